//! Attention over a paged cache: near the reference, and the same bits in every company.

use lory_kernels::Reference;
use lory_kernels::backend::{AttentionParams, AttentionRow, Backend, KvShape, KvType};

use super::{Noise, assert_near, assert_same, device, emulated, in_both_orders, own_device, put, take};

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
        for (i, s) in self.sequences.iter().enumerate() {
            self.write(b, &mut kv, i, 0..s.len);
        }
        kv
    }

    /// From the reference, as `attention.cu` and `parts.cuh` derive it. Values are below 1 in magnitude, and so are weighted
    /// sums of them; queries are below 3. In units of 2⁻²⁴, of which a rounding on tensor cores is two.
    fn bound(&self) -> f32 {
        let longest = self.sequences.iter().map(|s| s.len).max().unwrap() as f32;
        let dims = self.shape.head_dim as f32;
        let products = if self.shape.ty == KvType::F16 { 2.0 } else { 6.0 };
        // 2^-20.9 of what is in parts.
        let parts = 9.0;
        let scores = 3.0 * self.params.scale * dims * (2.0 * products * dims + parts + 3.0);
        let caps = self.params.softcap.map_or(0.0, |cap| 8.0 * cap);
        let sums = 2.0 * products * longest.min(256.0) + parts + longest + longest / 8.0 + 16.0;
        (sums + 2.0 * (scores + caps)) * 2f32.powi(-24)
    }

    /// The case with other rows, which have other queries.
    fn with_rows(self, rows: Vec<(usize, u32)>, noise: &mut Noise) -> Case {
        let values = noise.values(rows.len() * self.params.n_heads * self.shape.head_dim);
        let q = values.iter().map(|v| v * 3.0).collect();
        Case { rows, q, ..self }
    }

    /// Every slot of every page.
    fn spoil<B: Backend>(&self, b: &B, kv: &mut B::Kv, with: f32) {
        let slots: Vec<u32> = (0..((self.pages() + 1) * self.shape.page_len) as u32).collect();
        let values = vec![with; slots.len() * self.shape.kv_heads * self.shape.head_dim];
        b.kv_write(kv, LAYER, &put(b, &values), &put(b, &values), &slots).unwrap();
    }

    /// Writes positions of a sequence.
    fn write<B: Backend>(&self, b: &B, kv: &mut B::Kv, sequence: usize, positions: std::ops::Range<usize>) {
        let (s, page_len) = (&self.sequences[sequence], self.shape.page_len);
        let width = self.shape.kv_heads * self.shape.head_dim;
        let slot = |p: usize| s.pages[p / page_len] as usize * page_len + p % page_len;
        let slots: Vec<u32> = positions.clone().map(|p| slot(p) as u32).collect();
        let values = positions.start * width..positions.end * width;
        b.kv_write(kv, LAYER, &put(b, &s.k[values.clone()]), &put(b, &s.v[values]), &slots).unwrap();
    }

    /// Some of the rows, in any order.
    fn run_some<B: Backend>(&self, b: &B, kv: &B::Kv, rows: &[usize]) -> Vec<f32> {
        let width = self.params.n_heads * self.shape.head_dim;
        let q: Vec<_> = rows.iter().flat_map(|r| self.q[r * width..][..width].to_vec()).collect();
        let mut out = put(b, &vec![f32::NAN; q.len()]);
        let described: Vec<_> = rows
            .iter()
            .map(|r| {
                let (s, position) = self.rows[*r];
                AttentionRow { pages: &self.sequences[s].pages, position }
            })
            .collect();
        b.attention(kv, LAYER, &put(b, &q), &described, &self.params, &mut out).unwrap();
        take(b, &out, q.len())
    }

    fn run<B: Backend>(&self, b: &B, kv: &B::Kv, rows: std::ops::Range<usize>) -> Vec<f32> {
        self.run_some(b, kv, &rows.collect::<Vec<_>>())
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
                let bound = case.bound();
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

/// A prompt over its positions `from` on, beside a row of each other sequence.
fn prompt(case: Case, from: usize, noise: &mut Noise) -> Case {
    let others = case.sequences.iter().enumerate().skip(1);
    let mut rows: Vec<_> = others.map(|(i, s)| (i, s.len as u32 - 1)).collect();
    let at = rows.len() / 2;
    rows.splice(at..at, (from..case.sequences[0].len).map(|p| (0, p as u32)));
    case.with_rows(rows, noise)
}

/// Prompts in tiles, row by row, in another order, token by token as the cache grows, with what is no number in every
/// slot that was not written.
#[test]
fn prompts() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(24);
    // Key-value heads, query heads of each, dimensions, positions of a page, of the sequences, where the prompt starts.
    for (kv_heads, group, head_dim, page_len, lengths, from) in [
        (2, 1, 8, 16, &[70, 5][..], 0),
        (1, 3, 40, 7, &[285, 31, 9], 240),
        (1, 5, 80, 24, &[41, 260], 0),
        (1, 8, 128, 32, &[270, 3, 12], 250),
        (1, 16, 256, 16, &[20, 7], 8),
        (1, 20, 512, 64, &[13, 2], 4),
        (2, 4, 64, 32, &[550, 300], 500),
    ] {
        for (ty, softcap, window) in [
            (KvType::F16, None, None),
            (KvType::F16, Some(30.0), Some(21)),
            (KvType::F32, None, Some(270)),
            (KvType::Q8_0, None, None),
        ] {
            if ty != KvType::F16 && head_dim > 80 {
                continue;
            }
            let shape = KvShape { layers: 2, kv_heads, head_dim, page_len, ty };
            let params = AttentionParams {
                n_heads: kv_heads * group,
                scale: 0.7 / (head_dim as f32).sqrt(),
                softcap,
                window,
            };
            let what = format!("{shape:?}, {params:?}");
            let case = prompt(Case::new(shape, params, lengths, &mut noise), from, &mut noise);
            let (n, width) = (case.rows.len(), params.n_heads * head_dim);
            let want = case.run(&Reference, &case.fill(&Reference), 0..n);
            let mut kv = cuda.kv_alloc(shape, case.pages() + 1).unwrap();
            case.spoil(cuda, &mut kv, f32::NAN);
            for (i, s) in case.sequences.iter().enumerate() {
                case.write(cuda, &mut kv, i, 0..s.len);
            }
            let got = case.run(cuda, &kv, 0..n);
            assert_near(&got, &want, case.bound(), &what);
            let line = |values: &[f32], row: usize| values[row * width..][..width].to_vec();
            // A multiplier without a common factor visits every row.
            let shuffled: Vec<_> = (0..n).map(|i| (i * 31 + 7) % n).collect();
            assert!(n % 31 != 0);
            let other = case.run_some(cuda, &kv, &shuffled);
            for (i, row) in shuffled.into_iter().enumerate() {
                assert_same(&line(&other, i), &line(&got, row), &format!("{what}, row {row} shuffled"));
            }
            // Keys and values come with their token; behind it there is nothing yet.
            let mut grown = cuda.kv_alloc(shape, case.pages() + 1).unwrap();
            case.spoil(cuda, &mut grown, f32::NAN);
            let mut there = vec![0; case.sequences.len()];
            for row in 0..n {
                let (s, position) = case.rows[row];
                case.write(cuda, &mut grown, s, there[s]..position as usize + 1);
                there[s] = position as usize + 1;
                let alone = case.run(cuda, &grown, row..row + 1);
                assert_same(&alone, &line(&got, row), &format!("{what}, row {row} alone"));
            }
        }
    }
}

/// An infinity that a row of a prompt does not see, or something that is no number in a gap between what its rows see.
#[test]
fn values_that_other_rows_see() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(25);
    for (ty, head_dim) in [(KvType::F16, 64), (KvType::F16, 8), (KvType::F16, 320), (KvType::F32, 72)] {
        let shape = KvShape { layers: 2, kv_heads: 2, head_dim, page_len: 16, ty };
        for window in [None, Some(4)] {
            let params = AttentionParams { n_heads: 4, scale: 0.2, softcap: None, window };
            let mut case = prompt(Case::new(shape, params, &[40, 3], &mut noise), 0, &mut noise);
            let (n, width, line) = (case.rows.len(), 4 * head_dim, 2 * head_dim);
            let finite = case.run(cuda, &case.fill(cuda), 0..n);
            // One dimension of one head, another of the other.
            case.sequences[0].v[20 * line + 5] = f32::INFINITY;
            case.sequences[0].v[22 * line + head_dim + 7] = f32::NEG_INFINITY;
            let want = case.run(&Reference, &case.fill(&Reference), 0..n);
            let kv = case.fill(cuda);
            let got = case.run(cuda, &kv, 0..n);
            assert_near(&got, &want, case.bound(), &format!("{shape:?}, {window:?}"));
            assert!(got.iter().any(|v| v.is_infinite()) && !got.iter().any(|v| v.is_nan()));
            for (row, (got, finite)) in got.chunks(width).zip(finite.chunks(width)).enumerate() {
                for (g, f) in got.iter().zip(finite) {
                    assert!(
                        g.to_bits() == f.to_bits() || g.is_infinite(),
                        "{shape:?}, {window:?}, row {row}"
                    );
                }
                assert_same(&case.run(cuda, &kv, row..row + 1), got, "alone");
            }
        }
        // The first and the last row see nothing of the middle.
        let params = AttentionParams { n_heads: 2, scale: 0.2, softcap: None, window: Some(8) };
        let case = Case::new(shape, params, &[300], &mut noise);
        let case = case.with_rows(vec![(0, 9), (0, 290), (0, 10)], &mut noise);
        let want = case.run(cuda, &case.fill(cuda), 0..3);
        let mut kv = cuda.kv_alloc(shape, case.pages() + 1).unwrap();
        case.spoil(cuda, &mut kv, f32::NAN);
        case.write(cuda, &mut kv, 0, 0..11);
        case.write(cuda, &mut kv, 0, 280..291);
        assert_same(&case.run(cuda, &kv, 0..3), &want, "a gap");
    }
}

/// How far from the exact result rows usually are: what the parts are for shows here, where the bound has room for
/// as many roundings as there are additions.
#[test]
fn usual_errors() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(26);
    for ty in [KvType::F16, KvType::F32, KvType::Q8_0] {
        for head_dim in [64, 128] {
            let shape = KvShape { layers: 2, kv_heads: 1, head_dim, page_len: 16, ty };
            let scale = 1.0 / (head_dim as f32).sqrt();
            let params = AttentionParams { n_heads: 4, scale, softcap: None, window: None };
            let case = prompt(Case::new(shape, params, &[60], &mut noise), 40, &mut noise);
            let n = case.rows.len();
            let want = case.run(&Reference, &case.fill(&Reference), 0..n);
            let got = case.run(cuda, &case.fill(cuda), 0..n);
            let error: f64 = got.iter().zip(&want).map(|(g, w)| f64::from((g - w).abs())).sum();
            let size: f64 = want.iter().map(|w| f64::from(w.abs())).sum();
            println!("{ty:?}, {head_dim} dimensions: {:e} of the size", error / size);
            assert!(error <= size * 2f64.powi(-20), "{shape:?}: {:e}", error / size);
        }
    }
}

/// Warps in another order.
#[test]
fn barriers_of_attention() {
    let Some(cuda) = device() else { return };
    let mut noise = Noise(27);
    for (ty, group, head_dim) in [(KvType::F16, 2, 40), (KvType::F16, 20, 136), (KvType::Q8_0, 3, 72)] {
        let shape = KvShape { layers: 2, kv_heads: 1, head_dim, page_len: 16, ty };
        let params = AttentionParams { n_heads: group, scale: 0.2, softcap: None, window: None };
        let case = prompt(Case::new(shape, params, &[262, 3], &mut noise), 245, &mut noise);
        let kv = case.fill(cuda);
        in_both_orders(|| case.run(cuda, &kv, 0..case.rows.len()));
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
    let Some(cuda) = own_device() else { return };
    let rows = if emulated(&cuda) { 40 } else { 3000 };
    let mut noise = Noise(23);
    let shape = KvShape { layers: 2, kv_heads: 1, head_dim: 8, page_len: 32, ty: KvType::F16 };
    let params = AttentionParams { n_heads: 1, scale: 0.3, softcap: None, window: None };
    // The last of them reach into a second span.
    let case = Case::new(shape, params, &[280], &mut noise);
    let case = case.with_rows((0..rows).map(|i| (0, i as u32 * 7 % 280)).collect(), &mut noise);
    let want = case.run(&Reference, &case.fill(&Reference), 0..rows);
    let kv = case.fill(&cuda);
    let whole = case.run(&cuda, &kv, 0..rows);
    assert_near(&whole, &want, case.bound(), "many rows");
    // A row's sums take 40 bytes for each span.
    for (bytes, most) in [(0, 1), (400, 10), (1000, 25)] {
        cuda.set_partial_bytes(bytes);
        let before = cuda.launch_counts();
        assert_same(&case.run(&cuda, &kv, 0..rows), &whole, &format!("{bytes} bytes"));
        let now = cuda.launch_counts();
        let launched = (now.plain + now.in_graphs - before.plain - before.in_graphs) as usize;
        assert!(launched >= 2 * rows.div_ceil(most), "{launched} launches for {rows} rows");
    }
}
