//! The pack's binary parts, encoded and decoded in one place. FORMAT.md describes them in prose.

use lory_kernels::{QuantType, backend::BAND};

use crate::adapter::Site;

/// `adapter.type` of a pack.
pub const ADAPTER_TYPE: &str = "lora.basis";
/// The version that this program writes, and the newest that it reads.
pub const VERSION: u32 = 1;

pub(super) mod key {
    pub const VERSION: &str = "lora.basis.version";
    pub const BASE_FINGERPRINT: &str = "lora.basis.base.fingerprint";
    pub const BASE_NAME: &str = "lora.basis.base.name";
    pub const BLOCK_COUNT: &str = "lora.basis.block_count";
    pub const SITE_OUT: &str = "lora.basis.site_out";
    pub const SITE_IN: &str = "lora.basis.site_in";
    pub const CLUSTERS: &str = "lora.basis.clusters";
    pub const HASH: &str = "lora.basis.hash";
    pub const ADAPTERS: &str = "lora.basis.adapters";
    pub const INDEX_HASH: &str = "lora.basis.index_hash";
    pub const SEGMENT: &str = "lora.basis.segment";
    pub const MERGED: &str = "lora.basis.merged";
}

pub(super) const DATA: &str = "adapters.data";
pub(super) const INDEX: &str = "adapters.index";
pub(super) const NAMES: &str = "adapters.names";

/// A cluster number that stands for "no shared basis".
pub(super) const NO_CLUSTER: u32 = u32::MAX;
/// Records begin at multiples of this in `adapters.data`: a cache line, and enough for any device.
pub(super) const RECORD_ALIGN: usize = 64;
/// The parts of a record begin at multiples of this.
pub(super) const PART_ALIGN: usize = 16;
/// Longest adapter name in bytes.
pub(super) const MAX_NAME: usize = 255;
/// Longest JSON text of a record.
pub(super) const MAX_META: usize = 1 << 20;

/// A factor of a basis as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Factor {
    /// r × in.
    V,
    /// out × r.
    U,
    /// U in bands of 32 outputs, out / 32 × 32 r.
    UBands,
}

impl Factor {
    const ALL: [Factor; 3] = [Factor::V, Factor::U, Factor::UBands];

    fn name(self) -> &'static str {
        match self {
            Factor::V => "basis_v",
            Factor::U => "basis_u",
            Factor::UBands => "basis_u_bands",
        }
    }
}

/// The tensor's name of a cluster's factor.
pub(super) fn factor_name(cluster: u32, site: Site, factor: Factor) -> String {
    format!("cluster.{cluster}.{site}.{}", factor.name())
}

/// The reverse.
pub(super) fn parse_factor_name(name: &str) -> Option<(u32, Site, Factor)> {
    let (cluster, rest) = name.strip_prefix("cluster.")?.split_once('.')?;
    let (site, factor) = rest.rsplit_once('.')?;
    let canonical = cluster == "0" || !cluster.starts_with(['0', '+']);
    let factor = Factor::ALL.into_iter().find(|known| known.name() == factor)?;
    Some((cluster.parse().ok().filter(|_| canonical)?, Site::parse(site)?, factor))
}

/// Reads little-endian fields one after another; `None` where the bytes end.
pub(super) struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[b]| b)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    pub fn u128(&mut self) -> Option<u128> {
        self.array().map(u128::from_le_bytes)
    }

    pub fn f32(&mut self) -> Option<f32> {
        self.array().map(f32::from_le_bytes)
    }
}

/// What an entry of `adapters.index` does to the table of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EntryKind {
    /// Adds or replaces an adapter.
    Record,
    /// Removes one (segments only).
    Tombstone,
    /// Gives an adapter of an earlier file this name; offset and length are those of its old
    /// name in `adapters.names` (segments only).
    Rename,
}

/// One entry of `adapters.index`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct IndexEntry {
    pub name_offset: u32,
    pub name_len: u16,
    pub kind: EntryKind,
    pub offset: u64,
    pub len: u64,
    pub cluster: u32,
    /// XXH3-128 of the record's bytes.
    pub hash: u128,
    /// Mean and worst err² over the sites, negative where unknown.
    pub err2: [f32; 2],
}

impl IndexEntry {
    pub const BYTES: usize = 64;

    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        let kind: u16 = match self.kind {
            EntryKind::Record => 0,
            EntryKind::Tombstone => 1,
            EntryKind::Rename => 2,
        };
        let fields: [&[u8]; 9] = [
            &self.name_offset.to_le_bytes(),
            &self.name_len.to_le_bytes(),
            &kind.to_le_bytes(),
            &self.offset.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.cluster.to_le_bytes(),
            &[0; 4],
            &self.hash.to_le_bytes(),
            &[self.err2[0].to_le_bytes(), self.err2[1].to_le_bytes()].concat(),
        ];
        put(&mut out, &fields);
        out
    }

    pub fn decode(bytes: &[u8]) -> Option<IndexEntry> {
        let mut f = Fields(bytes);
        let (name_offset, name_len) = (f.u32()?, f.u16()?);
        let kind = match f.u16()? {
            0 => EntryKind::Record,
            1 => EntryKind::Tombstone,
            2 => EntryKind::Rename,
            _ => return None,
        };
        let (offset, len, cluster, _) = (f.u64()?, f.u64()?, f.u32()?, f.u32()?);
        let (hash, err2) = (f.u128()?, [f.f32()?, f.f32()?]);
        Some(IndexEntry { name_offset, name_len, kind, offset, len, cluster, hash, err2 })
    }
}

fn put(out: &mut [u8], fields: &[&[u8]]) {
    let mut out = out.iter_mut();
    for (to, from) in out.by_ref().zip(fields.iter().copied().flatten()) {
        *to = *from;
    }
}

/// The first bytes of a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RecordHeader {
    pub n_layers: u32,
    pub cluster: u32,
    pub n_cores: u32,
    pub len: u64,
    pub meta_len: u32,
    pub n_invocation: u32,
}

impl RecordHeader {
    pub const BYTES: usize = 48;
    const MAGIC: [u8; 4] = *b"LBR1";

    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut out = [0; Self::BYTES];
        let fields: [&[u8]; 7] = [
            &Self::MAGIC,
            &self.n_layers.to_le_bytes(),
            &self.cluster.to_le_bytes(),
            &self.n_cores.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.meta_len.to_le_bytes(),
            &self.n_invocation.to_le_bytes(),
        ];
        put(&mut out, &fields);
        out
    }

    pub fn decode(f: &mut Fields<'_>) -> Option<RecordHeader> {
        (f.array()? == Self::MAGIC).then_some(())?;
        let (n_layers, cluster, n_cores, len) = (f.u32()?, f.u32()?, f.u32()?, f.u64()?);
        let (meta_len, n_invocation) = (f.u32()?, f.u32()?);
        f.array::<16>()?;
        Some(RecordHeader { n_layers, cluster, n_cores, len, meta_len, n_invocation })
    }
}

/// C's form in a [`CoreEntry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum MatrixForm {
    None,
    Full,
    Diagonal,
    Identity,
}

/// What a record says of one site.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct CoreEntry {
    pub matrix: MatrixForm,
    pub private: bool,
    pub delta_scale: bool,
    pub row_scale: bool,
    pub bias: bool,
    /// Whether an own U lies in bands.
    pub bands: bool,
    pub core_type: QuantType,
    pub u_type: QuantType,
    pub v_type: QuantType,
    pub vector_type: QuantType,
    pub rank: u16,
    pub scale: f32,
    /// Negative where unknown.
    pub err2: f32,
}

impl CoreEntry {
    pub const BYTES: usize = 16;

    pub fn encode(&self) -> [u8; Self::BYTES] {
        let matrix: u8 = match self.matrix {
            MatrixForm::None => 0,
            MatrixForm::Full => 1,
            MatrixForm::Diagonal => 2,
            MatrixForm::Identity => 3,
        };
        let flags = [self.private, self.delta_scale, self.row_scale, self.bias, self.bands];
        let form = flags.iter().enumerate().fold(matrix, |form, (i, flag)| form | u8::from(*flag) << (2 + i));
        let types = [self.core_type, self.u_type, self.v_type, self.vector_type].map(|t| t as u32 as u8);
        let mut out = [0; Self::BYTES];
        let fields: [&[u8]; 6] = [
            &[form],
            &types,
            &[0],
            &self.rank.to_le_bytes(),
            &self.scale.to_le_bytes(),
            &self.err2.to_le_bytes(),
        ];
        put(&mut out, &fields);
        out
    }

    pub fn decode(f: &mut Fields<'_>) -> Option<CoreEntry> {
        let form = f.u8()?;
        (form < 128).then_some(())?;
        let matrix = match form & 3 {
            0 => MatrixForm::None,
            1 => MatrixForm::Full,
            2 => MatrixForm::Diagonal,
            _ => MatrixForm::Identity,
        };
        let mut ty = || QuantType::from_id(f.u8()?.into());
        let (core_type, u_type, v_type, vector_type) = (ty()?, ty()?, ty()?, ty()?);
        (f.u8()? == 0).then_some(())?;
        let flag = |bit: u8| form >> bit & 1 == 1;
        (flag(2) || !flag(6)).then_some(())?;
        Some(CoreEntry {
            matrix,
            private: flag(2),
            delta_scale: flag(3),
            row_scale: flag(4),
            bias: flag(5),
            bands: flag(6),
            core_type,
            u_type,
            v_type,
            vector_type,
            rank: f.u16()?,
            scale: f.f32()?,
            err2: f.f32()?,
        })
    }
}

/// One stored matrix of a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    V,
    U,
    Matrix,
    DeltaScale,
    RowScale,
    Bias,
}

impl CoreEntry {
    /// What is stored for this core, in order: part, format, rows, columns. `out` and `inp` are
    /// the site's sizes.
    pub fn parts(
        &self,
        site: Site,
        out: usize,
        inp: usize,
    ) -> impl Iterator<Item = (Part, QuantType, usize, usize)> {
        let r = usize::from(self.rank);
        let (v_rows, v_cols) = if site == Site::TOKEN_EMBD { (inp, r) } else { (r, inp) };
        let matrix_rows = match self.matrix {
            MatrixForm::Full => Some(r),
            MatrixForm::Diagonal => Some(1),
            MatrixForm::None | MatrixForm::Identity => None,
        };
        let (u_rows, u_cols) = if self.bands { (out / BAND, r * BAND) } else { (out, r) };
        let vector = |flag: bool, part| flag.then_some((part, self.vector_type, 1, out));
        [
            self.private.then_some((Part::V, self.v_type, v_rows, v_cols)),
            self.private.then_some((Part::U, self.u_type, u_rows, u_cols)),
            matrix_rows.map(|rows| (Part::Matrix, self.core_type, rows, r)),
            vector(self.delta_scale, Part::DeltaScale),
            vector(self.row_scale, Part::RowScale),
            vector(self.bias, Part::Bias),
        ]
        .into_iter()
        .flatten()
    }
}

/// Bytes of a record's bitmap of sites.
pub(super) fn bitmap_len(n_layers: usize) -> usize {
    Site::count(n_layers).div_ceil(8).next_multiple_of(PART_ALIGN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::Projection;

    #[test]
    fn fields_go_both_ways() {
        let entry = IndexEntry {
            name_offset: 7,
            name_len: 9,
            kind: EntryKind::Rename,
            offset: 1 << 40,
            len: 12345,
            cluster: 3,
            hash: 0x0123_4567_89ab_cdef_0123_4567_89ab_cdef,
            err2: [0.25, 0.5],
        };
        assert_eq!(IndexEntry::decode(&entry.encode()), Some(entry));

        let header = RecordHeader {
            n_layers: 2,
            cluster: NO_CLUSTER,
            n_cores: 5,
            len: 4096,
            meta_len: 77,
            n_invocation: 4,
        };
        assert_eq!(RecordHeader::decode(&mut Fields(&header.encode())), Some(header));

        let core = CoreEntry {
            matrix: MatrixForm::Diagonal,
            private: true,
            delta_scale: false,
            row_scale: true,
            bias: true,
            bands: true,
            core_type: QuantType::F16,
            u_type: QuantType::Q8_0,
            v_type: QuantType::Q4_0,
            vector_type: QuantType::F32,
            rank: 300,
            scale: 0.5,
            err2: -1.0,
        };
        assert_eq!(CoreEntry::decode(&mut Fields(&core.encode())), Some(core));
    }

    #[test]
    fn factor_names_go_both_ways() {
        let site = Site::layer(12, Projection::FfnUp);
        for factor in Factor::ALL {
            assert_eq!(parse_factor_name(&factor_name(31, site, factor)), Some((31, site, factor)));
        }
        for name in
            ["cluster.01.output.basis_u", "cluster.1.output.basis_w", "cluster.1.basis_u", "output.basis_u"]
        {
            assert_eq!(parse_factor_name(name), None, "{name}");
        }
    }
}
