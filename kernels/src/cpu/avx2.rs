//! AVX2: a vector is two registers.

use std::arch::x86_64::*;

use super::avx2_half::Half;
use super::lanes::{Lanes, Rows};
use super::simd::{Op, Simd};

/// AVX2, FMA and F16C, with or without the VNNI instructions on 256 bits.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool>(());

/// Runs `op` with AVX2.
#[target_feature(enable = "avx2,fma,f16c")]
pub(crate) fn run<O: Op>(op: O) -> O::Out {
    op.run(Avx2::<false>(()))
}

/// Runs `op` with AVX2 and VNNI.
#[target_feature(enable = "avx2,fma,f16c,avxvnni")]
pub(crate) fn run_vnni<O: Op>(op: O) -> O::Out {
    op.run(Avx2::<true>(()))
}

macro_rules! proven {
    ($call:expr) => {{
        // SAFETY: `self` is made only in `run` and `run_vnni`, whose features the instruction needs;
        // loads and stores are on references of their size.
        unsafe { $call }
    }};
}

type F = [__m256; 2];
type I = [__m256i; 2];

/// An operation on both registers.
macro_rules! both {
    ($self:ident.$op:ident($($x:ident),*)) => {{
        let (low, high) = $self.halves();
        [low.$op($($x[0]),*), high.$op($($x[1]),*)]
    }};
}

impl<const VNNI: bool> Lanes for Avx2<VNNI> {
    type F = F;
    type I = I;
    const PAIRS: bool = !VNNI;
    const FEW_REGISTERS: bool = true;
    const NEIGHBOURS: bool = false;
    const DIRECT_ROWS: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        proven!([_mm256_set1_ps(x); 2])
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> F {
        let (low, high) = self.halves();
        [low.load(x), high.load(x)]
    }
    #[inline(always)]
    fn load_f16(self, x: &[[u8; 2]; 16]) -> F {
        let (low, high) = self.halves();
        [low.load_f16(x), high.load_f16(x)]
    }
    #[inline(always)]
    fn load_bf16(self, x: &[[u8; 2]; 16]) -> F {
        let (low, high) = self.halves();
        [low.load_bf16(x), high.load_bf16(x)]
    }
    #[inline(always)]
    fn store(self, x: F, out: &mut [f32; 16]) {
        let (low, high) = self.halves();
        low.store(x[0], out);
        high.store(x[1], out);
    }
    #[inline(always)]
    fn sub(self, a: F, b: F) -> F {
        both!(self.sub(a, b))
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        both!(self.mul(a, b))
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        both!(self.fma(a, b, c))
    }

    #[inline(always)]
    fn load_i(self, x: &[u8; 64]) -> I {
        let (low, high) = self.halves();
        [low.load_i(x), high.load_i(x)]
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        proven!([_mm256_set1_epi32(x); 2])
    }
    #[inline(always)]
    unsafe fn gather_u16(self, rows: &Rows, offset: usize) -> I {
        let (low, high) = self.halves();
        // SAFETY: the caller's promise.
        unsafe { [low.gather_u16(rows, offset), high.gather_u16(rows, offset)] }
    }
    #[inline(always)]
    fn load_u16(self, x: &[u8; 32]) -> I {
        let (low, high) = self.halves();
        [low.load_u16(x), high.load_u16(x)]
    }
    #[inline(always)]
    unsafe fn load_lanes(self, rows: [*const u8; 4]) -> I {
        let (low, high) = self.halves();
        // SAFETY: the caller's promise.
        unsafe { [low.load_lanes(rows), high.load_lanes(rows)] }
    }
    #[inline(always)]
    fn transpose4(self, x: [I; 4]) -> [I; 4] {
        let (low, high) = self.halves();
        let low = low.transpose4([x[0][0], x[1][0], x[2][0], x[3][0]]);
        let high = high.transpose4([x[0][1], x[1][1], x[2][1], x[3][1]]);
        [[low[0], high[0]], [low[1], high[1]], [low[2], high[2]], [low[3], high[3]]]
    }
    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        both!(self.and(a, b))
    }
    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        both!(self.or(a, b))
    }
    #[inline(always)]
    fn xor(self, a: I, b: I) -> I {
        both!(self.xor(a, b))
    }
    #[inline(always)]
    fn shl<const N: u32>(self, x: I) -> I {
        let (low, high) = self.halves();
        [low.shl::<N>(x[0]), high.shl::<N>(x[1])]
    }
    #[inline(always)]
    fn shr<const N: u32>(self, x: I) -> I {
        let (low, high) = self.halves();
        [low.shr::<N>(x[0]), high.shr::<N>(x[1])]
    }
    #[inline(always)]
    fn sra<const N: u32>(self, x: I) -> I {
        let (low, high) = self.halves();
        [low.sra::<N>(x[0]), high.sra::<N>(x[1])]
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        both!(self.add_i(a, b))
    }
    #[inline(always)]
    fn sub_i(self, a: I, b: I) -> I {
        both!(self.sub_i(a, b))
    }
    #[inline(always)]
    fn mul_i(self, a: I, b: I) -> I {
        both!(self.mul_i(a, b))
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], bytes: I) -> I {
        let (low, high) = self.halves();
        [low.lookup(table, bytes[0]), high.lookup(table, bytes[1])]
    }
    #[inline(always)]
    fn to_f(self, x: I) -> F {
        both!(self.to_f(x))
    }
    #[inline(always)]
    fn f16_low(self, x: I) -> F {
        both!(self.f16_low(x))
    }
    #[inline(always)]
    fn dot4<const WIDE: bool>(self, acc: I, codes: I, q: &[i8; 4]) -> I {
        let (low, high) = self.halves();
        [low.dot4::<WIDE>(acc[0], codes[0], q), high.dot4::<WIDE>(acc[1], codes[1], q)]
    }
    #[inline(always)]
    fn pin(self, x: I) -> I {
        both!(self.pin(x))
    }
    #[inline(always)]
    fn add_pairs(self, pairs: I) -> I {
        both!(self.add_pairs(pairs))
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        self.halves().0.prefetch(address);
    }
    #[inline(always)]
    fn prefetch_near(self, address: *const u8) {
        self.halves().0.prefetch_near(address);
    }

    #[inline(always)]
    fn prefetch_early(self, address: *const u8) {
        self.halves().0.prefetch_early(address);
    }
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type Low = Half<0, VNNI>;
    type High = Half<1, VNNI>;
    type Two = __m256;

    // With the codes, sums and accumulators are more than the registers hold, but accumulators are used once in a group only; with 3 rows
    // it is slower (0.84 to 0.98 of it).
    const TILE_ROWS: usize = 4;
    const TILE_PANELS: usize = 1;
    const DIRECT_TILES: usize = 2;
    const DIRECT_ROWS_NEAR: usize = 16;
    const FLOAT_ROWS: usize = 6;
    #[inline(always)]
    fn store_f16(self, x: F, out: &mut [[u8; 2]; 16]) {
        proven!({
            let halves = [
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[0]),
                _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[1]),
            ];
            _mm_storeu_si128(out.as_mut_ptr().cast(), halves[0]);
            _mm_storeu_si128(out[8..].as_mut_ptr().cast(), halves[1]);
        })
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> F {
        proven!({
            let bytes = _mm_loadu_si128(x.as_ptr().cast());
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))),
            ]
        })
    }
    #[inline(always)]
    fn store_i8(self, x: F, out: &mut [i8; 16]) {
        proven!({
            let words = _mm256_packs_epi32(_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(out.as_mut_ptr().cast(), bytes);
        })
    }

    #[inline(always)]
    fn add(self, a: F, b: F) -> F {
        proven!([_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        proven!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn max(self, a: F, b: F) -> F {
        proven!([_mm256_max_ps(a[0], b[0]), _mm256_max_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn select_gt(self, a: F, b: F, x: F, y: F) -> F {
        proven!([
            _mm256_blendv_ps(y[0], x[0], _mm256_cmp_ps::<_CMP_GT_OQ>(a[0], b[0])),
            _mm256_blendv_ps(y[1], x[1], _mm256_cmp_ps::<_CMP_GT_OQ>(a[1], b[1])),
        ])
    }
    #[inline(always)]
    fn round(self, x: F) -> F {
        proven!([
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x[0]),
            _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x[1]),
        ])
    }
    #[inline(always)]
    fn exp2(self, n: F) -> F {
        proven!({
            let bias = _mm256_set1_epi32(127);
            let low = _mm256_add_epi32(_mm256_cvtps_epi32(n[0]), bias);
            let high = _mm256_add_epi32(_mm256_cvtps_epi32(n[1]), bias);
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<23>(high)),
            ]
        })
    }
    #[inline(always)]
    fn fold(self, x: F) -> f32 {
        proven!({
            let x = _mm256_add_ps(x[0], x[1]);
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        })
    }
    #[inline(always)]
    fn fold2(self, a: F, b: F) -> __m256 {
        // Two steps of `fold`; four lanes of either are left.
        proven!({
            let (a, b) = (_mm256_add_ps(a[0], a[1]), _mm256_add_ps(b[0], b[1]));
            _mm256_add_ps(_mm256_permute2f128_ps::<0x20>(a, b), _mm256_permute2f128_ps::<0x31>(a, b))
        })
    }
    #[inline(always)]
    fn fold16(self, x: [__m256; 8]) -> F {
        // The other two, for four vectors and for eight at once. Macros, since closures would not have the level's instructions.
        macro_rules! four {
            ($k:expr) => {{
                let (a, b) = (x[$k], x[$k + 1]);
                _mm256_add_ps(_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b))
            }};
        }
        macro_rules! eight {
            ($k:expr) => {{
                let (a, b) = (four!($k), four!($k + 2));
                let sums = _mm256_add_ps(_mm256_shuffle_ps::<0x88>(a, b), _mm256_shuffle_ps::<0xdd>(a, b));
                // Those of vectors 0, 2, 4, 6, and of 1, 3, 5, 7.
                _mm256_permutevar8x32_ps(sums, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7))
            }};
        }
        proven!([eight!(0), eight!(4)])
    }
    #[inline(always)]
    fn largest(self, x: F) -> f32 {
        proven!({
            let x = _mm256_max_ps(x[0], x[1]);
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        })
    }
    #[inline(always)]
    fn store_i(self, x: I, out: &mut [u8; 64]) {
        proven!({
            _mm256_storeu_si256(out.as_mut_ptr().cast(), x[0]);
            _mm256_storeu_si256(out[32..].as_mut_ptr().cast(), x[1]);
        })
    }
    #[inline(always)]
    fn bits(self, x: F) -> I {
        proven!([_mm256_castps_si256(x[0]), _mm256_castps_si256(x[1])])
    }
    #[inline(always)]
    fn max_i(self, a: I, b: I) -> I {
        proven!([_mm256_max_epi32(a[0], b[0]), _mm256_max_epi32(a[1], b[1])])
    }
    #[inline(always)]
    fn largest_i(self, x: I) -> i32 {
        proven!({
            let x = _mm256_max_epi32(x[0], x[1]);
            let x = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256::<1>(x));
            let x = _mm_max_epi32(x, _mm_unpackhi_epi64(x, x));
            _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32::<1>(x)))
        })
    }
    #[inline(always)]
    fn scale_nibbles(self, d: F, codes: &[u8; 16]) -> [F; 2] {
        proven!({
            // Four bits with their sign. The low ones stay at the top of their lanes, 2²⁸ times as large.
            let codes = _mm_xor_si128(_mm_loadu_si128(codes.as_ptr().cast()), _mm_set1_epi8(-0x78));
            let low = _mm256_cvtepi8_epi32(codes);
            let high = _mm256_cvtepi8_epi32(_mm_unpackhi_epi64(codes, codes));
            let d_low = _mm256_mul_ps(d[0], _mm256_set1_ps(f32::from_bits((127 - 28) << 23)));
            [
                [
                    _mm256_mul_ps(d_low, _mm256_cvtepi32_ps(_mm256_slli_epi32::<28>(low))),
                    _mm256_mul_ps(d_low, _mm256_cvtepi32_ps(_mm256_slli_epi32::<28>(high))),
                ],
                [
                    _mm256_mul_ps(d[0], _mm256_cvtepi32_ps(_mm256_srai_epi32::<4>(low))),
                    _mm256_mul_ps(d[0], _mm256_cvtepi32_ps(_mm256_srai_epi32::<4>(high))),
                ],
            ]
        })
    }

    #[inline(always)]
    fn halves(self) -> (Self::Low, Self::High) {
        (Half::of(self), Half::of(self))
    }
}
