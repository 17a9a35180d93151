//! AVX-512: a vector is one register.

use std::arch::x86_64::*;

use super::lanes::{Lanes, Rows};
use super::simd::{Op, Simd};

/// AVX-512 F, BW, DQ and VL, with or without VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>(());

/// Runs `op` with AVX-512.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(crate) fn run<O: Op>(op: O) -> O::Out {
    op.run(Avx512::<false>(()))
}

/// Runs `op` with AVX-512 and VNNI.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c")]
pub(crate) fn run_vnni<O: Op>(op: O) -> O::Out {
    op.run(Avx512::<true>(()))
}

macro_rules! proven {
    ($call:expr) => {{
        // SAFETY: `self` is made only in `run` and `run_vnni`, whose features the instruction needs;
        // loads and stores are on references of their size.
        unsafe { $call }
    }};
}

impl<const VNNI: bool> Lanes for Avx512<VNNI> {
    type F = __m512;
    type I = __m512i;
    const PAIRS: bool = !VNNI;
    const FEW_REGISTERS: bool = false;
    const NEIGHBOURS: bool = true;
    const DIRECT_ROWS: usize = 8;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        proven!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> __m512 {
        proven!(_mm512_loadu_ps(x.as_ptr()))
    }
    #[inline(always)]
    fn load_f16(self, x: &[[u8; 2]; 16]) -> __m512 {
        proven!(_mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast())))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[[u8; 2]; 16]) -> __m512 {
        proven!(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(_mm256_loadu_si256(
            x.as_ptr().cast()
        )))))
    }
    #[inline(always)]
    fn store(self, x: __m512, out: &mut [f32; 16]) {
        proven!(_mm512_storeu_ps(out.as_mut_ptr(), x))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        proven!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn load_i(self, x: &[u8; 64]) -> __m512i {
        proven!(_mm512_loadu_si512(x.as_ptr().cast()))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> __m512i {
        proven!(_mm512_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn gather_u16(self, rows: &Rows, offset: usize) -> __m512i {
        let mut words = [0i16; 16];
        for (i, word) in words.iter_mut().enumerate() {
            // SAFETY: the caller promises two readable bytes in every row.
            *word = unsafe { rows.at(i, offset).cast::<i16>().read_unaligned() };
        }
        let w = &words;
        proven!({
            // By name, so that the compiler inserts words into a register instead of going through memory.
            let low = _mm_set_epi16(w[7], w[6], w[5], w[4], w[3], w[2], w[1], w[0]);
            let high = _mm_set_epi16(w[15], w[14], w[13], w[12], w[11], w[10], w[9], w[8]);
            _mm512_cvtepu16_epi32(_mm256_set_m128i(high, low))
        })
    }
    #[inline(always)]
    fn load_u16(self, x: &[u8; 32]) -> __m512i {
        proven!(_mm512_cvtepu16_epi32(_mm256_loadu_si256(x.as_ptr().cast())))
    }
    #[inline(always)]
    unsafe fn load_lanes(self, rows: [*const u8; 4]) -> __m512i {
        // The compiler knows the masks and makes two insertions into halves and one of a half of them (see NOTES, "By a model of the processor").
        // SAFETY: the caller promises 16 readable bytes behind every pointer, `self` the features.
        unsafe {
            let x = _mm512_castsi128_si512(_mm_loadu_si128(rows[0].cast()));
            let x = _mm512_mask_broadcast_i32x4(x, 0x00f0, _mm_loadu_si128(rows[1].cast()));
            let x = _mm512_mask_broadcast_i32x4(x, 0x0f00, _mm_loadu_si128(rows[2].cast()));
            _mm512_mask_broadcast_i32x4(x, 0xf000, _mm_loadu_si128(rows[3].cast()))
        }
    }
    #[inline(always)]
    fn transpose4(self, x: [__m512i; 4]) -> [__m512i; 4] {
        proven!({
            let low01 = _mm512_unpacklo_epi32(x[0], x[1]);
            let high01 = _mm512_unpackhi_epi32(x[0], x[1]);
            let low23 = _mm512_unpacklo_epi32(x[2], x[3]);
            let high23 = _mm512_unpackhi_epi32(x[2], x[3]);
            [
                _mm512_unpacklo_epi64(low01, low23),
                _mm512_unpackhi_epi64(low01, low23),
                _mm512_unpacklo_epi64(high01, high23),
                _mm512_unpackhi_epi64(high01, high23),
            ]
        })
    }
    #[inline(always)]
    fn and(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_and_si512(a, b))
    }
    #[inline(always)]
    fn or(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_or_si512(a, b))
    }
    #[inline(always)]
    fn xor(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_xor_si512(a, b))
    }
    #[inline(always)]
    fn shl<const N: u32>(self, x: __m512i) -> __m512i {
        proven!(_mm512_slli_epi32::<N>(x))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, x: __m512i) -> __m512i {
        proven!(_mm512_srli_epi32::<N>(x))
    }
    #[inline(always)]
    fn sra<const N: u32>(self, x: __m512i) -> __m512i {
        proven!(_mm512_srai_epi32::<N>(x))
    }
    #[inline(always)]
    fn add_i(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_i(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_sub_epi32(a, b))
    }
    #[inline(always)]
    fn mul_i(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_mullo_epi32(a, b))
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], bytes: __m512i) -> __m512i {
        proven!({
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, bytes)
        })
    }
    #[inline(always)]
    fn to_f(self, x: __m512i) -> __m512 {
        proven!(_mm512_cvtepi32_ps(x))
    }
    #[inline(always)]
    fn f16_low(self, x: __m512i) -> __m512 {
        proven!(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)))
    }
    #[inline(always)]
    fn dot4<const WIDE: bool>(self, acc: __m512i, codes: __m512i, q: &[i8; 4]) -> __m512i {
        proven!({
            let q = _mm512_set1_epi32(i32::from_le_bytes(q.map(|q| q as u8)));
            if VNNI {
                return _mm512_dpbusd_epi32(acc, codes, q);
            }
            let products = if WIDE {
                // |c| ≤ 128 keeps pairs of products within 16 bits; the sign moves to q.
                let signed = _mm512_xor_si512(codes, _mm512_set1_epi8(-128));
                let negative = _mm512_movepi8_mask(signed);
                let q = _mm512_mask_sub_epi8(q, negative, _mm512_setzero_si512(), q);
                _mm512_maddubs_epi16(_mm512_abs_epi8(signed), q)
            } else {
                _mm512_maddubs_epi16(codes, q)
            };
            _mm512_add_epi16(acc, products)
        })
    }
    #[inline(always)]
    fn add_pairs(self, pairs: __m512i) -> __m512i {
        proven!(_mm512_madd_epi16(pairs, _mm512_set1_epi16(1)))
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        proven!(_mm_prefetch::<_MM_HINT_T1>(address.cast()))
    }
    #[inline(always)]
    fn prefetch_near(self, address: *const u8) {
        proven!(_mm_prefetch::<_MM_HINT_T0>(address.cast()))
    }

    #[inline(always)]
    fn prefetch_early(self, address: *const u8) {
        proven!(_mm_prefetch::<_MM_HINT_T2>(address.cast()))
    }
}

impl<const VNNI: bool> Simd for Avx512<VNNI> {
    type Low = Self;
    type High = Self;
    type Two = [__m512; 2];

    // 12 integer and 12 float accumulators, 2 vectors of codes, and scales: 32 registers.
    const TILE_ROWS: usize = 6;
    const TILE_PANELS: usize = 2;
    const DIRECT_TILES: usize = 1;
    const DIRECT_ROWS_NEAR: usize = 8;
    const FLOAT_ROWS: usize = 6;
    #[inline(always)]
    fn store_f16(self, x: __m512, out: &mut [[u8; 2]; 16]) {
        proven!(_mm256_storeu_si256(out.as_mut_ptr().cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)))
    }
    #[inline(always)]
    fn load_i8(self, x: &[i8; 16]) -> __m512 {
        proven!(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(x.as_ptr().cast()))))
    }
    #[inline(always)]
    fn store_i8(self, x: __m512, out: &mut [i8; 16]) {
        proven!(_mm_storeu_si128(out.as_mut_ptr().cast(), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x))))
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        proven!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn select_gt(self, a: __m512, b: __m512, x: __m512, y: __m512) -> __m512 {
        proven!(_mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), y, x))
    }
    #[inline(always)]
    fn round(self, x: __m512) -> __m512 {
        proven!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(x))
    }
    #[inline(always)]
    fn exp2(self, n: __m512) -> __m512 {
        proven!({
            let biased = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(biased))
        })
    }
    #[inline(always)]
    fn fold(self, x: __m512) -> f32 {
        proven!({
            let x = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps::<1>(x));
            let x = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_add_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)))
        })
    }
    #[inline(always)]
    fn fold2(self, a: __m512, b: __m512) -> [__m512; 2] {
        [a, b]
    }
    #[inline(always)]
    fn fold16(self, x: [[__m512; 2]; 8]) -> __m512 {
        let x = x.as_flattened();
        // Each step of `fold` for two vectors at once, until one vector holds the sums of all. The last step leaves the sum of
        // vector l of `four!(k)` in lane 4l + k. Macros, since closures would not have the level's instructions.
        macro_rules! halves {
            ($a:expr, $b:expr) => {
                _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>($a, $b), _mm512_shuffle_f32x4::<0xee>($a, $b))
            };
        }
        macro_rules! four {
            ($k:expr) => {{
                let (a, b) = (halves!(x[$k], x[$k + 4]), halves!(x[$k + 8], x[$k + 12]));
                _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(a, b), _mm512_shuffle_f32x4::<0xdd>(a, b))
            }};
        }
        macro_rules! pairs {
            ($a:expr, $b:expr) => {{
                let (a, b) = (_mm512_castps_pd($a), _mm512_castps_pd($b));
                let (low, high) = (_mm512_shuffle_pd::<0>(a, b), _mm512_shuffle_pd::<0xff>(a, b));
                _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high))
            }};
        }
        proven!({
            let (a, b) = (pairs!(four!(0), four!(1)), pairs!(four!(2), four!(3)));
            _mm512_add_ps(_mm512_shuffle_ps::<0x88>(a, b), _mm512_shuffle_ps::<0xdd>(a, b))
        })
    }
    #[inline(always)]
    fn largest(self, x: __m512) -> f32 {
        proven!(_mm512_reduce_max_ps(x))
    }
    #[inline(always)]
    fn store_i(self, x: __m512i, out: &mut [u8; 64]) {
        proven!(_mm512_storeu_si512(out.as_mut_ptr().cast(), x))
    }
    #[inline(always)]
    fn bits(self, x: __m512) -> __m512i {
        proven!(_mm512_castps_si512(x))
    }
    #[inline(always)]
    fn max_i(self, a: __m512i, b: __m512i) -> __m512i {
        proven!(_mm512_max_epi32(a, b))
    }
    #[inline(always)]
    fn largest_i(self, x: __m512i) -> i32 {
        proven!(_mm512_reduce_max_epi32(x))
    }
    #[inline(always)]
    fn scale_nibbles(self, d: __m512, codes: &[u8; 16]) -> [__m512; 2] {
        const CENTRED: [f32; 16] =
            [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0];
        proven!({
            // All sixteen products, of which each code picks one; a lane's high bits do not count.
            let products = _mm512_mul_ps(d, _mm512_loadu_ps(CENTRED.as_ptr()));
            let bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            [
                _mm512_permutexvar_ps(bytes, products),
                _mm512_permutexvar_ps(_mm512_srli_epi32::<4>(bytes), products),
            ]
        })
    }

    #[inline(always)]
    fn halves(self) -> (Self, Self) {
        (self, self)
    }
}
