//! What packs can hold beside uniform bases: one V for several projections, own factors chosen by `--auto`; and
//! the way back to PEFT folders.

use std::path::{Path, PathBuf};
use std::sync::{Arc, atomic::AtomicBool};

use lory_compress::{
    Collection, Factors, Goal, Kind, Options, Report, Silent, Source, Storage, Synthetic, compress,
    extract_peft, merge_segments, open_pack, plain_factors, read_file, remove,
};
use lory_kernels::{Backend, Cpu, QuantType, backend::KvType, cpu::Isa, ops::Reference};
use lory_models::{
    Error as ModelError,
    adapter::{
        Adapter, AdapterSet, BaseInfo, Projection, Site,
        pack::{BasisSite, Pack, PackSpec, PackWriter},
    },
    decoder::Decoder,
    gguf::Gguf,
};
use lory_tests::{
    fixtures::{self, fixture, gguf, relative_error},
    runner::Runner,
};
use tempfile::TempDir;

static GO_ON: AtomicBool = AtomicBool::new(false);

struct Packed {
    dir: TempDir,
    model: &'static str,
    gguf: Gguf,
    base: BaseInfo,
    collection: Collection,
}

impl Packed {
    /// `n` adapters of rank 4 for a fixture model.
    fn new(model: &'static str, n: usize, kind: Kind) -> Packed {
        let dir = tempfile::tempdir().expect("a folder");
        let gguf = gguf(&fixture(&format!("models/{model}.gguf")));
        let base = BaseInfo::from_gguf(&gguf).expect("a base");
        let adapters = dir.path().join("adapters");
        Synthetic::new(n, 4, kind, 1).write(&base, &adapters, &Silent, &GO_ON).expect("adapters");
        let sources = Source::find(&[adapters]).expect("adapters");
        let collection = Collection::open(base.clone(), Some(&gguf), &sources, dir.path(), &Silent, &GO_ON);
        let collection = collection.unwrap_or_else(|e| panic!("{e}"));
        Packed { dir, model, gguf, base, collection }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("pack.gguf")
    }

    fn compress(&self, options: &Options) -> Report {
        compress(&self.collection, options, &self.path(), &Silent, &GO_ON).unwrap_or_else(|e| panic!("{e}"))
    }

    fn open(&self) -> Pack {
        let pack = open_pack(&self.path(), &read_file).unwrap_or_else(|e| panic!("{e}"));
        pack.verify().unwrap_or_else(|e| panic!("{e}"));
        pack
    }

    fn logits(&self, backend: &impl Backend, adapter: Arc<Adapter>) -> Vec<f32> {
        let f = fixtures::model(self.model);
        let decoder = Decoder::load(&self.gguf, f.n_ctx).expect("a decoder");
        let set = AdapterSet::new(vec![(adapter, 1.0)]).expect("a set");
        Runner::new(backend, &decoder, 64, KvType::F32).with_adapters(set).logits(&f.tokens)
    }

    /// err² of an adapter at every site by dense deltas; a site without a delta counts as 1.
    fn dense_errors(&self, index: usize, adapter: &Adapter) -> Vec<f64> {
        let packed = plain_factors(adapter).expect("plain");
        let one = |site: &Site| {
            let want = self.collection.factors(index, *site).expect("readable").expect("there");
            let want = &want.b * &want.a;
            let got = packed.iter().find(|(s, _)| s == site).map(|(_, f)| &f.b * &f.a);
            let left = got.map_or(want.squared_norm_l2(), |got| (&want - &got).squared_norm_l2());
            f64::from(left / want.squared_norm_l2())
        };
        self.collection.sites().iter().map(one).collect()
    }
}

const HALF: Storage = Storage { basis: QuantType::F16, core: QuantType::F16 };

#[test]
fn a_shared_v_is_stored_once_and_used_by_all() {
    let packed = Packed::new("llama", 24, Kind::Shared);
    let options = Options { rank: Some(8), clusters: Some(2), storage: HALF, ..Options::default() };
    let apart = packed.compress(&options);
    let report = packed.compress(&Options { share_v: true, ..options });
    let pack = packed.open();
    // q, k, v of one V, gate and up of another: three of seven are gone.
    let file = gguf(&packed.path());
    let count = |end: &str| file.tensors().filter(|t| t.name.ends_with(end)).count();
    assert_eq!(count(".basis_v") * 7, count(".basis_u") * 4);
    assert!(report.basis_bytes < apart.basis_bytes * 9 / 10, "{} {}", report.basis_bytes, apart.basis_bytes);
    let tensors: usize =
        file.tensors().filter(|t| t.name.contains(".basis_")).map(|t| t.byte_range().len()).sum();
    assert_eq!(tensors as u64, report.basis_bytes);
    let basis: usize = (0..2).map(|c| pack.basis(c).expect("there").bytes()).sum();
    assert_eq!(basis, tensors);

    let name = Synthetic::name(7);
    let adapter = pack.adapter(&name).expect("packed");
    for (dense, told) in packed.dense_errors(7, &adapter).iter().zip(&report.by_adapter[7].module_err2) {
        assert!((dense - f64::from(*told)).abs() < 1e-3, "{dense} {told}");
    }
    // The fast backend shrinks once for the projections that share V.
    let want = packed.logits(&Reference, adapter.clone());
    let cpu = Cpu::new(Some(2), Isa::detect());
    let error = relative_error(&packed.logits(&cpu, adapter.clone()), &want);
    assert!(error < 1e-4, "{error}");
    // Segments and merges keep it.
    remove(&packed.path(), &pack, &[Synthetic::name(0)]).expect("removed");
    merge_segments(&packed.path(), &packed.open()).expect("merged");
    let merged = packed.open();
    assert_eq!((merged.len(), merged.hash()), (23, pack.hash()));
    assert_eq!(merged.adapter(&name).expect("there").identity(), adapter.identity());
}

/// Packs whose shared V is missing, or of another rank, are refused by both ends.
#[test]
fn a_shared_v_that_is_not_there_is_an_error() {
    let base = lory_models::adapter::synthetic_base(1, 64, 32, 96, 50);
    let site = |p| Site::layer(0, p);
    let at = |site, rank, shared_v| BasisSite {
        cluster: 0,
        site,
        rank,
        u_type: QuantType::F16,
        v_type: QuantType::F16,
        shared_v,
    };
    use Projection::*;
    let start = |layout: &[BasisSite]| {
        PackWriter::new(std::io::Cursor::new(Vec::new()), PackSpec::of(&base), layout).map(drop)
    };
    for layout in [
        vec![at(site(AttnQ), 4, true)],
        vec![at(site(AttnQ), 4, false), at(site(AttnK), 8, true)],
        vec![at(site(AttnV), 4, false), at(site(FfnGate), 4, true)],
        vec![at(site(AttnOutput), 4, false), at(site(FfnGate), 4, false), at(site(FfnDown), 4, true)],
    ] {
        assert!(
            matches!(start(&layout), Err(ModelError::Request(m)) if m.contains("to share")),
            "{layout:?}"
        );
    }
    assert!(start(&[at(site(AttnK), 4, false), at(site(AttnV), 4, true)]).is_ok());
    assert!(start(&[at(site(FfnGate), 4, false), at(site(FfnUp), 4, true)]).is_ok());

    // A reader looks for the V before, not elsewhere: rename the one tensor that holds it.
    let layout = [at(site(AttnQ), 4, false), at(site(AttnK), 4, true)];
    let mut writer =
        PackWriter::new(std::io::Cursor::new(Vec::new()), PackSpec::of(&base), &layout).expect("sound");
    writer.factors(&[0.5; 64 * 4], &[0.5; 64 * 4]).expect("q");
    assert!(writer.factors(&[0.5; 32 * 4], &[0.5; 64 * 4]).is_err(), "a V that has no place");
    let mut writer =
        PackWriter::new(std::io::Cursor::new(Vec::new()), PackSpec::of(&base), &layout).expect("sound");
    writer.factors(&[0.5; 64 * 4], &[0.5; 64 * 4]).expect("q");
    writer.factors(&[0.5; 32 * 4], &[]).expect("k");
    let sound = writer.finish().expect("a pack").into_inner();
    let parse = |bytes: Vec<u8>| {
        let gguf = Gguf::parse(vec![("p.gguf".into(), Arc::new(bytes) as lory_models::Bytes)])?;
        let pack = Pack::parse(gguf, Vec::new())?;
        pack.verify()
    };
    parse(sound.clone()).unwrap_or_else(|e| panic!("{e}"));
    let edited = |from: &str, to: &str| {
        let at = sound.windows(from.len()).position(|w| w == from.as_bytes()).expect("in the header");
        let mut bytes = sound.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        parse(bytes).expect_err(to).to_string()
    };
    // q's pair becomes v's, behind k; or k's U becomes one that no V comes before.
    let late = edited("cluster.0.blk.0.attn_q.basis_v", "cluster.0.blk.0.attn_v.basis_v");
    assert!(late.contains("attn_q.basis_u") && late.contains("is missing"), "{late}");
    let early = edited("cluster.0.blk.0.attn_k.basis_u", "cluster.0.blk.1.attn_k.basis_u");
    assert!(early.contains("attn_k.basis_u"), "{early}");
}

#[test]
fn automatic_choices_are_never_behind_factors_of_their_own() {
    for (kind, n) in [(Kind::Independent, 24), (Kind::Shared, 24)] {
        let packed = Packed::new("llama", n, kind);
        let uniform = packed.compress(&Options { rank: Some(8), clusters: Some(2), ..Options::default() });
        let budget = uniform.basis_bytes + uniform.core_bytes;
        let auto = packed.compress(&Options { auto: Some(Goal::Bytes(budget)), ..Options::default() });
        assert!(
            auto.basis_bytes + auto.core_bytes <= budget,
            "{} {budget}",
            auto.basis_bytes + auto.core_bytes
        );
        assert!(auto.err2.mean < uniform.err2.mean, "{kind:?}: {:?} {:?}", auto.err2, uniform.err2);
        // Rounding is in the one and not in the other.
        let svd = auto.stored_svd_err2_at_equal_bytes;
        assert!(auto.err2.mean <= svd + 2e-3, "{kind:?}: {:?} {svd}", auto.err2);
        println!("{kind:?}: uniform {:?}, auto {:?}, svd {svd}", uniform.err2, auto.err2);
        println!("{} own, {} left out of {}", auto.own, auto.left_out, n * packed.collection.sites().len());
        let pack = packed.open();
        let mut forms = (0, 0);
        for i in 0..n {
            let adapter = pack.adapter(&Synthetic::name(i)).expect("packed");
            let info = pack.info(&Synthetic::name(i)).expect("there");
            forms.0 += info.sites.iter().filter(|s| s.private).count();
            forms.1 += info.sites.iter().filter(|s| s.rank == 0).count();
            let told = &auto.by_adapter[i].module_err2;
            for (dense, told) in packed.dense_errors(i, &adapter).iter().zip(told) {
                assert!((dense - f64::from(*told)).abs() < 2e-3 * dense.max(0.05), "{dense} {told}");
            }
        }
        assert_eq!(forms, (auto.own, auto.left_out));
        // The budget counts matrices; records add their headers and padding.
        assert!(auto.bytes_after < budget + 40_000 + 2_000 * n as u64, "{} {budget}", auto.bytes_after);
    }
}

#[test]
fn an_error_ceiling_is_kept_with_own_factors_where_nothing_is_shared() {
    let packed = Packed::new("llama", 16, Kind::Independent);
    let report = packed.compress(&Options { auto: Some(Goal::Error(0.2)), ..Options::default() });
    // Expected before rounding, measured behind it.
    assert!(report.err2.mean <= 0.2 + 2e-3, "{:?}", report.err2);
    let (told, bytes) = report.expected.expect("told");
    assert!(told <= 0.2 && bytes >= report.basis_bytes + report.core_bytes, "{told} {bytes}");
}

fn peft(packed: &Packed, folder: &Path) -> Adapter {
    let source = Source::find(&[folder.into()]).expect("a source").remove(0);
    source.load(&packed.base, Some(&packed.gguf)).unwrap_or_else(|e| panic!("{e}")).adapter
}

/// Dense delta of one site, row by row.
fn dense(all: &[(Site, Factors)], site: Site) -> Vec<f32> {
    let f = &all.iter().find(|(s, _)| *s == site).expect("there").1;
    let product = &f.b * &f.a;
    product.row_iter().flat_map(|row| row.iter().copied().collect::<Vec<f32>>()).collect()
}

#[test]
fn an_adapter_goes_out_as_a_peft_folder_and_comes_back() {
    // Permuted rows of q and k, a fused base, and one that is neither.
    for model in ["llama", "smollm3", "phi3", "qwen3"] {
        let packed = Packed::new(model, 6, Kind::Shared);
        packed.compress(&Options { rank: Some(5), clusters: Some(1), storage: HALF, ..Options::default() });
        let pack = packed.open();
        let name = Synthetic::name(3);
        let folder = packed.dir.path().join("out");
        let extract = || extract_peft(&pack, &name, &packed.base, &packed.gguf, &folder);
        extract().unwrap_or_else(|e| panic!("{model}: {e}"));
        let config = std::fs::read_to_string(folder.join("adapter_config.json")).expect("written");
        assert_eq!(config.contains("qkv_proj"), model == "phi3", "{config}");
        let back = peft(&packed, &folder);
        let want = pack.adapter(&name).expect("packed");
        let (got, want_plain) = (plain_factors(&back).expect("plain"), plain_factors(&want).expect("plain"));
        assert_eq!(got.len(), want_plain.len());
        for (site, _) in &want_plain {
            let (got, want) = (dense(&got, *site), dense(&want_plain, *site));
            assert!(relative_error(&got, &want) < 1e-6, "{model}, {site}");
        }
        let error =
            relative_error(&packed.logits(&Reference, Arc::new(back)), &packed.logits(&Reference, want));
        assert!(error < 1e-5, "{model}: {error}");
        // What is there stays as it is.
        let before = std::fs::read(folder.join("adapter_model.safetensors")).expect("written");
        assert!(extract().is_err());
        assert_eq!(std::fs::read(folder.join("adapter_model.safetensors")).expect("there"), before);
        let left = std::fs::read_dir(packed.dir.path()).expect("a folder").count();
        assert_eq!(left, 3, "adapters, pack and folder");
    }
}

#[test]
fn ranks_that_differ_by_module_survive_the_way_through_peft() {
    let packed = Packed::new("llama", 24, Kind::Shared);
    let uniform = packed.compress(&Options { rank: Some(12), clusters: Some(2), ..Options::default() });
    let goal = Goal::Bytes(uniform.basis_bytes + uniform.core_bytes);
    packed.compress(&Options { auto: Some(goal), storage: HALF, ..Options::default() });
    let pack = packed.open();
    for i in [1, 20] {
        let name = Synthetic::name(i);
        let folder = packed.dir.path().join(&name);
        extract_peft(&pack, &name, &packed.base, &packed.gguf, &folder).unwrap_or_else(|e| panic!("{e}"));
        let want = packed.logits(&Reference, pack.adapter(&name).expect("packed"));
        let got = packed.logits(&Reference, Arc::new(peft(&packed, &folder)));
        assert!(relative_error(&got, &want) < 1e-5, "{name}");
    }
}
