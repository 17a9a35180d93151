//! U in bands: what is expanded with factors whose rank is not whole blocks of their format.
//!
//! A band holds the coefficients of 32 outputs, column after column of U ([`Expand::Bands`](crate::backend::Expand::Bands)). So outputs
//! stand in the lanes of registers, each sums over the columns in order, and nothing is folded. Bits are those of
//! [`crate::ops::lora::expand`].

use std::ops::Range;

use super::output::Output;
use super::pointwise::try_split;
use super::simd::{Op, Simd};
use super::{Isa, ThreadPool};
use crate::backend::BAND;
use crate::quant::{FormatError, Half, Q4_0, Q8_0, QMatrix, dequantize_row};

/// Lines for which a band is decoded as it is used: one tile of [`Lines`]. For more, numbers are written down.
const DIRECT_LINES: usize = 4;

/// Some bands and the lines that they expand.
#[derive(Clone, Copy)]
pub(super) struct Bands<'a> {
    /// See [`crate::backend::Expand::Bands`].
    pub u: QMatrix<'a>,
    /// Lines of the rank.
    pub z: &'a [f32],
}

impl<'a> Bands<'a> {
    /// Bytes of the bands that begin among some outputs, as a range of those of U.
    pub fn bytes(u: QMatrix<'_>, outputs: &Range<usize>) -> Range<usize> {
        outputs.start.div_ceil(BAND) * u.row_bytes()..outputs.end.div_ceil(BAND) * u.row_bytes()
    }

    /// `U z` of every line, for some outputs.
    ///
    /// # Safety
    /// `out` holds all lines, and no one else uses these outputs.
    pub unsafe fn run(self, isa: Isa, outputs: Range<usize>, out: Output<'_>) -> Result<(), FormatError> {
        // SAFETY: the caller's promise.
        unsafe { Bands::run_each(isa, outputs, &mut std::iter::once((self, out))) }
    }

    /// The same for several. While one is expanded, the coefficients of the next come into the first level of the cache.
    ///
    /// # Safety
    /// As for [`Bands::run`], for each.
    pub unsafe fn run_each<'o>(
        isa: Isa,
        outputs: Range<usize>,
        all: &mut dyn Iterator<Item = (Bands<'a>, Output<'o>)>,
    ) -> Result<(), FormatError> {
        isa.run(Each { outputs, all })
    }

    /// The same for all outputs, divided among threads. Panics if `out` has other lines.
    ///
    /// # Safety
    /// No one else uses `out`.
    pub unsafe fn run_all(&self, isa: Isa, pool: &ThreadPool, out: Output<'_>) -> Result<(), FormatError> {
        let Some(lines) = self.z.len().checked_div(self.u.cols() / BAND) else { return Ok(()) };
        out.check(lines, self.u.rows() * BAND);
        try_split(pool, self.u.rows(), self.z.len() * BAND, &|bands| {
            // SAFETY: the caller's promise; each band is given to one thread.
            unsafe { self.run(isa, bands.start * BAND..bands.end * BAND, out) }
        })
    }
}

/// See [`Bands::run_each`].
struct Each<'i, 'a, 'o> {
    outputs: Range<usize>,
    all: &'i mut dyn Iterator<Item = (Bands<'a>, Output<'o>)>,
}

impl Op for Each<'_, '_, '_> {
    type Out = Result<(), FormatError>;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Result<(), FormatError> {
        let Each { outputs, all } = self;
        let mut next = all.next();
        while let Some((Bands { u, z }, out)) = next {
            next = all.next();
            if let Some((Bands { u, .. }, _)) = next {
                for line in u.bytes()[Bands::bytes(u, &outputs)].chunks(64) {
                    s.prefetch_near(line.as_ptr());
                }
            }
            let rank = u.cols() / BAND;
            let lines = z.len().checked_div(rank).unwrap_or(0);
            assert!(outputs.end <= u.rows() * BAND && lines * rank == z.len());
            if outputs.is_empty() || lines == 0 {
                continue;
            }
            let (few, first) = (lines <= DIRECT_LINES, outputs.start / BAND);
            let outputs = outputs.clone();
            if let Some(blocks) = u.blocks::<Q4_0>().filter(|_| few) {
                Lines { bands: &blocks[first * rank..], z, rank, lines, outputs, out }.run(s);
            } else if let Some(blocks) = u.blocks::<Q8_0>().filter(|_| few) {
                Lines { bands: &blocks[first * rank..], z, rank, lines, outputs, out }.run(s);
            } else {
                let mut band = vec![0f32; u.cols()];
                for i in first..outputs.end.div_ceil(BAND) {
                    dequantize_row(u.ty(), u.row(i), &mut band)?;
                    let (bands, _) = band.as_chunks::<BAND>();
                    let outputs = outputs.start.max(i * BAND)..outputs.end.min((i + 1) * BAND);
                    Lines { bands, z, rank, lines, outputs, out }.run(s);
                }
            }
        }
        Ok(())
    }
}

/// One column of a band.
trait BandColumn {
    /// Its 32 coefficients in order.
    fn load<S: Simd>(&self, s: S) -> [S::F; 2];
}

impl BandColumn for [f32; BAND] {
    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> [S::F; 2] {
        let (halves, _) = self.as_chunks::<16>();
        [s.load(&halves[0]), s.load(&halves[1])]
    }
}

/// A block's scale in all lanes.
#[inline(always)]
fn scale<S: Simd>(s: S, d: Half) -> S::F {
    s.load_f16(&[d.to_bits().to_le_bytes(); 16])
}

impl BandColumn for Q8_0 {
    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> [S::F; 2] {
        let d = scale(s, self.d);
        let (halves, _) = self.qs.as_chunks::<16>();
        [s.mul(d, s.load_i8(&halves[0])), s.mul(d, s.load_i8(&halves[1]))]
    }
}

impl BandColumn for Q4_0 {
    #[inline(always)]
    fn load<S: Simd>(&self, s: S) -> [S::F; 2] {
        s.scale_nibbles(scale(s, self.d), &self.qs)
    }
}

/// Some bands and all lines.
struct Lines<'a, B> {
    /// `rank` columns of each band, the first of which is the one that `outputs` begin in.
    bands: &'a [B],
    z: &'a [f32],
    rank: usize,
    lines: usize,
    outputs: Range<usize>,
    out: Output<'a>,
}

impl<B: BandColumn> Lines<'_, B> {
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let bands = self.outputs.end.div_ceil(BAND) - self.outputs.start / BAND;
        let mut band = 0;
        // Four times two sums hide the time that each addition takes: those of lines, or of bands. With few registers, no more than two times
        // two fit beside the column.
        let most = if S::FEW_REGISTERS { 2 } else { 4 };
        let most_bands = most / self.lines;
        while band < bands {
            let mut line = 0;
            let at_once = match most_bands.min(bands - band) {
                n @ 3.. => n,
                2 => 2,
                _ => 1,
            };
            while line < self.lines {
                line += match ((self.lines - line).min(most), at_once) {
                    (1, 4) => self.tile::<S, 1, 4>(s, line, band),
                    (1, 3) => self.tile::<S, 1, 3>(s, line, band),
                    (1, 2) => self.tile::<S, 1, 2>(s, line, band),
                    (1, _) => self.tile::<S, 1, 1>(s, line, band),
                    (2, 2) => self.tile::<S, 2, 2>(s, line, band),
                    (2, _) => self.tile::<S, 2, 1>(s, line, band),
                    (3, _) => self.tile::<S, 3, 1>(s, line, band),
                    _ => self.tile::<S, 4, 1>(s, line, band),
                };
            }
            band += at_once;
        }
    }

    /// M lines of N bands.
    #[inline(always)]
    fn tile<S: Simd, const M: usize, const N: usize>(&self, s: S, line: usize, band: usize) -> usize {
        let rank = self.rank;
        let mut columns = [&self.bands[..0]; N];
        for (n, columns) in columns.iter_mut().enumerate() {
            *columns = &self.bands[(band + n) * rank..][..rank];
        }
        let mut z = [&self.z[..0]; M];
        for (m, z) in z.iter_mut().enumerate() {
            *z = &self.z[(line + m) * rank..][..rank];
        }
        let mut sums = [[[s.splat(0.0); 2]; M]; N];
        for k in 0..rank {
            // By hand: what `map` calls is not always compiled into this, and only here are the level's instructions.
            let mut at_k = [s.splat(0.0); M];
            for (at_k, z) in at_k.iter_mut().zip(z) {
                *at_k = s.splat(z[k]);
            }
            for (sums, columns) in sums.iter_mut().zip(columns) {
                let u = columns[k].load(s);
                for (sums, z) in sums.iter_mut().zip(at_k) {
                    *sums = [s.fma(u[0], z, sums[0]), s.fma(u[1], z, sums[1])];
                }
            }
        }
        // By reference: what moves through memory on the way is waited for longer than the products.
        for (n, sums) in sums.iter().enumerate() {
            let first = (self.outputs.start / BAND + band + n) * BAND;
            let wanted = self.outputs.start.max(first)..self.outputs.end.min(first + BAND);
            for (m, sums) in sums.iter().enumerate() {
                // SAFETY: the caller of `Bands::run` promised that these outputs are this call's alone.
                unsafe {
                    if wanted.len() == BAND {
                        self.out.put_two(s, line + m, first, *sums);
                        continue;
                    }
                    let mut values = [0.0; BAND];
                    let (halves, _) = values.as_chunks_mut::<16>();
                    s.store(sums[0], &mut halves[0]);
                    s.store(sums[1], &mut halves[1]);
                    let values = &values[wanted.start - first..wanted.end - first];
                    self.out.put(line + m, wanted.start, values);
                }
            }
        }
        M
    }
}
