//! Models divided between two backends: the bits of one that has all of it, wherever the border is.

use std::io::Cursor;
use std::path::{Path, PathBuf};

use lory_kernels::backend::{KvShape, KvType, MatmulJob};
use lory_kernels::cpu::{Cpu, Isa};
use lory_kernels::{Backend, QMatrix, QuantType, Reference, Split};
use lory_models::adapter::AdapterSet;
use lory_models::adapter::pack::{Pack, SynthSpec, synth_pack};
use lory_models::weights::Layer;
use lory_runtime::mapping::Loading;
use lory_runtime::{Bare, BareOptions, LoadedModel, OpenOptions, open_pack};

fn models() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/models")
}

fn cpu() -> Cpu {
    Cpu::new(Some(1), Isa::detect())
}

/// Layers `first..` on a second processor with buffers of its own, and the output with them if it is to be.
fn divided(model: &LoadedModel, first: usize, output: bool) -> Split<Cpu, Cpu> {
    let split = Split::new(cpu(), cpu(), first);
    let weights = model.decoder.weights();
    let layers = weights.layers.iter().skip(first).flat_map(Layer::factors);
    for tensor in layers.chain(output.then(|| weights.output_factor())) {
        split.load(tensor.matrix()).unwrap();
    }
    split
}

const SEQUENCES: usize = 3;

/// Logits of a prompt and of single tokens after it, in sequences of which two have adapters.
fn logits<B: Backend>(backend: &B, model: &LoadedModel, pack: &Pack) -> Vec<f32> {
    let options = BareOptions { sequences: SEQUENCES, tokens: 64, n_batch: 16, kv_type: KvType::F16 };
    let mut bare = Bare::new(backend, &model.decoder, options).unwrap();
    for (sequence, name) in ["synth-00000", "synth-00001"].into_iter().enumerate() {
        bare.set_adapters(sequence, AdapterSet::single(pack.adapter(name).unwrap()));
    }
    let mut all = Vec::new();
    for length in [5, 1, 1] {
        let tokens: Vec<Vec<u32>> =
            (0..SEQUENCES).map(|s| (0..length).map(|i| 20 + s as u32 * 9 + i).collect()).collect();
        let work: Vec<_> = tokens.iter().enumerate().map(|(s, tokens)| (s, &tokens[..])).collect();
        all.extend_from_slice(bare.run(&work).unwrap());
    }
    bare.score(2, &[7, 8, 9], &mut |_, logits| all.extend_from_slice(logits)).unwrap();
    all
}

#[test]
fn the_border_does_not_show() {
    let folder = tempfile::tempdir().unwrap();
    let files = std::fs::read_dir(models()).unwrap().map(|entry| entry.unwrap().path());
    let mut seen = 0;
    for path in files.filter(|path| path.extension().is_some_and(|extension| extension == "gguf")) {
        let options = OpenOptions { n_ctx: Some(64), loading: Loading::Map };
        let model = LoadedModel::open(&path, &options).unwrap();
        seen += 1;
        let spec = SynthSpec {
            n_adapters: 2,
            clusters: 1,
            rank: 8,
            diagonal: false,
            share_v: true,
            basis_type: QuantType::F32,
            core_type: QuantType::F16,
            seed: 5,
        };
        let bytes = synth_pack(&model.base, &spec, Cursor::new(Vec::new())).unwrap().into_inner();
        let file = folder.path().join("pack.gguf");
        std::fs::write(&file, bytes).unwrap();
        let pack = open_pack(&file, Loading::Read).unwrap();
        let want = logits(&cpu(), &model, &pack);
        assert!(want.iter().all(|x| x.is_finite()) && want.iter().any(|x| *x != want[0]));
        let layers = model.decoder.weights().layers.len();
        for first in 0..=layers {
            for output in [false, true] {
                let got = logits(&divided(&model, first, output), &model, &pack);
                let name = path.display();
                assert!(got == want, "{name}: layers from {first} on, output with them: {output}");
            }
        }
    }
    assert!(seen >= 10, "{seen} models");
}

/// Pages are written, copied, read and restored in both halves.
#[test]
fn pages_of_both_halves() {
    let shape = KvShape { layers: 3, kv_heads: 2, head_dim: 32, page_len: 4, ty: KvType::Q8_0 };
    for first in [0, 1, 3, 9] {
        let (one, split) = (cpu(), Split::new(cpu(), cpu(), first));
        let values: Vec<f32> = (0..64).map(|i| (i as f32 - 31.0) / 7.0).collect();
        let (mut a, mut b) = (one.kv_alloc(shape, 2).unwrap(), split.kv_alloc(shape, 2).unwrap());
        let mut x = one.alloc(64).unwrap();
        let mut y = split.alloc(64).unwrap();
        one.upload(&values, &mut x).unwrap();
        split.upload(&values, &mut y).unwrap();
        for layer in 0..3 {
            one.kv_write(&mut a, layer, &x, &x, &[layer as u32]).unwrap();
            let mut z = split.alloc(64).unwrap();
            split.add(&mut z, &y, 64).unwrap();
            // Keys and values may also be one buffer.
            let values = if layer == 1 { &y } else { &z };
            split.kv_write(&mut b, layer, &y, values, &[layer as u32]).unwrap();
        }
        one.kv_copy_page(&mut a, 0, 1).unwrap();
        split.kv_copy_page(&mut b, 0, 1).unwrap();
        let page = split.kv_read_page(&b, 1).unwrap();
        assert_eq!(page, one.kv_read_page(&a, 1).unwrap());
        assert!(page.iter().any(|byte| *byte != 0));
        let mut other = split.kv_alloc(shape, 1).unwrap();
        split.kv_write_page(&mut other, 0, &page).unwrap();
        assert_eq!(split.kv_read_page(&other, 0).unwrap(), page);
        for wrong in [&page[1..], &[page.clone(), vec![0]].concat()] {
            let error = split.kv_write_page(&mut other, 0, wrong).unwrap_err().to_string();
            assert!(error.contains("bytes"), "{error}");
        }
    }
}

/// Tokens are selected on the side that computed the logits: the processor leaves that to the caller, the other side does it.
#[test]
fn candidates_come_from_where_the_logits_are() {
    let split = Split::new(cpu(), Reference, 0);
    let bytes: Vec<u8> = [1f32, 4.0, -2.0, 3.0].iter().flat_map(|v| v.to_le_bytes()).collect();
    let weight = QMatrix::new(QuantType::F32, 4, 1, &bytes).unwrap();
    let mut x = split.alloc(2).unwrap();
    split.upload(&[1.0, -1.0], &mut x).unwrap();
    let mut logits = split.alloc(8).unwrap();
    split.matmul(&x, 2, &mut [MatmulJob { weight, out: &mut logits }]).unwrap();
    assert_eq!(split.top_k(&logits, 4, 4, &[0], 2).unwrap(), None);
    split.load(weight).unwrap();
    split.matmul(&x, 2, &mut [MatmulJob { weight, out: &mut logits }]).unwrap();
    let found = split.top_k(&logits, 4, 3, &[1, 0], 2).unwrap();
    assert_eq!(found, Some(vec![vec![(2, 2.0), (0, -1.0)], vec![(1, 4.0), (0, 1.0)]]));
}
