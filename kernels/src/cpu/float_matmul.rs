//! Products with float formats: lanes run along the columns.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::Isa;
use super::lanes::Lanes;
use super::output::Output;
use super::simd::{Op, Simd};
use crate::quant::{BF16, Block, F16, F32, FormatError, QMatrix, QuantType, dequantize_row};

/// Columns at a time: those of six activation rows (12 KiB) stay in the first-level cache.
const COLUMNS: usize = 512;
/// The same for a single row. Weights are then read once, and the longer a stretch is that is read in one go, the better do the
/// processor's own prefetchers follow.
const COLUMNS_OF_ONE: usize = 8192;
/// The same for few rows, shared out among them: 16 KiB.
const COLUMNS_OF_FEW: usize = 4096;
/// Weight rows of a tile.
const WEIGHTS: usize = 4;
/// The same for several activation rows where there are few registers ([`Lanes::FEW_REGISTERS`]).
const WEIGHTS_FEW: usize = 2;
/// Weight rows of a strip.
pub(crate) const STRIP: usize = 16;
/// Activation rows of a task at most; a task keeps 48 KiB of accumulators and 32 KiB of weights.
pub(crate) const ROW_BLOCK: usize = 48;

/// What a task adds up: the lanes of each row and weight, each in a line of the cache.
#[repr(align(64))]
pub(super) struct Sums(#[allow(dead_code)] [[f32; 16]; STRIP * ROW_BLOCK]);

/// Some columns of a strip's weights as floats.
#[repr(align(64))]
struct Wide(#[allow(dead_code)] [[f32; COLUMNS]; STRIP]);

/// A float format read 16 weights at a time, or those of some lanes.
trait FloatBlock: Block {
    /// # Safety
    /// 16 weights are readable.
    unsafe fn load<L: Lanes>(l: L, weights: *const u8) -> L::F;
}

impl FloatBlock for F32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(l: L, weights: *const u8) -> L::F {
        // SAFETY: readable by the caller's promise; as bytes, since a mapped file aligns them to whatever it likes.
        l.load(&unsafe { weights.cast::<[f32; 16]>().read_unaligned() })
    }
}

impl FloatBlock for F16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(l: L, weights: *const u8) -> L::F {
        // SAFETY: readable by the caller's promise; pairs of bytes have align 1.
        l.load_f16(unsafe { &*weights.cast() })
    }
}

impl FloatBlock for BF16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(l: L, weights: *const u8) -> L::F {
        // SAFETY: readable by the caller's promise; pairs of bytes have align 1.
        l.load_bf16(unsafe { &*weights.cast() })
    }
}

/// Adds the products of some columns to `acc[row · STRIP + weight]`, in the order of [`crate::ops::sum::dot`].
///
/// A tile of 4 weights × 6 rows does 24 multiply-adds on 10 loads. Where registers are few, its lanes are taken in halves and it has 2 × 6: 12 multiply-adds
/// on 8 loads. One or two rows wait for the weights anyway, so that these pass only once.
struct Sweep<'a, B> {
    weights: *const u8,
    weight_stride: usize,
    n_weights: usize,
    x: &'a [f32],
    x_stride: usize,
    n_rows: usize,
    columns: usize,
    first: bool,
    /// Bytes to what the next strip will read; 0 for weights that are in the cache.
    ahead: usize,
    acc: *mut [f32; 16],
    block: PhantomData<B>,
}

impl<B: FloatBlock> Op for Sweep<'_, B> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let mut row = 0;
        while row < self.n_rows {
            // SAFETY: `rows` and `tile` stay within the rows that are left.
            row += unsafe {
                match self.n_rows - row {
                    n if n == 1 || S::FLOAT_ROWS == 1 => self.rows::<S, WEIGHTS, 1>(s, row),
                    2 if S::FEW_REGISTERS => self.rows::<S, WEIGHTS_FEW, 2>(s, row),
                    2 => self.rows::<S, WEIGHTS, 2>(s, row),
                    3 | 5 => self.rows::<S, WEIGHTS, 3>(s, row),
                    4 | 7 | 8 if S::FEW_REGISTERS => self.rows::<S, WEIGHTS_FEW, 4>(s, row),
                    4 | 7 | 8 => self.rows::<S, WEIGHTS, 4>(s, row),
                    _ if S::FEW_REGISTERS => self.rows::<S, WEIGHTS_FEW, 6>(s, row),
                    _ => self.rows::<S, WEIGHTS, 6>(s, row),
                }
            };
        }
    }
}

impl<B: FloatBlock> Sweep<'_, B> {
    /// W weights at a time, as long as there are as many.
    #[inline(always)]
    unsafe fn rows<S: Simd, const W: usize, const M: usize>(&self, s: S, row: usize) -> usize {
        let mut weight = 0;
        while weight + W <= self.n_weights {
            // SAFETY: so many rows and weights are left.
            unsafe { self.halves::<S, W, M>(s, weight, row) };
            weight += W;
        }
        while weight < self.n_weights {
            // SAFETY: one weight is left.
            unsafe { self.halves::<S, 1, M>(s, weight, row) };
            weight += 1;
        }
        M
    }

    /// All lanes of a tile, in halves where they do not fit the registers.
    #[inline(always)]
    unsafe fn halves<S: Simd, const W: usize, const M: usize>(&self, s: S, weight: usize, row: usize) {
        let fetch = row == 0 && self.ahead > 0;
        // SAFETY: the caller's promise.
        unsafe {
            if S::FEW_REGISTERS && M > 2 {
                let (low, high) = s.halves();
                self.tile::<_, W, M>(low, weight, row, fetch);
                self.tile::<_, W, M>(high, weight, row, false);
            } else {
                self.tile::<_, W, M>(s, weight, row, fetch);
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<L: Lanes, const W: usize, const M: usize>(
        &self,
        l: L,
        weight: usize,
        row: usize,
        fetch: bool,
    ) {
        let mut acc = [[l.splat(0.0); W]; M];
        // SAFETY: the caller's accumulators cover all rows and STRIP weights.
        let at = |m: usize, w: usize| unsafe { self.acc.add((row + m) * STRIP + weight + w) };
        if !self.first {
            for m in 0..M {
                for w in 0..W {
                    // SAFETY: written by the sweep over the first columns.
                    acc[m][w] = l.load(unsafe { &*at(m, w) });
                }
            }
        }
        // The last tile of rows may end with the slice, so its end is checked once.
        let x = &self.x[row * self.x_stride..][..(M - 1) * self.x_stride + self.columns];
        let weights = self.weights.wrapping_add(weight * self.weight_stride);
        for k in (0..self.columns).step_by(16) {
            let mut w_k = [l.splat(0.0); W];
            for w in 0..W {
                // SAFETY: `columns` is a multiple of 16, and so many weights are readable in each row.
                let at = unsafe { weights.add(w * self.weight_stride + k * size_of::<B>()) };
                // SAFETY: as above.
                w_k[w] = unsafe { B::load(l, at) };
                if fetch && (k * size_of::<B>()).is_multiple_of(64) {
                    l.prefetch(at.wrapping_add(self.ahead));
                }
            }
            for m in 0..M {
                // SAFETY: `x` above has these 16.
                let x_k = l.load(unsafe { &*x.as_ptr().add(m * self.x_stride + k).cast::<[f32; 16]>() });
                for w in 0..W {
                    acc[m][w] = l.fma(w_k[w], x_k, acc[m][w]);
                }
            }
        }
        for m in 0..M {
            for w in 0..W {
                // SAFETY: the caller's accumulators.
                l.store(acc[m][w], unsafe { &mut *at(m, w) });
            }
        }
    }
}

/// The sums of lanes of as many weight rows.
pub(super) struct Fold<'a> {
    pub lanes: &'a [[f32; 16]],
    pub sums: &'a mut [f32; STRIP],
}

impl Op for Fold<'_> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        if let Ok(lanes) = <&[[f32; 16]; STRIP]>::try_from(self.lanes) {
            let none = s.splat(0.0);
            let mut all = [s.fold2(none, none); STRIP / 2];
            for i in 0..STRIP / 2 {
                all[i] = s.fold2(s.load(&lanes[2 * i]), s.load(&lanes[2 * i + 1]));
            }
            return s.store(s.fold16(all), self.sums);
        }
        for (lanes, sum) in self.lanes.iter().zip(self.sums) {
            *sum = s.fold(s.load(lanes));
        }
    }
}

/// Whether so many weights of a type are multiplied where they lie.
fn is_direct(ty: QuantType, columns: usize) -> bool {
    columns.is_multiple_of(16) && matches!(ty, QuantType::F32 | QuantType::F16 | QuantType::BF16)
}

/// Weight rows of few columns times some activation rows: what plain adapters expand with.
///
/// A strip of [`Sweep`] and [`Fold`] would take several times as long to set up as to compute.
struct Narrow<'a, B> {
    weights: *const u8,
    weight_stride: usize,
    /// Of [`STRIP`] weight rows.
    panels: usize,
    x: &'a [f32],
    x_stride: usize,
    n_rows: usize,
    /// A multiple of 16, at most [`NARROW`].
    columns: usize,
    /// Receives `[row · panels + panel]`.
    out: *mut [f32; STRIP],
    block: PhantomData<B>,
}

impl<B: FloatBlock> Op for Narrow<'_, B> {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        match self.columns / 16 {
            1 => self.columns::<S, 1>(s),
            2 => self.columns::<S, 2>(s),
            3 => self.columns::<S, 3>(s),
            4 => self.columns::<S, 4>(s),
            n => unreachable!("{n} vectors"),
        }
    }
}

impl<B: FloatBlock> Narrow<'_, B> {
    /// N vectors of columns. Two weights at a time, which are then one register where there are few.
    #[inline(always)]
    fn columns<S: Simd, const N: usize>(self, s: S) {
        let none = s.splat(0.0);
        for panel in 0..self.panels {
            let weights = self.weights.wrapping_add(panel * STRIP * self.weight_stride);
            for row in 0..self.n_rows {
                let (x, _) = self.x[row * self.x_stride..][..16 * N].as_chunks::<16>();
                let mut sums = [s.fold2(none, none); STRIP / 2];
                for i in 0..STRIP / 2 {
                    let mut acc = [none; 2];
                    for k in 0..N {
                        let x = s.load(&x[k]);
                        for w in 0..2 {
                            let row = (2 * i + w) * self.weight_stride;
                            let at = weights.wrapping_add(row + 16 * k * size_of::<B>());
                            // SAFETY: so many weights are readable in each row.
                            acc[w] = s.fma(unsafe { B::load(s, at) }, x, acc[w]);
                        }
                    }
                    sums[i] = s.fold2(acc[0], acc[1]);
                }
                // SAFETY: the caller's room for all rows and panels.
                s.store(s.fold16(sums), unsafe { &mut *self.out.add(row * self.panels + panel) });
            }
        }
    }
}

/// Some weight rows times some activation rows.
pub(crate) struct FloatStrip<'a> {
    /// The weights, of a float type or one that only `dequantize_row` reads.
    pub weight: QMatrix<'a>,
    /// At most [`FloatStrip::most_rows`].
    pub rows: Range<usize>,
    /// Lines of `x_stride`, which is `weight.cols()` rounded up to 16, zeros behind the columns.
    pub x: &'a [f32],
    /// See `x`.
    pub x_stride: usize,
    /// At most [`ROW_BLOCK`].
    pub x_rows: Range<usize>,
}

/// Columns of which not even the lanes' sums are worth storing.
const NARROW: usize = 64;

/// Whether [`Narrow`] computes with it.
fn is_narrow(weight: QMatrix<'_>) -> bool {
    is_direct(weight.ty(), weight.cols()) && (16..=NARROW).contains(&weight.cols())
}

impl FloatStrip<'_> {
    /// The most weight rows of a strip with so many activation rows.
    pub fn most_rows(weight: QMatrix<'_>, x_rows: usize) -> usize {
        if is_narrow(weight) { ROW_BLOCK / x_rows.clamp(1, ROW_BLOCK) * STRIP } else { STRIP }
    }

    /// Computes and writes `out[row · weight.rows() + n]`.
    ///
    /// # Safety
    /// `out` holds all rows of `x`, and no one else uses the outputs of these rows.
    pub unsafe fn run(&self, isa: Isa, out: Output<'_>) -> Result<(), FormatError> {
        assert!(self.rows.len() <= FloatStrip::most_rows(self.weight, self.x_rows.len()));
        assert!(self.x_rows.len() <= ROW_BLOCK);
        assert!(self.x_stride.is_multiple_of(16) && self.x_stride >= self.weight.cols());
        let panels = if is_narrow(self.weight) { self.rows.len() / STRIP } else { 0 };
        let whole = self.rows.start + panels * STRIP;
        let rest = FloatStrip { rows: whole..self.rows.end, x_rows: self.x_rows.clone(), ..*self };
        // SAFETY: the caller's promise; whole panels, and what is left.
        unsafe {
            if panels > 0 {
                self.narrow(isa, self.rows.start..whole, out);
            }
            if rest.rows.is_empty() { Ok(()) } else { rest.wide(isa, out) }
        }
    }

    /// One panel. Not inlined, since its stack, tens of KiB, is touched page by page on every entry.
    ///
    /// # Safety
    /// As for `run`.
    #[inline(never)]
    unsafe fn wide(&self, isa: Isa, out: Output<'_>) -> Result<(), FormatError> {
        let mut acc = MaybeUninit::<Sums>::uninit();
        let mut wide = MaybeUninit::<Wide>::uninit();
        let step = match self.x_rows.len() {
            _ if !is_direct(self.weight.ty(), self.weight.cols()) => COLUMNS,
            0 | 1 => COLUMNS_OF_ONE,
            rows => (COLUMNS_OF_FEW / rows / COLUMNS).max(1) * COLUMNS,
        };
        for column in (0..self.weight.cols()).step_by(step) {
            let acc = acc.as_mut_ptr().cast();
            let columns = step.min(self.weight.cols() - column);
            // SAFETY: accumulators for all rows; they are written at column 0 before they are read.
            unsafe { self.chunk(isa, column, columns, acc, &mut wide)? };
        }
        for (i, row) in self.x_rows.clone().enumerate() {
            let mut sums = [0.0; STRIP];
            if self.weight.cols() > 0 {
                // SAFETY: the sweeps have written them.
                let lanes = unsafe {
                    let acc: *const [f32; 16] = acc.as_ptr().cast();
                    std::slice::from_raw_parts(acc.add(i * STRIP), self.rows.len())
                };
                isa.run(Fold { lanes, sums: &mut sums });
            }
            // SAFETY: these outputs are this strip's alone.
            unsafe { out.put(row, self.rows.start, &sums[..self.rows.len()]) };
        }
        Ok(())
    }

    /// Whole panels of few columns.
    ///
    /// # Safety
    /// As for `run`.
    unsafe fn narrow(&self, isa: Isa, rows: Range<usize>, out: Output<'_>) {
        let panels = rows.len() / STRIP;
        let n_rows = self.x_rows.len();
        assert!(panels * n_rows <= ROW_BLOCK);
        let mut sums = [const { MaybeUninit::<[f32; STRIP]>::uninit() }; ROW_BLOCK];
        // SAFETY: so many whole rows of the weight; sums for all rows and panels.
        unsafe {
            let sums = sums.as_mut_ptr().cast();
            match self.weight.ty() {
                QuantType::F16 => self.narrow_of::<F16>(isa, rows.start, panels, sums),
                QuantType::BF16 => self.narrow_of::<BF16>(isa, rows.start, panels, sums),
                _ => self.narrow_of::<F32>(isa, rows.start, panels, sums),
            }
        }
        for (i, row) in self.x_rows.clone().enumerate() {
            for panel in 0..panels {
                // SAFETY: written above; these outputs are this strip's alone.
                unsafe {
                    let sums = sums[i * panels + panel].assume_init();
                    out.put(row, rows.start + panel * STRIP, &sums);
                }
            }
        }
    }

    /// # Safety
    /// The weights are of type B, `panels` panels from row `first` on; `out` has room for as many for each row.
    unsafe fn narrow_of<B: FloatBlock>(&self, isa: Isa, first: usize, panels: usize, out: *mut [f32; STRIP]) {
        let weights = &self.weight.bytes()[first * self.weight.row_bytes()..];
        assert!(panels * STRIP * self.weight.row_bytes() <= weights.len());
        isa.run(Narrow::<B> {
            weights: weights.as_ptr(),
            weight_stride: self.weight.row_bytes(),
            panels,
            x: &self.x[self.x_rows.start * self.x_stride..],
            x_stride: self.x_stride,
            n_rows: self.x_rows.len(),
            columns: self.weight.cols(),
            out,
            block: PhantomData,
        });
    }

    /// # Safety
    /// `acc` has room for [`STRIP`] × the rows, and was written if `column` is not 0.
    unsafe fn chunk(
        &self,
        isa: Isa,
        column: usize,
        columns: usize,
        acc: *mut [f32; 16],
        wide: &mut MaybeUninit<Wide>,
    ) -> Result<(), FormatError> {
        let ty = self.weight.ty();
        let bytes = column / ty.block_len() * ty.block_bytes()
            ..(column + columns) / ty.block_len() * ty.block_bytes();
        let padded = columns.next_multiple_of(16);
        if is_direct(ty, columns) {
            let (weights, stride) =
                (self.weight.row(self.rows.start)[bytes.start..].as_ptr(), self.weight.row_bytes());
            // SAFETY: the rows' own `columns` weights; the caller vouches for `acc`.
            unsafe {
                match ty {
                    QuantType::F16 => self.sweep::<F16>(isa, weights, stride, column, padded, acc),
                    QuantType::BF16 => self.sweep::<BF16>(isa, weights, stride, column, padded, acc),
                    _ => self.sweep::<F32>(isa, weights, stride, column, padded, acc),
                }
            }
            return Ok(());
        }
        for (i, row) in self.rows.clone().enumerate() {
            let line: *mut [f32; COLUMNS] = wide.as_mut_ptr().cast();
            // SAFETY: line `i` of STRIP; zeroed before it becomes a slice.
            let line = unsafe {
                line.add(i).write_bytes(0, 1);
                &mut *line.add(i)
            };
            let (weights, out) = (&self.weight.row(row)[bytes.clone()], &mut line[..columns]);
            dequantize_row(ty, weights, out)?;
        }
        // SAFETY: `wide` holds the weights, and zeros behind them; the caller vouches for `acc`.
        unsafe {
            self.sweep::<F32>(isa, wide.as_ptr().cast(), COLUMNS * size_of::<f32>(), column, padded, acc)
        };
        Ok(())
    }

    /// # Safety
    /// `columns` weights of B are readable in each of the strip's rows; `acc` as for `chunk`.
    unsafe fn sweep<B: FloatBlock>(
        &self,
        isa: Isa,
        weights: *const u8,
        weight_stride: usize,
        column: usize,
        columns: usize,
        acc: *mut [f32; 16],
    ) {
        // Up to a part of the second-level cache; behind the last strip is something else.
        let near = weight_stride == self.weight.row_bytes()
            && weight_stride * STRIP <= 256 << 10
            && self.rows.end < self.weight.rows();
        let ahead = if near { weight_stride * STRIP } else { 0 };
        isa.run(Sweep::<B> {
            weights,
            weight_stride,
            n_weights: self.rows.len(),
            x: &self.x[self.x_rows.start * self.x_stride + column..],
            x_stride: self.x_stride,
            n_rows: self.x_rows.len(),
            columns,
            first: column == 0,
            ahead,
            acc,
            block: PhantomData,
        });
    }
}
