//! The folder that PEFT saves an adapter in: which of its files are read.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// Where an adapter's two files are. Whoever opens them finds out whether they are there.
#[derive(Clone, Debug)]
pub struct PeftFolder {
    /// `adapter_config.json`.
    pub config: PathBuf,
    /// `adapter_model.safetensors`.
    pub weights: PathBuf,
}

impl PeftFolder {
    /// Looks for the files in `folder`. It came from somewhere as a whole: a link in it must not make this program read
    /// what lies elsewhere. The hub's cache keeps its files in `blobs` beside its `snapshots`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for weights that are there as a pickle only, [`Error::Container`] for a file that is a link
    /// out of the folder (naming both).
    pub fn find(folder: &Path) -> Result<PeftFolder> {
        let weights = folder.join("adapter_model.safetensors");
        let pickle = folder.join("adapter_model.bin");
        if !weights.exists() && pickle.exists() {
            return Err(Error::unsupported(
                &pickle.to_string_lossy(),
                "is a pickle, which may run code and is never read; save the adapter again with safe_serialization=True",
            ));
        }
        let found = PeftFolder { config: folder.join("adapter_config.json"), weights };
        let Ok(root) = fs::canonicalize(folder) else { return Ok(found) };
        let snapshots = root.parent().filter(|p| p.file_name().is_some_and(|n| n == "snapshots"));
        let blobs = snapshots.and_then(Path::parent).map(|p| p.join("blobs"));
        for file in [&found.config, &found.weights] {
            let Ok(target) = fs::canonicalize(file) else { continue };
            if !target.starts_with(&root) && blobs.as_ref().is_none_or(|b| !target.starts_with(b)) {
                let message = format!("is a link out of its folder, to {}; copy the file", target.display());
                return Err(Error::container(&file.to_string_lossy(), message));
            }
        }
        Ok(found)
    }
}
