//! The adapters of a pack on both sides: Lory reads them from the pack, llama.cpp gets each as a LoRA
//! file that was extracted from it.

use std::fs::File;
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use lory_benches::pearson;
use lory_kernels::QuantType;
use lory_kernels::cpu::physical_cores;
use lory_models::adapter::pack::{SynthSpec, synth_pack};
use lory_models::adapter::{AdapterSet, BaseCheck};
use lory_runtime::mapping::Loading;
use lory_runtime::{LoadedModel, open_pack, random_tokens};
use tempfile::TempDir;

use crate::llama::{Llama, Lora};
use crate::lora_file;
use crate::side::Side;

/// The first adapters of a pack.
pub struct Adapted {
    pub sets: Vec<AdapterSet>,
    files: Vec<PathBuf>,
    _folder: TempDir,
}

impl Adapted {
    /// `n` different adapters. llama.cpp's files hold two bytes per number, some 90 MB for rank 64 on all projections of
    /// a model of 1.2 B parameters.
    pub fn open(pack: &Path, model: &LoadedModel, n: usize) -> Result<Adapted, String> {
        let text = |e: &dyn std::fmt::Display| e.to_string();
        let pack = open_pack(pack, Loading::Map).map_err(|e| text(&e))?;
        pack.check_base(&model.base, BaseCheck::Exact).map_err(|e| text(&e))?;
        if pack.len() < n {
            return Err(format!("{}: {} adapters, {n} are needed", pack.file(), pack.len()));
        }
        let folder = tempfile::tempdir().map_err(|e| text(&e))?;
        let names = pack.names().take(n);
        let adapters: Vec<_> =
            names.map(|name| pack.adapter(name).map_err(|e| text(&e))).collect::<Result<_, _>>()?;
        let files: Vec<PathBuf> = (0..n).map(|i| folder.path().join(format!("{i}.gguf"))).collect();
        eprintln!("writing {n} adapters as LoRA files for llama.cpp in {}", folder.path().display());
        let next = AtomicUsize::new(0);
        let write = || -> Result<(), String> {
            while let Some(i) = Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < n) {
                lora_file::write(&adapters[i], &model.base.architecture, &files[i])?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..physical_cores()).map(|_| scope.spawn(write)).collect();
            threads.into_iter().try_for_each(|t| t.join().unwrap_or_else(|_| Err("a thread panicked".into())))
        })?;
        let sets = adapters.into_iter().map(AdapterSet::single).collect();
        Ok(Adapted { sets, files, _folder: folder })
    }

    /// The first `n` for llama.cpp.
    pub fn loras<'m>(&self, llama: &'m Llama, n: usize) -> Result<Vec<Lora<'m>>, String> {
        self.files.iter().take(n).map(|file| llama.lora(file)).collect()
    }
}

/// Runs a prompt in every sequence, alone, and compares the logits; then forgets it. The lowest correlation, and
/// the highest between two adapters, which shows that they differ at all.
pub fn check(
    lory: &mut dyn Side,
    llama: &mut dyn Side,
    n: usize,
    vocab: usize,
) -> Result<(f64, f64), String> {
    let tokens = random_tokens(11, 8, vocab);
    let (mut lowest, mut between) = (1.0f64, -1.0f64);
    let mut last: Option<Vec<f32>> = None;
    for sequence in 0..n {
        lory.run(&[(sequence, &tokens)])?;
        llama.run(&[(sequence, &tokens)])?;
        let ours = lory.logits(0)?.to_vec();
        lowest = lowest.min(pearson(&ours, llama.logits(0)?));
        if let Some(last) = &last {
            between = between.max(pearson(&ours, last));
        }
        last = Some(ours);
        lory.truncate(sequence, 0)?;
        llama.truncate(sequence, 0)?;
    }
    if lowest < 0.99 || between > 0.999_9 {
        return Err(format!(
            "with adapters the two sides did not compute the same: correlation {lowest:.5}, between adapters {between:.5}"
        ));
    }
    Ok((lowest, between))
}

/// A small pack beside a model, for a quick run.
pub fn tiny_pack(model: &Path, loaded: &LoadedModel, adapters: usize) -> Result<PathBuf, String> {
    let path = model.with_extension("pack.gguf");
    let spec = SynthSpec {
        n_adapters: adapters,
        clusters: 2,
        rank: 8,
        diagonal: false,
        share_v: false,
        basis_type: QuantType::F16,
        core_type: QuantType::F16,
        seed: 1,
    };
    let file = File::create(&path).map_err(|e| e.to_string())?;
    synth_pack(&loaded.base, &spec, BufWriter::new(file)).map_err(|e| e.to_string())?;
    Ok(path)
}
