//! The few vector operations that all kernels are written in.
//!
//! A vector is 16 floats or 64 bytes of integers at every level: one register of AVX-512, two of
//! AVX2, an array elsewhere. Kernels are generic over [`Simd`] and thereby compute the same bits
//! everywhere; only [`Lanes::dot4`] differs in how, and its sums are exact integers (see [`super::int_sum`]).

use super::lanes::Lanes;

/// A level of instructions. A value exists only where the processor has it, so its methods
/// are safe to call (the values are made in `run` of each level's file).
pub(crate) trait Simd: Lanes {
    /// The first eight rows, which are taken before the others with [`Lanes::FEW_REGISTERS`]. Elsewhere all of them.
    type Low: Lanes;
    /// The others.
    type High: Lanes;
    /// Two vectors on their way to [`Simd::fold16`].
    type Two: Copy;
    /// Activation rows and panels of 16 weight rows in one integer tile: as many accumulators as
    /// fit the registers beside the operands.
    const TILE_ROWS: usize;
    /// See [`Simd::TILE_ROWS`].
    const TILE_PANELS: usize;
    /// How many tiles of [`Lanes::DIRECT_ROWS`] weights are multiplied with at once. For more rows, they are unpacked into panels.
    const DIRECT_TILES: usize;
    /// Activation rows for which weights of few columns are not unpacked into panels, at most: to unpack them for every tile takes less time than
    /// to begin and end a panel.
    const DIRECT_ROWS_NEAR: usize;
    /// Activation rows in one float tile. If it is 1, each row meets all weights alone.
    const FLOAT_ROWS: usize;

    /// Both halves.
    fn halves(self) -> (Self::Low, Self::High);

    /// Rounds to half precision, ties to even.
    fn store_f16(self, x: Self::F, out: &mut [[u8; 2]; 16]);
    /// 16 signed bytes.
    fn load_i8(self, x: &[i8; 16]) -> Self::F;
    /// Rounds to integers, ties to even, and saturates to bytes.
    fn store_i8(self, x: Self::F, out: &mut [i8; 16]);

    /// a + b.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// a / b.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a > b { x } else { y }`, lane by lane.
    fn select_gt(self, a: Self::F, b: Self::F, x: Self::F, y: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    fn round(self, x: Self::F) -> Self::F;
    /// `n` is integral and in −126 ..= 127: 2ⁿ.
    fn exp2(self, n: Self::F) -> Self::F;
    /// The sum in the order of [`crate::ops::sum::fold`].
    fn fold(self, x: Self::F) -> f32;
    /// Begins to fold two vectors, in the registers of one where there are few.
    fn fold2(self, a: Self::F, b: Self::F) -> Self::Two;
    /// [`Simd::fold`] of sixteen vectors, two by two in order.
    fn fold16(self, x: [Self::Two; 8]) -> Self::F;
    /// The largest lane.
    fn largest(self, x: Self::F) -> f32;
    /// The reverse of [`Lanes::load_i`].
    fn store_i(self, x: Self::I, out: &mut [u8; 64]);
    /// The bits of floats.
    fn bits(self, x: Self::F) -> Self::I;
    /// The larger of signed 32-bit lanes.
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// The largest of all signed 32-bit lanes.
    fn largest_i(self, x: Self::I) -> i32;
    /// `d · (code − 8)` of 32 codes: the low four bits of each byte, then the high ones. In all lanes `d` is the same number, of
    /// half precision, so that the products are exact.
    fn scale_nibbles(self, d: Self::F, codes: &[u8; 16]) -> [Self::F; 2];
}

/// A computation that is generic over the level.
///
/// `run` and everything that it calls must be `#[inline(always)]`: it is compiled into each
/// level's entry and only there has the level's instructions.
pub(crate) trait Op {
    /// What it gives.
    type Out;
    /// Carries it out.
    fn run<S: Simd>(self, s: S) -> Self::Out;
}

/// Asks for memory that will be used soon. It need not exist.
pub(crate) struct Fetch {
    /// Where it begins.
    pub from: *const u8,
    /// Its length.
    pub bytes: usize,
}

impl Fetch {
    /// The memory of a slice.
    pub fn of(bytes: &[u8]) -> Fetch {
        Fetch { from: bytes.as_ptr(), bytes: bytes.len() }
    }
}

impl Op for Fetch {
    type Out = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for offset in (0..self.bytes).step_by(64) {
            s.prefetch(self.from.wrapping_add(offset));
        }
    }
}

/// [`crate::ops::exp::exp`], the same operations in the same order.
#[inline(always)]
pub(crate) fn exp<S: Simd>(s: S, x: S::F) -> S::F {
    use crate::ops::exp::{HIGH, LN2, LOW, TAYLOR};
    let n = s.round(s.mul(x, s.splat(std::f32::consts::LOG2_E)));
    let r = s.fma(n, s.splat(-LN2[1]), s.fma(n, s.splat(-LN2[0]), x));
    let mut p = s.splat(TAYLOR[0]);
    for c in &TAYLOR[1..] {
        p = s.fma(p, r, s.splat(*c));
    }
    let y = s.mul(p, s.exp2(n));
    let y = s.select_gt(x, s.splat(HIGH), s.splat(f32::INFINITY), y);
    s.select_gt(s.splat(LOW), x, s.splat(0.0), y)
}

/// [`crate::ops::exp::sigmoid`].
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::F) -> S::F {
    let one = s.splat(1.0);
    s.div(one, s.add(one, exp(s, s.sub(s.splat(-0.0), x))))
}

/// [`crate::ops::exp::tanh`].
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::F) -> S::F {
    s.fma(s.splat(2.0), sigmoid(s, s.add(x, x)), s.splat(-1.0))
}
