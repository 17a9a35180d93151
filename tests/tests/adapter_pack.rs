//! The shared-basis pack: round trip, growth, damage, refusal.

use std::{io::Cursor, sync::Arc, time::Instant};

use lory_kernels::{QuantType, quant::dequantize_row};
use lory_models::{
    Error, Tensor,
    adapter::{
        Adapter, AdapterSet, BaseCheck, BaseInfo, BatchAdapters, CoreMatrix, Delta, Existing, Projection,
        Site,
        pack::{
            AdapterMeta, BasisSite, NewAdapter, NewCore, NewMatrix, Pack, PackSpec, PackWriter, StorageTypes,
            merge, open_segments, segment_file_name, segment_files,
        },
        publish,
        publish::{TEMPORARY, Unfinished, remove_abandoned, remove_own_unfinished},
        synthetic_base,
    },
    gguf::Gguf,
};

const Q: Site = Site::layer(0, Projection::AttnQ);
const DOWN: Site = Site::layer(1, Projection::FfnDown);

fn base() -> BaseInfo {
    synthetic_base(2, 64, 32, 96, 100)
}

fn numbers(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state as f32 / u32::MAX as f32 - 0.5
    };
    (0..n).map(|_| next()).collect()
}

fn parse(name: &str, bytes: Vec<u8>) -> lory_models::Result<Gguf> {
    Gguf::parse(vec![(name.into(), Arc::new(bytes))])
}

fn open(bytes: Vec<u8>, segments: Vec<Vec<u8>>) -> lory_models::Result<Pack> {
    let segments =
        segments.into_iter().enumerate().map(|(i, b)| parse(&format!("p.seg-{:04}.gguf", i + 1), b));
    Pack::parse(parse("p.gguf", bytes)?, segments.collect::<Result<_, _>>()?)
}

/// Two clusters with factors at two sites; ranks 8 and 5, F32 so that numbers come back exactly.
fn layout(u_type: QuantType) -> Vec<BasisSite> {
    let site =
        |cluster, site, rank| BasisSite { cluster, site, rank, u_type, v_type: u_type, shared_v: false };
    vec![site(0, Q, 8), site(0, DOWN, 8), site(1, Q, 5), site(1, DOWN, 5)]
}

fn factors(l: &BasisSite) -> (Vec<f32>, Vec<f32>) {
    let shape = base().shapes.get(l.site).unwrap();
    let seed = l.cluster * 100 + l.site.index() as u32;
    (numbers(shape.out_features * l.rank, seed), numbers(shape.in_features * l.rank, seed + 50))
}

fn shared(name: &str, cluster: u32, seed: u32) -> NewAdapter {
    let r = if cluster == 0 { 8 } else { 5 };
    let full = NewCore::shared(NewMatrix::Full(numbers(r * r, seed)), r, 0.5, Some(0.25));
    let mut diagonal = NewCore::shared(NewMatrix::Diagonal(numbers(r, seed + 1)), r, 2.0, Some(0.75));
    diagonal.delta_scale = Some(numbers(64, seed + 2));
    diagonal.row_scale = Some(numbers(64, seed + 3));
    diagonal.bias = Some(numbers(64, seed + 4));
    NewAdapter {
        name: name.into(),
        cluster: Some(cluster),
        meta: AdapterMeta {
            description: format!("the adapter {name}"),
            source: "x".into(),
            ..Default::default()
        },
        invocation: vec![3, 99],
        cores: vec![(Q, full), (DOWN, diagonal)],
        types: StorageTypes { core: QuantType::F32, factors: QuantType::F32, vectors: QuantType::F32 },
    }
}

fn private(name: &str, seed: u32) -> NewAdapter {
    let embedding = NewCore {
        factors: Some((numbers(64 * 3, seed), numbers(100 * 3, seed + 1))),
        ..NewCore::shared(NewMatrix::Identity, 3, 1.5, None)
    };
    let q = NewCore {
        factors: Some((numbers(64 * 4, seed + 2), numbers(64 * 4, seed + 3))),
        ..NewCore::shared(NewMatrix::Diagonal(numbers(4, seed + 4)), 4, 0.25, None)
    };
    let bias =
        NewCore { bias: Some(numbers(64, seed + 5)), ..NewCore::shared(NewMatrix::None, 0, 1.0, None) };
    NewAdapter {
        cluster: None,
        invocation: vec![],
        cores: vec![(Site::TOKEN_EMBD, embedding), (Q, q), (DOWN, bias)],
        ..shared(name, 0, seed)
    }
}

fn writer(u_type: QuantType) -> PackWriter<Cursor<Vec<u8>>> {
    let layout = layout(u_type);
    let mut w = PackWriter::new(Cursor::new(Vec::new()), PackSpec::of(&base()), &layout).unwrap();
    for l in &layout {
        let (u, v) = factors(l);
        w.factors(&u, &v).unwrap();
    }
    w
}

fn pack_of(factors: QuantType) -> Vec<u8> {
    let mut w = writer(factors);
    // Not in the order of their names.
    for a in [shared("beta", 0, 1), private("gamma", 2), shared("alpha", 1, 3), shared("delta", 1, 4)] {
        w.adapter(&NewAdapter { types: StorageTypes { factors, ..a.types }, ..a }).unwrap();
    }
    w.finish().unwrap().into_inner()
}

fn pack_bytes() -> Vec<u8> {
    pack_of(QuantType::F32)
}

/// Its ranks are no whole blocks, so that every U lies in bands.
fn banded_bytes() -> Vec<u8> {
    pack_of(QuantType::Q8_0)
}

fn values(t: &Tensor) -> Vec<f32> {
    let mut out = vec![0.0; t.rows() * t.cols()];
    dequantize_row(t.ty(), t.matrix().bytes(), &mut out).unwrap();
    out
}

#[test]
fn what_was_written_comes_back() {
    let pack = open(pack_bytes(), vec![]).unwrap();
    pack.check_base(&base(), BaseCheck::Exact).unwrap();
    assert_eq!(pack.names().collect::<Vec<_>>(), ["alpha", "beta", "delta", "gamma"]);
    assert_eq!((pack.len(), pack.n_clusters()), (4, 2));

    let beta = pack.adapter("beta").unwrap();
    assert_eq!(beta.invocation(), [3, 99]);
    assert_eq!(beta.basis().unwrap().cluster(), 0);
    let (u, v) = factors(&layout(QuantType::F32)[0]);
    let f = beta.factors(Q).unwrap();
    assert_eq!((f.u_numbers().unwrap(), values(f.v()), f.rank()), (u, v, 8));
    let core = beta.core(Q).unwrap();
    let Delta::Shared(CoreMatrix::Full(c)) = &core.delta else { panic!("{core:?}") };
    assert_eq!((values(c), core.scale, core.err2), (numbers(64, 1), 0.5, Some(0.25)));
    let core = beta.core(DOWN).unwrap();
    let Delta::Shared(CoreMatrix::Diagonal(c)) = &core.delta else { panic!("{core:?}") };
    assert_eq!(values(c), numbers(8, 2));
    assert_eq!(values(core.row_scale.as_ref().unwrap()), numbers(64, 4));
    assert_eq!(values(core.bias.as_ref().unwrap()), numbers(64, 5));
    // Beside a row scale the delta's own scale, 2, moves into g.
    let g: Vec<f32> = numbers(64, 3).iter().map(|g| g * 2.0).collect();
    assert_eq!((values(core.delta_scale.as_ref().unwrap()), core.scale), (g, 1.0));
    assert!(beta.core(Site::OUTPUT).is_none());

    let gamma = pack.adapter("gamma").unwrap();
    assert!(gamma.basis().is_none());
    let f = gamma.factors(Site::TOKEN_EMBD).unwrap();
    assert_eq!((f.v().rows(), f.v().cols(), values(f.v())), (100, 3, numbers(300, 3)));
    assert!(matches!(gamma.core(DOWN).unwrap().delta, Delta::None));

    let info = pack.info("beta").unwrap();
    assert_eq!(info.meta.description, "the adapter beta");
    assert_eq!((info.mean_err2, info.worst_err2, info.cluster), (Some(0.5), Some(0.75), Some(0)));
    assert_eq!(info.sites.iter().map(|s| (s.site, s.rank)).collect::<Vec<_>>(), [(Q, 8), (DOWN, 8)]);
    assert_eq!(pack.info("gamma").unwrap().mean_err2, None);
    pack.verify().unwrap();
}

#[test]
fn adapters_of_one_cluster_share_the_basis_and_identity_follows_content() {
    let pack = open(pack_bytes(), vec![]).unwrap();
    let again = open(pack_bytes(), vec![]).unwrap();
    let (alpha, delta) = (pack.adapter("alpha").unwrap(), pack.adapter("delta").unwrap());
    assert!(Arc::ptr_eq(alpha.basis().unwrap(), delta.basis().unwrap()));
    assert_ne!(alpha.identity(), delta.identity());
    assert_eq!(alpha.identity(), again.adapter("alpha").unwrap().identity());
}

/// The pack with another first number in the first cluster's U at `Q`, and all hashes as they were.
fn altered(number: f32) -> Vec<u8> {
    let mut bytes = pack_bytes();
    let gguf = parse("p.gguf", bytes.clone()).unwrap();
    let at = gguf.info("cluster.0.blk.0.attn_q.basis_u").unwrap().byte_range().start;
    bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
    bytes
}

#[test]
fn bases_are_told_apart_by_their_bytes_and_not_by_what_the_file_says() {
    let pack = open(pack_bytes(), vec![]).unwrap();
    let other = open(altered(3.5), vec![]).unwrap();
    assert_eq!(pack.hash(), other.hash());
    let (one, two) = (pack.adapter("beta").unwrap(), other.adapter("beta").unwrap());
    assert_ne!(one.basis().unwrap().identity(), two.basis().unwrap().identity());
    assert_ne!(one.identity(), two.identity());
    // The other cluster is what it was.
    assert_eq!(pack.adapter("alpha").unwrap().identity(), other.adapter("alpha").unwrap().identity());
    let set = AdapterSet::new(vec![(one, 1.0), (two, 1.0)]).expect("two adapters");
    assert_eq!(BatchAdapters::new(&[Some(&set)]).groups(Q).len(), 2);
}

#[test]
fn merging_does_not_make_damage_sound() {
    let damaged = open(altered(3.5), vec![]).unwrap();
    for e in [damaged.verify(), merge(&damaged, Cursor::new(Vec::new())).map(drop)] {
        assert!(e.as_ref().is_err_and(|e| e.to_string().contains("not the hash of the bases")), "{e:?}");
    }
}

#[test]
fn a_basis_with_a_weight_that_is_no_number_is_refused_when_it_is_needed() {
    let pack = open(altered(f32::NAN), vec![]).unwrap();
    let e = pack.adapter("beta").unwrap_err().to_string();
    assert!(e.contains("cluster.0.blk.0.attn_q.basis_u") && e.contains("not a finite number"), "{e}");
    pack.adapter("alpha").unwrap();
}

#[test]
fn a_rank_of_partial_blocks_lies_in_bands() {
    // Rank 24 is no whole block of Q8_0.
    let mut l = layout(QuantType::Q8_0)[0];
    l.rank = 24;
    let (u, v) = factors(&l);
    let mut w = PackWriter::new(Cursor::new(Vec::new()), PackSpec::of(&base()), &[l]).unwrap();
    w.factors(&u, &v).unwrap();
    let core = numbers(24 * 24, 9);
    let adapter = NewAdapter {
        cores: vec![(Q, NewCore::shared(NewMatrix::Full(core.clone()), 24, 1.0, None))],
        types: StorageTypes { core: QuantType::Q8_0, ..StorageTypes::default() },
        ..shared("a", 0, 0)
    };
    w.adapter(&adapter).unwrap();
    let pack = open(w.finish().unwrap().into_inner(), vec![]).unwrap();
    pack.verify().unwrap();
    let a = pack.adapter("a").unwrap();
    let f = a.factors(Q).unwrap();
    assert_eq!((f.rank(), f.stored_u().ty(), f.v().ty()), (24, QuantType::Q8_0, QuantType::Q8_0));
    assert!(f.is_in_bands() && f.stored_u().cols() == 24 * 32);
    for (got, want) in f.u_numbers().unwrap().iter().zip(&u) {
        assert!((got - want).abs() <= 0.5 / 127.0, "{got} {want}");
    }
    // Rows of 24 are no blocks of Q8_0.
    let Delta::Shared(CoreMatrix::Full(c)) = &a.core(Q).unwrap().delta else { panic!() };
    assert_eq!(c.ty(), QuantType::F16);
    for (got, want) in values(c).iter().zip(&core) {
        assert!((got - want).abs() <= 1e-3, "{got} {want}");
    }
}

fn segment(pack: &Pack, change: impl FnOnce(&mut PackWriter<Cursor<Vec<u8>>>)) -> Vec<u8> {
    let mut w = PackWriter::segment(Cursor::new(Vec::new()), pack).unwrap();
    change(&mut w);
    w.finish().unwrap().into_inner()
}

#[test]
fn a_pack_grows_by_segments_and_merges() {
    let main = pack_bytes();
    let pack = open(main.clone(), vec![]).unwrap();
    let original = pack.adapter("alpha").unwrap().identity();
    let one = segment(&pack, |w| {
        w.rename("alpha", "omega").unwrap();
        w.adapter(&shared("alpha", 0, 77)).unwrap();
        w.remove("beta").unwrap();
        w.adapter(&shared("new", 1, 78)).unwrap();
    });
    let pack = open(main.clone(), vec![one.clone()]).unwrap();
    assert_eq!(pack.names().collect::<Vec<_>>(), ["alpha", "delta", "gamma", "new", "omega"]);
    assert_eq!(pack.adapter("omega").unwrap().identity(), original);
    assert_ne!(pack.adapter("alpha").unwrap().identity(), original);
    assert_eq!(pack.info("new").unwrap().file, "p.seg-0001.gguf");

    let two = segment(&pack, |w| {
        w.remove("alpha").unwrap();
        w.adapter(&private("delta", 79)).unwrap();
    });
    let pack = open(main.clone(), vec![one.clone(), two.clone()]).unwrap();
    let names = ["delta", "gamma", "new", "omega"];
    assert_eq!(pack.names().collect::<Vec<_>>(), names);
    pack.verify().unwrap();

    let merged = merge(&pack, Cursor::new(Vec::new())).unwrap().into_inner();
    // Beside the merged pack the old segments do nothing, and numbers go on after them.
    for segments in [vec![], vec![one.clone(), two.clone()], vec![two.clone()]] {
        let m = open(merged.clone(), segments).unwrap();
        assert_eq!(m.names().collect::<Vec<_>>(), names);
        assert_eq!(m.next_segment(), 3);
        assert_eq!(m.hash(), pack.hash());
        m.verify().unwrap();
        for name in names {
            assert_eq!(m.adapter(name).unwrap().identity(), pack.adapter(name).unwrap().identity());
        }
    }

    let gap = open(main.clone(), vec![two]).unwrap_err();
    assert!(gap.to_string().contains("is 2, expected 1"), "{gap}");
    let twice = open(main, vec![one.clone(), one]).unwrap_err();
    assert!(twice.to_string().contains("is 1, expected 2"), "{twice}");
}

#[test]
fn a_segment_of_another_pack_is_refused_naming_both() {
    let pack = open(pack_bytes(), vec![]).unwrap();
    let foreign = segment(&pack, |w| w.remove("alpha").unwrap());
    let other = writer(QuantType::F16).finish().unwrap().into_inner();
    let other_hash = open(other.clone(), vec![]).unwrap().hash().to_owned();
    let e = open(other, vec![foreign.clone()]).unwrap_err();
    assert!(matches!(e, Error::WrongBase { .. }), "{e}");
    assert!(e.to_string().contains(pack.hash()) && e.to_string().contains(&other_hash), "{e}");
    let e = open(foreign, vec![]).unwrap_err();
    assert!(e.to_string().contains("this is a segment"), "{e}");
}

#[test]
fn a_wrong_base_is_refused_naming_both() {
    let pack = open(pack_bytes(), vec![]).unwrap();
    let mut other = base();
    other.file = "other.gguf".into();
    other.fingerprint.weights ^= 1 << 40;
    let e = pack.check_base(&other, BaseCheck::Exact).unwrap_err();
    let text = e.to_string();
    assert!(matches!(e, Error::WrongBase { .. }), "{e}");
    assert!(
        text.contains(&base().fingerprint.to_string()) && text.contains(&other.fingerprint.to_string()),
        "{text}"
    );
    assert!(text.contains("p.gguf") && text.contains("other.gguf"), "{text}");
    // The same shapes may be used when the caller says so.
    pack.check_base(&other, BaseCheck::Shapes).unwrap();

    let larger = synthetic_base(3, 64, 32, 96, 100);
    assert!(matches!(pack.check_base(&larger, BaseCheck::Shapes), Err(Error::WrongBase { .. })));
    let qwen = BaseInfo { architecture: "qwen2".into(), ..base() };
    let text = pack.check_base(&qwen, BaseCheck::Shapes).unwrap_err().to_string();
    assert!(text.contains("`llama`") && text.contains("`qwen2`"), "{text}");
}

#[test]
fn writers_refuse_what_does_not_fit() {
    let says = |a: NewAdapter, text: &str| {
        let e = writer(QuantType::F32).adapter(&a).unwrap_err().to_string();
        assert!(e.contains(text), "{e}");
    };
    says(shared("a\nb", 0, 0), "control character");
    says(shared("", 0, 0), "1 to 255 bytes");
    says(shared("x", 7, 0), "cluster 7 of 2");
    let with = |change: &dyn Fn(&mut NewCore)| {
        let mut a = shared("x", 0, 0);
        change(&mut a.cores[0].1);
        a
    };
    says(with(&|c| c.scale = f32::NAN), "scale NaN");
    says(with(&|c| c.scale = 1e-40), "not a normal number");
    says(with(&|c| c.rank = 9), "rank 9 in a basis of rank 8");
    says(with(&|c| c.matrix = NewMatrix::Full(vec![0.0; 63])), "63 numbers");
    says(with(&|c| c.matrix = NewMatrix::Full(vec![f32::INFINITY; 64])), "inf does not fit");
    let mut embedding = private("x", 0);
    embedding.cores[0].1.bias = Some(numbers(64, 1));
    says(embedding, "token_embd: an embedding has neither a row scale nor a bias");
    let mut w = writer(QuantType::F32);
    w.adapter(&shared("x", 0, 0)).unwrap();
    assert!(w.adapter(&shared("x", 0, 1)).unwrap_err().to_string().contains("already there"));
    assert!(w.remove("x").is_err());
}

/// Whatever happens to the bytes: an error, or a pack whose adapters are errors or sound.
fn try_everything(bytes: Vec<u8>) -> Result<usize, Error> {
    let pack = open(bytes, vec![])?;
    let _ = pack.check_base(&base(), BaseCheck::Exact);
    let names: Vec<_> = pack.names().map(str::to_owned).collect();
    Ok(names.iter().filter(|n| pack.adapter(n).is_ok() && pack.info(n).is_ok()).count())
}

#[test]
fn a_pack_cut_anywhere_is_an_error() {
    for bytes in [pack_bytes(), banded_bytes()] {
        assert_eq!(try_everything(bytes.clone()).unwrap(), 4);
        for len in (0..bytes.len()).step_by(97).chain(bytes.len() - 200..bytes.len()) {
            // The last bytes are padding of the names, but the tensor table counts them.
            assert!(try_everything(bytes[..len].to_vec()).is_err(), "cut at {len}");
        }
    }
}

#[test]
fn flipped_bits_are_never_a_panic_and_in_records_always_an_error() {
    let bytes = pack_bytes();
    let gguf = parse("p.gguf", bytes.clone()).unwrap();
    let range = |name: &str| gguf.info(name).unwrap().byte_range();
    let (data, index) = (range("adapters.data"), range("adapters.index"));
    let first_factor = range("cluster.0.blk.0.attn_q.basis_u").start;
    let flip = |i: usize, bit: u32| {
        let mut b = bytes.clone();
        b[i] ^= 1 << bit;
        try_everything(b)
    };
    // Header and tables: every byte.
    for i in (0..first_factor).chain(index.start..bytes.len()) {
        let outcome = flip(i, i as u32 % 8);
        if index.contains(&i) {
            assert!(outcome.is_err(), "byte {i} of the index");
        }
    }
    // Records: exactly the damaged adapter is refused.
    let records: Vec<_> = (0..4)
        .map(|i| {
            let e = &bytes[index.start + 64 * i..];
            let field = |at: usize| u64::from_le_bytes(e[at..at + 8].try_into().unwrap()) as usize;
            data.start + field(8)..data.start + field(8) + field(16)
        })
        .collect();
    for i in data.clone().step_by(5) {
        let inside = records.iter().any(|r| r.contains(&i));
        assert_eq!(flip(i, 3).unwrap(), if inside { 3 } else { 4 }, "byte {i}");
    }
}

/// Makes the hashes right again, as a forger would after changing records, index or names; `None`
/// where the change leaves no tables to hash.
fn rehashed(mut bytes: Vec<u8>) -> Option<Vec<u8>> {
    let gguf = parse("p.gguf", bytes.clone()).ok()?;
    let range = |name: &str| gguf.info(name).map(|i| i.byte_range());
    let (data, index, names) = (range("adapters.data")?, range("adapters.index")?, range("adapters.names")?);
    for entry in index.clone().step_by(64).filter(|e| e + 64 <= index.end) {
        let field =
            |at: usize| u64::from_le_bytes(bytes[entry + at..entry + at + 8].try_into().unwrap()) as usize;
        let start = data.start.checked_add(field(8))?;
        let Some(record) = start.checked_add(field(16)).and_then(|end| bytes.get(start..end)) else {
            continue;
        };
        let hash = xxhash_rust::xxh3::xxh3_128(record);
        bytes[entry + 32..entry + 48].copy_from_slice(&hash.to_le_bytes());
    }
    let hash = xxhash_rust::xxh3::xxh3_128(&[&bytes[index], &bytes[names]].concat());
    let old = gguf.metadata().opt_str("lora.basis.index_hash").ok()??.to_owned();
    let at = bytes.windows(old.len().max(1)).position(|w| w == old.as_bytes())?;
    bytes.get_mut(at..at + 32)?.copy_from_slice(format!("{hash:032x}").as_bytes());
    Some(bytes)
}

/// The adapter of a pack of one, after `change` to the bytes at its record's place.
fn forge(change: impl FnOnce(&mut Vec<u8>, usize)) -> Result<Arc<Adapter>, Error> {
    let mut w = writer(QuantType::F32);
    w.adapter(&shared("a", 0, 1)).unwrap();
    let mut bytes = w.finish().unwrap().into_inner();
    assert_eq!(rehashed(bytes.clone()).as_ref(), Some(&bytes), "right hashes are made where they are right");
    let start = parse("p.gguf", bytes.clone()).unwrap().info("adapters.data").unwrap().byte_range().start;
    change(&mut bytes, start);
    open(rehashed(bytes).unwrap(), vec![])?.adapter("a")
}

#[test]
fn forged_packs_are_never_a_panic() {
    for (bytes, first_factor) in [(pack_bytes(), "basis_u"), (banded_bytes(), "basis_u_bands")] {
        let gguf = parse("p.gguf", bytes.clone()).unwrap();
        let factors_end = gguf.info("adapters.data").unwrap().byte_range().start;
        let first_factor = format!("cluster.0.blk.0.attn_q.{first_factor}");
        let header_end = gguf.info(&first_factor).unwrap().byte_range().start;
        for i in (0..header_end).chain(factors_end..bytes.len()) {
            for change in [0x01, 0x40, 0x80, 0xff] {
                let mut forged = bytes.clone();
                forged[i] ^= change;
                let _ = rehashed(forged).map(try_everything);
            }
        }
    }
}

/// A pack whose one U is in bands, with what `change` makes of its bytes, which begin with the header.
fn banded(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut bytes = banded_bytes();
    change(&mut bytes);
    let error = |pack: Pack| pack.basis(0).map(drop).and_then(|()| pack.basis(1).map(drop));
    open(bytes, vec![]).and_then(error).unwrap_err().to_string()
}

fn place(bytes: &[u8], name: &str) -> usize {
    bytes.windows(name.len()).position(|w| w == name.as_bytes()).unwrap()
}

#[test]
fn bands_of_another_shape_or_beside_rows_are_refused() {
    let name = "cluster.0.blk.0.attn_q.basis_u_bands";
    // 2 rows of 8 · 32 become 4 rows of 4 · 32: the same bytes. Behind the name stand a u32 and the sizes.
    let reshaped = banded(|b| {
        let at = place(b, name) + name.len() + 4;
        b[at..at + 16].copy_from_slice(&[128u64.to_le_bytes(), 4u64.to_le_bytes()].concat());
    });
    assert!(reshaped.contains("gives 128 outputs") && reshaped.contains("64"), "{reshaped}");
    // Rank 5 for a V of 8.
    let other = banded(|b| {
        let (zero, one) = (place(b, name), place(b, &name.replace("r.0", "r.1")));
        (b[zero + 8], b[one + 8]) = (b'1', b'0');
    });
    assert!(other.contains("has rank 5") && other.contains("rank 8"), "{other}");
    // Both forms for one site: only a file in which one cluster has rows can become one.
    let mut l = layout(QuantType::Q8_0);
    (l[2].u_type, l[3].u_type) = (QuantType::F16, QuantType::F16);
    let mut w = PackWriter::new(Cursor::new(Vec::new()), PackSpec::of(&base()), &l).unwrap();
    for l in &l {
        let (u, v) = factors(l);
        w.factors(&u, &v).unwrap();
    }
    let mut bytes = w.finish().unwrap().into_inner();
    open(bytes.clone(), vec![]).unwrap().verify().unwrap();
    let rows = place(&bytes, "cluster.1.blk.0.attn_q.basis_u");
    bytes[rows + 8] = b'0';
    let both = open(bytes, vec![]).unwrap_err().to_string();
    assert!(both.contains(name) && both.contains("another way"), "{both}");
}

#[test]
fn a_pack_with_bands_merges_and_keeps_its_bytes() {
    let pack = open(banded_bytes(), vec![]).unwrap();
    pack.verify().unwrap();
    let merged = merge(&pack, Cursor::new(Vec::new())).unwrap().into_inner();
    let merged = open(merged, vec![]).unwrap();
    assert_eq!((merged.hash(), merged.len()), (pack.hash(), 4));
    merged.verify().unwrap();
    for name in ["alpha", "gamma"] {
        let (a, b) = (pack.adapter(name).unwrap(), merged.adapter(name).unwrap());
        let u = |a: &Adapter| a.factors(Q).unwrap().u_numbers().unwrap();
        assert!(a.factors(Q).unwrap().is_in_bands());
        assert_eq!(u(&a), u(&b), "{name}");
    }
    // What is its own may be taken over into another pack, near enough to be the same.
    let gamma = pack.adapter("gamma").unwrap();
    let again = NewAdapter::from_adapter(&gamma, private("gamma", 2).types).unwrap();
    let mut w = writer(QuantType::F32);
    w.adapter(&again).unwrap();
    let copy = open(w.finish().unwrap().into_inner(), vec![]).unwrap().adapter("gamma").unwrap();
    assert!(!copy.factors(Q).unwrap().is_in_bands());
    let u = |a: &Adapter| a.factors(Q).unwrap().u_numbers().unwrap();
    assert_eq!(u(&copy), u(&gamma));
}

#[test]
fn bands_are_for_factors_of_ones_own() {
    let e = forge(|b, r| b[r + ENTRIES] |= 64).unwrap_err().to_string();
    assert!(e.contains("entry of blk.0.attn_q is not valid"), "{e}");
}

/// First byte of the record's entry for site number `i` in order: header 48, bitmap 16.
const ENTRIES: usize = 48 + 16;

#[test]
fn vectors_of_the_embedding_are_refused() {
    let mut w = writer(QuantType::F32);
    let bias = NewCore { bias: Some(numbers(64, 5)), ..NewCore::shared(NewMatrix::None, 0, 1.0, None) };
    w.adapter(&NewAdapter { cluster: None, cores: vec![(Q, bias)], ..shared("a", 0, 1) }).unwrap();
    let mut bytes = w.finish().unwrap().into_inner();
    let record = parse("p.gguf", bytes.clone()).unwrap().info("adapters.data").unwrap().byte_range().start;
    // Of site 2, whose bias has as many numbers, becomes of site 0.
    assert_eq!(bytes[record + 48], 4);
    bytes[record + 48] = 1;
    let e = open(rehashed(bytes).unwrap(), vec![]).unwrap().adapter("a").unwrap_err().to_string();
    assert!(e.contains("adapter `a`, token_embd: an embedding has neither a row scale nor a bias"), "{e}");
}

#[test]
fn b2_core_of_another_rank() {
    let e = forge(|b, r| b[r + ENTRIES + 6] = 7).unwrap_err().to_string();
    assert!(e.contains("core of rank 7, its basis has rank 8"), "{e}");
}

#[test]
fn b4_site_or_cluster_out_of_range() {
    let e = forge(|b, r| b[r + 8] = 1).unwrap_err().to_string();
    assert!(e.contains("says cluster 1") && e.contains("the index cluster 0"), "{e}");
    // Bit 120 stands for a site that two layers do not have.
    let e = forge(|b, r| {
        b[r + 48] &= !4;
        b[r + 48 + 15] |= 1;
    });
    assert!(e.unwrap_err().to_string().contains("is not in the base"));
    let e = forge(|b, r| b[r + 48 + 15] |= 1).unwrap_err().to_string();
    assert!(e.contains("marks 3 sites but has 2 cores"), "{e}");
}

#[test]
fn b5_scales_that_are_no_numbers() {
    for bad in [f32::NAN, f32::INFINITY, 1e-40] {
        let e = forge(|b, r| b[r + ENTRIES + 8..r + ENTRIES + 12].copy_from_slice(&bad.to_le_bytes()));
        assert!(e.unwrap_err().to_string().contains("is not a normal number"), "{bad}");
    }
    // The first core begins after two entries, two tokens and the description.
    let e = forge(|b, r| {
        let len = u64::from_le_bytes(b[r + 16..r + 24].try_into().unwrap()) as usize;
        b[r + len - 4..r + len].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    assert!(e.unwrap_err().to_string().contains("is not a finite number"));
}

#[test]
fn record_lengths_that_disagree() {
    let e = forge(|b, r| b[r + ENTRIES + 1] = QuantType::Q8_0 as u8).unwrap_err().to_string();
    assert!(e.contains("Matrix of 8 x 8 cannot be Q8_0"), "{e}");
    // A full core read as a diagonal leaves bytes over.
    let e = forge(|b, r| b[r + ENTRIES] = 2).unwrap_err().to_string();
    assert!(e.contains("its cores end at byte"), "{e}");
    let e = forge(|b, r| b[r + ENTRIES + 1] = QuantType::F64 as u8).unwrap_err().to_string();
    assert!(e.contains("exceeds its record") || e.contains("F64"), "{e}");
    let e = forge(|b, r| b[r + ENTRIES + 1] = 4).unwrap_err().to_string();
    assert!(e.contains("blk.0.attn_q is not valid"), "{e}");
    let e = forge(|b, r| b[r + 24..r + 28].copy_from_slice(&u32::MAX.to_le_bytes())).unwrap_err().to_string();
    assert!(e.contains("ends inside its header"), "{e}");
    let e = forge(|b, r| b[r + 28..r + 32].copy_from_slice(&u32::MAX.to_le_bytes())).unwrap_err().to_string();
    assert!(e.contains("ends inside its header"), "{e}");
    let e = forge(|b, r| b[r] = b'X').unwrap_err().to_string();
    assert!(e.contains("no valid header"), "{e}");
    let e = forge(|b, r| b[r + ENTRIES + 32..r + ENTRIES + 36].copy_from_slice(&100u32.to_le_bytes()));
    assert!(e.unwrap_err().to_string().contains("token 100, the base has 100"));
}

#[test]
fn b7_another_version_is_refused_by_number() {
    let mut bytes = pack_bytes();
    let key = b"lora.basis.version";
    let at = bytes.windows(key.len()).position(|w| w == key).unwrap() + key.len() + 4;
    bytes[at] = 9;
    let e = open(bytes, vec![]).unwrap_err();
    assert!(matches!(e, Error::Unsupported { .. }), "{e}");
    assert!(e.to_string().contains("version 9"), "{e}");
}

#[test]
fn b8_two_bases_for_one_site_cannot_be_declared() {
    let l = layout(QuantType::F32);
    let twice = PackWriter::new(Cursor::new(Vec::new()), PackSpec::of(&base()), &[l[0], l[0]]);
    assert!(twice.is_err());
    // In a file: rename one factor tensor so that it claims what another has.
    let mut bytes = pack_bytes();
    let name = b"cluster.1.blk.0.attn_q.basis_u";
    let at = bytes.windows(name.len()).position(|w| w == name).unwrap();
    bytes[at + 8] = b'0';
    let e = open(bytes, vec![]).unwrap_err();
    assert!(e.to_string().contains("cluster.0.blk.0.attn_q.basis_u"), "{e}");
}

#[test]
fn b6_a_basis_outlives_its_pack() {
    let pack = open(pack_bytes(), vec![]).unwrap();
    let beta = pack.adapter("beta").unwrap();
    drop(pack);
    assert_eq!(beta.factors(Q).unwrap().u_numbers().unwrap(), factors(&layout(QuantType::F32)[0]).0);
}

#[test]
fn files_are_published_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.gguf");
    let write = |existing, bytes: &[u8]| {
        publish(&path, existing, |f| {
            use std::io::Write;
            f.write_all(bytes)
        })
    };
    write(Existing::Replace, b"one").unwrap();
    write(Existing::Replace, b"two").unwrap();
    assert_eq!(write(Existing::Keep, b"three").unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
    let failed: std::io::Result<()> = publish(&path, Existing::Replace, |_| Err(std::io::Error::other("no")));
    assert!(failed.is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"two");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing is left behind");

    for n in [2, 10_000, 1, 9999] {
        std::fs::write(segment_file_name(&path, n), b"").unwrap();
    }
    let found = segment_files(&path).unwrap();
    assert_eq!(found, [1, 2, 9999, 10_000].map(|n| segment_file_name(&path, n)));
}

#[test]
fn what_a_killed_writer_left_goes_and_what_is_being_written_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p.gguf");
    let names = || {
        let mut names: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names.into_iter().map(|n| n.into_string().unwrap()).collect::<Vec<_>>()
    };
    // A killed process' locks are gone, and so is its number.
    let dead = |end: &str| dir.path().join(format!(".p.gguf.4294967295-{end}"));
    std::fs::write(dead(&format!("0{TEMPORARY}")), "half").unwrap();
    std::fs::create_dir(dead(&format!("x7{TEMPORARY}"))).unwrap();
    for other in ["notes.txt", ".p.gguf.4294967295-0.tmp", &format!(".p.gguf.me-0{TEMPORARY}"), TEMPORARY] {
        std::fs::write(dir.path().join(other), "someone else's").unwrap();
    }
    let kept = names().len() - 2;
    let mut new = Unfinished::create(&path).unwrap();
    std::io::Write::write_all(new.file(), b"new").unwrap();
    remove_abandoned(dir.path());
    assert_eq!(names().len(), kept + 1, "{:?}", names());
    assert!(!dead(&format!("0{TEMPORARY}")).exists() && !dead(&format!("x7{TEMPORARY}")).exists());
    new.finish(Existing::Keep).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert_eq!(names().len(), kept + 1);

    // The moment before this process ends: its own go, whoever holds them.
    let unfinished = Unfinished::create(&path).unwrap();
    remove_own_unfinished(dir.path());
    assert_eq!(names().len(), kept + 1, "{:?}", names());
    assert!(unfinished.finish(Existing::Replace).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
}

#[test]
fn ten_thousand_adapters_open_at_once() {
    let mut w = writer(QuantType::F16);
    let mut adapter = shared("", 0, 0);
    adapter.types = StorageTypes::default();
    for i in 0..10_000 {
        adapter.name = format!("adapter-{:05}", i * 7919 % 10_000);
        w.adapter(&adapter).unwrap();
    }
    let bytes = w.finish().unwrap().into_inner();
    let size = bytes.len();
    let start = Instant::now();
    let pack = open(bytes, vec![]).unwrap();
    let opened = start.elapsed();
    assert_eq!(pack.len(), 10_000);
    assert!(pack.contains("adapter-09999"));
    let start = Instant::now();
    let a = pack.adapter("adapter-05000").unwrap();
    println!("10,000 adapters, {size} bytes: open {opened:?}, first adapter {:?}", start.elapsed());
    assert_eq!(a.cores().len(), 2);
}

#[test]
fn a_segment_that_is_merged_meanwhile_is_not_missed() {
    let folder = tempfile::tempdir().unwrap();
    let pack = folder.path().join("my.gguf");
    let [first, second] = [1, 2].map(|n| segment_file_name(&pack, n));
    for path in [&first, &second] {
        std::fs::write(path, "").unwrap();
    }
    let merging = |path: &std::path::Path| {
        if path == first {
            std::fs::remove_file(path)?;
        }
        std::fs::metadata(path).map(|_| path.to_owned())
    };
    assert_eq!(open_segments(&pack, |e| e, merging).unwrap(), std::slice::from_ref(&second));
    let broken = |path: &std::path::Path| Err::<(), _>(std::io::Error::other(path.display().to_string()));
    let error = open_segments(&pack, |e| e, broken).unwrap_err();
    assert_eq!(error.to_string(), second.display().to_string());
}
