//! A whole model file, in one piece or several: its keys and its tensors by name.

use std::{collections::HashMap, ops::Range, sync::Arc};

use lory_kernels::QuantType;

use super::{Metadata, parser::Header, split::Split};
use crate::{Bytes, Error, Result, Tensor};

/// What the file says of one tensor.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    /// Its name.
    pub name: Arc<str>,
    /// Its format.
    pub ty: QuantType,
    /// One to four sizes, GGUF's `ne`: `dims[0]` is the length of a row.
    pub dims: Vec<usize>,
    /// The file that holds its data.
    pub file: Arc<str>,
    shard: usize,
    range: Range<usize>,
}

impl TensorInfo {
    /// Length of a row: `dims[0]`.
    pub fn cols(&self) -> usize {
        self.dims.first().copied().unwrap_or(0)
    }

    /// Number of rows: the product of all dimensions but the first.
    pub fn rows(&self) -> usize {
        // The parser checked that the product of all of them does not overflow.
        self.dims.iter().skip(1).product()
    }

    /// Number of weights.
    pub fn elements(&self) -> usize {
        self.dims.iter().product()
    }

    /// Where its data lies in [`TensorInfo::file`], in bytes from the file's start.
    pub fn byte_range(&self) -> Range<usize> {
        self.range.clone()
    }
}

/// A parsed GGUF file, or all shards of one. The tensors' data stays where it is.
pub struct Gguf {
    metadata: Metadata,
    shards: Vec<(Arc<str>, Bytes)>,
    tensors: Vec<TensorInfo>,
    by_name: HashMap<Arc<str>, usize>,
}

impl Gguf {
    /// Parses a file, or the shards of one in their order; each comes with the name that errors use.
    ///
    /// The keys are those of the first shard. Nothing of the tensor data is read.
    ///
    /// # Errors
    /// [`Error::Container`], [`Error::Key`], [`Error::Tensor`] for a broken file, [`Error::Unsupported`]
    /// for big-endian files, GGUF 1, unknown versions and the formats before GGUF.
    pub fn parse(shards: Vec<(Arc<str>, Bytes)>) -> Result<Gguf> {
        let mut metadata = None;
        let mut tensors: Vec<TensorInfo> = Vec::new();
        let mut by_name: HashMap<Arc<str>, usize> = HashMap::new();
        let mut promised = None;
        for (shard, (file, bytes)) in shards.iter().enumerate() {
            let header = Header::parse(file, (**bytes).as_ref())?;
            let split = Split::read(&header.metadata)?;
            check_split(&header.metadata, &split, shard, shards.len())?;
            for t in header.tensors {
                if let Some(&other) = by_name.get(&t.name) {
                    let first = tensors.get(other).map_or("another shard", |o| &*o.file);
                    return Err(Error::tensor(file, &t.name, format!("is already in {first}")));
                }
                by_name.insert(t.name.clone(), tensors.len());
                let (name, ty, dims, range) = (t.name, t.ty, t.dims, t.range);
                tensors.push(TensorInfo { name, ty, dims, file: file.clone(), shard, range });
            }
            if shard == 0 {
                promised = split.tensors.filter(|_| split.count > 1);
                metadata = Some(header.metadata);
            }
        }
        let Some(metadata) = metadata else {
            return Err(Error::Request("no file was given to parse".into()));
        };
        if let Some(n) = promised.filter(|&n| n as usize != tensors.len()) {
            let m = format!("promises {n} tensors, the {} shards hold {}", shards.len(), tensors.len());
            return Err(metadata.error("split.tensors.count", m));
        }
        Ok(Gguf { metadata, shards, tensors, by_name })
    }

    /// The keys (of the first shard).
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The name of the (first) file.
    pub fn file(&self) -> &str {
        self.metadata.file()
    }

    /// The files' names and bytes.
    pub fn shards(&self) -> &[(Arc<str>, Bytes)] {
        &self.shards
    }

    /// All tensors in file order.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter()
    }

    /// What the file says of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.by_name.get(name).and_then(|&i| self.tensors.get(i))
    }

    /// A tensor that must be there: `product(dims[1..])` rows of `dims[0]` weights.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        self.opt_tensor(name)?.ok_or_else(|| Error::tensor(self.file(), name, "is missing"))
    }

    /// A tensor, if the file has it.
    pub fn opt_tensor(&self, name: &str) -> Result<Option<Tensor>> {
        let Some(t) = self.info(name) else { return Ok(None) };
        let Some((file, bytes)) = self.shards.get(t.shard) else { return Ok(None) };
        Tensor::new(file.clone(), name, t.ty, t.rows(), t.cols(), bytes.clone(), t.range.clone()).map(Some)
    }
}

impl std::fmt::Debug for Gguf {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({} shards, {} tensors)", self.file(), self.shards.len(), self.tensors.len())
    }
}

fn check_split(metadata: &Metadata, split: &Split, shard: usize, given: usize) -> Result<()> {
    if split.count as usize != given {
        let m = match given {
            1 => format!(
                "is {}: this is one shard of several; open it under a name like \
                 model-00001-of-{:05}.gguf, beside the others",
                split.count, split.count
            ),
            _ => format!("is {}, but {given} files were given", split.count),
        };
        return Err(metadata.error("split.count", m));
    }
    if split.no as usize != shard {
        let m = format!("is {}, expected {shard} at this place; is a shard repeated or renamed?", split.no);
        return Err(metadata.error("split.no", m));
    }
    Ok(())
}
