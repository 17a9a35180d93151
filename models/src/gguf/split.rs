//! Files that llama.cpp's `gguf-split` cut in pieces: names and keys of shards.

use super::Metadata;
use crate::Result;

/// A shard's file name taken apart: `model-00002-of-00003.gguf` is number 2 of 3.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardName {
    /// What stands before `-00001-of-`, directories included.
    pub prefix: String,
    /// The shard's number, from 1.
    pub number: u16,
    /// How many shards there are.
    pub count: u16,
}

impl ShardName {
    /// The names of all shards, in order.
    pub fn siblings(&self) -> impl Iterator<Item = String> {
        (1..=self.count).map(|i| format!("{}-{i:05}-of-{:05}.gguf", self.prefix, self.count))
    }
}

/// Takes a shard's path apart; `None` if it does not have the pattern of a shard's name.
pub fn shard_name(path: &str) -> Option<ShardName> {
    let (rest, count) = path.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let digits = |s: &str| -> Option<u16> {
        (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok())?
    };
    let (number, count) = (digits(number)?, digits(count)?);
    (1..=count).contains(&number).then(|| ShardName { prefix: prefix.into(), number, count })
}

/// The keys `split.*` of one file; a file without them is shard 0 of 1.
pub(super) struct Split {
    pub no: u32,
    pub count: u32,
    /// Tensors in all shards together, if the file says so.
    pub tensors: Option<u32>,
}

impl Split {
    pub fn read(metadata: &Metadata) -> Result<Split> {
        let split = Split {
            no: metadata.opt_u32("split.no")?.unwrap_or(0),
            // gguf-split --merge leaves the key behind with the value 0.
            count: metadata.opt_u32("split.count")?.unwrap_or(0).max(1),
            tensors: metadata.opt_u32("split.tensors.count")?,
        };
        if split.count > u16::MAX.into() {
            return Err(metadata.error("split.count", format!("is {}, the limit is 65535", split.count)));
        }
        if split.no >= split.count {
            let m = format!("is {}, but split.count is {}", split.no, split.count);
            return Err(metadata.error("split.no", m));
        }
        Ok(split)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shard_names_come_apart_and_back() {
        let s = shard_name("dir/model-q4-00002-of-00003.gguf").unwrap();
        assert_eq!((s.prefix.as_str(), s.number, s.count), ("dir/model-q4", 2, 3));
        let all: Vec<_> = s.siblings().collect();
        assert_eq!(all.len(), 3);
        assert_eq!(all[0], "dir/model-q4-00001-of-00003.gguf");
        assert_eq!(all[1], "dir/model-q4-00002-of-00003.gguf");
    }

    #[test]
    fn other_names_are_no_shards() {
        for name in [
            "model.gguf",
            "model-00001-of-00003.bin",
            "model-1-of-3.gguf",
            "model-00000-of-00003.gguf",
            "model-00004-of-00003.gguf",
            "model-+0001-of-00003.gguf",
            "model-99999-of-99999.gguf",
            "-of-.gguf",
        ] {
            assert_eq!(shard_name(name), None, "{name}");
        }
    }
}
