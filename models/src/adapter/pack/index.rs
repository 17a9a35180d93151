//! The tables of names and records of a pack and its segments.

use std::{collections::BTreeMap, sync::Arc};

use xxhash_rust::xxh3::Xxh3;

use crate::{Bytes, Error, Result, gguf::Gguf};

use super::format::{DATA, EntryKind, INDEX, IndexEntry, MAX_NAME, NAMES, NO_CLUSTER, key};

/// Where an adapter's record lies, as the index of its file says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    /// Which of the pack's files.
    pub file: usize,
    /// Where in that file the record begins; inside the file, as checked.
    pub start: usize,
    pub len: usize,
    pub cluster: u32,
    pub hash: u128,
    pub err2: [f32; 2],
}

/// One file's index, decoded and checked.
pub(super) struct IndexFile {
    pub file: Arc<str>,
    pub bytes: Bytes,
    changes: Vec<Change>,
}

enum Change {
    Put(Arc<str>, Slot),
    Remove(Arc<str>),
    Rename { from: Arc<str>, to: Arc<str> },
}

/// The hash that protects index and names.
pub(super) fn index_hash(index: &[u8], names: &[u8]) -> String {
    let mut h = Xxh3::new();
    h.update(index);
    h.update(names);
    format!("{:032x}", h.digest128())
}

/// Names are shown to people and typed by them: 1 to 255 bytes, no control characters.
///
/// # Errors
/// What is wrong with the name, in words.
pub fn check_name(name: &str) -> std::result::Result<(), String> {
    if name.is_empty() || name.len() > MAX_NAME {
        return Err(format!("an adapter's name has 1 to {MAX_NAME} bytes, not {}", name.len()));
    }
    match name.chars().find(|c| c.is_control()) {
        Some(c) => Err(format!("an adapter's name has no control character such as {c:?}")),
        None => Ok(()),
    }
}

impl IndexFile {
    /// Decodes a file's index: cost is proportional to the number of adapters, not to their size.
    pub fn open(gguf: &Gguf, clusters: usize, segment: bool) -> Result<IndexFile> {
        let m = gguf.metadata();
        let (data, index, names) = (table(gguf, DATA)?, table(gguf, INDEX)?, table(gguf, NAMES)?);
        let count = m.u32(key::ADAPTERS)? as usize;
        let (file, bytes) = gguf.shards().first().ok_or_else(|| m.error(key::ADAPTERS, "has no file"))?;
        let all = (**bytes).as_ref();
        let view = |r: &std::ops::Range<usize>| all.get(r.clone()).unwrap_or_default();
        let entries = view(&index).get(..count.saturating_mul(IndexEntry::BYTES)).ok_or_else(|| {
            m.error(key::ADAPTERS, format!("is {count}, but `{INDEX}` has only {} bytes", index.len()))
        })?;
        let expected = m.str(key::INDEX_HASH)?;
        // Fuzzing looks past the hashes: it could not mutate anything behind them.
        if index_hash(view(&index), view(&names)) != expected && !cfg!(fuzzing) {
            let m = format!("is not the hash of `{INDEX}` and `{NAMES}`: the file is damaged");
            return Err(gguf.metadata().error(key::INDEX_HASH, m));
        }
        let mut reader = Reader { file, names: view(&names), data, clusters, segment, previous: None };
        let changes = entries
            .chunks_exact(IndexEntry::BYTES)
            .enumerate()
            .map(|(i, entry)| reader.change(i, entry))
            .collect::<Result<_>>()?;
        Ok(IndexFile { file: file.clone(), bytes: bytes.clone(), changes })
    }
}

fn table(gguf: &Gguf, name: &str) -> Result<std::ops::Range<usize>> {
    let info = gguf.info(name).ok_or_else(|| Error::tensor(gguf.file(), name, "is missing"))?;
    if gguf.shards().len() != 1 {
        return Err(Error::container(
            gguf.file(),
            "is a pack in several shards; packs have segments instead",
        ));
    }
    match (info.ty, info.dims.len()) {
        (lory_kernels::QuantType::I8, 1) => Ok(info.byte_range()),
        (ty, dims) => Err(Error::tensor(
            gguf.file(),
            name,
            format!("is {ty} with {dims} dimensions, expected I8 with 1"),
        )),
    }
}

struct Reader<'a> {
    file: &'a Arc<str>,
    names: &'a [u8],
    data: std::ops::Range<usize>,
    clusters: usize,
    segment: bool,
    previous: Option<&'a str>,
}

impl<'a> Reader<'a> {
    fn error(&self, entry: usize, message: impl std::fmt::Display) -> Error {
        Error::tensor(self.file, INDEX, format!("entry {entry}: {message}"))
    }

    fn name(&self, entry: usize, offset: u64, len: u64) -> Result<&'a str> {
        let range =
            offset.checked_add(len).and_then(|end| Some(offset.try_into().ok()?..end.try_into().ok()?));
        let bytes = range.and_then(|r: std::ops::Range<usize>| self.names.get(r)).ok_or_else(|| {
            self.error(entry, format!("name of {len} bytes at {offset}, `{NAMES}` has {}", self.names.len()))
        })?;
        let name = std::str::from_utf8(bytes).map_err(|_| self.error(entry, "its name is not UTF-8"))?;
        check_name(name).map_err(|e| self.error(entry, e))?;
        Ok(name)
    }

    fn change(&mut self, i: usize, bytes: &[u8]) -> Result<Change> {
        let e = IndexEntry::decode(bytes).ok_or_else(|| self.error(i, "is not valid"))?;
        let name = self.name(i, e.name_offset.into(), e.name_len.into())?;
        if self.previous.is_some_and(|p| p >= name) {
            return Err(self.error(i, format!("`{name}` is not in ascending order, or stands twice")));
        }
        self.previous = Some(name);
        if e.kind != EntryKind::Record && !self.segment {
            return Err(self.error(i, "removes or renames an adapter, which only segments do"));
        }
        match e.kind {
            EntryKind::Record => Ok(Change::Put(name.into(), self.slot(i, name, &e)?)),
            EntryKind::Tombstone => Ok(Change::Remove(name.into())),
            EntryKind::Rename => {
                Ok(Change::Rename { from: self.name(i, e.offset, e.len)?.into(), to: name.into() })
            }
        }
    }

    fn slot(&self, i: usize, name: &str, e: &IndexEntry) -> Result<Slot> {
        let (start, len) = (usize::try_from(e.offset).ok(), usize::try_from(e.len).ok());
        let start = start.and_then(|s| self.data.start.checked_add(s));
        let end = start.zip(len).and_then(|(s, l)| s.checked_add(l)).filter(|end| *end <= self.data.end);
        let (Some(start), Some(len), Some(_)) = (start, len, end) else {
            let m = format!(
                "`{name}`: record of {} bytes at {}, `{DATA}` has {}",
                e.len,
                e.offset,
                self.data.len()
            );
            return Err(self.error(i, m));
        };
        if e.cluster != NO_CLUSTER && e.cluster as usize >= self.clusters {
            return Err(self.error(i, format!("`{name}`: cluster {} of {}", e.cluster, self.clusters)));
        }
        if e.err2.iter().any(|v| !v.is_finite()) {
            return Err(self.error(i, format!("`{name}`: its error is not a finite number")));
        }
        Ok(Slot { file: 0, start, len, cluster: e.cluster, hash: e.hash, err2: e.err2 })
    }
}

/// All adapters of a pack by name, later files over earlier ones.
#[derive(Default)]
pub(super) struct Names(BTreeMap<Arc<str>, Slot>);

impl Names {
    /// Applies each file's changes to what the earlier ones left: renames look at the state before
    /// the file; then names are removed; then records are put.
    pub fn collect(files: &[IndexFile]) -> Result<Names> {
        let mut all: BTreeMap<Arc<str>, Slot> = BTreeMap::new();
        for (file, index) in files.iter().enumerate() {
            let mut put = Vec::with_capacity(index.changes.len());
            for change in &index.changes {
                match change {
                    Change::Put(name, slot) => put.push((name.clone(), Slot { file, ..*slot })),
                    Change::Remove(_) => {}
                    Change::Rename { from, to } => {
                        let slot = all.get(from).ok_or_else(|| {
                            let m = format!("renames `{from}` to `{to}`, but there is no `{from}`");
                            Error::tensor(&index.file, INDEX, m)
                        })?;
                        put.push((to.clone(), *slot));
                    }
                }
            }
            for change in &index.changes {
                if let Change::Remove(name) | Change::Rename { from: name, .. } = change {
                    all.remove(name);
                }
            }
            // The first file's names come sorted: the map is built in one go.
            if all.is_empty() {
                all = put.into_iter().collect();
            } else {
                all.extend(put);
            }
        }
        Ok(Names(all))
    }

    pub fn get(&self, name: &str) -> Option<&Slot> {
        self.0.get(name)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &Slot)> {
        self.0.iter().map(|(name, slot)| (&**name, slot))
    }
}
