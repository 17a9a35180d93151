//! One adapter of a pack as a PEFT folder.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use faer::MatRef;
use lory_models::adapter::BaseInfo;
use lory_models::adapter::pack::Pack;
use lory_models::adapter::peft::{Factors, Matrix, PeftFiles, PermutedHeads};
use lory_models::adapter::publish::{TEMPORARY, folder_of, remove_abandoned, temporary_prefix};
use lory_models::gguf::Gguf;

use crate::lora_file::plain_factors;
use crate::{Error, Result};

/// Writes one adapter of a pack as a folder with `adapter_config.json` and `adapter_model.safetensors` (F32) for the
/// model that `gguf` was converted from. The folder appears whole; it must not be there yet, or be empty.
///
/// # Errors
/// A name that is not in the pack, an adapter that plain LoRA cannot express, a folder that cannot be written.
pub fn extract_peft(pack: &Pack, name: &str, base: &BaseInfo, gguf: &Gguf, folder: &Path) -> Result<()> {
    if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        let message = format!("{}: is there and is not empty; name another folder", folder.display());
        return Err(Error::Request(message));
    }
    let adapter = pack.adapter(name)?;
    if !adapter.invocation().is_empty() {
        return Err(Error::Request(format!("adapter `{name}` has invocation tokens; extract it as GGUF")));
    }
    let permuted = PermutedHeads::from_metadata(gguf.metadata())?;
    let plain = plain_factors(&adapter)?;
    let deltas: Vec<_> = plain
        .iter()
        .map(|(site, f)| {
            let (a, b) = (matrix(f.a.as_ref()), matrix(f.b.as_ref()));
            (*site, Factors { a, b, scale: 1.0, bias: None, magnitude: None })
        })
        .collect();
    let files = PeftFiles::new(base, permuted, &deltas)?;
    publish_folder(
        folder,
        &[("adapter_config.json", &files.config), ("adapter_model.safetensors", &files.weights)],
    )
    .map_err(Error::io(folder))
}

fn matrix(m: MatRef<'_, f32>) -> Matrix {
    let data = m.row_iter().flat_map(|row| row.iter().copied().collect::<Vec<f32>>()).collect();
    Matrix { rows: m.nrows(), cols: m.ncols(), data }
}

/// Writes the files into a folder beside its place, and gives it its name when they are on the disk.
fn publish_folder(folder: &Path, files: &[(&str, &[u8])]) -> std::io::Result<()> {
    let beside = folder_of(folder);
    remove_abandoned(beside);
    let (prefix, suffix) = (temporary_prefix(folder)?, TEMPORARY);
    let new = tempfile::Builder::new().prefix(&prefix).suffix(suffix).tempdir_in(beside)?;
    // The lock says that it is not abandoned; not every system opens folders.
    let lock = File::open(new.path());
    let _ = lock.as_ref().map(File::try_lock);
    // Temporary folders are private; this one is to be like any other.
    let inner = new.path().join("adapter");
    fs::create_dir(&inner)?;
    for (name, bytes) in files {
        let mut file = File::create(inner.join(name))?;
        file.write_all(bytes)?;
        file.sync_all()?;
    }
    // An empty folder gives way; where that is not so, it is asked to.
    match fs::rename(&inner, folder) {
        Err(_) if folder.is_dir() && fs::read_dir(folder)?.next().is_none() => {
            fs::remove_dir(folder)?;
            fs::rename(&inner, folder)
        }
        done => done,
    }
}
