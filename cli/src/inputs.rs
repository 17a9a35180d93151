//! What a command reads, so that it does not write over it.

use std::{
    fs,
    path::{Path, PathBuf},
};

use lory_models::{adapter::pack::segment_files, gguf::shard_name};

use crate::{
    adapter_flags::AdapterFlags,
    failure::{Failure, Outcome},
};

/// Files that are read, each with what it is in words.
#[derive(Default)]
pub struct Inputs(Vec<(PathBuf, &'static str)>);

impl Inputs {
    /// A model, with all its shards.
    pub fn model(mut self, path: &Path) -> Inputs {
        let shards = path.to_str().and_then(shard_name);
        self.0.extend(
            shards.iter().flat_map(|s| s.siblings()).map(|shard| (shard.into(), "a shard of the model")),
        );
        self.file(path, "the model itself")
    }

    /// A pack, with its segments.
    pub fn pack(mut self, path: &Path) -> Inputs {
        // Whoever opens the pack says why its folder cannot be read.
        let segments = segment_files(path).unwrap_or_default();
        self.0.extend(segments.into_iter().map(|segment| (segment, "a segment of the pack")));
        self.file(path, "the pack itself")
    }

    /// An adapter: a file, or the files of a PEFT folder.
    pub fn adapter(mut self, path: &Path) -> Inputs {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        self.0.extend(entries.map(|entry| (entry.path(), "part of an adapter that is read")));
        self.file(path, "an adapter that is read")
    }

    /// Everything that these flags name.
    pub fn adapters(mut self, flags: &AdapterFlags) -> Outcome<Inputs> {
        for file in flags.lora_files()? {
            self = self.adapter(&file.path);
        }
        Ok(flags.pack.iter().fold(self, |inputs, pack| inputs.pack(pack)))
    }

    /// Files with texts, where they are given.
    pub fn texts<'a>(self, paths: impl IntoIterator<Item = &'a PathBuf>) -> Inputs {
        paths.into_iter().fold(self, |inputs, path| inputs.file(path, "a text that is read"))
    }

    fn file(mut self, path: &Path, what: &'static str) -> Inputs {
        self.0.push((path.into(), what));
        self
    }

    /// Refuses to write what is read; `flag` is the one that names `output`.
    pub fn refuse(&self, flag: &str, output: &Path) -> Outcome {
        let is_file = |path: &Path| fs::metadata(path).is_ok_and(|m| m.is_file());
        if !is_file(output) {
            return Ok(());
        }
        // Devices and FIFOs are not compared, for that opens them.
        let same = |path: &Path| is_file(path) && same_file::is_same_file(path, output).unwrap_or(false);
        match self.0.iter().find(|(path, _)| same(path)) {
            None => Ok(()),
            Some((_, what)) => {
                let message = format!("{flag} {}: is {what}; name another file", output.display());
                Err(Failure::usage(message))
            }
        }
    }
}
