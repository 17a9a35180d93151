//! Products with BF16 weights by `vdpbf16ps`.
//!
//! The one kernel whose bits depend on the level: the instruction takes both sides in BF16, so the activations are
//! rounded to 8 bits of mantissa first, and it flushes denormal numbers. Lane `l` of 16 takes the columns
//! `2l` and `2l + 1` (mod 32) in order; then the lanes are folded as everywhere. For a given row
//! the bits are the same in every batch and on any number of threads.
//!
//! Error against the exact product with the unrounded `x`: at most `2⁻⁸ · Σ |w x|` from rounding `x` and
//! `(n/32 + 6) · 2⁻²³ · Σ |w x|` from the sums, in which the instruction rounds twice per step
//! (source: Intel SDM, VDPBF16PS), plus `2⁻¹²⁶ · (n + Σ |w| + Σ |x|)` for what is flushed. Activations beyond 3.39·10³⁸ become infinite.

// Tiles index several arrays at once.
#![allow(clippy::needless_range_loop)]

use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::aligned::Aligned;
use super::float_matmul::{Fold, ROW_BLOCK, STRIP, Sums};
use super::output::Output;
use super::{Isa, Level};
use crate::quant::QMatrix;

/// Columns at a time: those of six activation rows (12 KiB) stay in the first-level cache.
const COLUMNS: usize = 1024;
/// Weight rows of a tile; with 6 activation rows it has 24 accumulators.
const WEIGHTS: usize = 4;

/// Proof that the processor has the instruction.
#[derive(Clone, Copy)]
pub(super) struct Bf16(());

/// Activations rounded to BF16, lines of `stride` with zeros behind the columns.
pub(super) struct Rounded {
    x: Aligned<u16>,
    stride: usize,
    proof: Bf16,
}

impl Bf16 {
    /// At levels that have it.
    pub fn of(isa: Isa) -> Option<Bf16> {
        (isa.level() == Level::Avx512Bf16).then_some(Bf16(()))
    }
}

impl Rounded {
    /// Rounds lines of `columns` to nearest, ties to even.
    pub fn new(proof: Bf16, x: &[f32], columns: usize) -> Rounded {
        // Half a page more than whole pages, so that the rows of a tile do not share cache sets.
        let stride = columns.next_multiple_of(2048) + 1024;
        let mut out = Aligned::zeros(x.len() / columns * stride);
        for (out, x) in out.chunks_exact_mut(stride).zip(x.chunks_exact(columns)) {
            // SAFETY: the proof.
            unsafe { round(x, out) };
        }
        Rounded { x: out, stride, proof }
    }

    /// Some of the lines.
    pub fn select(&self, rows: &[u32]) -> Rounded {
        let mut out = Aligned::zeros(rows.len() * self.stride);
        for (out, row) in out.chunks_exact_mut(self.stride).zip(rows) {
            out.copy_from_slice(&self.x[*row as usize * self.stride..][..self.stride]);
        }
        Rounded { x: out, ..*self }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn round(x: &[f32], out: &mut [u16]) {
    let (x, tail) = x.as_chunks::<32>();
    let (out, _) = out.as_chunks_mut::<32>();
    let mut last = [0.0; 32];
    last[..tail.len()].copy_from_slice(tail);
    // Lines of `Rounded` are longer than the columns, so there is room for the tail, or for zeros.
    for (x, out) in x.iter().chain([&last]).zip(out) {
        // SAFETY: 32 floats in, 32 halves out.
        unsafe {
            let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[16..].as_ptr()));
            let both: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), both);
        }
    }
}

/// Some weight rows times some activation rows.
pub(super) struct Bf16Strip<'a> {
    /// BF16.
    pub weight: QMatrix<'a>,
    /// At most [`STRIP`].
    pub rows: Range<usize>,
    /// The right-hand side.
    pub x: &'a Rounded,
    /// At most [`ROW_BLOCK`].
    pub x_rows: Range<usize>,
}

impl Bf16Strip<'_> {
    /// Computes and writes. Not inlined, since its stack, 48 KiB, is touched page by page on every entry.
    ///
    /// # Safety
    /// `out` holds all rows of `x`, and no one else uses the outputs of these rows.
    #[inline(never)]
    pub unsafe fn run(&self, isa: Isa, out: Output<'_>) {
        assert!(self.rows.len() <= STRIP && self.x_rows.len() <= ROW_BLOCK);
        assert!(self.x_rows.end * self.x.stride <= self.x.x.len() && self.weight.cols() <= self.x.stride);
        let Bf16(()) = self.x.proof;
        let mut acc = MaybeUninit::<Sums>::uninit();
        let acc: *mut __m512 = acc.as_mut_ptr().cast();
        // SAFETY: the proof; the lengths were checked here and in `QMatrix`.
        unsafe { self.sweep(acc) };
        for (i, row) in self.x_rows.clone().enumerate() {
            let mut sums = [0.0; STRIP];
            if self.weight.cols() > 0 {
                let lanes = acc.wrapping_add(i * STRIP).cast::<[f32; 16]>();
                // SAFETY: the tiles have written those of all rows.
                let lanes = unsafe { std::slice::from_raw_parts(lanes, self.rows.len()) };
                isa.run(Fold { lanes, sums: &mut sums });
            }
            // SAFETY: these outputs are this strip's alone.
            unsafe { out.put(row, self.rows.start, &sums[..self.rows.len()]) };
        }
    }

    /// The lanes of each row and weight.
    ///
    /// # Safety
    /// As for `run`; `acc` has room for them, as [`Sums`] does.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn sweep(&self, acc: *mut __m512) {
        for column in (0..self.weight.cols()).step_by(COLUMNS) {
            let mut row = 0;
            while row < self.x_rows.len() {
                // SAFETY: so many rows are left.
                row += unsafe {
                    match self.x_rows.len() - row {
                        1 => self.rows::<1>(column, row, acc),
                        2 => self.rows::<2>(column, row, acc),
                        3 | 5 => self.rows::<3>(column, row, acc),
                        4 | 7 | 8 => self.rows::<4>(column, row, acc),
                        _ => self.rows::<6>(column, row, acc),
                    }
                };
            }
        }
    }

    /// # Safety
    /// M rows from `row` on.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn rows<const M: usize>(&self, column: usize, row: usize, acc: *mut __m512) -> usize {
        let mut w = 0;
        // SAFETY: so many weights are left.
        unsafe {
            while w + WEIGHTS <= self.rows.len() {
                self.tile::<WEIGHTS, M>(column, row, w, acc);
                w += WEIGHTS;
            }
            while w < self.rows.len() {
                self.tile::<1, M>(column, row, w, acc);
                w += 1;
            }
        }
        M
    }

    /// # Safety
    /// M rows from `row` and W weights from `w` on.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
    unsafe fn tile<const W: usize, const M: usize>(
        &self,
        column: usize,
        row: usize,
        w: usize,
        acc: *mut __m512,
    ) {
        let columns = COLUMNS.min(self.weight.cols() - column);
        let stride = self.weight.cols();
        let weights = self.weight.row(self.rows.start + w)[2 * column..].as_ptr().cast::<i16>();
        let x = self.x.x[(self.x_rows.start + row) * self.x.stride + column..].as_ptr().cast::<i16>();
        // What the next strip will read, in the same order; each tile of rows asks for its share, since all at once would come no faster
        // than memory gives it.
        let ahead = if 2 * stride * STRIP <= 256 << 10 { stride * STRIP } else { 2 * COLUMNS };
        let all = self.x_rows.len();
        let share = columns * row / all..columns * (row + M) / all;
        // SAFETY: the caller's rows and weights; columns end with those of the weight by a mask, and `x` has
        // zeros up to its stride.
        unsafe {
            let mut sums = [[_mm512_setzero_ps(); W]; M];
            if column > 0 {
                for m in 0..M {
                    for w_i in 0..W {
                        sums[m][w_i] = *acc.add((row + m) * STRIP + w + w_i);
                    }
                }
            }
            for k in (0..columns).step_by(32) {
                let left = (columns - k).min(32);
                let mask = u32::MAX >> (32 - left);
                let mut w_k = [_mm512_setzero_si512(); W];
                for w_i in 0..W {
                    let at = weights.add(w_i * stride + k);
                    w_k[w_i] = _mm512_maskz_loadu_epi16(mask, at);
                    if share.contains(&k) {
                        _mm_prefetch::<_MM_HINT_T1>(at.wrapping_add(ahead).cast());
                    }
                }
                for m in 0..M {
                    let x_k: __m512bh =
                        std::mem::transmute(_mm512_loadu_si512(x.add(m * self.x.stride + k).cast()));
                    for w_i in 0..W {
                        sums[m][w_i] = _mm512_dpbf16_ps(
                            sums[m][w_i],
                            std::mem::transmute::<__m512i, __m512bh>(w_k[w_i]),
                            x_k,
                        );
                    }
                }
            }
            for m in 0..M {
                for w_i in 0..W {
                    *acc.add((row + m) * STRIP + w + w_i) = sums[m][w_i];
                }
            }
        }
    }
}
