//! Products with BF16 weights on AMX tiles.
//!
//! `tdpbf16ps` multiplies 16 weight rows × 32 columns, loaded from where they are mapped, with 32 columns × up to 16 activation
//! rows, and adds to 16 × 16 sums in f32. As at the level below ([`super::avx512_bf16`]) both sides are in BF16, so the activations
//! are rounded to 8 bits of mantissa first, denormal numbers are flushed, and bits depend on the level. For each 32 columns the instruction sums the products
//! with even columns and those with odd ones, in order, then adds the two to each other and then to the output's sum (source: Intel SDM,
//! TDPBF16PS). So for a given row the bits are the same in every batch and on any number of threads.
//!
//! Error against the exact product with the unrounded `x`: at most `2⁻⁸ · Σ |w x|` from rounding `x` and
//! `(n/32 + 18) · 2⁻²⁴ · Σ |w x|` from the sums, plus `2⁻¹²⁶ · (n + Σ |w| + Σ |x|)` for what is flushed. Activations beyond
//! 3.39·10³⁸ become infinite.
//!
//! Two panels of weights × two tiles of activations are four instructions (64 cycles) on four loads of 1 KiB. [`COLUMNS`] columns of the panels
//! stay in the first-level cache while all activations pass.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::ThreadPool;
use super::activations::{Shared, Tiles};
use super::amx::{Amx, Shapes, release};
use super::output::Output;
use super::panel::ROWS;
use crate::quant::QMatrix;

/// Columns of an instruction.
const STEP: usize = 32;
/// Columns at a time: 32 KiB of weights.
const COLUMNS: usize = 512;
/// Weight rows of a strip.
pub(super) const STRIP: usize = 2 * ROWS;
/// Tiles of activations that a task takes at most.
pub(super) const TILES: usize = 16;

/// Activations rounded to BF16 in pairs of columns: `x[k / 2][row][2]` for each tile of up to 16 rows, with zeros behind the columns.
pub(super) struct Paired {
    tiles: Tiles,
    /// Columns rounded up to [`STEP`].
    stride: usize,
    x: Vec<[u16; 2]>,
    amx: Amx,
}

impl Paired {
    /// Rounds lines of `columns` to nearest, ties to even.
    pub fn new(amx: Amx, pool: &ThreadPool, x: &[f32], columns: usize, rows: usize) -> Paired {
        let tiles = Tiles::new(rows, ROWS);
        let stride = columns.next_multiple_of(STEP);
        let mut out = vec![[0; 2]; rows * stride / 2];
        let pairs = Shared(out.as_mut_ptr());
        // Below some thousand values a task costs more than it saves.
        let serial = ThreadPool::new(1);
        let pool = if rows * columns < 16_384 { &serial } else { pool };
        pool.run(tiles.count(), &|t| {
            let (start, end) = (tiles.start(t), tiles.start(t + 1));
            // SAFETY: tiles are disjoint ranges of rows, and each has one task.
            let out = unsafe { pairs.slice(start * stride / 2, (end - start) * stride / 2) };
            // SAFETY: the proof: this level has AVX-512 and its BF16.
            unsafe { pair(&x[start * columns..end * columns], columns, end - start, out) };
        });
        Paired { tiles, stride, x: out, amx }
    }

    /// Some of the lines.
    pub fn select(&self, rows: &[u32]) -> Paired {
        let tiles = Tiles::new(rows.len(), ROWS);
        let mut x = vec![[0; 2]; rows.len() * self.stride / 2];
        for (place, row) in rows.iter().enumerate() {
            let from = self.tiles.place(*row as usize, self.stride);
            from.copy(2, &self.x, tiles.place(place, self.stride), &mut x);
        }
        Paired { tiles, x, ..*self }
    }

    /// How many tiles.
    pub fn count(&self) -> usize {
        self.tiles.count()
    }

    /// How many lines.
    pub fn rows(&self) -> usize {
        self.tiles.rows()
    }
}

/// One tile of `rows` lines.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512bf16")]
fn pair(x: &[f32], columns: usize, rows: usize, out: &mut [[u16; 2]]) {
    for (r, line) in x.chunks_exact(columns).enumerate() {
        let (steps, tail) = line.as_chunks::<STEP>();
        let mut last = [0.0; STEP];
        last[..tail.len()].copy_from_slice(tail);
        let all = steps.iter().chain((!tail.is_empty()).then_some(&last));
        for (x, out) in all.zip(out.chunks_exact_mut(STEP / 2 * rows)) {
            // SAFETY: 32 floats in, 32 halves out.
            let halves: [[u16; 2]; STEP / 2] = unsafe {
                let (low, high) = (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x[16..].as_ptr()));
                std::mem::transmute(_mm512_cvtne2ps_pbh(high, low))
            };
            for (out, pair) in out[r..].iter_mut().step_by(rows).zip(halves) {
                *out = pair;
            }
        }
    }
}

/// Some weight rows times some tiles of activations.
pub(super) struct TileStrip<'a> {
    /// BF16.
    pub weight: QMatrix<'a>,
    /// At most [`STRIP`].
    pub rows: Range<usize>,
    /// The right-hand side.
    pub x: &'a Paired,
    /// At most [`TILES`].
    pub tiles: Range<usize>,
}

/// 16 weight rows × 16 activation rows.
type Square = [[f32; ROWS]; ROWS];

/// Weights that cannot be loaded from where they are, with zeros beside them: of a panel of fewer than 16 rows, or the last columns.
#[repr(align(64))]
struct Copies([[[u16; STEP]; ROWS]; COLUMNS / STEP]);

/// Where a panel's weights are: tile after tile of 16 lines.
#[derive(Clone, Copy)]
struct Panel {
    whole: *const u8,
    row_bytes: usize,
    /// Instructions whose weights are loaded from `whole`; those behind them from `copies`.
    wholes: usize,
    copies: *const Copies,
}

impl Panel {
    /// The tile of an instruction, and from one line to the next.
    #[inline(always)]
    fn at(&self, step: usize) -> (*const u8, usize) {
        if step < self.wholes {
            (self.whole.wrapping_add(2 * STEP * step), self.row_bytes)
        } else {
            (self.copies.cast::<u8>().wrapping_add(step * size_of::<[[u16; STEP]; ROWS]>()), 2 * STEP)
        }
    }
}

impl TileStrip<'_> {
    /// Computes and writes.
    ///
    /// # Safety
    /// `out` holds all rows of `x`, and no one else uses the outputs of these rows.
    pub unsafe fn run(&self, out: Output<'_>) {
        let columns = self.weight.cols();
        assert!(self.rows.len() <= STRIP && self.tiles.len() <= TILES && self.tiles.end <= self.x.count());
        assert!(columns.next_multiple_of(STEP) == self.x.stride && self.rows.end <= self.weight.rows());
        let mut acc = [const { MaybeUninit::<[Square; 2]>::uninit() }; TILES];
        let acc: *mut [Square; 2] = acc.as_mut_ptr().cast();
        for t in self.tiles.clone().filter(|t| self.len(*t) < ROWS) {
            // SAFETY: room for every tile. Instructions write so many columns, and all are turned at the end.
            unsafe { acc.add(t - self.tiles.start).write_bytes(0, 1) };
        }
        let mut copies = [const { MaybeUninit::<Copies>::uninit() }; 2];
        let copies: *mut Copies = copies.as_mut_ptr().cast();
        for column in (0..columns).step_by(COLUMNS) {
            let steps = COLUMNS.min(columns - column).div_ceil(STEP);
            // SAFETY: the copies' room.
            let panels = [0, 1].map(|p| unsafe { self.panel(p, column, steps, copies.add(p)) });
            let mut t = self.tiles.start;
            while t < self.tiles.end {
                // SAFETY: the panels have so many instructions, and so has every tile of activations from `column` on; the sums
                // of a tile have been written if these are not the first columns.
                unsafe {
                    let acc = acc.add(t - self.tiles.start);
                    let n = if t + 1 < self.tiles.end && self.len(t) == self.len(t + 1) { 2 } else { 1 };
                    self.squares(panels, t, n, column, steps, acc.cast());
                    t += n;
                }
            }
        }
        release(self.x.amx);
        for t in self.tiles.clone() {
            // SAFETY: written above; the proof; these outputs are this strip's alone.
            unsafe { self.put(t, &*acc.add(t - self.tiles.start), out) };
        }
    }

    /// Rows of a tile.
    fn len(&self, t: usize) -> usize {
        self.x.tiles.start(t + 1) - self.x.tiles.start(t)
    }

    /// Panel `p` from a column on; what cannot be loaded from where it is goes to `copies`.
    ///
    /// # Safety
    /// `copies` has room.
    unsafe fn panel(&self, p: usize, column: usize, steps: usize, copies: *mut Copies) -> Panel {
        let first = self.rows.start + p * ROWS;
        let there = self.rows.end.saturating_sub(first).min(ROWS);
        let left = self.weight.cols() - column;
        let wholes = if there == ROWS { (left / STEP).min(steps) } else { 0 };
        for step in wholes..steps {
            for r in 0..ROWS {
                let mut line = [0; STEP];
                if r < there {
                    let from = &self.weight.row(first + r)[2 * (column + step * STEP)..];
                    for (to, from) in line.iter_mut().zip(from.as_chunks::<2>().0) {
                        *to = u16::from_le_bytes(*from);
                    }
                }
                // SAFETY: the caller's room; there are no more steps than it is for.
                unsafe { (&raw mut (*copies).0[step][r]).write(line) };
            }
        }
        let row = if there == 0 { &[] } else { &self.weight.row(first)[2 * column..] };
        Panel { whole: row.as_ptr(), row_bytes: self.weight.row_bytes(), wholes, copies }
    }

    /// Both panels × `n` tiles of activations of the same length.
    ///
    /// # Safety
    /// The panels have so many steps; `acc` has two squares for each tile, written if `column` is not 0.
    #[inline(always)]
    unsafe fn squares(
        &self,
        panels: [Panel; 2],
        t: usize,
        n: usize,
        column: usize,
        steps: usize,
        acc: *mut Square,
    ) {
        let rows = self.len(t);
        let x = |i: usize| {
            let start = self.x.tiles.start(t + i) * self.x.stride / 2 + column / 2 * rows;
            self.x.x[start..][..steps * STEP / 2 * rows].as_ptr()
        };
        let x = [x(0), x(n - 1)];
        // What the next strip will read, in the order of use.
        let strip_bytes = self.weight.row_bytes() * STRIP;
        let ahead = if t == self.tiles.start && strip_bytes <= 256 << 10 { strip_bytes } else { 0 };
        // SAFETY: the proof; the loads are of operands that the caller and the slices above vouch for; the squares have been
        // written where they are loaded.
        unsafe {
            Shapes::new(rows).apply(self.x.amx);
            if column > 0 {
                load::<0>(acc);
                load::<1>(acc.add(1));
                load::<2>(acc.add(2 * (n - 1)));
                load::<3>(acc.add(2 * (n - 1) + 1));
            }
            for step in 0..steps {
                let ((w0, stride0), (w1, stride1)) = (panels[0].at(step), panels[1].at(step));
                let at = step * STEP / 2 * rows;
                if ahead > 0 {
                    for (w, stride) in [(w0, stride0), (w1, stride1)] {
                        for r in 0..ROWS {
                            _mm_prefetch::<_MM_HINT_T1>(w.wrapping_add(r * stride + ahead).cast());
                        }
                    }
                }
                asm!(
                    "tileloadd tmm4, [{w0} + {stride0}]",
                    "tileloadd tmm6, [{x0} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{w1} + {stride1}]",
                    "tdpbf16ps tmm1, tmm5, tmm6",
                    w0 = in(reg) w0, stride0 = in(reg) stride0,
                    w1 = in(reg) w1, stride1 = in(reg) stride1,
                    x0 = in(reg) x[0].wrapping_add(at), row = in(reg) 4 * rows,
                    options(nostack, readonly),
                );
                if n == 2 {
                    asm!(
                        "tileloadd tmm7, [{x1} + {row}]",
                        "tdpbf16ps tmm2, tmm4, tmm7",
                        "tdpbf16ps tmm3, tmm5, tmm7",
                        x1 = in(reg) x[1].wrapping_add(at), row = in(reg) 4 * rows,
                        options(nostack, readonly),
                    );
                }
            }
            store::<0>(acc);
            store::<1>(acc.add(1));
            if n == 2 {
                store::<2>(acc.add(2));
                store::<3>(acc.add(3));
            }
        }
    }

    /// Writes the outputs of a tile.
    ///
    /// # Safety
    /// No one else uses them; the processor has AVX-512.
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
    unsafe fn put(&self, t: usize, squares: &[Square; 2], out: Output<'_>) {
        let (start, m) = (self.x.tiles.start(t), self.len(t));
        for (p, square) in squares.iter().enumerate() {
            let first = self.rows.start + p * ROWS;
            let n = self.rows.end.saturating_sub(first).min(ROWS);
            if n == 0 {
                continue;
            }
            let mut turned = [[0.0; ROWS]; ROWS];
            transpose(square, &mut turned);
            for (r, values) in turned.iter().enumerate().take(m) {
                // SAFETY: the caller's promise.
                unsafe { out.put(start + r, first, &values[..n]) };
            }
        }
    }
}

/// # Safety
/// Tile TILE is shaped for squares, and the square was written.
#[inline(always)]
unsafe fn load<const TILE: u8>(from: *const Square) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("tileloadd tmm{t}, [{from} + {bytes}]", t = const TILE, from = in(reg) from, bytes = in(reg) 64usize, options(nostack, readonly));
    }
}

/// # Safety
/// Tile TILE is shaped for squares.
#[inline(always)]
unsafe fn store<const TILE: u8>(to: *mut Square) {
    // SAFETY: the caller's promise.
    unsafe {
        asm!("tilestored [{to} + {bytes}], tmm{t}", t = const TILE, to = in(reg) to, bytes = in(reg) 64usize, options(nostack));
    }
}

/// Rows become columns: pairs, fours, then lanes of four.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
fn transpose(from: &Square, to: &mut Square) {
    let mut x = [_mm512_setzero_ps(); ROWS];
    for (x, from) in x.iter_mut().zip(from) {
        // SAFETY: 16 floats.
        *x = unsafe { _mm512_loadu_ps(from.as_ptr()) };
    }
    let mut y = x;
    for i in 0..8 {
        y[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
    }
    for i in 0..4 {
        for half in 0..2 {
            let (a, b) = (_mm512_castps_pd(y[4 * i + half]), _mm512_castps_pd(y[4 * i + 2 + half]));
            x[4 * i + 2 * half] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
            x[4 * i + 2 * half + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
        }
    }
    for i in 0..4 {
        // Lane l of x[4q + i] is column 4l + i of rows 4q .. 4q + 4.
        let (a, b) =
            (_mm512_shuffle_f32x4::<0x44>(x[i], x[4 + i]), _mm512_shuffle_f32x4::<0x44>(x[8 + i], x[12 + i]));
        let (c, d) =
            (_mm512_shuffle_f32x4::<0xee>(x[i], x[4 + i]), _mm512_shuffle_f32x4::<0xee>(x[8 + i], x[12 + i]));
        y[i] = _mm512_shuffle_f32x4::<0x88>(a, b);
        y[4 + i] = _mm512_shuffle_f32x4::<0xdd>(a, b);
        y[8 + i] = _mm512_shuffle_f32x4::<0x88>(c, d);
        y[12 + i] = _mm512_shuffle_f32x4::<0xdd>(c, d);
    }
    for (y, to) in y.into_iter().zip(to) {
        // SAFETY: 16 floats.
        unsafe { _mm512_storeu_ps(to.as_mut_ptr(), y) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::Isa;
    use super::*;
    use crate::QuantType;

    /// The instruction as the manual describes it, for numbers far from the denormal ones.
    fn by_the_manual(w: &[f32], x: &[f32]) -> f32 {
        w.chunks(STEP).zip(x.chunks(STEP)).fold(0.0, |sum, (w, x)| {
            let mut halves = [0.0f32; 2];
            for (i, (w, x)) in w.iter().zip(x).enumerate() {
                halves[i % 2] = w.mul_add(*x, halves[i % 2]);
            }
            sum + (halves[0] + halves[1])
        })
    }

    #[test]
    fn bits_are_those_of_the_manual() {
        let Some(amx) = Amx::of(Isa::detect()) else {
            println!("skipped: this machine has no amx-bf16");
            return;
        };
        let mut state = 7u32;
        let mut noise = |n: usize| -> Vec<f32> {
            (0..n)
                .map(|_| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    (state >> 8) as f32 / (1 << 23) as f32 - 1.0
                })
                .collect()
        };
        for (n, k, rows) in [(32, 512, 16), (19, 100, 21), (1, 1, 1), (40, 1090, 33), (16, 31, 2)] {
            let round = |x: &f32| half::bf16::from_f32(*x);
            let w: Vec<_> = noise(n * k).iter().map(round).collect();
            let x = noise(rows * k);
            let rounded: Vec<f32> = x.iter().map(|x| round(x).to_f32()).collect();
            let bytes: Vec<u8> = w.iter().flat_map(|w| w.to_le_bytes()).collect();
            let weight = QMatrix::new(QuantType::BF16, n, k, &bytes).unwrap();
            let paired = Paired::new(amx, &ThreadPool::new(1), &x, k, rows);
            let picked: Vec<u32> = (0..rows as u32).rev().step_by(2).collect();
            for (x, lines) in [(&paired, (0..rows as u32).collect()), (&paired.select(&picked), picked)] {
                let mut out = vec![f32::NAN; lines.len() * n];
                for start in (0..n).step_by(STRIP) {
                    let rows = start..(start + STRIP).min(n);
                    let strip = TileStrip { weight, rows, x, tiles: 0..x.count() };
                    // SAFETY: `out` has all lines, and this thread alone.
                    unsafe { strip.run(Output::set(&mut out, n)) };
                }
                for (line, out) in lines.iter().zip(out.chunks(n)) {
                    let x = &rounded[*line as usize * k..][..k];
                    for (w, out) in w.chunks(k).zip(out) {
                        let w: Vec<f32> = w.iter().map(|w| w.to_f32()).collect();
                        assert_eq!(out.to_bits(), by_the_manual(&w, x).to_bits(), "{n} × {k}, {rows} rows");
                    }
                }
            }
        }
    }
}
