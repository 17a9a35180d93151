//! GGUF files on disk, through the mapping: sizes that only a sparse file has, shards, synthetic models.

use std::{fs, io::Write, path::Path};

use lory_kernels::{QuantType, backend::KvType, ops::Reference, quant};
use lory_models::{
    config::Config,
    decoder::Decoder,
    synth::{self, FileType},
    tokenizer::{EncodeOptions, Tokenizer},
};
use lory_runtime::mapping::{Loading, open_gguf};
use lory_tests::{
    gguf_bytes::{GgufBytes, array, string},
    runner::Runner,
};

const TERABYTE: u64 = 1 << 40;

/// Writes `start` and makes the file a terabyte of zeros long; `None` where the file system cannot.
fn sparse(path: &Path, start: &[u8]) -> Option<()> {
    let mut file = fs::File::create(path).unwrap();
    file.write_all(start).unwrap();
    match file.set_len(TERABYTE) {
        Ok(()) => Some(()),
        Err(e) => {
            eprintln!("skipped: no sparse files here: {e}");
            None
        }
    }
}

#[test]
fn a_sparse_file_cannot_make_the_parser_take_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.gguf");
    let new = GgufBytes::new;
    for (file, word) in [
        (new().key("k", 9, &array(8, TERABYTE / 16, &[])), "`k`"),
        (new().key("k", 9, &array(0, TERABYTE / 2, &[])), "`k`"),
        (new().key("k", 8, &(TERABYTE / 2).to_le_bytes()), "`k`"),
        (new().claim_keys(TERABYTE / 16), "key 1 of"),
        (new().claim_tensors(TERABYTE / 64), "tensor 1 of"),
        // Keys enough to fill the memory limit, each for itself within it.
        ((0..9).fold(new(), |f, i| f.key(format!("k{i}"), 9, &array(0, 32 << 20, &[0; 32 << 20]))), "`k8`"),
    ] {
        let Some(()) = sparse(&path, &file.header()) else { return };
        let message = open_gguf(&path, Loading::Map).unwrap_err().to_string();
        assert!(message.contains("sparse.gguf") && message.contains(word), "{message}");
    }
}

#[test]
fn a_sparse_file_may_be_sound() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("sparse.gguf");
    let file = GgufBytes::new().key("general.architecture", 8, &string("llama")).tensor(
        "t",
        &[TERABYTE / 2],
        QuantType::I8 as u32,
        0,
    );
    let Some(()) = sparse(&path, &file.header()) else { return };
    let open = open_gguf(&path, Loading::Map).unwrap();
    assert_eq!(open.gguf.tensor("t").unwrap().matrix().row(0)[1 << 30], 0);
    // Reading a terabyte is refused or fails; it must not end the process.
    let error = open_gguf(&path, Loading::Read);
    assert!(error.is_err_and(|e| e.to_string().contains("memory")));
}

fn synthetic(shape: &str, ty: &str, path: &Path) {
    let shape = synth::shape(shape).unwrap();
    let out = std::io::BufWriter::new(fs::File::create(path).unwrap());
    synth::model(shape, FileType::from_name(ty).unwrap(), 11, out, |_| ()).unwrap();
}

/// Deviation and mean of the weights are those asked for, in every format of every file type.
#[test]
fn synthetic_weights_have_unit_gain() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let mut seen = std::collections::BTreeSet::new();
    for ty in FileType::all() {
        synthetic("llama-tiny", ty.name(), &path);
        let open = open_gguf(&path, Loading::Map).unwrap();
        for info in open.gguf.tensors().filter(|t| t.dims.len() == 2) {
            let t = open.gguf.tensor(&info.name).unwrap();
            let mut w = vec![0.0; info.elements()];
            quant::dequantize_row(t.ty(), t.matrix().bytes(), &mut w).unwrap();
            let n = w.len() as f64;
            let mean = w.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let rms = (w.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n).sqrt();
            let gain = rms * (t.cols() as f64).sqrt();
            assert!((gain - 1.0).abs() < 0.05, "{ty} {t:?}: gain {gain}");
            assert!(mean.abs() < 0.03 * rms, "{ty} {t:?}: mean {mean}, rms {rms}");
            seen.insert(t.ty());
        }
    }
    // The three floats and the twelve quantized formats that have kernels.
    let names: Vec<_> = seen.iter().map(|t| t.name()).collect();
    assert_eq!(names.len(), 15, "{names:?}");
}

#[test]
fn a_synthetic_vocabulary_encodes_and_decodes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    synthetic("llama-tiny", "Q4_0", &path);
    let open = open_gguf(&path, Loading::Read).unwrap();
    let tokenizer = Tokenizer::from_metadata(open.gguf.metadata()).unwrap();
    assert_eq!(tokenizer.vocab_size(), 512);
    let text = "Hello,\n  Straße, 日本語 🦙 1234";
    let ids = tokenizer.encode(text, EncodeOptions { add_special: true, parse_special: true });
    assert_eq!(ids.first().copied(), tokenizer.bos());
    assert_eq!(tokenizer.decode(&ids[1..]), text);
    let english = "In the beginning there was a made-up world";
    let (n, bytes) = (tokenizer.encode(english, EncodeOptions::default()).len(), english.len());
    assert!(n < bytes * 9 / 10, "merges are hardly used: {n} tokens for {bytes} bytes");
    assert!(ids.iter().all(|&id| id < 512));
}

/// Names and shapes of every shape are what its architecture's loader asks for. The data are a
/// hole in the file.
#[test]
fn every_synthetic_shape_loads() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for shape in synth::shapes() {
        let header = synth::header(shape, FileType::from_name("Q4_K_M").unwrap(), 1);
        let data = header.data_bytes();
        let file = fs::File::create(&path).unwrap();
        drop(header.start(&file).unwrap());
        let len = file.metadata().unwrap().len();
        if file.set_len(len + data).is_err() {
            eprintln!("skipped: no sparse files here");
            return;
        }
        let open = open_gguf(&path, Loading::Map).unwrap();
        let config = Config::from_metadata(open.gguf.metadata(), 64).unwrap();
        assert_eq!((config.n_layers(), config.n_embd), (shape.layers, shape.d_model));
        // Holes read as zeros, which are no frequency factors; all else loads.
        match Decoder::load(&open.gguf, 64) {
            Ok(decoder) => assert_eq!(decoder.vocab_size(), shape.vocab, "{}", shape.name),
            Err(e) => assert!(e.to_string().contains("rope_freqs"), "{}: {e}", shape.name),
        }
    }
}

/// Random weights, but no random size: logits of about 1 after all layers.
#[test]
fn synthetic_models_run_in_every_file_type() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    for ty in FileType::all() {
        synthetic("llama-tiny", ty.name(), &path);
        let open = open_gguf(&path, Loading::Map).unwrap();
        let decoder = Decoder::load(&open.gguf, 64).unwrap();
        let logits = Runner::new(&Reference, &decoder, 8, KvType::F16).logits(&[496, 72, 101, 300]);
        let rms = (logits.iter().map(|x| x * x).sum::<f32>() / logits.len() as f32).sqrt();
        assert!((0.3..3.0).contains(&rms), "{ty}: logits of size {rms}");
    }
}
