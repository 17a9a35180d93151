//! Sixteen weight rows side by side, as the integer tile wants them.

use super::simd::{Op, Simd};
use crate::quant::IntBlock;

/// Columns that a panel holds: two super-blocks. The two panels of a tile take 24 KiB, and stay in the
/// first-level cache while all activation rows pass.
pub(crate) const COLUMNS: usize = 512;
/// Weight rows of a panel.
pub(crate) const ROWS: usize = 16;

/// Up to [`COLUMNS`] columns of 16 weight rows, taken apart: `codes[k / 4]` holds four codes
/// of each row, `scales[g]` and `mins[g]` one number per row.
#[repr(C, align(64))]
pub(crate) struct Panel {
    pub codes: [[u8; 64]; COLUMNS / 4],
    pub scales: [[f32; ROWS]; COLUMNS / 16],
    /// Written only for formats with minima.
    pub mins: [[f32; ROWS]; COLUMNS / 16],
}

/// Where one block of 16 rows goes: the same arrays, from the block's first column on.
#[derive(Clone, Copy)]
pub(crate) struct Slot {
    codes: *mut [u8; 64],
    scales: *mut [f32; ROWS],
    mins: *mut [f32; ROWS],
}

impl Slot {
    /// Four codes of each row.
    ///
    /// # Safety
    /// `i` is below a quarter of the block's length.
    #[inline(always)]
    pub unsafe fn codes<S: Simd>(self, s: S, i: usize, codes: S::I) {
        // SAFETY: the slot points at room for a whole block.
        s.store_i(codes, unsafe { &mut *self.codes.add(i) });
    }

    /// The scales of group `g`.
    ///
    /// # Safety
    /// The block has so many groups.
    #[inline(always)]
    pub unsafe fn scale<S: Simd>(self, s: S, g: usize, scales: S::F) {
        // SAFETY: the slot points at room for a whole block.
        s.store(scales, unsafe { &mut *self.scales.add(g) });
    }

    /// The minima of group `g`.
    ///
    /// # Safety
    /// The block has so many groups.
    #[inline(always)]
    pub unsafe fn min<S: Simd>(self, s: S, g: usize, mins: S::F) {
        // SAFETY: the slot points at room for a whole block.
        s.store(mins, unsafe { &mut *self.mins.add(g) });
    }
}

/// A format that can be unpacked 16 rows at a time: [`IntBlock::codes`] with vectors.
pub(crate) trait PanelBlock: IntBlock {
    /// Whether codes go beyond 63 (see [`Simd::dot4`]).
    const WIDE: bool = false;

    /// Takes one block of each of 16 rows apart.
    ///
    /// # Safety
    /// Every pointer is to a block, and `slot` to room for its parts.
    unsafe fn unpack<S: Simd>(s: S, rows: &[*const u8; ROWS], slot: Slot);
}

/// Fills one panel.
pub(crate) struct Fill<'a, B> {
    /// Where the first block of each row lies.
    pub rows: &'a [*const u8; ROWS],
    /// Blocks per row, at most `COLUMNS / B::LEN`.
    pub blocks: usize,
    /// Bytes to what will be read some microseconds later, from each row.
    pub ahead: usize,
    /// Receives them.
    pub panel: *mut Panel,
    /// The format.
    pub block: std::marker::PhantomData<B>,
}

impl<B: PanelBlock> Op for Fill<'_, B> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let size = size_of::<B>();
        let lines = (self.blocks * size).div_ceil(64);
        let mut prefetched = 0;
        let mut rows = *self.rows;
        // SAFETY: field pointers of the caller's panel.
        let mut slot = unsafe {
            Slot {
                codes: (&raw mut (*self.panel).codes).cast(),
                scales: (&raw mut (*self.panel).scales).cast(),
                mins: (&raw mut (*self.panel).mins).cast(),
            }
        };
        for block in 0..self.blocks {
            // The lines of all rows are spread evenly over the blocks, so that a burst of them does not hold up the loads.
            let until = ROWS * lines * (block + 1) / self.blocks;
            while prefetched < until {
                let row = self.rows[prefetched % ROWS];
                s.prefetch(row.wrapping_add(self.ahead + prefetched / ROWS * 64));
                prefetched += 1;
            }
            // SAFETY: the caller's rows have `blocks` blocks, and the panel has room for them.
            unsafe {
                B::unpack(s, &rows, slot);
                slot.codes = slot.codes.add(B::LEN / 4);
                slot.scales = slot.scales.add(B::LEN / B::GROUP);
                slot.mins = slot.mins.add(B::LEN / B::GROUP);
            }
            for row in &mut rows {
                *row = row.wrapping_add(size);
            }
        }
    }
}
