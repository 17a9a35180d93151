//! Reading adapters: GGUF files, PEFT folders, packs with their segments.

use std::{path::Path, sync::Arc};

use lory_models::adapter::{
    Adapter, gguf_lora as format,
    pack::{Pack, open_segments},
    peft::{PeftAdapter, PeftFolder, PermutedHeads},
};
use lory_models::gguf::Gguf;

use crate::{
    Error, LoadedModel, Result,
    mapping::{self, File, Loading, OpenGguf},
};

/// An adapter and the files that it points into.
type Read = (Adapter, Vec<Arc<File>>);

pub(super) fn lora(model: &LoadedModel, loading: Loading, path: &Path, name: &str) -> Result<Read> {
    match path.is_dir() {
        true => peft(model, loading, path, name),
        false => gguf_lora(model, mapping::open_gguf(path, loading)?, name),
    }
}

pub(super) fn gguf_lora(model: &LoadedModel, open: OpenGguf, name: &str) -> Result<Read> {
    Ok((format::load(name, &open.gguf, &model.base)?, open.files))
}

fn peft(model: &LoadedModel, loading: Loading, folder: &Path, name: &str) -> Result<Read> {
    if !folder.join("adapter_config.json").exists() {
        let message = "is a folder without adapter_config.json: give a GGUF file or a folder that PEFT saved";
        return Err(Error::io(&folder.to_string_lossy(), message));
    }
    let files = PeftFolder::find(folder)?;
    let config = File::open(&files.config, Loading::Read)?;
    let weights = Arc::new(File::open(&files.weights, loading)?);
    let LoadedModel { gguf, base, decoder, .. } = model;
    let permuted = PermutedHeads::from_metadata(gguf.metadata())?;
    let peft = PeftAdapter::read(name, config.as_ref(), weights.clone(), base, permuted)?;
    let adapter = peft.into_adapter(base, |site| decoder.weights().at(site).cloned())?;
    Ok((adapter, vec![weights]))
}

/// Opens a pack and the segments beside it, also while another process merges them into it.
pub fn open_pack(path: &Path, loading: Loading) -> Result<Pack> {
    Ok(pack(path, loading)?.0)
}

/// [`open_pack`] with the files, for [`File::check_unchanged`].
pub(super) fn pack(path: &Path, loading: Loading) -> Result<(Pack, Vec<Arc<File>>)> {
    let unlisted = |e| Error::io(&path.to_string_lossy(), e);
    let segments = open_segments(path, unlisted, |segment| mapping::open_gguf(segment, loading))?;
    parse_pack(mapping::open_gguf(path, loading)?, segments)
}

pub(super) fn parse_pack(main: OpenGguf, segments: Vec<OpenGguf>) -> Result<(Pack, Vec<Arc<File>>)> {
    let mut files = main.files;
    let mut parts: Vec<Gguf> = Vec::with_capacity(segments.len());
    for segment in segments {
        files.extend(segment.files);
        parts.push(segment.gguf);
    }
    Ok((Pack::parse(main.gguf, parts)?, files))
}

pub(super) fn name_of(path: &Path, name: Option<&str>) -> Result<String> {
    match name {
        Some("") => Err(Error::io(&path.to_string_lossy(), "an adapter needs a name that is not empty")),
        Some(name) => Ok(name.into()),
        None => match path.file_stem() {
            Some(stem) => Ok(stem.to_string_lossy().into_owned()),
            None => Err(Error::io(&path.to_string_lossy(), "has no file name to call the adapter by")),
        },
    }
}
