//! Products with integer formats: panels are unpacked once and meet all activation rows.

use std::marker::PhantomData;
use std::mem::MaybeUninit;

use super::Isa;
use super::activations::{Activations, Offset, Shared};
use super::int_tile::Sweep;
use super::panel::{COLUMNS, Fill, Panel, PanelBlock, ROWS};
use crate::quant::{
    IQ4_NL, IQ4_XS, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0, QMatrix, QuantType,
};

/// Activation rows that one task takes at most: their accumulators (32 KiB for two panels)
/// stay close, and unpacking is repeated only once in so many rows.
pub(crate) const ROW_BLOCK: usize = 256;
/// The most panels of any level's tile.
const MAX_PANELS: usize = 2;

/// The functions of one format.
pub(crate) struct IntKernel {
    /// Weights that share a scale.
    pub group: usize,
    offset: Offset,
    wide: bool,
    fill: unsafe fn(Isa, &[*const u8; ROWS], usize, usize, *mut Panel),
    block_len: usize,
    sweep: unsafe fn(Isa, Strip<'_>, *const Panel, usize, usize, *mut [f32; ROWS]),
}

impl IntKernel {
    const fn new<B: PanelBlock, const STEPS: usize, const MIN: bool, const WIDE: bool>() -> IntKernel {
        assert!(
            B::GROUP == 4 * STEPS && B::HAS_MIN == MIN && B::WIDE == WIDE && COLUMNS.is_multiple_of(B::LEN)
        );
        IntKernel {
            group: B::GROUP,
            offset: if MIN { Offset::Min } else { Offset::Zero(B::ZERO) },
            wide: WIDE,
            fill: fill::<B>,
            block_len: B::LEN,
            sweep: sweep::<STEPS, MIN, WIDE>,
        }
    }

    /// The kernel of a format; `None` for float formats and those without code here.
    pub fn of(ty: QuantType) -> Option<&'static IntKernel> {
        const KERNELS: &[(QuantType, IntKernel)] = &[
            (QuantType::Q8_0, IntKernel::new::<Q8_0, 8, false, true>()),
            (QuantType::Q4_0, IntKernel::new::<Q4_0, 8, false, false>()),
            (QuantType::Q4_1, IntKernel::new::<Q4_1, 8, true, false>()),
            (QuantType::Q5_0, IntKernel::new::<Q5_0, 8, false, false>()),
            (QuantType::Q5_1, IntKernel::new::<Q5_1, 8, true, false>()),
            (QuantType::Q2_K, IntKernel::new::<Q2_K, 4, true, false>()),
            (QuantType::Q3_K, IntKernel::new::<Q3_K, 4, false, false>()),
            (QuantType::Q4_K, IntKernel::new::<Q4_K, 8, true, false>()),
            (QuantType::Q5_K, IntKernel::new::<Q5_K, 8, true, false>()),
            (QuantType::Q6_K, IntKernel::new::<Q6_K, 4, false, false>()),
            (QuantType::IQ4_NL, IntKernel::new::<IQ4_NL, 8, false, true>()),
            (QuantType::IQ4_XS, IntKernel::new::<IQ4_XS, 8, false, true>()),
        ];
        KERNELS.iter().find(|(of, _)| *of == ty).map(|(_, kernel)| kernel)
    }

    /// What to ask [`Activations::offsets`] for.
    pub fn offset(&self, isa: Isa) -> Offset {
        // Where the dot product takes signed codes, nothing is left to correct.
        if self.wide && isa.wide_is_signed() { Offset::Zero(0) } else { self.offset }
    }
}

/// # Safety
/// Every pointer is to `blocks` blocks of B, at most [`COLUMNS`] columns.
unsafe fn fill<B: PanelBlock>(
    isa: Isa,
    rows: &[*const u8; ROWS],
    blocks: usize,
    ahead: usize,
    panel: *mut Panel,
) {
    isa.run(Fill::<B> { rows, blocks, ahead, panel, block: PhantomData });
}

/// # Safety
/// The level's number of panels, filled with `columns` columns; accumulators for all rows of the strip.
unsafe fn sweep<const STEPS: usize, const MIN: bool, const WIDE: bool>(
    isa: Isa,
    strip: Strip<'_>,
    panels: *const Panel,
    column: usize,
    columns: usize,
    acc: *mut [f32; ROWS],
) {
    let Strip { x, offsets, ref tiles, .. } = strip;
    let tiles = tiles.clone();
    isa.run(Sweep::<STEPS, MIN, WIDE> { panels, column, columns, x, offsets, tiles, acc });
}

/// Some weight rows times some tiles of activations.
#[derive(Clone)]
pub(crate) struct Strip<'a> {
    /// The weights.
    pub weight: QMatrix<'a>,
    /// First of the weight rows, and one past the last: at most 16 · panels of the level.
    pub rows: std::ops::Range<usize>,
    /// The right-hand side.
    pub x: &'a Activations,
    /// For the weight's format.
    pub offsets: &'a [i32],
    /// Which tiles; at most [`ROW_BLOCK`] rows.
    pub tiles: std::ops::Range<usize>,
}

impl Strip<'_> {
    /// Computes and writes `out[row · weight.rows() + n]`.
    ///
    /// # Safety
    /// `out` holds all rows of `x`, and no one else uses the outputs of these rows and tiles.
    pub unsafe fn run(&self, isa: Isa, kernel: &IntKernel, out: Shared<f32>) {
        let panels = isa.tile_panels();
        let (columns, size) = (self.weight.cols(), self.weight.row_bytes());
        assert!(self.x.columns == columns && self.rows.len() <= panels * ROWS);
        let first_row = self.x.tiles.start(self.tiles.start);
        let n_rows = self.x.tiles.start(self.tiles.end) - first_row;
        assert!(n_rows <= ROW_BLOCK);
        let mut storage = [const { MaybeUninit::<Panel>::uninit() }; MAX_PANELS];
        let mut acc = [const { MaybeUninit::<[f32; ROWS]>::uninit() }; ROW_BLOCK * MAX_PANELS];
        // The next strip's same columns: far enough for memory, near enough for the second-level cache.
        let ahead = if size * panels * ROWS <= 256 << 10 { size * panels * ROWS } else { 0 };
        for column in (0..columns).step_by(COLUMNS) {
            let n = COLUMNS.min(columns - column);
            let skip = column / kernel.block_len * self.weight.ty().block_bytes();
            let ahead = if ahead > 0 { ahead } else { n / kernel.block_len * self.weight.ty().block_bytes() };
            for (p, panel) in storage.iter_mut().enumerate().take(panels) {
                let mut rows = [std::ptr::null(); ROWS];
                for (i, row) in rows.iter_mut().enumerate() {
                    // Rows past the end repeat the last one; their results are not written.
                    let row_index = (self.rows.start + p * ROWS + i).min(self.rows.end - 1);
                    *row = self.weight.row(row_index)[skip..].as_ptr();
                }
                // SAFETY: whole blocks, as columns are, and `n` of them lie in each row.
                unsafe { (kernel.fill)(isa, &rows, n / kernel.block_len, ahead, panel.as_mut_ptr()) };
            }
            // SAFETY: the panels have just been filled with `n` columns; there are accumulators
            // for `n_rows` rows, written at column 0 before they are read.
            unsafe {
                let acc = acc.as_mut_ptr().cast();
                (kernel.sweep)(isa, self.clone(), storage.as_ptr().cast(), column, n, acc);
            }
        }
        let width = self.weight.rows();
        for row in 0..n_rows {
            for (p, start) in self.rows.clone().step_by(ROWS).enumerate() {
                let n = ROWS.min(self.rows.end - start);
                // SAFETY: written above if there is any column; these outputs are this strip's alone.
                unsafe {
                    let lanes = if columns > 0 { acc[row * panels + p].assume_init() } else { [0.0; ROWS] };
                    out.slice((first_row + row) * width + start, n).copy_from_slice(&lanes[..n]);
                }
            }
        }
    }
}
