//! Where the blocks of sixteen weight rows come from: the file's layout, or a repacked one.

use super::lanes::{Lanes, Rows};
use super::panel::ROWS;

/// Bytes of a line of cache.
pub(crate) const LINE: usize = 64;

/// Sixteen weight rows, at one block of each.
pub(crate) trait Source: Copy {
    /// Whether [`Source::columns`] only loads.
    const READY: bool;

    /// Bytes `offset..offset + 16` of each row's block as four vectors of four bytes of all rows.
    ///
    /// # Safety
    /// They lie within the block.
    unsafe fn columns<S: Lanes>(&self, s: S, offset: usize) -> [S::I; 4];

    /// The 16-bit number at `offset` of each row's block, zero-extended.
    ///
    /// # Safety
    /// It lies within the block.
    unsafe fn halves<S: Lanes>(&self, s: S, offset: usize) -> S::I;

    /// The last eight of these rows, which take the place of the first eight.
    fn upper(self) -> Self;

    /// Where the first row's block begins; of what is woven, the block of all.
    fn first(&self) -> *const u8;

    /// Goes on to the next block; blocks have so many bytes.
    fn advance(&mut self, bytes: usize);

    /// Fetches line of cache `line`, of `lines`, of what comes `distance` bytes later in row `row`; of what is woven, that share of all rows'.
    fn fetch<S: Lanes>(&self, s: S, distance: usize, row: usize, line: usize, lines: usize);
}

impl Source for Rows {
    const READY: bool = false;

    #[inline(always)]
    unsafe fn columns<S: Lanes>(&self, s: S, offset: usize) -> [S::I; 4] {
        let mut x = [s.splat_i(0); 4];
        for (r, x) in x.iter_mut().enumerate() {
            // Rows r, r + 4, r + 8, r + 12: after the transposition lane l holds rows 4l .. 4l + 4.
            // SAFETY: the caller's promise.
            *x = unsafe {
                s.load_lanes([
                    self.at(r, offset),
                    self.at(r + 4, offset),
                    self.at(r + 8, offset),
                    self.at(r + 12, offset),
                ])
            };
        }
        s.transpose4(x)
    }

    #[inline(always)]
    unsafe fn halves<S: Lanes>(&self, s: S, offset: usize) -> S::I {
        // SAFETY: the caller's promise.
        unsafe { s.gather_u16(self, offset) }
    }

    #[inline(always)]
    fn upper(self) -> Rows {
        Rows::upper(self)
    }

    #[inline(always)]
    fn first(&self) -> *const u8 {
        self.at(0, 0)
    }

    #[inline(always)]
    fn advance(&mut self, bytes: usize) {
        Rows::advance(self, bytes);
    }

    #[inline(always)]
    fn fetch<S: Lanes>(&self, s: S, distance: usize, row: usize, line: usize, _: usize) {
        s.prefetch(self.at(row, distance + LINE * line));
    }
}

/// Blocks of sixteen rows woven into one: what lies in bytes `o .. o + w` of each row's block lies in
/// bytes `16·o .. 16·(o + w)` here, word by word of all rows (numbers of 16 bits: half-word by half-word). One vector
/// of [`Source::columns`] is then one load, and the blocks of all columns follow each other in memory.
#[derive(Clone, Copy)]
pub(crate) struct Woven {
    at: *const u8,
    /// 0, or 1 if the last eight rows come first.
    upper: usize,
}

impl Woven {
    /// At the first block.
    pub fn new(at: *const u8) -> Woven {
        Woven { at, upper: 0 }
    }
}

impl Source for Woven {
    const READY: bool = true;

    #[inline(always)]
    unsafe fn columns<S: Lanes>(&self, s: S, offset: usize) -> [S::I; 4] {
        // SAFETY: the caller's promise.
        let x = unsafe { &*self.at.wrapping_add(16 * offset + 32 * self.upper).cast::<[[u8; 64]; 4]>() };
        [s.load_i(&x[0]), s.load_i(&x[1]), s.load_i(&x[2]), s.load_i(&x[3])]
    }

    #[inline(always)]
    unsafe fn halves<S: Lanes>(&self, s: S, offset: usize) -> S::I {
        // SAFETY: the caller's promise.
        s.load_u16(unsafe { &*self.at.wrapping_add(16 * offset + 16 * self.upper).cast() })
    }

    #[inline(always)]
    fn upper(self) -> Woven {
        Woven { upper: 1, ..self }
    }

    #[inline(always)]
    fn first(&self) -> *const u8 {
        self.at
    }

    #[inline(always)]
    fn advance(&mut self, bytes: usize) {
        self.at = self.at.wrapping_add(16 * bytes);
    }

    #[inline(always)]
    fn fetch<S: Lanes>(&self, s: S, distance: usize, row: usize, line: usize, lines: usize) {
        let row = row + ROWS / 2 * self.upper;
        s.prefetch(self.at.wrapping_add(ROWS * distance + LINE * (row * lines + line)));
    }
}
