//! How factors are laid out: their formats, and what becomes of a U whose rows are not whole blocks.

use lory_kernels::{QuantType, backend::BAND};

use crate::adapter::{Site, SiteShape};

/// How one site's U, out_features × r, is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ULayout {
    /// The format.
    pub ty: QuantType,
    /// r.
    pub rank: usize,
    /// Whether it lies in bands of [`BAND`] outputs, out_features / 32 rows of 32 r, instead of in rows of r.
    pub bands: bool,
}

impl ULayout {
    /// In `wanted`, if it can be: in rows where r is whole blocks, else in bands where outputs are whole bands and a band is whole
    /// blocks. Otherwise in rows of F16.
    pub fn plan(wanted: QuantType, out_features: usize, rank: usize) -> ULayout {
        let bands = wanted.bytes_for(rank).is_none()
            && out_features.is_multiple_of(BAND)
            && wanted.bytes_for(rank.saturating_mul(BAND)).is_some();
        ULayout { ty: if bands { wanted } else { row_type(wanted, rank) }, rank, bands }
    }

    /// Rows and columns as stored.
    pub fn size(&self, out_features: usize) -> (usize, usize) {
        if self.bands { (out_features / BAND, self.rank * BAND) } else { (out_features, self.rank) }
    }

    /// Output and column of U of a number as stored.
    pub fn place(&self, row: usize, column: usize) -> (usize, usize) {
        if self.bands { (row * BAND + column % BAND, column / BAND) } else { (row, column) }
    }
}

/// `ty`, or F16 where rows of `cols` are not whole blocks.
pub fn row_type(ty: QuantType, cols: usize) -> QuantType {
    if ty.bytes_for(cols).is_some() { ty } else { QuantType::F16 }
}

/// Format of V at a site.
pub(super) fn v_type(site: Site, wanted: QuantType, rank: usize, shape: SiteShape) -> QuantType {
    row_type(wanted, if site == Site::TOKEN_EMBD { rank } else { shape.in_features })
}

/// U's numbers, out_features × r, in the order in which bands have them.
pub(super) fn to_bands(u: &[f32], rank: usize) -> Vec<f32> {
    let band =
        |band: &[f32]| (0..rank).flat_map(|k| band.iter().skip(k).step_by(rank).copied()).collect::<Vec<_>>();
    u.chunks_exact((rank * BAND).max(1)).flat_map(band).collect()
}

/// The reverse.
pub(in crate::adapter) fn from_bands(u: &[f32], rank: usize) -> Vec<f32> {
    let band =
        |band: &[f32]| (0..BAND).flat_map(|i| band.iter().skip(i).step_by(BAND).copied()).collect::<Vec<_>>();
    u.chunks_exact((rank * BAND).max(1)).flat_map(band).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partial_blocks_lie_in_bands_or_are_halves() {
        let plan = |ty, out, rank| {
            let layout = ULayout::plan(ty, out, rank);
            (layout.ty, layout.bands)
        };
        assert_eq!(plan(QuantType::Q8_0, 64, 64), (QuantType::Q8_0, false));
        assert_eq!(plan(QuantType::Q8_0, 64, 16), (QuantType::Q8_0, true));
        assert_eq!(plan(QuantType::Q4_0, 96, 5), (QuantType::Q4_0, true));
        assert_eq!(plan(QuantType::Q4_K, 64, 16), (QuantType::Q4_K, true));
        // 172 outputs are no whole bands, nor 32 · 5 weights whole blocks of 256.
        assert_eq!(plan(QuantType::Q8_0, 172, 16), (QuantType::F16, false));
        assert_eq!(plan(QuantType::Q4_K, 64, 5), (QuantType::F16, false));
        assert_eq!(plan(QuantType::F32, 64, 7), (QuantType::F32, false));
        assert_eq!(row_type(QuantType::Q8_0, 172), QuantType::F16);
    }

    #[test]
    fn bands_go_both_ways() {
        let (out, rank) = (96, 5);
        let u: Vec<f32> = (0..out * rank).map(|i| i as f32).collect();
        let bands = to_bands(&u, rank);
        assert_eq!(from_bands(&bands, rank), u);
        let layout = ULayout::plan(QuantType::Q8_0, out, rank);
        let (rows, columns) = layout.size(out);
        assert_eq!((rows, columns), (3, 160));
        for (i, value) in bands.iter().enumerate() {
            let (output, column) = layout.place(i / columns, i % columns);
            assert_eq!(*value, u[output * rank + column]);
        }
    }
}
