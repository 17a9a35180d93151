//! An adapter as given, turned into the bytes of a record.

use std::borrow::Cow;

use lory_kernels::{
    QuantType,
    quant::{dequantize_row, quantize_row},
};

use crate::{
    Error,
    adapter::{
        Adapter, CoreMatrix, Delta, MAX_RANK, Site, SiteShape, SiteShapes, core::NO_VECTORS, finite::to_f32,
    },
};

use super::{
    format::{CoreEntry, MAX_META, MatrixForm, NO_CLUSTER, PART_ALIGN, Part, RecordHeader, bitmap_len},
    layout::{ULayout, row_type, v_type},
    record::AdapterMeta,
};

/// Formats that the parts of a record are stored in. Where a row is not whole blocks of the
/// format, F16 is used for that part.
#[derive(Clone, Copy, Debug)]
pub struct StorageTypes {
    /// Cores: F32, F16, Q8_0 or Q4_0.
    pub core: QuantType,
    /// U and V of adapters with factors of their own.
    pub factors: QuantType,
    /// Row scales and biases.
    pub vectors: QuantType,
}

impl Default for StorageTypes {
    fn default() -> Self {
        StorageTypes { core: QuantType::F16, factors: QuantType::F16, vectors: QuantType::F32 }
    }
}

/// C of a [`NewCore`].
#[derive(Clone, Debug)]
pub enum NewMatrix {
    /// r × r, row-major.
    Full(Vec<f32>),
    /// r entries.
    Diagonal(Vec<f32>),
    /// C = I.
    Identity,
    /// No delta.
    None,
}

/// What a new adapter adds at one site.
#[derive(Clone, Debug)]
pub struct NewCore {
    /// Between shrink and expand.
    pub matrix: NewMatrix,
    /// r; 0 without a delta. A shared basis may have more, as older packs have: then the core is padded.
    pub rank: usize,
    /// U (out × r) and V (r × in; for the token embedding in × r), if they are its own.
    pub factors: Option<(Vec<f32>, Vec<f32>)>,
    /// Their format, if it is not [`StorageTypes::factors`].
    pub factor_type: Option<QuantType>,
    /// The resolved scale of the delta.
    pub scale: f32,
    /// g, out entries.
    pub delta_scale: Option<Vec<f32>>,
    /// s, out entries.
    pub row_scale: Option<Vec<f32>>,
    /// b, out entries.
    pub bias: Option<Vec<f32>>,
    /// Relative squared error of the compression.
    pub err2: Option<f32>,
}

impl NewCore {
    /// A core in a shared basis of this rank.
    pub fn shared(matrix: NewMatrix, rank: usize, scale: f32, err2: Option<f32>) -> NewCore {
        let (factors, factor_type) = (None, None);
        let (delta_scale, row_scale, bias) = (None, None, None);
        NewCore { matrix, rank, factors, factor_type, scale, delta_scale, row_scale, bias, err2 }
    }
}

/// An adapter to be put into a pack.
#[derive(Clone, Debug)]
pub struct NewAdapter {
    /// Its name in the pack: 1 to 255 bytes without control characters.
    pub name: String,
    /// Whose basis its shared cores use; `None` if all factors are its own.
    pub cluster: Option<u32>,
    /// Description and source.
    pub meta: AdapterMeta,
    /// Tokens that switch it on; empty for one that always works.
    pub invocation: Vec<u32>,
    /// Its cores, ascending by site.
    pub cores: Vec<(Site, NewCore)>,
    /// How to store it.
    pub types: StorageTypes,
}

impl NewAdapter {
    /// A loaded adapter whose factors are all its own (a plain LoRA), to be stored uncompressed.
    ///
    /// # Errors
    /// [`Error::Request`] for an adapter with a shared basis: its record can be copied instead.
    pub fn from_adapter(adapter: &Adapter, types: StorageTypes) -> crate::Result<NewAdapter> {
        let vector = |t: &Option<crate::Tensor>| t.as_ref().map(to_f32).transpose();
        let mut cores = Vec::with_capacity(adapter.cores().len());
        for (site, core) in adapter.cores() {
            let (factors, matrix) = match &core.delta {
                Delta::Shared(_) => {
                    let m = format!("adapter `{}` shares a basis, which is not copied", adapter.name());
                    return Err(Error::Request(m));
                }
                Delta::Private(f, m) => (Some(f), Some(m)),
                Delta::None => (None, None),
            };
            let matrix = match matrix {
                Some(CoreMatrix::Full(t)) => NewMatrix::Full(to_f32(t)?),
                Some(CoreMatrix::Diagonal(t)) => NewMatrix::Diagonal(to_f32(t)?),
                Some(CoreMatrix::Identity) => NewMatrix::Identity,
                None => NewMatrix::None,
            };
            let rank = factors.map_or(0, |f| f.rank());
            let core = NewCore {
                factors: factors.map(|f| Ok::<_, Error>((f.u_numbers()?, to_f32(f.v())?))).transpose()?,
                delta_scale: vector(&core.delta_scale)?,
                row_scale: vector(&core.row_scale)?,
                bias: vector(&core.bias)?,
                ..NewCore::shared(matrix, rank, core.scale, core.err2)
            };
            cores.push((*site, core));
        }
        Ok(NewAdapter {
            name: adapter.name().into(),
            cluster: None,
            meta: AdapterMeta::default(),
            invocation: adapter.invocation().to_vec(),
            cores,
            types,
        })
    }

    /// Mean and worst err², −1 where none is known.
    pub(super) fn err2(&self) -> [f32; 2] {
        let known: Vec<f32> = self.cores.iter().filter_map(|(_, c)| c.err2).collect();
        if known.is_empty() {
            return [-1.0; 2];
        }
        [known.iter().sum::<f32>() / known.len() as f32, known.iter().copied().fold(0.0, f32::max)]
    }

    /// The record's bytes. `stored_rank` is that of a cluster's basis at a site.
    pub(super) fn encode(
        &self,
        shapes: &SiteShapes,
        stored_rank: impl Fn(u32, Site) -> Option<usize>,
    ) -> crate::Result<Vec<u8>> {
        let fail = |m: String| Error::Request(format!("adapter `{}`: {m}", self.name));
        if self.cores.is_empty() || !self.cores.is_sorted_by(|a, b| a.0 < b.0) {
            return Err(fail("its cores are none, or not in ascending order of sites".into()));
        }
        let meta = serde_json::to_vec(&self.meta).unwrap_or_default();
        if meta.len() > MAX_META {
            return Err(fail(format!("its description has {} bytes, at most {MAX_META} fit", meta.len())));
        }
        let mut bitmap = vec![0u8; bitmap_len(shapes.n_layers())];
        let mut entries = Vec::with_capacity(self.cores.len() * CoreEntry::BYTES);
        let mut payload = Vec::new();
        for (site, core) in &self.cores {
            let Some(shape) = shapes.get(*site) else {
                return Err(fail(format!("{site} is not in the base")));
            };
            let rank = self.cluster.and_then(|c| stored_rank(c, *site));
            let entry =
                plan(core, *site, shape, rank, self.types).map_err(|m| fail(format!("{site}: {m}")))?;
            for (part, ty, rows, cols) in entry.parts(*site, shape.out_features, shape.in_features) {
                let (data, given) = match (part, source(core, *site, shape, part)) {
                    (Part::U, (u, rank)) => {
                        let layout = ULayout { ty, rank, bands: entry.bands };
                        (layout.stored(u), cols)
                    }
                    (_, (data, given)) => (Cow::Borrowed(data), given),
                };
                let bytes = quantize(ty, rows, cols, &data, given)
                    .map_err(|m| fail(format!("{site}: {part:?}: {m}")))?;
                payload.extend_from_slice(&bytes);
                payload.resize(payload.len().next_multiple_of(PART_ALIGN), 0);
            }
            entries.extend_from_slice(&entry.encode());
            if let Some(byte) = bitmap.get_mut(site.index() / 8) {
                *byte |= 1 << (site.index() % 8);
            }
        }
        let mut head = bitmap;
        head.extend_from_slice(&entries);
        head.extend(self.invocation.iter().flat_map(|t| t.to_le_bytes()));
        head.extend_from_slice(&meta);
        head.resize((RecordHeader::BYTES + head.len()).next_multiple_of(PART_ALIGN) - RecordHeader::BYTES, 0);
        let header = RecordHeader {
            n_layers: shapes.n_layers() as u32,
            cluster: self.cluster.unwrap_or(NO_CLUSTER),
            n_cores: self.cores.len() as u32,
            len: (RecordHeader::BYTES + head.len() + payload.len()) as u64,
            meta_len: meta.len() as u32,
            n_invocation: self.invocation.len() as u32,
        };
        Ok([&header.encode()[..], &head, &payload].concat())
    }
}

fn plan(
    core: &NewCore,
    site: Site,
    shape: SiteShape,
    shared_rank: Option<usize>,
    types: StorageTypes,
) -> Result<CoreEntry, String> {
    let factors = core.factor_type.unwrap_or(types.factors);
    let shared = |rank| ULayout { ty: factors, rank, bands: false };
    let u = match (&core.matrix, &core.factors) {
        (NewMatrix::None, None) => shared(0),
        (NewMatrix::None, Some(_)) => return Err("has factors but no delta".into()),
        (_, Some(_)) => ULayout::plan(factors, shape.out_features, core.rank),
        (_, None) => {
            let rank = shared_rank.ok_or("its basis has no factors there")?;
            if core.rank > rank {
                return Err(format!("core of rank {} in a basis of rank {rank}", core.rank));
            }
            shared(rank)
        }
    };
    let rank = u.rank;
    let delta = !matches!(core.matrix, NewMatrix::None);
    if delta && (core.rank == 0 || rank > MAX_RANK) {
        return Err(format!("rank {}, expected 1 to {MAX_RANK}", core.rank));
    }
    check_sizes(core, site, shape)?;
    if site == Site::TOKEN_EMBD && (core.row_scale.is_some() || core.bias.is_some()) {
        return Err(NO_VECTORS.into());
    }
    if !core.scale.is_finite() || (core.scale != 0.0 && !core.scale.is_normal()) {
        return Err(format!("scale {} is not a normal number", core.scale));
    }
    Ok(CoreEntry {
        matrix: match core.matrix {
            NewMatrix::Full(_) => MatrixForm::Full,
            NewMatrix::Diagonal(_) => MatrixForm::Diagonal,
            NewMatrix::Identity => MatrixForm::Identity,
            NewMatrix::None => MatrixForm::None,
        },
        private: core.factors.is_some(),
        delta_scale: core.delta_scale.is_some(),
        row_scale: core.row_scale.is_some(),
        bias: core.bias.is_some(),
        bands: u.bands,
        core_type: row_type(types.core, rank),
        u_type: u.ty,
        v_type: v_type(site, factors, rank, shape),
        vector_type: row_type(types.vectors, shape.out_features),
        rank: rank as u16,
        scale: core.scale,
        err2: core.err2.filter(|e| e.is_finite() && *e >= 0.0).unwrap_or(-1.0),
    })
}

fn check_sizes(core: &NewCore, site: Site, shape: SiteShape) -> Result<(), String> {
    let SiteShape { out_features: out, in_features: inp } = shape;
    let r = core.rank;
    let matrix = match &core.matrix {
        NewMatrix::Full(m) => Some(("core", m.len(), r * r)),
        NewMatrix::Diagonal(m) => Some(("core", m.len(), r)),
        NewMatrix::Identity | NewMatrix::None => None,
    };
    let factors = core.factors.iter().flat_map(|(u, v)| [("U", u.len(), out * r), ("V", v.len(), inp * r)]);
    let vectors = [("delta scale", &core.delta_scale), ("row scale", &core.row_scale), ("bias", &core.bias)];
    let vectors = vectors.into_iter().filter_map(|(what, v)| Some((what, v.as_ref()?.len(), out)));
    match matrix.into_iter().chain(factors).chain(vectors).find(|(_, got, want)| got != want) {
        None => Ok(()),
        Some((what, got, want)) => Err(format!("{what} of {got} numbers, {site} needs {want}")),
    }
}

/// The numbers given for a part, and the length of their rows before padding.
fn source(core: &NewCore, site: Site, shape: SiteShape, part: Part) -> (&[f32], usize) {
    let r = core.rank;
    let v_cols = if site == Site::TOKEN_EMBD { r } else { shape.in_features };
    let vector = |v: &'_ Option<Vec<f32>>| -> usize { v.as_ref().map_or(0, Vec::len) };
    let (data, cols): (Option<&Vec<f32>>, usize) = match part {
        Part::U => (core.factors.as_ref().map(|f| &f.0), r),
        Part::V => (core.factors.as_ref().map(|f| &f.1), v_cols),
        Part::Matrix => match &core.matrix {
            NewMatrix::Full(m) | NewMatrix::Diagonal(m) => (Some(m), r),
            NewMatrix::Identity | NewMatrix::None => (None, r),
        },
        Part::DeltaScale => (core.delta_scale.as_ref(), vector(&core.delta_scale)),
        Part::RowScale => (core.row_scale.as_ref(), vector(&core.row_scale)),
        Part::Bias => (core.bias.as_ref(), vector(&core.bias)),
    };
    (data.map_or(&[], Vec::as_slice), cols)
}

/// `rows` × `cols` in `ty` from rows of length `cols_given` ≤ `cols`, padded with zeros.
pub(super) fn quantize(
    ty: QuantType,
    rows: usize,
    cols: usize,
    data: &[f32],
    cols_given: usize,
) -> Result<Vec<u8>, String> {
    let row_bytes = ty.bytes_for(cols).ok_or_else(|| format!("rows of {cols} are not whole {ty} blocks"))?;
    let mut out = vec![0; row_bytes * rows];
    let (mut row, mut back) = (vec![0.0f32; cols], vec![0.0f32; cols]);
    let given = data.chunks(cols_given.max(1)).chain(std::iter::repeat(&[][..]));
    for (bytes, given) in out.chunks_exact_mut(row_bytes.max(1)).zip(given) {
        row.fill(0.0);
        row.iter_mut().zip(given).for_each(|(to, from)| *to = *from);
        quantize_row(ty, &row, bytes).map_err(|e| e.to_string())?;
        dequantize_row(ty, bytes, &mut back).map_err(|e| e.to_string())?;
        if let Some(i) = back.iter().position(|v| !v.is_finite()) {
            return Err(format!("{} does not fit {ty}", row.get(i).copied().unwrap_or_default()));
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_beyond_the_format_are_refused() {
        assert!(quantize(QuantType::F16, 1, 2, &[1.0, 1e6], 2).unwrap_err().contains("1000000"));
        assert!(quantize(QuantType::F32, 1, 1, &[f32::NAN], 1).is_err());
        let padded = quantize(QuantType::F32, 2, 2, &[5.0], 1).unwrap();
        assert_eq!(padded, [5.0f32.to_le_bytes(), [0; 4], [0; 4], [0; 4]].concat());
    }
}
