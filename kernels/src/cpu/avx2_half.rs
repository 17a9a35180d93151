//! AVX2, half a vector: one register, for eight of sixteen weight rows.

use std::arch::asm;
use std::arch::x86_64::*;

use super::avx2::Avx2;
use super::lanes::{Lanes, Rows};

/// Rows 0 to 7 (`HIGH` is 0), or 8 to 15 (1).
#[derive(Clone, Copy)]
pub(crate) struct Half<const HIGH: usize, const VNNI: bool>(());

/// `x`, of which the compiler then knows nothing.
#[target_feature(enable = "avx2")]
#[inline]
fn opaque(mut x: __m256i) -> __m256i {
    // SAFETY: there is no instruction.
    unsafe { asm!("/* {x} */", x = inout(ymm_reg) x, options(nomem, nostack, preserves_flags)) };
    x
}

macro_rules! proven {
    ($call:expr) => {{
        // SAFETY: `self` is made only of an [`Avx2`], which proves the features that the instruction needs;
        // loads and stores are on references of their size.
        unsafe { $call }
    }};
}

impl<const HIGH: usize, const VNNI: bool> Half<HIGH, VNNI> {
    /// Half of it.
    #[inline(always)]
    pub fn of(_: Avx2<VNNI>) -> Self {
        Half(())
    }
}

impl<const HIGH: usize, const VNNI: bool> Lanes for Half<HIGH, VNNI> {
    type F = __m256;
    type I = __m256i;
    const PAIRS: bool = !VNNI;
    const FEW_REGISTERS: bool = true;
    const NEIGHBOURS: bool = false;
    const DIRECT_ROWS: usize = 4;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        proven!(_mm256_set1_ps(x))
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> __m256 {
        proven!(_mm256_loadu_ps(x[8 * HIGH..].as_ptr()))
    }
    #[inline(always)]
    fn load_f16(self, x: &[[u8; 2]; 16]) -> __m256 {
        proven!(_mm256_cvtph_ps(_mm_loadu_si128(x[8 * HIGH..].as_ptr().cast())))
    }
    #[inline(always)]
    fn load_bf16(self, x: &[[u8; 2]; 16]) -> __m256 {
        proven!({
            let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(x[8 * HIGH..].as_ptr().cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
        })
    }
    #[inline(always)]
    fn store(self, x: __m256, out: &mut [f32; 16]) {
        proven!(_mm256_storeu_ps(out[8 * HIGH..].as_mut_ptr(), x))
    }
    #[inline(always)]
    fn sub(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m256, b: __m256) -> __m256 {
        proven!(_mm256_mul_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m256, b: __m256, c: __m256) -> __m256 {
        proven!(_mm256_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn load_i(self, x: &[u8; 64]) -> __m256i {
        proven!(_mm256_loadu_si256(x[32 * HIGH..].as_ptr().cast()))
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> __m256i {
        proven!(_mm256_set1_epi32(x))
    }
    #[inline(always)]
    unsafe fn gather_u16(self, rows: &Rows, offset: usize) -> __m256i {
        let mut w = [0i16; 8];
        for (i, word) in w.iter_mut().enumerate() {
            // SAFETY: the caller promises two readable bytes in every row.
            *word = unsafe { rows.at(8 * HIGH + i, offset).cast::<i16>().read_unaligned() };
        }
        // By name, so that the compiler inserts words into a register instead of going through memory.
        proven!(_mm256_cvtepu16_epi32(_mm_set_epi16(w[7], w[6], w[5], w[4], w[3], w[2], w[1], w[0])))
    }
    #[inline(always)]
    fn load_u16(self, x: &[u8; 32]) -> __m256i {
        proven!(_mm256_cvtepu16_epi32(_mm_loadu_si128(x[16 * HIGH..].as_ptr().cast())))
    }
    #[inline(always)]
    unsafe fn load_lanes(self, rows: [*const u8; 4]) -> __m256i {
        // SAFETY: the caller promises 16 readable bytes behind every pointer, `self` the features.
        unsafe { _mm256_loadu2_m128i(rows[2 * HIGH + 1].cast(), rows[2 * HIGH].cast()) }
    }
    #[inline(always)]
    fn transpose4(self, x: [__m256i; 4]) -> [__m256i; 4] {
        proven!({
            let low01 = _mm256_unpacklo_epi32(x[0], x[1]);
            let high01 = _mm256_unpackhi_epi32(x[0], x[1]);
            let low23 = _mm256_unpacklo_epi32(x[2], x[3]);
            let high23 = _mm256_unpackhi_epi32(x[2], x[3]);
            [
                _mm256_unpacklo_epi64(low01, low23),
                _mm256_unpackhi_epi64(low01, low23),
                _mm256_unpacklo_epi64(high01, high23),
                _mm256_unpackhi_epi64(high01, high23),
            ]
        })
    }
    #[inline(always)]
    fn and(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_and_si256(a, b))
    }
    #[inline(always)]
    fn or(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_or_si256(a, b))
    }
    #[inline(always)]
    fn xor(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_xor_si256(a, b))
    }
    #[inline(always)]
    fn shl<const N: u32>(self, x: __m256i) -> __m256i {
        // The count as a vector: a constant of type i32 cannot be made from N here.
        proven!(_mm256_sll_epi32(x, _mm_cvtsi32_si128(N as i32)))
    }
    #[inline(always)]
    fn shr<const N: u32>(self, x: __m256i) -> __m256i {
        proven!(_mm256_srl_epi32(x, _mm_cvtsi32_si128(N as i32)))
    }
    #[inline(always)]
    fn sra<const N: u32>(self, x: __m256i) -> __m256i {
        proven!(_mm256_sra_epi32(x, _mm_cvtsi32_si128(N as i32)))
    }
    #[inline(always)]
    fn add_i(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_add_epi32(a, b))
    }
    #[inline(always)]
    fn sub_i(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_sub_epi32(a, b))
    }
    #[inline(always)]
    fn mul_i(self, a: __m256i, b: __m256i) -> __m256i {
        proven!(_mm256_mullo_epi32(a, b))
    }
    #[inline(always)]
    fn lookup(self, table: &[u8; 16], bytes: __m256i) -> __m256i {
        proven!({
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            _mm256_shuffle_epi8(table, bytes)
        })
    }
    #[inline(always)]
    fn to_f(self, x: __m256i) -> __m256 {
        proven!(_mm256_cvtepi32_ps(x))
    }
    #[inline(always)]
    fn f16_low(self, x: __m256i) -> __m256 {
        proven!({
            // The low halves of all words in order; packus works within lanes of 128 bits.
            let words = _mm256_and_si256(x, _mm256_set1_epi32(0xffff));
            let packed = _mm256_permute4x64_epi64::<0b10_00>(_mm256_packus_epi32(words, words));
            _mm256_cvtph_ps(_mm256_castsi256_si128(packed))
        })
    }
    #[inline(always)]
    fn dot4<const WIDE: bool>(self, acc: __m256i, codes: __m256i, q: &[i8; 4]) -> __m256i {
        proven!({
            let q = _mm256_set1_epi32(i32::from_le_bytes(q.map(|q| q as u8)));
            if VNNI {
                return _mm256_dpbusd_avx_epi32(acc, codes, q);
            }
            let products = if WIDE {
                // |c| ≤ 128 keeps pairs of products within 16 bits; the sign moves to q.
                let signed = _mm256_xor_si256(codes, _mm256_set1_epi8(-128));
                _mm256_maddubs_epi16(_mm256_abs_epi8(signed), _mm256_sign_epi8(q, signed))
            } else {
                _mm256_maddubs_epi16(codes, q)
            };
            _mm256_add_epi16(acc, products)
        })
    }
    #[inline(always)]
    fn pin(self, x: __m256i) -> __m256i {
        proven!(opaque(x))
    }
    #[inline(always)]
    fn pin_f(self, x: __m256) -> __m256 {
        proven!(_mm256_castsi256_ps(opaque(_mm256_castps_si256(x))))
    }
    #[inline(always)]
    fn add_pairs(self, pairs: __m256i) -> __m256i {
        proven!(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
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
