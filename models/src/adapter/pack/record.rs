//! An adapter's record: decoded when the adapter is first used.

use std::{fmt::Write, sync::Arc};

use lory_kernels::QuantType;
use serde::{Deserialize, Serialize};

use crate::{
    Bytes, Error, Result, Tensor,
    adapter::{
        Adapter, AdapterBuilder, Basis, Core, CoreMatrix, Delta, Factors, Site, SiteShape, SiteShapes,
        finite::{check_finite, check_type},
        hash::Hasher,
    },
};

use super::format::{
    CoreEntry, DATA, Fields, MAX_META, MatrixForm, NO_CLUSTER, PART_ALIGN, Part, RecordHeader, bitmap_len,
};

/// What a record tells about its adapter besides the weights. Unknown fields are ignored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct AdapterMeta {
    /// For the people who choose it.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// The file it was made from.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source: String,
    /// A hash of that file.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub source_hash: String,
    /// What it was before: `lora`, `dora` …
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
}

/// What a record says of one site.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SiteInfo {
    /// Where.
    pub site: Site,
    /// Rank of the factors as stored; 0 without a delta.
    pub rank: usize,
    /// Format of the core, if there is one.
    pub core_type: Option<QuantType>,
    /// Whether U and V are the adapter's own.
    pub private: bool,
    /// The resolved scale.
    pub scale: f32,
    /// Relative squared error of the compression, where known.
    pub err2: Option<f32>,
}

/// A record inside its file, with the length and hash that the index gives.
pub(super) struct Record<'a> {
    pub file: &'a Arc<str>,
    pub name: &'a str,
    pub bytes: &'a Bytes,
    /// Where in the file it begins.
    pub start: usize,
    pub len: usize,
    pub cluster: u32,
    pub hash: u128,
}

/// How far a record was read.
struct Reading {
    /// The next part's first byte.
    at: usize,
    /// The last part's name; one buffer for all.
    name: String,
}

/// A record's fixed part.
struct Head {
    header: RecordHeader,
    cores: Vec<(Site, CoreEntry)>,
    invocation: Vec<u32>,
    meta: AdapterMeta,
    /// Where the first part begins.
    payload: usize,
}

impl Record<'_> {
    fn error(&self, message: impl std::fmt::Display) -> Error {
        Error::tensor(self.file, DATA, format!("adapter `{}`: {message}", self.name))
    }

    pub fn view(&self) -> Result<&[u8]> {
        let all = (**self.bytes).as_ref();
        let end = self.start.checked_add(self.len);
        end.and_then(|end| all.get(self.start..end)).ok_or_else(|| {
            self.error(format!("record of {} bytes at {} lies outside the file", self.len, self.start))
        })
    }

    fn head(&self, shapes: &SiteShapes) -> Result<Head> {
        let view = self.view()?;
        let mut f = Fields(view);
        let header =
            RecordHeader::decode(&mut f).ok_or_else(|| self.error("its record has no valid header"))?;
        let n_layers = shapes.n_layers();
        if header.n_layers as usize != n_layers {
            return Err(self.error(format!("is for {} layers, the pack for {n_layers}", header.n_layers)));
        }
        if (header.cluster, header.len) != (self.cluster, self.len as u64) {
            return Err(self.error(format!(
                "its record says cluster {} and {} bytes, the index cluster {} and {}",
                header.cluster, header.len, self.cluster, self.len
            )));
        }
        let ends = || self.error(format!("its record of {} bytes ends inside its header", self.len));
        let bitmap = f.0.get(..bitmap_len(n_layers)).ok_or_else(ends)?;
        f.0 = f.0.get(bitmap.len()..).unwrap_or_default();
        let sites: Vec<Site> = (0..bitmap.len() * 8)
            .filter(|i| bitmap.get(i / 8).is_some_and(|b| b >> (i % 8) & 1 == 1))
            .map(Site::from_index)
            .collect();
        if sites.len() != header.n_cores as usize {
            return Err(self.error(format!("marks {} sites but has {} cores", sites.len(), header.n_cores)));
        }
        let mut cores = Vec::with_capacity(sites.len());
        for site in sites {
            let entry = CoreEntry::decode(&mut f);
            cores.push((site, entry.ok_or_else(|| self.error(format!("the entry of {site} is not valid")))?));
        }
        let n_tokens = (header.n_invocation as usize).min(f.0.len() / 4);
        let invocation: Option<Vec<u32>> = (0..n_tokens).map(|_| f.u32()).collect();
        let invocation = invocation.filter(|t| t.len() == header.n_invocation as usize).ok_or_else(ends)?;
        let meta_len = header.meta_len as usize;
        let meta = f.0.get(..meta_len).filter(|_| meta_len <= MAX_META).ok_or_else(ends)?;
        let meta = serde_json::from_slice(meta).map_err(|e| self.error(format!("its description: {e}")))?;
        let payload = (view.len() - f.0.len() + meta_len).next_multiple_of(PART_ALIGN);
        Ok(Head { header, cores, invocation, meta, payload })
    }

    /// Reads names and numbers, not the weights.
    pub fn describe(&self, shapes: &SiteShapes) -> Result<(AdapterMeta, Vec<u32>, Vec<SiteInfo>)> {
        let head = self.head(shapes)?;
        let info = |(site, e): &(Site, CoreEntry)| SiteInfo {
            site: *site,
            rank: if e.matrix == MatrixForm::None { 0 } else { e.rank.into() },
            core_type: matches!(e.matrix, MatrixForm::Full | MatrixForm::Diagonal).then_some(e.core_type),
            private: e.private,
            scale: e.scale,
            err2: Some(e.err2).filter(|e| *e >= 0.0),
        };
        Ok((head.meta, head.invocation, head.cores.iter().map(info).collect()))
    }

    /// Compares the record's bytes with the hash in the index.
    pub fn check_hash(&self) -> Result<()> {
        match xxhash_rust::xxh3::xxh3_128(self.view()?) == self.hash || cfg!(fuzzing) {
            true => Ok(()),
            false => {
                Err(self.error("its record does not have the hash that the index gives: the file is damaged"))
            }
        }
    }

    /// The adapter, with every number in its record checked. `n_vocab` bounds invocation tokens.
    pub fn decode(&self, shapes: &SiteShapes, basis: Option<Arc<Basis>>) -> Result<Adapter> {
        self.check_hash()?;
        let head = self.head(shapes)?;
        let n_vocab = shapes.get(Site::TOKEN_EMBD).map_or(usize::MAX, |s| s.in_features);
        if let Some(t) = head.invocation.iter().find(|t| **t as usize >= n_vocab) {
            return Err(self.error(format!("is invoked by token {t}, the base has {n_vocab}")));
        }
        let mut reading = Reading { at: head.payload, name: String::new() };
        let mut identity = Hasher::new();
        let basis_identity = basis.as_ref().map_or(0, |b| b.identity());
        identity.bytes(&basis_identity.to_le_bytes()).bytes(&self.hash.to_le_bytes());
        let mut builder =
            AdapterBuilder::new(self.name).invocation(head.invocation).identity(identity.finish());
        for (site, entry) in &head.cores {
            let shape = shapes.get(*site).ok_or_else(|| self.error(format!("{site} is not in the base")))?;
            let shared = basis.as_ref().and_then(|b| b.factors(*site));
            builder.core(*site, self.core(*site, entry, shape, shared, &mut reading)?);
        }
        if reading.at != self.len || (head.header.cluster == NO_CLUSTER) != basis.is_none() {
            return Err(self.error(format!("its cores end at byte {} of {}", reading.at, self.len)));
        }
        if let Some(basis) = basis {
            builder = builder.basis(basis);
        }
        builder.build(shapes)
    }

    fn core(
        &self,
        site: Site,
        entry: &CoreEntry,
        shape: SiteShape,
        shared: Option<&Factors>,
        reading: &mut Reading,
    ) -> Result<Core> {
        let scale = entry.scale;
        if !scale.is_finite() || (scale != 0.0 && !scale.is_normal()) {
            return Err(self.error(format!("{site}: scale {scale} is not a normal number")));
        }
        if !entry.private && entry.matrix != MatrixForm::None {
            let rank = shared.map(Factors::rank);
            if rank != Some(entry.rank.into()) {
                let has = rank.map_or("has no factors there".into(), |r| format!("has rank {r} there"));
                return Err(self.error(format!("{site}: core of rank {}, its basis {has}", entry.rank)));
            }
        }
        let mut parts: [Option<Tensor>; 6] = Default::default();
        for (part, ty, rows, cols) in entry.parts(site, shape.out_features, shape.in_features) {
            if let Some(slot) = parts.get_mut(part as usize) {
                *slot = Some(self.part(site, part, ty, rows, cols, reading)?);
            }
        }
        let [v, u, matrix, delta_scale, row_scale, bias] = parts;
        let matrix = match (entry.matrix, matrix) {
            (MatrixForm::Full, Some(t)) => Some(CoreMatrix::Full(t)),
            (MatrixForm::Diagonal, Some(t)) => Some(CoreMatrix::Diagonal(t)),
            (MatrixForm::Identity, _) => Some(CoreMatrix::Identity),
            _ => None,
        };
        let delta = match (matrix, u, v) {
            (Some(m), Some(u), Some(v)) if entry.bands => {
                Delta::Private(Factors::in_bands(site, shape, u, v)?, m)
            }
            (Some(m), Some(u), Some(v)) => Delta::Private(Factors::new(site, shape, u, v)?, m),
            (Some(m), None, None) => Delta::Shared(m),
            (None, None, None) => Delta::None,
            _ => return Err(self.error(format!("{site}: factors without a delta"))),
        };
        let err2 = Some(entry.err2).filter(|e| *e >= 0.0);
        Ok(Core { delta, scale, delta_scale, row_scale, bias, err2 })
    }

    fn part(
        &self,
        site: Site,
        part: Part,
        ty: QuantType,
        rows: usize,
        cols: usize,
        reading: &mut Reading,
    ) -> Result<Tensor> {
        let bytes = ty.bytes_for(cols).and_then(|row| row.checked_mul(rows));
        let bytes = bytes.ok_or_else(|| {
            self.error(format!(
                "{site}: {part:?} of {rows} x {cols} cannot be {ty}, whose blocks are {}",
                ty.block_len()
            ))
        })?;
        let Reading { at, name } = reading;
        let end = at.checked_add(bytes).filter(|end| *end <= self.len).ok_or_else(|| {
            self.error(format!(
                "{site}: {part:?} of {bytes} bytes at {at} exceeds its record of {}",
                self.len
            ))
        })?;
        let range = self.start + *at..self.start + end;
        name.clear();
        let _ = write!(name, "{}/{site}", self.name);
        let tensor = Tensor::new(self.file.clone(), name, ty, rows, cols, self.bytes.clone(), range)?;
        check_type(&tensor)?;
        check_finite(&tensor)?;
        *at = end.next_multiple_of(PART_ALIGN);
        Ok(tensor)
    }
}
