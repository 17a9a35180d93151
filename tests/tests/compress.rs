//! Collections become packs: end to end on a tiny base, with and without llama.cpp beside.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lory_compress::{
    AddOptions, Collection, Error, Kind, Method, Options, Report, Silent, Source, Storage, Synthetic, add,
    compress, extract, merge_segments, open_gguf, open_pack, plain_factors, read_file, remove, rename,
    write_gguf_lora,
};
use lory_kernels::QuantType;
use lory_kernels::backend::KvType;
use lory_kernels::ops::Reference;
use lory_models::adapter::pack::Pack;
use lory_models::adapter::{Adapter, AdapterSet, BaseInfo, Factors, Site, SiteShape, gguf_lora};
use lory_models::decoder::Decoder;
use lory_models::gguf::{Gguf, Value};
use lory_runtime::{Engine, EngineOptions, Request, SamplerOptions, SessionOptions};
use lory_tests::edited::Edited;
use lory_tests::fixtures::{self, fixture, gguf};
use lory_tests::runner::Runner;
use tempfile::TempDir;

static GO_ON: AtomicBool = AtomicBool::new(false);

struct Base {
    gguf: Gguf,
    info: BaseInfo,
}

fn base() -> Base {
    let gguf = gguf(&fixture("models/llama.gguf"));
    let info = BaseInfo::from_gguf(&gguf).expect("a base");
    Base { gguf, info }
}

fn synth(folder: &Path, base: &Base, n: usize, rank: usize, kind: Kind, seed: u64) {
    let synthetic = Synthetic::new(n, rank, kind, seed);
    synthetic.write(&base.info, folder, &Silent, &GO_ON).expect("adapters");
}

fn collect(base: &Base, paths: &[PathBuf], scratch: &Path) -> Result<Collection, Error> {
    let sources = Source::find(paths)?;
    Collection::open(base.info.clone(), Some(&base.gguf), &sources, scratch, &Silent, &GO_ON)
}

/// A folder with `n` adapters and their pack.
fn packed(n: usize, kind: Kind, options: &Options) -> (TempDir, Base, Report, PathBuf) {
    let dir = tempfile::tempdir().expect("a folder");
    let base = base();
    let adapters = dir.path().join("adapters");
    synth(&adapters, &base, n, 4, kind, 1);
    let collection = collect(&base, &[adapters], dir.path()).expect("a collection");
    let path = dir.path().join("pack.gguf");
    let report = compress(&collection, options, &path, &Silent, &GO_ON).unwrap_or_else(|e| panic!("{e}"));
    (dir, base, report, path)
}

fn open(path: &Path) -> Pack {
    open_pack(path, &read_file).unwrap_or_else(|e| panic!("{e}"))
}

fn logits(base: &Base, adapter: Option<Arc<Adapter>>) -> Vec<f32> {
    let f = fixtures::model("llama");
    let decoder = Decoder::load(&base.gguf, f.n_ctx).expect("a decoder");
    let set = AdapterSet::new(adapter.map(|a| (a, 1.0)).into_iter().collect()).expect("a set");
    Runner::new(&Reference, &decoder, 32, KvType::F32).with_adapters(set).logits(&f.tokens)
}

#[test]
fn two_hundred_adapters_answer_alike_from_the_pack_and_extracted() {
    // Halves: with integer bases the activations are rounded too, differently on the two roads.
    let storage = Storage { basis: QuantType::F16, core: QuantType::F16 };
    let options = Options { rank: Some(8), clusters: Some(4), storage, ..Options::default() };
    let (dir, base, report, path) = packed(200, Kind::Shared, &options);
    assert_eq!((report.adapters, report.clusters), (200, 4));
    assert!(report.cluster_sizes.iter().all(|n| *n > 0));
    assert!(report.bytes_after < report.bytes_before, "{} {}", report.bytes_after, report.bytes_before);
    let pack = open(&path);
    pack.verify().unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(pack.len(), 200);
    let plain = logits(&base, None);
    for i in [0, 57, 121, 199] {
        let name = Synthetic::name(i);
        let file = dir.path().join("extracted.gguf");
        extract(&pack, &name, &base.info, QuantType::F32, &file).unwrap_or_else(|e| panic!("{e}"));
        let lora = gguf_lora::load(&name, &gguf(&file), &base.info).unwrap_or_else(|e| panic!("{e}"));
        let from_pack = logits(&base, Some(pack.adapter(&name).expect("packed")));
        let from_file = logits(&base, Some(Arc::new(lora)));
        let error = fixtures::relative_error(&from_pack, &from_file);
        assert!(error < 1e-4, "{name}: {error}");
        let moved = fixtures::relative_error(&from_pack, &plain);
        assert!(
            moved > 20.0 * error && moved > 1e-3,
            "{name}: an adapter that does nothing proves nothing: {moved}"
        );
    }
}

/// A rank that is not whole blocks, in the formats that are the default: U lies in bands.
#[test]
fn a_pack_with_bands_answers_like_what_is_extracted() {
    let options = Options { rank: Some(12), clusters: Some(2), ..Options::default() };
    let (dir, base, _, path) = packed(24, Kind::Shared, &options);
    let pack = open(&path);
    pack.verify().unwrap_or_else(|e| panic!("{e}"));
    let plain = logits(&base, None);
    for i in [1, 22] {
        let name = Synthetic::name(i);
        let adapter = pack.adapter(&name).expect("packed");
        let in_bands = |(_, f): (Site, &Factors)| f.is_in_bands();
        assert!(adapter.basis().expect("shared").iter().any(in_bands));
        let file = dir.path().join("extracted.gguf");
        extract(&pack, &name, &base.info, QuantType::F32, &file).unwrap_or_else(|e| panic!("{e}"));
        let lora = gguf_lora::load(&name, &gguf(&file), &base.info).unwrap_or_else(|e| panic!("{e}"));
        let (from_pack, from_file) = (logits(&base, Some(adapter)), logits(&base, Some(Arc::new(lora))));
        let error = fixtures::relative_error(&from_pack, &from_file);
        let moved = fixtures::relative_error(&from_pack, &plain);
        assert!(error < 2e-2 && moved > 5.0 * error, "{name}: {error} of {moved}");
    }
}

/// err² of every site of an adapter as packed, computed from dense deltas.
fn dense_errors(collection: &Collection, index: usize, adapter: &Adapter) -> Vec<f64> {
    let packed = plain_factors(adapter).expect("plain");
    packed
        .iter()
        .map(|(site, got)| {
            let want = collection.factors(index, *site).expect("readable").expect("there");
            let (want, got) = (&want.b * &want.a, &got.b * &got.a);
            f64::from((&want - &got).squared_norm_l2() / want.squared_norm_l2())
        })
        .collect()
}

#[test]
fn reported_errors_are_those_of_the_file() {
    for (method, storage, share_v) in [
        (Method::Full, Storage::default(), false),
        (Method::Full, Storage { basis: QuantType::Q4_0, core: QuantType::F16 }, false),
        (Method::Full, Storage { basis: QuantType::Q8_0, core: QuantType::Q4_0 }, true),
        (Method::Diag, Storage { basis: QuantType::F16, core: QuantType::F16 }, false),
    ] {
        let options =
            Options { rank: Some(24), clusters: Some(2), method, storage, share_v, ..Options::default() };
        let (dir, base, report, path) = packed(20, Kind::Independent, &options);
        let collection = collect(&base, &[dir.path().join("adapters")], dir.path()).expect("the same");
        let pack = open(&path);
        for i in [3, 19] {
            let adapter = pack.adapter(&Synthetic::name(i)).expect("packed");
            let dense = dense_errors(&collection, i, &adapter);
            let told = &report.by_adapter[i].module_err2;
            assert_eq!(dense.len(), told.len());
            for (d, t) in dense.iter().zip(told) {
                assert!((d - f64::from(*t)).abs() < 1e-3 * d.max(0.01), "{method:?} {storage:?}: {d} {t}");
            }
        }
    }
}

/// What shares no basis keeps its own factors, in a format that is not the bases'.
#[test]
fn reported_errors_of_what_is_kept_are_those_of_the_file() {
    let base = base();
    for basis in [QuantType::Q8_0, QuantType::Q4_0] {
        let dir = tempfile::tempdir().expect("a folder");
        let some = Synthetic::new(1, 4, Kind::Independent, 7);
        let deltas = base.info.shapes.iter().take(4);
        let deltas = deltas.map(|(site, s)| (site, some.factors(0, site, (s.out_features, s.in_features))));
        let path = dir.path().join("table.gguf");
        write_gguf_lora(&path, &base.info, "table", QuantType::F32, &[], deltas.collect()).expect("written");
        let collection = collect(&base, &[path], dir.path()).expect("a collection");
        let storage = Storage { basis, core: QuantType::F16 };
        let options = Options { rank: Some(4), clusters: Some(1), storage, ..Options::default() };
        let pack = dir.path().join("p.gguf");
        compress(&collection, &options, &pack, &Silent, &GO_ON).expect("a pack");
        let adapter = open(&pack).adapter("table").expect("packed");
        let dense = dense_errors(&collection, 0, &adapter);
        assert!(adapter.cores()[0].0 == Site::TOKEN_EMBD && dense[0] < 1e-6, "{dense:?}");
        for ((site, core), dense) in adapter.cores().iter().zip(&dense) {
            let told = f64::from(core.err2.expect("known"));
            assert!((dense - told).abs() < 1e-3 * dense.max(1e-3), "{site}: {dense} {told}");
        }
    }
}

#[test]
fn enough_rank_loses_only_the_rounding() {
    let storage = Storage { basis: QuantType::F32, core: QuantType::F32 };
    let options = Options { rank: Some(24), clusters: Some(1), storage, ..Options::default() };
    for kind in [Kind::Shared, Kind::Independent] {
        let (_dir, _, report, _) = packed(6, kind, &options);
        assert!(report.err2.worst < 1e-5, "{:?}", report.err2);
    }
}

#[test]
fn the_same_seed_gives_the_same_file_at_any_thread_count() {
    let bytes = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
        pool.install(|| {
            let options = Options { rank: Some(8), clusters: Some(3), ..Options::default() };
            let (_dir, _, _, path) = packed(24, Kind::Shared, &options);
            let bytes = std::fs::read(path).expect("the pack");
            // The records name their sources, which lie in another temporary folder each time.
            let pack_start = bytes.len();
            (pack_start, open_bytes(bytes))
        })
    };
    let (a, b) = (bytes(1), bytes(3));
    assert_eq!(a.0, b.0);
    assert_eq!(a.1, b.1);
}

/// Everything that is computed, without the records' descriptions.
fn open_bytes(bytes: Vec<u8>) -> Vec<(String, Vec<f32>)> {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("p.gguf");
    std::fs::write(&path, bytes).expect("written");
    let pack = open(&path);
    pack.names()
        .map(|name| {
            let deltas = plain_factors(&pack.adapter(name).expect("an adapter")).expect("plain");
            let numbers = deltas.iter().flat_map(|(_, f)| f.b.col(0).iter().copied().collect::<Vec<f32>>());
            (name.to_owned(), numbers.collect())
        })
        .collect()
}

#[test]
fn automatic_ranks_beat_the_uniform_ones_in_the_same_bytes() {
    let uniform = Options { rank: Some(16), clusters: Some(2), ..Options::default() };
    let (dir, base, report, _) = packed(48, Kind::Shared, &uniform);
    let budget = report.basis_bytes + report.core_bytes;
    let collection = collect(&base, &[dir.path().join("adapters")], dir.path()).expect("the same");
    let auto = Options { auto: Some(lory_compress::Goal::Bytes(budget)), ..Options::default() };
    let path = dir.path().join("auto.gguf");
    let better = compress(&collection, &auto, &path, &Silent, &GO_ON).unwrap_or_else(|e| panic!("{e}"));
    assert!(better.basis_bytes + better.core_bytes <= budget);
    assert!(better.err2.mean < report.err2.mean, "{:?} {:?}", better.err2, report.err2);
}

#[test]
fn an_error_to_reach_is_reached_in_the_bytes_that_were_expected() {
    for error in [0.1, 0.3] {
        let options = Options { auto: Some(lory_compress::Goal::Error(error)), ..Options::default() };
        let (_dir, _, report, _) = packed(24, Kind::Shared, &options);
        let (mean, bytes) = report.expected.expect("a choice");
        let got = report.basis_bytes + report.core_bytes;
        assert!(mean <= error && (report.err2.mean - mean).abs() < 0.1 * mean, "{mean} {:?}", report.err2);
        assert!(got.abs_diff(bytes) <= bytes / 10 && report.private == 0, "{bytes} {got}");
    }
}

#[test]
fn adapters_that_do_not_fit_keep_their_own_factors() {
    let dir = tempfile::tempdir().expect("a folder");
    let base = base();
    let adapters = dir.path().join("adapters");
    synth(&adapters, &base, 16, 4, Kind::Shared, 1);
    // A stranger: another family and another start.
    let strange = dir.path().join("strange");
    synth(&strange, &base, 1, 4, Kind::Independent, 99);
    std::fs::rename(strange.join("adapter-00000.gguf"), adapters.join("stranger.gguf")).expect("moved");
    let collection = collect(&base, &[adapters], dir.path()).expect("a collection");
    let all = Options { rank: Some(12), clusters: Some(1), ..Options::default() };
    let path = dir.path().join("pack.gguf");
    let report = compress(&collection, &all, &path, &Silent, &GO_ON).expect("a pack");
    let stranger = report.by_adapter.last().expect("17 adapters").err2.mean;
    let others = report.by_adapter[..16].iter().map(|a| a.err2.mean).fold(0.0, f64::max);
    assert!(stranger > others + 0.05, "{stranger} {others}");
    let options = Options { max_error: Some((stranger + others) / 2.0), ..all };
    let report = compress(&collection, &options, &path, &Silent, &GO_ON).expect("a pack");
    assert_eq!(report.private, 1);
    assert!(report.by_adapter[16].private.as_deref().is_some_and(|why| why.contains("above")));
    let pack = open(&path);
    assert_eq!(pack.info("stranger").expect("there").cluster, None);
    let adapter = pack.adapter("stranger").expect("there");
    for error in dense_errors(&collection, 16, &adapter) {
        assert!(error < 1e-5, "{error}");
    }
}

#[test]
fn the_engine_answers_alike_from_the_pack_and_from_the_extracted_file() {
    // Halves, for the reason given above.
    let storage = Storage { basis: QuantType::F16, core: QuantType::F16 };
    let options = Options { rank: Some(16), clusters: Some(2), storage, ..Options::default() };
    let (dir, base, _, path) = packed(24, Kind::Shared, &options);
    let pack = open(&path);
    let f = fixtures::model("llama");
    let settings = EngineOptions { threads: Some(2), n_ctx: Some(256), ..EngineOptions::default() };
    let engine = Engine::open(&fixture("models/llama.gguf"), &settings).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(engine.adapters().open_pack(&path).unwrap_or_else(|e| panic!("{e}")), 24);
    for i in [2, 11, 23] {
        let name = Synthetic::name(i);
        let file = dir.path().join(format!("extracted-{i}.gguf"));
        extract(&pack, &name, &base.info, QuantType::F32, &file).unwrap_or_else(|e| panic!("{e}"));
        let from_file = engine.adapters().load_lora(&file, None).unwrap_or_else(|e| panic!("{e}"));
        let from_pack = engine.adapters().resolve(&name).unwrap_or_else(|e| panic!("{e}"));
        let answers = [from_pack, from_file].map(|id| {
            let options = SessionOptions { adapters: vec![(id, 1.0)], ..SessionOptions::default() };
            let mut session = engine.session(&options).unwrap_or_else(|e| panic!("{e}"));
            let request = Request {
                tokens: f.tokens.clone(),
                max_new_tokens: 12,
                sampler: SamplerOptions::greedy(),
                ignore_eos: true,
                ..Request::default()
            };
            session.generate(request).and_then(|mut g| g.text()).unwrap_or_else(|e| panic!("{e}"))
        });
        assert_eq!(answers[0], answers[1], "{name}");
    }
}

#[test]
fn peft_folders_and_gguf_files_mix() {
    let dir = tempfile::tempdir().expect("a folder");
    let base = base();
    let folder = dir.path().join("adapters");
    synth(&folder, &base, 4, 4, Kind::Shared, 1);
    let peft = ["lora", "rslora", "patterns", "dora", "lora_bf16"].map(|name| fixture("peft").join(name));
    let paths: Vec<PathBuf> = [folder].into_iter().chain(peft).collect();
    let collection = collect(&base, &paths, dir.path()).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(collection.len(), 9);
    let storage = Storage { basis: QuantType::F32, core: QuantType::F32 };
    let options = Options { rank: Some(64), clusters: Some(1), storage, ..Options::default() };
    let path = dir.path().join("p.gguf");
    let report = compress(&collection, &options, &path, &Silent, &GO_ON).unwrap_or_else(|e| panic!("{e}"));
    assert!(report.err2.worst < 1e-4, "64 columns hold all of them: {:?}", report.err2);
    let pack = open(&path);
    assert_eq!(pack.info("dora").expect("there").meta.kind, "dora");
    for name in ["lora", "rslora", "dora"] {
        // The same adapter uncompressed; that one is compared with PEFT's own forward elsewhere.
        let source = Source::find(&[fixture("peft").join(name)]).expect("a source").remove(0);
        let direct = source.load(&base.info, Some(&base.gguf)).unwrap_or_else(|e| panic!("{e}")).adapter;
        let want = logits(&base, Some(Arc::new(direct)));
        let got = logits(&base, Some(pack.adapter(name).expect("packed")));
        let error = fixtures::relative_error(&got, &want);
        assert!(error < 2e-3, "{name}: {error}");
    }
    let refused = collect(&base, &[fixture("peft").join("ia3")], dir.path());
    assert!(refused.is_err_and(|e| e.to_string().contains("IA3")));
}

#[test]
fn packs_grow_shrink_and_merge() {
    let options = Options { rank: Some(16), clusters: Some(2), ..Options::default() };
    let (dir, base, report, path) = packed(24, Kind::Shared, &options);
    let before = std::fs::read(&path).expect("the pack");
    // Three more of the same kind, and one that fits nothing.
    let more = dir.path().join("more");
    let synthetic = Synthetic::new(27, 4, Kind::Shared, 1);
    let synthetic = Synthetic { families: Synthetic::new(24, 4, Kind::Shared, 1).families, ..synthetic };
    synthetic.write(&base.info, &more, &Silent, &GO_ON).expect("adapters");
    (0..24).for_each(|i| {
        std::fs::remove_file(more.join(format!("{}.gguf", Synthetic::name(i)))).expect("removed")
    });
    let strange = dir.path().join("strange");
    synth(&strange, &base, 1, 4, Kind::Independent, 99);
    std::fs::rename(strange.join("adapter-00000.gguf"), more.join("stranger.gguf")).expect("moved");

    let old = open(&path);
    let collection = collect(&base, &[more], dir.path()).expect("a collection");
    let added = add(&path, &old, &collection, AddOptions::default(), &Silent, &GO_ON).expect("added");
    let poor: Vec<bool> = added.iter().map(|a| a.poor).collect();
    assert_eq!(poor, [false, false, false, true], "{added:?}");
    assert!(added[..3].iter().all(|a| a.mean_err2 < 2.0 * report.err2.mean + 0.05), "{added:?}");
    assert_eq!(std::fs::read(&path).expect("the pack"), before, "the pack itself is not rewritten");
    assert_eq!(old.len(), 24, "who has it open sees no change");

    let grown = open(&path);
    assert_eq!(grown.len(), 28);
    let adapter = grown.adapter("stranger").expect("added");
    let dense = dense_errors(&collection, 3, &adapter);
    let mean = dense.iter().sum::<f64>() / dense.len() as f64;
    assert!((mean - added[3].mean_err2).abs() < 1e-3, "{mean} {added:?}");

    let again =
        add(&path, &grown, &collection, AddOptions::default(), &Silent, &GO_ON).expect_err("a taken name");
    assert!(again.to_string().contains("already"), "{again}");
    // Another program that opened the same state cannot overwrite the first one's segment.
    rename(&path, &grown, "stranger", "friend").expect("renamed");
    let late = remove(&path, &grown, &["stranger".into()]).expect_err("too late");
    assert!(late.to_string().contains("try again"), "{late}");
    let now = open(&path);
    assert!(now.contains("friend") && !now.contains("stranger"));
    assert!(rename(&path, &now, "friend", &Synthetic::name(0)).is_err());
    remove(&path, &now, &[Synthetic::name(0), Synthetic::name(1)]).expect("removed");
    let now = open(&path);
    assert_eq!(now.len(), 26);
    merge_segments(&path, &now).expect("merged");
    let merged = open(&path);
    assert_eq!(merged.len(), 26);
    assert_eq!(merged.names().collect::<Vec<_>>(), now.names().collect::<Vec<_>>());
    assert_eq!(merged.adapter("friend").expect("there").identity(), adapter.identity());
    let left = std::fs::read_dir(dir.path()).expect("a folder").filter_map(Result::ok);
    let segments = left.filter(|e| e.file_name().to_string_lossy().contains("seg-")).count();
    assert_eq!(segments, 0);
}

#[test]
fn collections_that_make_no_sense_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let base = base();
    let folder = dir.path().join("a");
    synth(&folder, &base, 2, 4, Kind::Shared, 1);
    let first = folder.join("adapter-00000.gguf");
    let refusal = |paths: &[PathBuf]| match collect(&base, paths, dir.path()) {
        Ok(_) => panic!("accepted"),
        Err(e) => e.to_string(),
    };
    let twice = refusal(&[folder.clone(), first.clone()]);
    assert!(twice.contains("two adapters are called `adapter-00000`"), "{twice}");
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).expect("made");
    assert!(refusal(std::slice::from_ref(&empty)).contains("holds no adapter"));
    assert!(refusal(&[dir.path().join("nowhere.gguf")]).contains("nowhere.gguf"));
    assert!(refusal(&[fixture("models/llama.gguf")]).contains("general.type"));

    // An adapter of another base: its fingerprint differs.
    let other = gguf(&fixture("models/llama_tied.gguf"));
    let other = Base { info: BaseInfo::from_gguf(&other).expect("a base"), gguf: other };
    let foreign = dir.path().join("foreign");
    synth(&foreign, &other, 1, 4, Kind::Shared, 2);
    let mixed = refusal(&[folder.clone(), foreign.join("adapter-00000.gguf")]);
    assert!(mixed.contains("adapter-00000"), "{mixed}");
    std::fs::rename(foreign.join("adapter-00000.gguf"), foreign.join("other.gguf")).expect("renamed");
    let mixed = refusal(&[folder.clone(), foreign.clone()]);
    assert!(mixed.contains("other.gguf") && mixed.contains("another base"), "{mixed}");

    // A weight that is not a number.
    let mut bytes = std::fs::read(&first).expect("readable");
    let at = bytes.len() - 64;
    bytes[at..at + 2].copy_from_slice(&0x7e00u16.to_le_bytes());
    std::fs::write(&first, bytes).expect("written");
    let nan = refusal(&[folder]);
    assert!(nan.contains("adapter-00000.gguf") && nan.contains("not a finite number"), "{nan}");
}

/// Sound numbers whose delta is none in f32: a scale that makes it overflow, and norms beyond both ends.
#[test]
fn deltas_that_no_f32_holds_are_refused_by_name() {
    let base = base();
    let (site, shape) = base.info.shapes.iter().find(|(s, _)| s.projection().is_some()).expect("a layer");
    let table = (Site::TOKEN_EMBD, base.info.shapes.get(Site::TOKEN_EMBD).expect("there"));
    let refusal = |(site, shape): (Site, SiteShape), b: f32, a: f32, alpha: f32| {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("loud.gguf");
        let some = Synthetic::new(1, 1, Kind::Shared, 1);
        let mut factors = some.factors(0, site, (shape.out_features, shape.in_features));
        factors.b.fill(b);
        factors.a.fill(a);
        write_gguf_lora(&path, &base.info, "loud", QuantType::F32, &[], vec![(site, factors)])
            .expect("written");
        let loud = Edited::of(&gguf(&path)).set("adapter.lora.alpha", Value::F32(alpha));
        std::fs::write(&path, loud.bytes()).expect("written");
        let collection = collect(&base, std::slice::from_ref(&path), dir.path()).expect("readable");
        let pack = dir.path().join("pack.gguf");
        let error = compress(&collection, &Options::default(), &pack, &Silent, &GO_ON).expect_err("refused");
        assert!(!pack.exists());
        let error = error.to_string();
        assert!(error.contains("loud.gguf") && error.contains(&site.to_string()), "{error}");
        error
    };
    for at in [(site, shape), table] {
        assert!(refusal(at, 100.0, 1.0, 3e38).contains("not finite"));
        assert!(refusal(at, 1e30, 1e30, 1.0).contains("not a normal f32"));
        assert!(refusal(at, 1e-20, 1e-21, 1.0).contains("not a normal f32"));
        assert!(refusal(at, 1e-30, 1e-30, 1.0).contains("not a normal f32"));
    }
}

#[test]
fn an_interrupted_run_or_a_failing_disk_leaves_nothing_behind() {
    let dir = tempfile::tempdir().expect("a folder");
    let base = base();
    let folder = dir.path().join("adapters");
    synth(&folder, &base, 6, 4, Kind::Shared, 1);
    let collection = collect(&base, &[folder], dir.path()).expect("a collection");
    let out = dir.path().join("out");
    std::fs::create_dir(&out).expect("made");
    let options = Options { rank: Some(4), clusters: Some(1), ..Options::default() };
    let stop = AtomicBool::new(true);
    let error = compress(&collection, &options, &out.join("p.gguf"), &Silent, &stop).expect_err("stopped");
    assert!(matches!(error, Error::Interrupted));
    let error =
        compress(&collection, &options, &out.join("no/p.gguf"), &Silent, &GO_ON).expect_err("no folder");
    assert!(error.to_string().contains("no"), "{error}");
    assert_eq!(std::fs::read_dir(&out).expect("a folder").count(), 0);
    // A pack that was there stays as it was when the run fails.
    compress(&collection, &options, &out.join("p.gguf"), &Silent, &GO_ON).expect("a pack");
    let before = std::fs::read(out.join("p.gguf")).expect("there");
    compress(&collection, &options, &out.join("p.gguf"), &Silent, &stop).expect_err("stopped");
    assert_eq!(std::fs::read(out.join("p.gguf")).expect("there"), before);
    assert_eq!(std::fs::read_dir(&out).expect("a folder").count(), 1);
}

#[test]
fn different_ranks_and_missing_modules_cost_nothing() {
    let dir = tempfile::tempdir().expect("a folder");
    let base = base();
    let folder = dir.path().join("adapters");
    synth(&folder, &base, 6, 4, Kind::Shared, 1);
    // Adapters of another rank with two modules only, in files of their own making.
    let small = Synthetic::new(2, 2, Kind::Independent, 5);
    let all: Vec<_> = base.info.shapes.iter().filter(|(s, _)| s.projection().is_some()).collect();
    for i in 0..2 {
        let deltas = all[..2]
            .iter()
            .map(|(site, s)| (*site, small.factors(i, *site, (s.out_features, s.in_features))))
            .collect();
        let path = folder.join(format!("small-{i}.gguf"));
        write_gguf_lora(&path, &base.info, "small", QuantType::F32, &[], deltas).expect("written");
    }
    let collection = collect(&base, &[folder], dir.path()).expect("a collection");
    let options = Options { rank: Some(8), clusters: Some(1), ..Options::default() };
    let path = dir.path().join("p.gguf");
    let report = compress(&collection, &options, &path, &Silent, &GO_ON).expect("a pack");
    assert_eq!(report.modules[0].adapters, 8);
    assert_eq!(report.modules[2].adapters, 6);
    assert_eq!(report.by_adapter[7].module_err2.iter().filter(|e| **e >= 0.0).count(), 2);
    let pack = open(&path);
    assert_eq!(pack.adapter("small-1").expect("there").cores().len(), 2);
    let bytes = |name: &str| pack.info(name).expect("there").bytes;
    assert!(bytes("small-1") * 3 < bytes("adapter-00001"), "{} {}", bytes("small-1"), bytes("adapter-00001"));
}

#[test]
fn the_report_is_written_for_programs_and_people() {
    let options = Options { rank: Some(8), clusters: Some(2), ..Options::default() };
    let (dir, _, report, _) = packed(16, Kind::Shared, &options);
    let folder = dir.path().join("report");
    report.write(&folder).expect("written");
    let json = std::fs::read(folder.join("report.json")).expect("there");
    let json: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
    assert_eq!(json["adapters"], 16);
    assert_eq!(json["by_adapter"].as_array().map(Vec::len), Some(16));
    assert!(json["error_by_rank"].as_array().is_some_and(|c| c.len() > 2));
    let curve: Vec<f64> = report.error_by_rank.iter().map(|p| p.1).collect();
    assert!(curve.windows(2).all(|w| w[1] <= w[0] + 1e-6), "{curve:?}");
    let page = std::fs::read_to_string(folder.join("report.md")).expect("there");
    assert!(page.contains("per-adapter SVD in the same bytes") && page.contains("blk.0.attn_q"));
    for plot in ["rank.svg", "adapters.svg", "spectrum.svg"] {
        assert!(std::fs::read_to_string(folder.join(plot)).expect("there").contains("<polyline"));
    }
    assert!(open_gguf(&folder.join("report.md"), &read_file).is_err());
}

#[test]
fn adapters_of_the_embedding_alone_keep_what_they_have() {
    let dir = tempfile::tempdir().expect("a folder");
    let base = base();
    let f = base.info.shapes.get(lory_models::adapter::Site::TOKEN_EMBD).expect("there");
    let folder = dir.path().join("adapters");
    std::fs::create_dir(&folder).expect("made");
    let synthetic = Synthetic::new(2, 3, Kind::Independent, 4);
    for i in 0..2 {
        let site = lory_models::adapter::Site::TOKEN_EMBD;
        let deltas = vec![(site, synthetic.factors(i, site, (f.out_features, f.in_features)))];
        let path = folder.join(format!("table-{i}.gguf"));
        write_gguf_lora(&path, &base.info, "table", QuantType::F16, &[], deltas).expect("written");
    }
    let collection = collect(&base, &[folder], dir.path()).expect("a collection");
    let path = dir.path().join("p.gguf");
    let report = compress(&collection, &Options::default(), &path, &Silent, &GO_ON).expect("a pack");
    assert_eq!((report.adapters, report.modules.len()), (2, 0));
    let pack = open(&path);
    pack.verify().expect("sound");
    let want = Source::find(&[dir.path().join("adapters/table-1.gguf")]).expect("a source").remove(0);
    let want = want.load(&base.info, None).expect("an adapter").adapter;
    let got = logits(&base, Some(pack.adapter("table-1").expect("packed")));
    let error = fixtures::relative_error(&got, &logits(&base, Some(Arc::new(want))));
    assert!(error < 1e-3, "{error}");
}

#[test]
fn names_that_no_pack_takes_are_refused_before_the_work() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("a\u{7}b.gguf");
    std::fs::write(&path, b"GGUF").expect("written");
    let error = Source::find(&[path]).expect_err("a bell").to_string();
    assert!(error.contains("control character"), "{error}");
}

/// A folder's configuration changes what its weights do.
#[test]
fn the_hash_of_a_folder_is_that_of_both_files() {
    let (dir, base, sound) = (tempfile::tempdir().expect("a folder"), base(), fixture("peft/lora"));
    let other = dir.path().join("lora");
    std::fs::create_dir(&other).expect("made");
    let (config, weights) = ("adapter_config.json", "adapter_model.safetensors");
    std::fs::copy(sound.join(weights), other.join(weights)).expect("copied");
    let text = std::fs::read_to_string(sound.join(config)).expect("there") + "\n";
    std::fs::write(other.join(config), text).expect("written");
    let hash = |folder: PathBuf| {
        collect(&base, &[folder], dir.path()).expect("a collection").entries[0].source_hash.clone()
    };
    assert_eq!(hash(sound.clone()), hash(sound.clone()));
    assert_ne!(hash(sound), hash(other));
}

/// P6 and P7: what a folder can hold instead of an adapter's two files.
#[cfg(unix)]
#[test]
fn folders_with_links_pipes_and_pickles_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let base = base();
    let (config, weights) = ("adapter_config.json", "adapter_model.safetensors");
    let sound = fixture("peft/lora");
    let make = |name: &str| {
        let folder = dir.path().join(name);
        std::fs::create_dir_all(&folder).expect("made");
        std::fs::copy(sound.join(config), folder.join(config)).expect("copied");
        folder
    };
    let load = |folder: PathBuf| collect(&base, &[folder], dir.path()).map(|c| c.len());
    let refusal = |folder: PathBuf| load(folder).expect_err("refused").to_string();

    let out = make("link");
    std::os::unix::fs::symlink(sound.join(weights), out.join(weights)).expect("linked");
    let text = refusal(out);
    assert!(text.contains("link out of its folder") && text.contains("peft/lora"), "{text}");
    let out = make("configured");
    std::fs::remove_file(out.join(config)).expect("removed");
    std::os::unix::fs::symlink(sound.join(config), out.join(config)).expect("linked");
    std::fs::copy(sound.join(weights), out.join(weights)).expect("copied");
    assert!(refusal(out).contains("link out of its folder"));

    // Links that stay inside, and the hub's cache.
    let inside = make("inside");
    std::fs::copy(sound.join(weights), inside.join("file")).expect("copied");
    std::os::unix::fs::symlink("file", inside.join(weights)).expect("linked");
    assert_eq!(load(inside).expect("sound"), 1);
    let cached = make("hub/snapshots/0123");
    std::fs::create_dir(dir.path().join("hub/blobs")).expect("made");
    std::fs::copy(sound.join(weights), dir.path().join("hub/blobs/abcd")).expect("copied");
    std::os::unix::fs::symlink("../../blobs/abcd", cached.join(weights)).expect("linked");
    assert_eq!(load(cached).expect("sound"), 1);

    let pipe = make("pipe");
    let made = std::process::Command::new("mkfifo").arg(pipe.join(weights)).status().expect("mkfifo runs");
    assert!(made.success() && refusal(pipe).contains("not a regular file"));
    let pickle = make("pickle");
    std::fs::write(pickle.join("adapter_model.bin"), b"\x80\x02").expect("written");
    let text = refusal(pickle);
    assert!(text.contains("pickle") && text.contains("safe_serialization=True"), "{text}");
    assert!(refusal(make("empty")).contains(weights));
}
