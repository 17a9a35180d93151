//! Attention: near the reference, and the same bits in every company.

use lory_kernels::Reference;
use lory_kernels::backend::{AttentionParams, AttentionRow, Backend, KvShape, KvType};
use lory_kernels::cpu::Cpu;

use super::{Noise, assert_same, cpus};

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
            // The last few positions as a prompt would have them, and one from the middle.
            let first = s.len.saturating_sub(23);
            rows.extend((first..s.len).map(|p| (i, p as u32)));
            rows.push((i, s.len as u32 / 2));
        }
        let q = noise.values(rows.len() * params.n_heads * shape.head_dim).iter().map(|v| v * 3.0).collect();
        Case { shape, params, sequences, rows, q }
    }

    fn pages(&self) -> usize {
        self.sequences.iter().map(|s| s.pages.len()).sum()
    }

    fn fill<B: Backend<Buffer = Vec<f32>>>(&self, b: &B) -> B::Kv {
        let mut kv = b.kv_alloc(self.shape, self.pages() + 1).unwrap();
        for s in &self.sequences {
            let slot = |p: usize| {
                s.pages[p / self.shape.page_len] as usize * self.shape.page_len + p % self.shape.page_len
            };
            let slots: Vec<u32> = (0..s.len).map(|p| slot(p) as u32).collect();
            b.kv_write(&mut kv, LAYER, &s.k, &s.v, &slots).unwrap();
        }
        kv
    }

    fn run<B: Backend<Buffer = Vec<f32>>>(
        &self,
        b: &B,
        kv: &B::Kv,
        rows: std::ops::Range<usize>,
    ) -> Vec<f32> {
        let width = self.params.n_heads * self.shape.head_dim;
        let q = self.q[rows.start * width..rows.end * width].to_vec();
        let mut out = vec![f32::NAN; q.len()];
        let rows: Vec<_> = self.rows[rows]
            .iter()
            .map(|(s, position)| AttentionRow { pages: &self.sequences[*s].pages, position: *position })
            .collect();
        b.attention(kv, LAYER, &q, &rows, &self.params, &mut out).unwrap();
        out
    }
}

fn cases() -> Vec<Case> {
    let mut noise = Noise(21);
    let mut out = Vec::new();
    for ty in [KvType::F32, KvType::F16, KvType::Q8_0] {
        for (kv_heads, n_heads, head_dim, page_len, lengths) in [
            (2, 8, 64, 32, &[1300, 1, 40][..]),
            (1, 1, 8, 16, &[17, 16]),
            (3, 3, 80, 24, &[600, 33]),
            (2, 14, 128, 64, &[130]),
            (1, 5, 40, 7, &[61, 520]),
        ] {
            for (softcap, window) in
                [(None, None), (Some(30.0), None), (None, Some(19)), (Some(5.0), Some(600))]
            {
                let shape = KvShape { layers: 2, kv_heads, head_dim, page_len, ty };
                let scale = 1.0 / (head_dim as f32).sqrt();
                let params = AttentionParams { n_heads, scale, softcap, window };
                out.push(Case::new(shape, params, lengths, &mut noise));
            }
        }
    }
    out
}

#[test]
fn near_the_reference_and_the_same_in_every_company() {
    let cpus = cpus();
    for case in cases() {
        let n = case.rows.len();
        let want = case.run(&Reference, &case.fill(&Reference), 0..n);
        // The bound of the kernel: values are below 1 in magnitude, and so are weighted sums of them.
        let longest = case.sequences.iter().map(|s| s.len).max().unwrap() as f32;
        let scores =
            3.0 * case.params.scale * case.shape.head_dim as f32 * (case.shape.head_dim as f32 + 3.0);
        let caps = case.params.softcap.map_or(0.0, |cap| 8.0 * cap);
        let bound = (longest + longest / 8.0 + 16.0 + 2.0 * (scores + caps)) * 2f32.powi(-24);
        let mut first: Option<Vec<f32>> = None;
        for cpu in &cpus {
            let what = format!("{:?}, {:?}, {}", case.shape, case.params, cpu.label());
            let kv = case.fill(cpu);
            let got = case.run(cpu, &kv, 0..n);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!((g - w).abs() <= bound, "{what}: at {i}: got {g}, want {w}, bound {bound}");
            }
            // All levels and thread counts agree to the bit,
            assert_same(&got, first.get_or_insert_with(|| got.clone()), &what);
            // and so do rows alone and in other batches.
            let width = got.len() / n;
            for range in [0..1, n - 1..n, 3..n.min(17), n / 2..n / 2 + 1] {
                let alone = case.run(cpu, &kv, range.clone());
                assert_same(
                    &alone,
                    &got[range.start * width..range.end * width],
                    &format!("{what}, rows {range:?}"),
                );
            }
        }
    }
}

#[test]
fn pages_copy_and_round_trip() {
    let mut noise = Noise(22);
    for ty in [KvType::F32, KvType::F16, KvType::Q8_0] {
        let shape = KvShape { layers: 2, kv_heads: 2, head_dim: 32, page_len: 16, ty };
        let params = AttentionParams { n_heads: 4, scale: 0.2, softcap: None, window: None };
        let mut case = Case::new(shape, params, &[16], &mut noise);
        pages_of(&mut case, &Reference);
        for cpu in cpus() {
            pages_of::<Cpu>(&mut case, &cpu);
        }
    }
}

fn pages_of<B: Backend<Buffer = Vec<f32>>>(case: &mut Case, b: &B) {
    let n = case.rows.len();
    let mut kv = case.fill(b);
    let (from, to) = (case.sequences[0].pages[0], case.pages() as u32);
    let want = case.run(b, &kv, 0..n);
    b.kv_copy_page(&mut kv, from, to).unwrap();
    case.sequences[0].pages = vec![to];
    assert_same(&case.run(b, &kv, 0..n), &want, &b.label());
    let saved = b.kv_read_page(&kv, from).unwrap();
    let mut fresh = b.kv_alloc(case.shape, 3).unwrap();
    b.kv_write_page(&mut fresh, 2, &saved).unwrap();
    case.sequences[0].pages = vec![2];
    assert_same(&case.run(b, &fresh, 0..n), &want, &b.label());
    case.sequences[0].pages = vec![from];
    let error = b.kv_write_page(&mut fresh, 0, &saved[1..]).unwrap_err().to_string();
    assert!(error.contains(&saved.len().to_string()), "{error}");
}

/// Of values and keys that are no finite numbers, only the rows that see them hear.
#[test]
fn what_is_not_finite_stays_with_the_rows_that_see_it() {
    let mut noise = Noise(23);
    for ty in [KvType::F32, KvType::F16] {
        for (head_dim, window) in [(64, None), (64, Some(4)), (40, None), (8, Some(9))] {
            let shape = KvShape { layers: 2, kv_heads: 2, head_dim, page_len: 32, ty };
            let params = AttentionParams { n_heads: 4, scale: 0.2, softcap: None, window };
            let line = 2 * head_dim;
            // The last one begins a block: a row sees nothing else in it.
            for (len, infinite, nan) in [(40, 20, 30), (532, 511, 512)] {
                let finite = Case::new(shape, params, &[len, 3], &mut noise);
                let mut case = Case::new(shape, params, &[len, 3], &mut Noise(24));
                case.q.clone_from(&finite.q);
                for (to, from) in case.sequences.iter_mut().zip(&finite.sequences) {
                    (to.k, to.v) = (from.k.clone(), from.v.clone());
                }
                case.sequences[0].v[infinite * line + 5] = f32::INFINITY;
                case.sequences[0].k[nan * line + head_dim + 3] = f32::NAN;
                let (n, width) = (case.rows.len(), 4 * head_dim);
                let want = case.run(&Reference, &case.fill(&Reference), 0..n);
                assert!(want.iter().any(|v| v.is_infinite()) && want.iter().any(|v| v.is_nan()));
                for cpu in cpus() {
                    let what = format!("{shape:?}, {window:?}, {len} positions, {}", cpu.label());
                    let without = finite.run(&cpu, &finite.fill(&cpu), 0..n);
                    let kv = case.fill(&cpu);
                    let got = case.run(&cpu, &kv, 0..n);
                    for (i, ((g, w), f)) in got.iter().zip(&want).zip(&without).enumerate() {
                        let as_without = w.is_finite() && g.to_bits() == f.to_bits();
                        assert!(
                            as_without || w.is_nan() && g.is_nan() || g == w,
                            "{what}, at {i}: {g}, {w}, {f}"
                        );
                    }
                    for row in 0..n {
                        let alone = case.run(&cpu, &kv, row..row + 1);
                        for (a, g) in alone.iter().zip(&got[row * width..]) {
                            assert!(
                                a.to_bits() == g.to_bits() || a.is_nan() && g.is_nan(),
                                "{what}, row {row}"
                            );
                        }
                    }
                }
            }
        }
    }
}
