//! The integer micro-kernel: panels of 16 weight rows × a few activation rows.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use super::activations::Activations;
use super::frame;
use super::int_sum::GroupSum;
use super::lanes::unroll;
use super::output::Output;
use super::panel::{Panel, ROWS};
use super::simd::{Op, Simd};

/// All tiles of activations `tiles` over the columns that `panels` hold.
///
/// For each output the order is the canonical one of [`crate::quant::dot`]: lanes are weight rows, so
/// a lane's chain over the groups is that of the scalar product, and the integer sums are exact
/// in any order.
///
/// Per step of four columns a tile of P panels × M rows loads P vectors of codes and M broadcast
/// words for P·M products; with 2 × 6 the vector unit and not the load ports is the limit. Per group it converts, scales
/// and adds 2 more vectors per product chain, so 8 products in 10 (formats with minima 8 in 11, groups of 16
/// 4 in 6) are the ceiling.
pub(crate) struct Sweep<'a, const STEPS: usize, const MIN: bool, const MOST: u8> {
    /// As many as the level's tile has.
    pub panels: *const Panel,
    /// The first column that the panels hold.
    pub column: usize,
    /// How many.
    pub columns: usize,
    /// The right-hand side.
    pub x: &'a Activations<'a>,
    /// From [`Activations::offsets`].
    pub offsets: &'a [i32],
    /// Which tiles of it.
    pub tiles: std::ops::Range<usize>,
    /// `[row − first row][panel][16]`: read unless `column` is 0, and written.
    pub acc: *mut [f32; ROWS],
    /// What is fetched meanwhile.
    pub ahead: Lines,
    /// Where the outputs go, if these are the last columns.
    pub outputs: Option<Outputs<'a>>,
}

/// Memory that will be read soon: `rows` times `bytes`.
#[derive(Clone, Copy)]
pub(crate) struct Lines {
    from: *const u8,
    stride: usize,
    bytes: usize,
    rows: usize,
    offset: usize,
}

impl Lines {
    /// `rows` times `bytes`, each `stride` behind the one before. It need not exist.
    pub fn new(from: *const u8, stride: usize, rows: usize, bytes: usize) -> Lines {
        Lines { from, stride, bytes, rows, offset: 0 }
    }

    /// How many lines of cache that is at most.
    fn count(&self) -> usize {
        self.rows * (self.bytes.div_ceil(64) + 1)
    }

    /// Asks for the next `n` lines. A few with every group: a burst would take all of the first cache's slots for misses, and
    /// what the tile loads would wait behind it.
    #[inline(always)]
    fn fetch<S: Simd>(&mut self, s: S, n: usize) {
        for _ in 0..n {
            if self.rows == 0 {
                return;
            }
            s.prefetch(self.from.wrapping_add(self.offset.min(self.bytes - 1)));
            self.offset += 64;
            if self.offset >= self.bytes + 64 {
                self.offset = 0;
                self.from = self.from.wrapping_add(self.stride);
                self.rows -= 1;
            }
        }
    }
}

/// The outputs of a strip.
#[derive(Clone)]
pub(crate) struct Outputs<'a> {
    /// The product's.
    pub out: Output<'a>,
    /// Weight rows of the strip.
    pub rows: std::ops::Range<usize>,
}

impl Outputs<'_> {
    /// Writes what `acc[panel]` holds of activation row `row`.
    ///
    /// # Safety
    /// The accumulators are there, and no one else uses these outputs.
    #[inline(always)]
    pub unsafe fn put(&self, row: usize, acc: *const [f32; ROWS]) {
        // SAFETY: the caller's promises.
        unsafe {
            let values = std::slice::from_raw_parts(acc.cast(), self.rows.len());
            self.out.put(row, self.rows.start, values);
        }
    }
}

/// A tile's operands.
struct Tile {
    panels: *const Panel,
    groups: usize,
    q: *const [i8; 4],
    scales: *const f32,
    offsets: *const i32,
    first: bool,
    acc: *mut [f32; ROWS],
    /// Lines to fetch with every group.
    fetch: usize,
}

impl<const STEPS: usize, const MIN: bool, const MOST: u8> Op for Sweep<'_, STEPS, MIN, MOST> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        frame::align();
        if S::TILE_PANELS == 2 { self.sweep::<S, 2>(s) } else { self.sweep::<S, 1>(s) }
    }
}

impl<const STEPS: usize, const MIN: bool, const MOST: u8> Sweep<'_, STEPS, MIN, MOST> {
    #[inline(always)]
    fn sweep<S: Simd, const P: usize>(mut self, s: S) {
        let per_row = self.x.columns;
        let group = 4 * STEPS;
        let first_row = self.x.tiles.start(self.tiles.start);
        let fetch = self.ahead.count().div_ceil((self.columns / group * self.tiles.len()).max(1));
        for t in self.tiles.clone() {
            let (start, m) = (self.x.tiles.start(t), self.x.tiles.start(t + 1) - self.x.tiles.start(t));
            let at = |unit: usize| start * per_row / unit + self.column / unit * m;
            let tile = Tile {
                panels: self.panels,
                groups: self.columns / group,
                q: self.x.q[at(4)..][..self.columns / 4 * m].as_ptr(),
                scales: self.x.scales[at(32)..][..self.columns / 32 * m].as_ptr(),
                offsets: self.offsets[at(group)..][..self.columns / group * m].as_ptr(),
                first: self.column == 0,
                // SAFETY: the caller's accumulators hold all rows of the tiles.
                acc: unsafe { self.acc.add((start - first_row) * P) },
                fetch,
            };
            let (acc, ahead) = (tile.acc, &mut self.ahead);
            // SAFETY: the slices above have the lengths that the tile reads; the panels hold `columns`.
            unsafe {
                match m {
                    1 => tile.run::<S, P, 1, STEPS, MIN, MOST>(s, ahead),
                    2 => tile.run::<S, P, 2, STEPS, MIN, MOST>(s, ahead),
                    3 if S::TILE_ROWS >= 3 => tile.run::<S, P, 3, STEPS, MIN, MOST>(s, ahead),
                    4 if S::TILE_ROWS >= 4 => tile.run::<S, P, 4, STEPS, MIN, MOST>(s, ahead),
                    5 if S::TILE_ROWS >= 5 => tile.run::<S, P, 5, STEPS, MIN, MOST>(s, ahead),
                    6 if S::TILE_ROWS >= 6 => tile.run::<S, P, 6, STEPS, MIN, MOST>(s, ahead),
                    _ => unreachable!("tiles have at most {} rows", S::TILE_ROWS),
                }
            }
            // Tile by tile, so that the stores, which miss every cache, drain while the next one computes.
            if let Some(outputs) = &self.outputs {
                for row in 0..m {
                    // SAFETY: the tile has just written P accumulators of each of its rows.
                    unsafe { outputs.put(start + row, acc.add(row * P)) };
                }
            }
        }
    }
}

impl Tile {
    /// # Safety
    /// P panels with `groups` groups; operands of M rows and as many groups; P · M accumulators.
    #[inline(always)]
    unsafe fn run<
        S: Simd,
        const P: usize,
        const M: usize,
        const STEPS: usize,
        const MIN: bool,
        const MOST: u8,
    >(
        self,
        s: S,
        ahead: &mut Lines,
    ) {
        let mut acc = [[s.splat(0.0); P]; M];
        if !self.first {
            for m in 0..M {
                for p in 0..P {
                    // SAFETY: P · M accumulators.
                    acc[m][p] = s.load(unsafe { &*self.acc.add(m * P + p) });
                }
            }
        }
        let (mut q, mut scales, mut offsets) = (self.q, self.scales, self.offsets);
        for g in 0..self.groups {
            ahead.fetch(s, self.fetch);
            // SAFETY: M offsets per group.
            let offset = |m| if MIN { 0 } else { unsafe { *offsets.add(m) } };
            let mut sums = [[GroupSum::<S, MOST>::new(s, 0); P]; M];
            for m in 0..M {
                sums[m] = [GroupSum::new(s, offset(m)); P];
            }
            for four in (0..STEPS).step_by(4) {
                unroll! { I in [0, 1, 2, 3] {
                    let mut codes = [s.splat_i(0); P];
                    for p in 0..P {
                        // SAFETY: P panels, and this group is within them.
                        codes[p] = s.load_i(unsafe { &(&(*self.panels.add(p)).codes)[g * STEPS + four + I] });
                    }
                    for m in 0..M {
                        // SAFETY: M words per step.
                        let q = unsafe { &*q.add((four + I) * M + m) };
                        for p in 0..P {
                            sums[m][p].add::<STEPS>(s, I, codes[p], q);
                        }
                    }
                }}
            }
            for p in 0..P {
                // SAFETY: as for the codes.
                let scale = s.load(unsafe { &(&(*self.panels.add(p)).scales)[g] });
                for m in 0..M {
                    // SAFETY: M scales per 32 columns.
                    let x = s.splat(unsafe { *scales.add(m) });
                    let sum = s.to_f(sums[m][p].get::<STEPS>(s, offset(m)));
                    acc[m][p] = s.fma(sum, s.mul(scale, x), acc[m][p]);
                }
                if MIN {
                    // SAFETY: as for the codes.
                    let min = s.load(unsafe { &(&(*self.panels.add(p)).mins)[g] });
                    for m in 0..M {
                        // SAFETY: M offsets per group.
                        let offset = f32::from_bits(unsafe { *offsets.add(m) } as u32);
                        acc[m][p] = s.fma(min, s.splat(offset), acc[m][p]);
                    }
                }
            }
            q = q.wrapping_add(STEPS * M);
            offsets = offsets.wrapping_add(M);
            if STEPS == 8 || g % 2 == 1 {
                scales = scales.wrapping_add(M);
            }
        }
        for m in 0..M {
            for p in 0..P {
                // SAFETY: P · M accumulators.
                s.store(acc[m][p], unsafe { &mut *self.acc.add(m * P + p) });
            }
        }
    }
}
