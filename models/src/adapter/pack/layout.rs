//! How factors are laid out: their formats, and what becomes of a U whose rows are not whole blocks.

use std::borrow::Cow;

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

    /// Where the number stands among U's, out_features × r, that is the `i`-th as stored.
    fn index(&self, i: usize) -> usize {
        let (_, columns) = self.size(0);
        let (output, column) = self.place(i / columns, i % columns);
        output * self.rank + column
    }

    /// U's numbers, out_features × r, in the order in which they are stored.
    pub(super) fn stored<'a>(&self, u: &'a [f32]) -> Cow<'a, [f32]> {
        match self.bands {
            false => Cow::Borrowed(u),
            true => (0..u.len()).filter_map(|i| u.get(self.index(i)).copied()).collect(),
        }
    }

    /// The reverse.
    pub fn numbers(&self, stored: Vec<f32>) -> Vec<f32> {
        if !self.bands {
            return stored;
        }
        let mut u = vec![0.0; stored.len()];
        for (i, number) in stored.into_iter().enumerate() {
            if let Some(place) = u.get_mut(self.index(i)) {
                *place = number;
            }
        }
        u
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
        let layout = ULayout::plan(QuantType::Q8_0, out, rank);
        assert_eq!(layout.size(out), (3, 160));
        let stored = layout.stored(&u).into_owned();
        // The second band begins with the first column of outputs 32, 33 …, and goes on with the second.
        let column = |k: usize| (32..64).map(move |output| (output * rank + k) as f32);
        assert!(stored[160..224].iter().copied().eq(column(0).chain(column(1))));
        assert_eq!(layout.numbers(stored), u);
        let rows = ULayout::plan(QuantType::F16, out, rank);
        assert_eq!(rows.numbers(rows.stored(&u).into_owned()), u);
    }
}
