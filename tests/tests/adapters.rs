//! What adapters compute: the shared-basis sum against merged dense weights, in one operation and
//! in whole models; mixtures; rows that do not depend on each other.

use std::{io::Cursor, sync::Arc};

use lory_kernels::{
    Backend, QuantType,
    backend::{AttentionRow, KvShape, KvType, LoraJob},
    cpu::{Cpu, Isa},
    ops::Reference,
};
use lory_models::{
    Tensor,
    adapter::{
        Adapter, AdapterBuilder, AdapterSet, BaseInfo, Basis, BatchAdapters, Core, CoreMatrix, Delta,
        Factors, Projection, Site,
        pack::{
            BasisSite, NewAdapter, NewCore, NewMatrix, Pack, PackSpec, PackWriter, StorageTypes, SynthSpec,
            synth_pack,
        },
        synthetic_base,
    },
    decoder::{Batch, Decoder, Scratch},
    gguf::{Gguf, Writer},
    kv_cache::{KvCache, Pages},
};
use lory_tests::{fixtures, runner::Runner};

const Q: Site = Site::layer(0, Projection::AttnQ);
const UP: Site = Site::layer(0, Projection::FfnUp);

struct Noise(u64);

impl Noise {
    /// In −1 .. 1, scaled.
    fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        let mut next = || {
            self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.0 >> 33) as f32 / (1u64 << 30) as f32 - 1.0) * scale
        };
        (0..n).map(|_| next()).collect()
    }
}

fn tensor(rows: usize, cols: usize, data: &[f32]) -> Tensor {
    let bytes = data.iter().flat_map(|v| v.to_le_bytes()).collect();
    Tensor::owned("t", QuantType::F32, rows, cols, bytes).unwrap()
}

fn values(t: &Tensor) -> Vec<f32> {
    let mut out = vec![0.0; t.rows() * t.cols()];
    lory_kernels::quant::dequantize_row(t.ty(), t.matrix().bytes(), &mut out).unwrap();
    out
}

fn base() -> BaseInfo {
    synthetic_base(1, 64, 32, 96, 100)
}

fn factors(noise: &mut Noise, site: Site, rank: usize) -> Factors {
    let s = base().shapes.get(site).unwrap();
    let u = noise.values(s.out_features * rank, 0.3);
    let v = noise.values(s.in_features * rank, 0.3);
    Factors::new(site, s, tensor(s.out_features, rank, &u), tensor(rank, s.in_features, &v)).unwrap()
}

/// Six adapters at `Q` (and one elsewhere), of every form: two clusters, private, scales and biases.
fn adapters() -> Vec<Arc<Adapter>> {
    let mut n = Noise(7);
    let bases: Vec<_> = [(1u128, 8), (2, 5)]
        .into_iter()
        .map(|(id, r)| Arc::new(Basis::new(id, id as u32, [(Q, factors(&mut n, Q, r))])))
        .collect();
    let full = |n: &mut Noise, r: usize| CoreMatrix::Full(tensor(r, r, &n.values(r * r, 1.0)));
    let vector = |n: &mut Noise| Some(tensor(1, 64, &n.values(64, 1.0)));
    let build = |name: &str, basis: Option<&Arc<Basis>>, site: Site, core: Core| {
        let mut b = AdapterBuilder::new(name);
        if let Some(basis) = basis {
            b = b.basis(basis.clone());
        }
        b.core(site, core);
        Arc::new(b.build(&base().shapes).unwrap())
    };
    let mut all = vec![
        build("full", Some(&bases[0]), Q, Core::new(Delta::Shared(full(&mut n, 8)), 0.5)),
        build("other", Some(&bases[0]), Q, Core::new(Delta::Shared(full(&mut n, 8)), 1.0)),
    ];
    let diagonal = CoreMatrix::Diagonal(tensor(1, 8, &n.values(8, 1.0)));
    let mut core = Core::new(Delta::Shared(diagonal), 2.0);
    (core.delta_scale, core.row_scale, core.bias) = (vector(&mut n), vector(&mut n), vector(&mut n));
    all.push(build("scaled", Some(&bases[0]), Q, core));
    all.push(build("far", Some(&bases[1]), Q, Core::new(Delta::Shared(full(&mut n, 5)), 1.5)));
    let private = Delta::Private(factors(&mut n, Q, 3), CoreMatrix::Identity);
    all.push(build("private", None, Q, Core::new(private, 0.75)));
    let mut core = Core::new(Delta::None, 1.0);
    core.row_scale = vector(&mut n);
    all.push(build("ia3", None, Q, core));
    let elsewhere = Delta::Private(factors(&mut n, UP, 2), CoreMatrix::Identity);
    all.push(build("elsewhere", None, UP, Core::new(elsewhere, 1.0)));
    all
}

fn set(all: &[Arc<Adapter>], entries: &[(usize, f32)]) -> AdapterSet {
    AdapterSet::new(entries.iter().map(|(i, s)| (all[*i].clone(), *s)).collect()).unwrap()
}

/// `y₀ + Σ λ ((s − 1) ⊙ y₀ + scale · g ⊙ (U C Vᵀ x) + b)` in double precision, by the merged matrix.
fn dense(set: &AdapterSet, site: Site, x: &[f32], y0: &[f32]) -> Vec<f64> {
    let mut y: Vec<f64> = y0.iter().map(|v| f64::from(*v)).collect();
    for (adapter, lambda) in set.entries() {
        let Some(core) = adapter.core(site) else { continue };
        let lambda = f64::from(*lambda);
        let at = |t: &Option<Tensor>, i: usize, absent: f64| {
            t.as_ref().map_or(absent, |t| f64::from(values(t)[i]))
        };
        let merged = merged(adapter, site);
        for (i, y) in y.iter_mut().enumerate() {
            let delta: f64 = merged
                .as_ref()
                .map_or(0.0, |m| m[i * x.len()..].iter().zip(x).map(|(w, x)| w * f64::from(*x)).sum());
            let own = (at(&core.row_scale, i, 1.0) - 1.0) * f64::from(y0[i]);
            *y += lambda * (own + at(&core.delta_scale, i, 1.0) * delta + at(&core.bias, i, 0.0));
        }
    }
    y
}

/// `scale · U C Vᵀ`, out × in (for the embedding as it is added to the table: in × out).
fn merged(adapter: &Adapter, site: Site) -> Option<Vec<f64>> {
    let (f, core) = (adapter.factors(site)?, adapter.core(site)?);
    let (u, v, r) = (f.u_numbers().unwrap(), values(f.v()), f.rank());
    let matrix = match &core.delta {
        Delta::Shared(m) | Delta::Private(_, m) => m,
        Delta::None => return None,
    };
    let c = |i: usize, j: usize| match matrix {
        CoreMatrix::Full(c) => f64::from(values(c)[i * r + j]),
        CoreMatrix::Diagonal(c) => {
            if i == j {
                f64::from(values(c)[i])
            } else {
                0.0
            }
        }
        CoreMatrix::Identity => f64::from(u8::from(i == j)),
    };
    let c: Vec<f64> = (0..r * r).map(|k| c(k / r, k % r)).collect();
    let turned = site == Site::TOKEN_EMBD;
    let n_in = if turned { f.v().rows() } else { f.v().cols() };
    let v_at = |j: usize, k: usize| f64::from(if turned { v[k * r + j] } else { v[j * n_in + k] });
    let n_out = f.expand().outputs();
    let mut out = vec![0.0; n_out * n_in];
    for i in 0..n_out {
        for j in 0..r {
            let uc: f64 = (0..r).map(|l| f64::from(u[i * r + l]) * c[l * r + j]).sum();
            for k in 0..n_in {
                let at = if turned { k * n_out + i } else { i * n_in + k };
                out[at] += f64::from(core.scale) * uc * v_at(j, k);
            }
        }
    }
    Some(out)
}

/// One LoRA operation on `rows.len()` rows of random input; (x, y₀, y).
fn run<B: Backend>(backend: &B, rows: &[Option<&AdapterSet>]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let mut n = Noise(99);
    let (x, y0) = (n.values(64 * rows.len(), 1.0), n.values(64 * rows.len(), 1.0));
    let (mut xb, mut yb) = (backend.alloc(x.len()).unwrap(), backend.alloc(y0.len()).unwrap());
    backend.upload(&x, &mut xb).unwrap();
    backend.upload(&y0, &mut yb).unwrap();
    let adapters = BatchAdapters::new(rows);
    let groups = adapters.groups(Q);
    let mut y = vec![0.0; y0.len()];
    backend.lora(&xb, 64, &mut [LoraJob { out: &mut yb, width: 64, groups: &groups }]).unwrap();
    backend.download(&yb, 0, &mut y).unwrap();
    (x, y0, y)
}

fn mixtures(all: &[Arc<Adapter>]) -> Vec<Option<AdapterSet>> {
    vec![
        None,
        Some(set(all, &[(0, 1.0)])),
        Some(set(all, &[(3, -0.5)])),
        Some(set(all, &[(4, 1.0)])),
        Some(set(all, &[(5, 0.5)])),
        Some(set(all, &[(1, 0.25), (0, 2.0)])),
        Some(set(all, &[(2, 0.3)])),
        Some(set(all, &[(6, 1.0)])),
        Some(set(all, &[(0, 0.5), (1, -1.0), (2, 0.3), (3, 0.7), (4, 0.2), (5, 0.1), (6, 1.0)])),
        Some(set(all, &[(0, 1.0)])),
        Some(set(all, &[(0, 0.0)])),
    ]
}

fn matches_dense<B: Backend>(backend: &B) {
    let all = adapters();
    let sets = mixtures(&all);
    let rows: Vec<_> = sets.iter().map(Option::as_ref).collect();
    let (x, y0, y) = run(backend, &rows);
    for (i, row) in rows.iter().enumerate() {
        let at = i * 64..(i + 1) * 64;
        let want = match row {
            Some(set) => dense(set, Q, &x[at.clone()], &y0[at.clone()]),
            None => y0[at.clone()].iter().map(|v| f64::from(*v)).collect(),
        };
        for (got, want) in y[at].iter().zip(&want) {
            assert!((f64::from(*got) - want).abs() < 2e-5 * want.abs().max(4.0), "row {i}: {got} {want}");
        }
    }
}

#[test]
fn a_shared_basis_gives_what_the_merged_weight_gives() {
    matches_dense(&Reference);
    for isa in Isa::available() {
        matches_dense(&Cpu::new(Some(2), isa));
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let all = adapters();
    let sets = mixtures(&all);
    let rows: Vec<_> = sets.iter().map(Option::as_ref).collect();
    let cpu = Cpu::new(Some(2), Isa::detect());
    let (_, y0, together) = run(&cpu, &rows);
    for i in 0..rows.len() {
        let mut alone = vec![None; rows.len()];
        alone[i] = rows[i];
        let (.., y) = run(&cpu, &alone);
        assert_eq!(y[i * 64..(i + 1) * 64], together[i * 64..(i + 1) * 64], "row {i}");
    }
    // Without an adapter at this site, with weight 0, and without any: untouched.
    for i in [0, 7, 10] {
        assert_eq!(y0[i * 64..(i + 1) * 64], together[i * 64..(i + 1) * 64], "row {i}");
    }
    // The order in which a user names adapters does not matter either.
    let (forth, back) =
        (set(&all, &[(0, 0.5), (3, 0.7), (4, 0.2)]), set(&all, &[(4, 0.2), (3, 0.7), (0, 0.5)]));
    assert_eq!(run(&cpu, &[Some(&forth)]).2, run(&cpu, &[Some(&back)]).2);
    assert_eq!(forth, back);
}

#[test]
fn rows_are_grouped_by_basis_and_stand_beside_their_adapter() {
    let all = adapters();
    let sets = mixtures(&all);
    let rows: Vec<_> = sets.iter().map(Option::as_ref).collect();
    let batch = BatchAdapters::new(&rows);
    assert_eq!((batch.rows(), batch.is_empty()), (11, false));
    let shape = |batch: &BatchAdapters, site| -> Vec<Vec<(u32, usize)>> {
        batch.groups(site).iter().map(|g| g.rows.iter().map(|(row, t)| (*row, t.len())).collect()).collect()
    };
    let groups = shape(&batch, Q);
    // Bases in order, each row once with all its terms; then private factors and lone row scales.
    assert_eq!(groups.len(), 4);
    let mut first = groups[0].clone();
    first.sort_unstable();
    assert_eq!(first, [(1, 1), (5, 2), (6, 1), (8, 3), (9, 1)]);
    assert_eq!(groups[1], [(2, 1), (8, 1)]);
    let place = |row| groups[0].iter().position(|(r, _)| *r == row).unwrap();
    assert_eq!(place(1).abs_diff(place(9)), 1, "two rows of one adapter");
    assert_eq!(shape(&batch, UP), [[(7, 1), (8, 1)]]);
    assert!(batch.groups(Site::OUTPUT).is_empty());

    // Selecting rows is the same as having only them.
    let picked: Vec<_> = [8, 0, 5].iter().map(|i| rows[*i as usize]).collect();
    assert_eq!(shape(&batch.select(&[8, 0, 5]), Q), shape(&BatchAdapters::new(&picked), Q));
    assert!(batch.select(&[0, 10]).is_empty());
    assert_eq!(batch.select(&[0, 10]).rows(), 2);
}

#[test]
fn a_zero_core_costs_nothing() {
    let mut n = Noise(11);
    let basis = Arc::new(Basis::new(9, 0, [(Q, factors(&mut n, Q, 4)), (UP, factors(&mut n, UP, 4))]));
    let build = |zero: &[Core]| {
        let mut b = AdapterBuilder::new("sparse").basis(basis.clone());
        b.core(Q, zero[0].clone()).core(UP, zero[1].clone());
        Arc::new(b.build(&base().shapes).unwrap())
    };
    let full = Core::new(Delta::Shared(CoreMatrix::Full(tensor(4, 4, &[0.5; 16]))), 1.0);
    let zero = Core::new(Delta::Shared(CoreMatrix::Full(tensor(4, 4, &[0.0; 16]))), 1.0);
    let unscaled = Core { scale: 0.0, ..full.clone() };
    let biased = Core { bias: Some(tensor(1, 96, &[1.0; 96])), ..zero.clone() };
    for (up, groups) in [(&full, 1), (&zero, 0), (&unscaled, 0), (&biased, 1)] {
        let adapter = build(&[full.clone(), up.clone()]);
        assert_eq!(adapter.cores().len(), 2, "it is still there to be read");
        let set = AdapterSet::single(adapter);
        let batch = BatchAdapters::new(&[Some(&set), None]);
        assert_eq!(batch.groups(Q).len(), 1);
        assert_eq!(batch.groups(UP).len(), groups);
    }
    let mut private = factors(&mut n, Q, 3);
    let (u, v) = (private.stored_u().clone(), tensor(3, 64, &[0.0; 192]));
    private = Factors::new(Q, base().shapes.get(Q).unwrap(), u, v).unwrap();
    let mut b = AdapterBuilder::new("untrained");
    b.core(Q, Core::new(Delta::Private(private, CoreMatrix::Identity), 1.0));
    let set = AdapterSet::single(Arc::new(b.build(&base().shapes).unwrap()));
    assert!(BatchAdapters::new(&[Some(&set)]).groups(Q).is_empty());
}

/// A pack for the fixture model: two clusters with factors everywhere, three adapters and a
/// private one on embedding and output.
fn pack_for(base: &BaseInfo) -> Pack {
    let mut n = Noise(3);
    let sites: Vec<_> = base.shapes.iter().filter(|(s, _)| s.layer_index().is_some()).collect();
    let rank = 6;
    let ty = QuantType::F32;
    let layout: Vec<_> = (0..2)
        .flat_map(|cluster| sites.iter().map(move |(site, _)| (cluster, *site)))
        .map(|(cluster, site)| BasisSite { cluster, site, rank, u_type: ty, v_type: ty, shared_v: false })
        .collect();
    let mut w = PackWriter::new(Cursor::new(Vec::new()), PackSpec::of(base), &layout).unwrap();
    for l in &layout {
        let s = base.shapes.get(l.site).unwrap();
        w.factors(&n.values(s.out_features * rank, 0.25), &n.values(s.in_features * rank, 0.25)).unwrap();
    }
    let types = StorageTypes { core: ty, factors: ty, vectors: ty };
    let adapter = |name: &str, cluster, cores| NewAdapter {
        name: name.into(),
        cluster,
        meta: Default::default(),
        invocation: vec![],
        cores,
        types,
    };
    for (name, cluster) in [("one", 0), ("two", 0), ("three", 1)] {
        let mut core = || NewCore::shared(NewMatrix::Full(n.values(rank * rank, 0.5)), rank, 0.5, None);
        let cores = sites.iter().map(|(site, _)| (*site, core())).collect();
        w.adapter(&adapter(name, Some(cluster), cores)).unwrap();
    }
    let mut ends = Vec::new();
    for site in [Site::TOKEN_EMBD, Site::OUTPUT] {
        let s = base.shapes.get(site).unwrap();
        let factors = Some((n.values(s.out_features * 2, 0.2), n.values(s.in_features * 2, 0.2)));
        ends.push((site, NewCore { factors, ..NewCore::shared(NewMatrix::Identity, 2, 0.5, None) }));
    }
    w.adapter(&adapter("ends", None, ends)).unwrap();
    let bytes = w.finish().unwrap().into_inner();
    Pack::parse(Gguf::parse(vec![("pack.gguf".into(), Arc::new(bytes))]).unwrap(), vec![]).unwrap()
}

/// The model's file with the set's deltas added to its F32 weights.
fn merged_file(gguf: &Gguf, set: &AdapterSet) -> Gguf {
    let mut w = Writer::new();
    gguf.metadata().iter().for_each(|(k, v)| {
        w.set(k, v.clone());
    });
    gguf.tensors().for_each(|t| {
        w.tensor(&t.name, t.ty, &t.dims);
    });
    let mut data = w.start(Vec::new()).unwrap();
    let mut changed = 0;
    for info in gguf.tensors() {
        let tensor = gguf.tensor(&info.name).unwrap();
        let Some(site) = info.name.strip_suffix(".weight").and_then(Site::parse) else {
            data.tensor(&info.name, tensor.matrix().bytes()).unwrap();
            continue;
        };
        let mut weights = values(&tensor);
        for (adapter, lambda) in set.entries() {
            let Some(delta) = merged(adapter, site) else { continue };
            changed += 1;
            for (w, d) in weights.iter_mut().zip(delta) {
                *w = (f64::from(*w) + f64::from(*lambda) * d) as f32;
            }
        }
        let bytes: Vec<u8> = weights.iter().flat_map(|v| v.to_le_bytes()).collect();
        data.tensor(&info.name, &bytes).unwrap();
    }
    let sites: usize = set.entries().iter().map(|(a, _)| a.cores().len()).sum();
    assert_eq!(changed, sites, "every core is merged somewhere");
    Gguf::parse(vec![("merged.gguf".into(), Arc::new(data.finish().unwrap()))]).unwrap()
}

fn pack_set(pack: &Pack, entries: &[(&str, f32)]) -> AdapterSet {
    AdapterSet::new(entries.iter().map(|(name, s)| (pack.adapter(name).unwrap(), *s)).collect()).unwrap()
}

const MIXTURES: [&[(&str, f32)]; 4] = [
    &[("one", 1.0)],
    &[("one", 0.5), ("two", -0.75)],
    &[("three", 1.0), ("two", 0.5)],
    &[("ends", 1.0), ("three", 0.25)],
];

#[test]
fn a_pack_on_a_model_answers_as_the_merged_model() {
    let f = fixtures::model("llama");
    let decoder = Decoder::load(&f.gguf, f.n_ctx).unwrap();
    let pack = pack_for(&BaseInfo::from_gguf(&f.gguf).unwrap());
    for entries in MIXTURES {
        let set = pack_set(&pack, entries);
        let merged = Decoder::load(&merged_file(&f.gguf, &set), f.n_ctx).unwrap();
        let want = Runner::new(&Reference, &merged, 64, KvType::F32).logits(&f.tokens);
        let got =
            Runner::new(&Reference, &decoder, 64, KvType::F32).with_adapters(set.clone()).logits(&f.tokens);
        let error = fixtures::relative_error(&got, &want);
        assert!(error < 1e-4, "{entries:?}: {error}");
        for isa in Isa::available() {
            let cpu = Cpu::new(Some(2), isa);
            let got =
                Runner::new(&cpu, &decoder, 5, KvType::F32).with_adapters(set.clone()).logits(&f.tokens);
            let error = fixtures::relative_error(&got, &want);
            assert!(error < 1e-4, "{entries:?} at {}: {error}", isa.level().name());
        }
        let moved = fixtures::relative_error(&got, &f.logits);
        assert!(moved > 0.02, "{entries:?} changes only {moved}");
    }
}

/// All sequences in one batch, each with its own adapters; logits of every row.
fn batch<B: Backend>(backend: &B, decoder: &Decoder, sequences: &[(&[u32], &AdapterSet)]) -> Vec<Vec<f32>> {
    let c = decoder.config();
    let (layers, kv_heads, head_dim) = (c.n_layers(), c.n_kv_heads, c.head_dim);
    let shape = KvShape { layers, kv_heads, head_dim, page_len: 16, ty: KvType::F16 };
    let n = sequences.iter().map(|(tokens, _)| tokens.len()).sum();
    let mut cache = KvCache::new(backend, shape, 64).unwrap();
    let mut scratch = Scratch::new(backend, decoder, n, n).unwrap();
    let mut pages: Vec<Pages> = sequences.iter().map(|_| Pages::default()).collect();
    let mut slots = Vec::new();
    for ((tokens, _), pages) in sequences.iter().zip(&mut pages) {
        slots.extend(cache.extend(backend, pages, tokens.len()).unwrap());
    }
    let mut tokens = Vec::new();
    let (mut rows, mut sets) = (Vec::new(), Vec::new());
    for ((t, set), pages) in sequences.iter().zip(&pages) {
        tokens.extend_from_slice(t);
        rows.extend((0..t.len() as u32).map(|position| AttentionRow { pages: pages.ids(), position }));
        sets.extend(t.iter().map(|_| Some(*set)));
    }
    let outputs: Vec<u32> = (0..n as u32).collect();
    let adapters = BatchAdapters::new(&sets);
    let batch = Batch { tokens: &tokens, rows: &rows, slots: &slots, adapters: &adapters, outputs: &outputs };
    decoder.forward(backend, &mut cache, &mut scratch, &batch).unwrap();
    let vocab = decoder.vocab_size();
    let mut logits = vec![0.0; n * vocab];
    decoder.logits(backend, &mut scratch, &adapters, 0..n, &mut logits).unwrap();
    let mut rest = logits.as_slice();
    sequences
        .iter()
        .map(|(t, _)| {
            let (own, others) = rest.split_at(t.len() * vocab);
            rest = others;
            own.to_vec()
        })
        .collect()
}

#[test]
fn a_mixed_batch_equals_separate_runs_bit_for_bit() {
    let f = fixtures::model("llama");
    let decoder = Decoder::load(&f.gguf, f.n_ctx).unwrap();
    let pack = pack_for(&BaseInfo::from_gguf(&f.gguf).unwrap());
    let none = AdapterSet::default();
    let sets: Vec<_> = MIXTURES.iter().map(|m| pack_set(&pack, m)).collect();
    let mut sequences: Vec<(&[u32], &AdapterSet)> = vec![(&f.tokens, &none)];
    sequences.extend(sets.iter().enumerate().map(|(i, set)| (&f.tokens[..f.tokens.len() - i], set)));
    sequences.push((&f.tokens[..3], &sets[0]));
    let cpu = Cpu::new(Some(2), Isa::detect());
    let together = batch(&cpu, &decoder, &sequences);
    for (i, sequence) in sequences.iter().enumerate() {
        assert!(batch(&cpu, &decoder, &[*sequence])[0] == together[i], "sequence {i}");
    }
    // The base is the base, adapters loaded or not; and the adapters did something.
    let plain = Runner::new(&cpu, &decoder, f.tokens.len(), KvType::F16).logits(&f.tokens);
    assert!(together[0] == plain && together[0] != together[1]);
}

#[test]
fn random_packs_are_reproducible_and_run() {
    let f = fixtures::model("llama");
    let base = BaseInfo::from_gguf(&f.gguf).unwrap();
    let spec = SynthSpec {
        n_adapters: 5,
        clusters: 2,
        rank: 4,
        diagonal: false,
        share_v: false,
        basis_type: QuantType::Q8_0,
        core_type: QuantType::F16,
        seed: 1,
    };
    let bytes = |spec: &SynthSpec| synth_pack(&base, spec, Cursor::new(Vec::new())).unwrap().into_inner();
    assert_eq!(bytes(&spec), bytes(&spec));
    assert_ne!(bytes(&spec), bytes(&SynthSpec { seed: 2, ..spec.clone() }));
    let decoder = Decoder::load(&f.gguf, f.n_ctx).unwrap();
    let plain = SynthSpec { clusters: 0, ..spec.clone() };
    let shared = SynthSpec { share_v: true, ..spec.clone() };
    for spec in [&spec, &shared, &plain] {
        let gguf = Gguf::parse(vec![("synth.gguf".into(), Arc::new(bytes(spec)))]).unwrap();
        let pack = Pack::parse(gguf, vec![]).unwrap();
        pack.verify().unwrap();
        assert_eq!(pack.names().last(), Some("synth-00004"));
        let adapter = pack.adapter("synth-00003").unwrap();
        assert_eq!(adapter.basis().is_some(), spec.clusters > 0);
        let v = |p| adapter.factors(Site::layer(0, p)).unwrap().v().matrix().bytes().as_ptr();
        assert_eq!(v(Projection::AttnQ) == v(Projection::AttnK), spec.share_v);
        let set = AdapterSet::single(adapter.clone());
        let logits = Runner::new(&Reference, &decoder, 64, KvType::F32).with_adapters(set).logits(&f.tokens);
        let moved = fixtures::relative_error(&logits, &f.logits);
        assert!(moved > 1e-3 && moved < 2.0, "{moved}");
    }
}
