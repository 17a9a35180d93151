//! AVX2: a vector is two registers.

use std::arch::x86_64::*;

use super::simd::{Op, Rows, Simd};

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

impl<const VNNI: bool> Avx2<VNNI> {
    #[inline(always)]
    fn dot_half<const WIDE: bool>(self, acc: __m256i, codes: __m256i, q: __m256i) -> __m256i {
        proven!({
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
    fn words(self, x: I) -> __m256i {
        // The low halves of 16 words in order; packus works within lanes of 128 bits.
        proven!({
            let mask = _mm256_set1_epi32(0xffff);
            let packed = _mm256_packus_epi32(_mm256_and_si256(x[0], mask), _mm256_and_si256(x[1], mask));
            _mm256_permute4x64_epi64::<0b11_01_10_00>(packed)
        })
    }
}

impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F = F;
    type I = I;

    // With the codes, sums and accumulators are more than the registers hold, but accumulators are used once in a group only; with 3 rows
    // it is slower (0.84 to 0.98 of it).
    const TILE_ROWS: usize = 4;
    const TILE_PANELS: usize = 1;
    const DIRECT_ROWS: usize = 4;
    const FLOAT_ROWS: usize = 1;
    const PAIRS: bool = !VNNI;

    #[inline(always)]
    fn splat(self, x: f32) -> F {
        proven!([_mm256_set1_ps(x); 2])
    }
    #[inline(always)]
    fn load(self, x: &[f32; 16]) -> F {
        proven!([_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x[8..].as_ptr())])
    }
    #[inline(always)]
    fn store(self, x: F, out: &mut [f32; 16]) {
        proven!({
            _mm256_storeu_ps(out.as_mut_ptr(), x[0]);
            _mm256_storeu_ps(out[8..].as_mut_ptr(), x[1]);
        })
    }
    #[inline(always)]
    fn load_f16(self, x: &[[u8; 2]; 16]) -> F {
        proven!([
            _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast())),
            _mm256_cvtph_ps(_mm_loadu_si128(x[8..].as_ptr().cast())),
        ])
    }
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
    fn load_bf16(self, x: &[[u8; 2]; 16]) -> F {
        proven!({
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(x.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(x[8..].as_ptr().cast()));
            [
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            ]
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
    fn load_u8(self, x: &[u8; 16]) -> I {
        proven!({
            let bytes = _mm_loadu_si128(x.as_ptr().cast());
            [_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128::<8>(bytes))]
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
    fn sub(self, a: F, b: F) -> F {
        proven!([_mm256_sub_ps(a[0], b[0]), _mm256_sub_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn mul(self, a: F, b: F) -> F {
        proven!([_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn div(self, a: F, b: F) -> F {
        proven!([_mm256_div_ps(a[0], b[0]), _mm256_div_ps(a[1], b[1])])
    }
    #[inline(always)]
    fn fma(self, a: F, b: F, c: F) -> F {
        proven!([_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])])
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
    fn largest(self, x: F) -> f32 {
        proven!({
            let x = _mm256_max_ps(x[0], x[1]);
            let x = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps::<1>(x));
            let x = _mm_max_ps(x, _mm_movehl_ps(x, x));
            _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)))
        })
    }

    #[inline(always)]
    fn load_i(self, x: &[u8; 64]) -> I {
        proven!([_mm256_loadu_si256(x.as_ptr().cast()), _mm256_loadu_si256(x[32..].as_ptr().cast()),])
    }
    #[inline(always)]
    fn store_i(self, x: I, out: &mut [u8; 64]) {
        proven!({
            _mm256_storeu_si256(out.as_mut_ptr().cast(), x[0]);
            _mm256_storeu_si256(out[32..].as_mut_ptr().cast(), x[1]);
        })
    }
    #[inline(always)]
    fn splat_i(self, x: i32) -> I {
        proven!([_mm256_set1_epi32(x); 2])
    }
    #[inline(always)]
    unsafe fn gather_u16(self, rows: &Rows, offset: usize) -> I {
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
            [_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high)]
        })
    }
    #[inline(always)]
    fn load_u16(self, x: &[u8; 32]) -> I {
        proven!({
            let (low, high) = (_mm_loadu_si128(x.as_ptr().cast()), _mm_loadu_si128(x[16..].as_ptr().cast()));
            [_mm256_cvtepu16_epi32(low), _mm256_cvtepu16_epi32(high)]
        })
    }
    #[inline(always)]
    unsafe fn load_lanes(self, rows: [*const u8; 4]) -> I {
        // SAFETY: the caller promises 16 readable bytes behind every pointer, `self` the features.
        unsafe {
            [
                _mm256_loadu2_m128i(rows[1].cast(), rows[0].cast()),
                _mm256_loadu2_m128i(rows[3].cast(), rows[2].cast()),
            ]
        }
    }
    #[inline(always)]
    fn transpose4(self, x: [I; 4]) -> [I; 4] {
        let mut out = x;
        for half in 0..2 {
            proven!({
                let low01 = _mm256_unpacklo_epi32(x[0][half], x[1][half]);
                let high01 = _mm256_unpackhi_epi32(x[0][half], x[1][half]);
                let low23 = _mm256_unpacklo_epi32(x[2][half], x[3][half]);
                let high23 = _mm256_unpackhi_epi32(x[2][half], x[3][half]);
                out[0][half] = _mm256_unpacklo_epi64(low01, low23);
                out[1][half] = _mm256_unpackhi_epi64(low01, low23);
                out[2][half] = _mm256_unpacklo_epi64(high01, high23);
                out[3][half] = _mm256_unpackhi_epi64(high01, high23);
            })
        }
        out
    }
    #[inline(always)]
    fn bits(self, x: F) -> I {
        proven!([_mm256_castps_si256(x[0]), _mm256_castps_si256(x[1])])
    }
    #[inline(always)]
    fn and(self, a: I, b: I) -> I {
        proven!([_mm256_and_si256(a[0], b[0]), _mm256_and_si256(a[1], b[1])])
    }
    #[inline(always)]
    fn or(self, a: I, b: I) -> I {
        proven!([_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])])
    }
    #[inline(always)]
    fn xor(self, a: I, b: I) -> I {
        proven!([_mm256_xor_si256(a[0], b[0]), _mm256_xor_si256(a[1], b[1])])
    }
    #[inline(always)]
    fn shl<const N: u32>(self, x: I) -> I {
        // The count as a vector: a constant of type i32 cannot be made from N here.
        proven!({
            let n = _mm_cvtsi32_si128(N as i32);
            [_mm256_sll_epi32(x[0], n), _mm256_sll_epi32(x[1], n)]
        })
    }
    #[inline(always)]
    fn shr<const N: u32>(self, x: I) -> I {
        proven!({
            let n = _mm_cvtsi32_si128(N as i32);
            [_mm256_srl_epi32(x[0], n), _mm256_srl_epi32(x[1], n)]
        })
    }
    #[inline(always)]
    fn sra<const N: u32>(self, x: I) -> I {
        proven!({
            let n = _mm_cvtsi32_si128(N as i32);
            [_mm256_sra_epi32(x[0], n), _mm256_sra_epi32(x[1], n)]
        })
    }
    #[inline(always)]
    fn add_i(self, a: I, b: I) -> I {
        proven!([_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])])
    }
    #[inline(always)]
    fn sub_i(self, a: I, b: I) -> I {
        proven!([_mm256_sub_epi32(a[0], b[0]), _mm256_sub_epi32(a[1], b[1])])
    }
    #[inline(always)]
    fn mul_i(self, a: I, b: I) -> I {
        proven!([_mm256_mullo_epi32(a[0], b[0]), _mm256_mullo_epi32(a[1], b[1])])
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
    fn lookup(self, table: &[u8; 16], bytes: I) -> I {
        proven!({
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            [_mm256_shuffle_epi8(table, bytes[0]), _mm256_shuffle_epi8(table, bytes[1])]
        })
    }
    #[inline(always)]
    fn pick(self, table: F, lanes: I) -> F {
        let pick = |lanes| {
            proven!({
                let low = _mm256_permutevar8x32_ps(table[0], lanes);
                let high = _mm256_permutevar8x32_ps(table[1], lanes);
                _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(lanes)))
            })
        };
        lanes.map(pick)
    }
    #[inline(always)]
    fn to_f(self, x: I) -> F {
        proven!([_mm256_cvtepi32_ps(x[0]), _mm256_cvtepi32_ps(x[1])])
    }
    #[inline(always)]
    fn f16_low(self, x: I) -> F {
        let words = self.words(x);
        proven!([
            _mm256_cvtph_ps(_mm256_castsi256_si128(words)),
            _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(words)),
        ])
    }
    #[inline(always)]
    fn dot4<const WIDE: bool>(self, acc: I, codes: I, q: &[i8; 4]) -> I {
        let q = proven!(_mm256_set1_epi32(i32::from_le_bytes(q.map(|q| q as u8))));
        [self.dot_half::<WIDE>(acc[0], codes[0], q), self.dot_half::<WIDE>(acc[1], codes[1], q)]
    }
    #[inline(always)]
    fn add_pairs(self, pairs: I) -> I {
        let one = proven!(_mm256_set1_epi16(1));
        proven!([_mm256_madd_epi16(pairs[0], one), _mm256_madd_epi16(pairs[1], one)])
    }

    #[inline(always)]
    fn prefetch(self, address: *const u8) {
        proven!(_mm_prefetch::<_MM_HINT_T1>(address.cast()))
    }
}
