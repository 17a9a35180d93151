//! Attention over a paged cache: near the reference, and the same bits in every company.

use lory_kernels::Reference;
use lory_kernels::backend::{AttentionParams, AttentionRow, Backend, KvShape, KvType};

use super::{Noise, assert_near, assert_same, device, emulated, put, take};

/// One sequence's keys, values and pages.
struct Sequence {
    pages: Vec<u32>,
    k: Vec<f32>,
    v: Vec<f32>,
    len: usize,
}

struct Case {
    shape: KvShape,
    params: AttentionParams,
    sequences: Vec<Sequence>,
    /// (sequence, position)
    rows: Vec<(usize, u32)>,
    q: Vec<f32>,
}

const LAYER: usize = 1;

impl Case {
    fn new(shape: KvShape, params: AttentionParams, lengths: &[usize], noise: &mut Noise) -> Case {
        let width = shape.kv_heads * shape.head_dim;
        let mut next_page = 0;
        let sequences: Vec<_> = lengths
            .iter()
            .map(|len| {
                let n = len.div_ceil(shape.page_len) as u32;
                // Backwards, so that pages are not in order.
                let pages = (next_page..next_page + n).rev().collect();
                next_page += n;
                Sequence { pages, k: noise.values(len * width), v: noise.values(len * width), len: *len }
            })
            .collect();
        let mut rows = Vec::new();
        for (i, s) in sequences.iter().enumerate() {
            let first = s.len.saturating_sub(3);
            rows.extend((first..s.len).map(|p| (i, p as u32)));
            rows.push((i, s.len as u32 / 2));
        }
        let q = noise.values(rows.len() * params.n_heads * shape.head_dim).iter().map(|v| v * 3.0).collect();
        Case { shape, params, sequences, rows, q }
    }

    fn pages(&self) -> usize {
        self.sequences.iter().map(|s| s.pages.len()).sum()
    }

    fn fill<B: Backend>(&self, b: &B) -> B::Kv {
        let mut kv = b.kv_alloc(self.shape, self.pages() + 1).unwrap();
        for s in &self.sequences {
            let slot = |p: usize| {
                s.pages[p / self.shape.page_len] as usize * self.shape.page_len + p % self.shape.page_len
            };
            let slots: Vec<u32> = (0..s.len).map(|p| slot(p) as u32).collect();
            b.kv_write(&mut kv, LAYER, &put(b, &s.k), &put(b, &s.v), &slots).unwrap();
        }
        kv
    }

    fn run<B: Backend>(&self, b: &B, kv: &B::Kv, rows: std::ops::Range<usize>) -> Vec<f32> {
        let width = self.params.n_heads * self.shape.head_dim;
        let q = put(b, &self.q[rows.start * width..rows.end * width]);
        let mut out = put(b, &vec![f32::NAN; rows.len() * width]);
        let rows: Vec<_> = self.rows[rows]
            .iter()
            .map(|(s, position)| AttentionRow { pages: &self.sequences[*s].pages, position: *position })
            .collect();
        b.attention(kv, LAYER, &q, &rows, &self.params, &mut out).unwrap();
        take(b, &out, rows.len() * width)
    }
}

#[test]
fn near_the_reference_and_the_same_in_every_company() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(21);
    for ty in [KvType::F32, KvType::F16, KvType::Q8_0] {
        for (kv_heads, n_heads, head_dim, page_len, lengths) in [
            (2, 8, 64, 32, &[300, 1, 40][..]),
            (1, 1, 8, 16, &[17, 16]),
            (1, 3, 80, 24, &[520]),
            (1, 10, 40, 7, &[61, 257]),
            (1, 2, 512, 64, &[70]),
        ] {
            for (softcap, window) in [(None, None), (Some(30.0), Some(19)), (None, Some(300))] {
                let shape = KvShape { layers: 2, kv_heads, head_dim, page_len, ty };
                let scale = 1.0 / (head_dim as f32).sqrt();
                let params = AttentionParams { n_heads, scale, softcap, window };
                let case = Case::new(shape, params, lengths, &mut noise);
                let n = case.rows.len();
                let want = case.run(&Reference, &case.fill(&Reference), 0..n);
                // As for the CPU: values are below 1 in magnitude, and so are weighted sums of them.
                let longest = *lengths.iter().max().unwrap() as f32;
                let scores = 3.0 * scale * head_dim as f32 * (head_dim as f32 + 3.0);
                let caps = softcap.map_or(0.0, |cap| 8.0 * cap);
                let bound = (longest + longest / 8.0 + 16.0 + 2.0 * (scores + caps)) * 2f32.powi(-24);
                let what = format!("{shape:?}, {params:?}");
                let kv = case.fill(cuda);
                let got = case.run(cuda, &kv, 0..n);
                assert_near(&got, &want, bound, &what);
                let width = got.len() / n;
                for range in [0..1, n - 1..n, n / 2..n / 2 + 1] {
                    let alone = case.run(cuda, &kv, range.clone());
                    assert_same(
                        &alone,
                        &got[range.start * width..range.end * width],
                        &format!("{what}, {range:?}"),
                    );
                }
            }
        }
    }
}

#[test]
fn pages_copy_and_round_trip() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(22);
    for ty in [KvType::F32, KvType::F16, KvType::Q8_0] {
        let shape = KvShape { layers: 2, kv_heads: 2, head_dim: 40, page_len: 16, ty };
        let params = AttentionParams { n_heads: 4, scale: 0.2, softcap: None, window: None };
        let mut case = Case::new(shape, params, &[16], &mut noise);
        let n = case.rows.len();
        let mut kv = case.fill(cuda);
        let (from, to) = (case.sequences[0].pages[0], case.pages() as u32);
        let want = case.run(cuda, &kv, 0..n);
        cuda.kv_copy_page(&mut kv, from, to).unwrap();
        case.sequences[0].pages = vec![to];
        assert_same(&case.run(cuda, &kv, 0..n), &want, "copied");
        let saved = cuda.kv_read_page(&kv, from).unwrap();
        let mut fresh = cuda.kv_alloc(case.shape, 3).unwrap();
        cuda.kv_write_page(&mut fresh, 2, &saved).unwrap();
        case.sequences[0].pages = vec![2];
        assert_same(&case.run(cuda, &fresh, 0..n), &want, "saved and read");
        let error = cuda.kv_write_page(&mut fresh, 0, &saved[1..]).unwrap_err().to_string();
        assert!(error.contains(&saved.len().to_string()), "{error}");
    }
    let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 12, page_len: 16, ty: KvType::F16 };
    let error = cuda.kv_alloc(shape, 1).err().unwrap().to_string();
    assert!(error.contains("heads of 12 dimensions"), "{error}");
}

/// Keys and values that are not numbers, or too large for the type, end where the reference's do.
#[test]
fn cached_values_at_the_ends() {
    let Some(cuda) = device() else { return };
    for ty in [KvType::F16, KvType::Q8_0] {
        let shape = KvShape { layers: 1, kv_heads: 1, head_dim: 32, page_len: 16, ty };
        let params = AttentionParams { n_heads: 1, scale: 1.0, softcap: None, window: Some(1) };
        let lines: Vec<f32> = [1e-7f32, 6e-5, 65519.0, 7e4, -1e30, f32::INFINITY, 1e-40, -3e-8]
            .iter()
            .flat_map(|v| (0..32).map(move |i| if i % 2 == 0 { *v } else { v * 0.37 }))
            .collect();
        fn run<B: Backend>(b: &B, shape: KvShape, params: &AttentionParams, lines: &[f32]) -> Vec<f32> {
            let n = lines.len() / 32;
            let mut kv = b.kv_alloc(shape, 1).unwrap();
            let slots: Vec<u32> = (0..n as u32).collect();
            b.kv_write(&mut kv, 0, &put(b, &vec![0.0; lines.len()]), &put(b, lines), &slots).unwrap();
            let rows: Vec<_> = (0..n as u32).map(|position| AttentionRow { pages: &[0], position }).collect();
            let mut out = b.alloc(lines.len()).unwrap();
            b.attention(&kv, 0, &put(b, &vec![0.0; lines.len()]), &rows, params, &mut out).unwrap();
            take(b, &out, lines.len())
        }
        // A window of one: each row is its own value, as the cache holds it.
        let (got, want) = (run(cuda, shape, &params, &lines), run(&Reference, shape, &params, &lines));
        assert_same(&got, &want, &format!("{ty:?}"));
    }
}

/// More rows than partial sums fit at once.
#[test]
fn many_rows() {
    let Some(cuda) = device() else { return };
    let rows = if emulated(cuda) { 40 } else { 3000 };
    let mut noise = Noise(23);
    let shape = KvShape { layers: 2, kv_heads: 1, head_dim: 8, page_len: 32, ty: KvType::F16 };
    let params = AttentionParams { n_heads: 1, scale: 0.3, softcap: None, window: None };
    let mut case = Case::new(shape, params, &[40], &mut noise);
    case.rows = (0..rows).map(|i| (0, i as u32 % 40)).collect();
    case.q = noise.values(rows * 8);
    let want = case.run(&Reference, &case.fill(&Reference), 0..rows);
    let kv = case.fill(cuda);
    assert_near(&case.run(cuda, &kv, 0..rows), &want, 1e-5, "many rows");
}
