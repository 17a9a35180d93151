// What every kernel starts from: the language (CUDA, or host C++ through the emulator), scalar
// types, loads that respect alignment, and the numbers of `ops/exp.rs`.
//
// Compiled with -fmad=false (host: -ffp-contract=off): a fused multiply-add is written as fmaf, so
// that both compilers round at the same places.
#pragma once

#ifdef __CUDACC__
#define KERNEL(name, threads, ...) extern "C" __global__ void __launch_bounds__(threads) name(__VA_ARGS__)
// Before a loop whose counter chooses among registers.
#define UNROLL _Pragma("unroll")
#else
#define UNROLL
#include "../emulator/emulator.h"
#endif

using i8 = signed char;
using u8 = unsigned char;
using u16 = unsigned short;
using i16 = short;
using u32 = unsigned int;
using u64 = unsigned long long;

constexpr unsigned ALL_LANES = 0xffffffffu;

// Formats as GGUF numbers them (`quant/types.rs`).
enum Type : u32 { F32 = 0, F16 = 1, Q4_0 = 2, Q8_0 = 8, Q4_K = 12, Q5_K = 13, Q6_K = 14, BF16 = 30 };

__device__ __forceinline__ u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
__device__ __forceinline__ u64 min_u64(u64 a, u64 b) { return a < b ? a : b; }

// From an address that is even.
__device__ __forceinline__ u16 load_u16(const u8 *at) { return *reinterpret_cast<const u16 *>(at); }
// Four bytes from an even address, the first lowest.
__device__ __forceinline__ u32 load_u32_even(const u8 *at) { return load_u16(at) | (u32)load_u16(at + 2) << 16; }
// Four bytes from a multiple of 4.
__device__ __forceinline__ u32 load_u32(const u8 *at) { return *reinterpret_cast<const u32 *>(at); }

// IEEE binary16 to binary32, exact.
__device__ __forceinline__ float half_to_float(u16 bits) {
#ifdef __CUDACC__
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    const u32 sign = (u32)(bits & 0x8000) << 16, magnitude = bits & 0x7fff;
    if (magnitude >= 0x7c00) return __uint_as_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Subnormals and zero: mantissa · 2^-24.
    const float value = magnitude < 0x400 ? (float)magnitude * 5.9604644775390625e-8f
                                          : __uint_as_float((magnitude << 13) + (112u << 23));
    return sign ? -value : value;
#endif
}

// Binary32 to binary16, to the nearest, ties to even; beyond ±65520 infinite.
__device__ __forceinline__ u16 float_to_half(float value) {
#ifdef __CUDACC__
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    const u32 word = __float_as_uint(value), sign = word >> 16 & 0x8000, magnitude = word & 0x7fffffff;
    if (magnitude > 0x7f800000) return (u16)(sign | 0x7fff);
    if (magnitude >= 0x477ff000) return (u16)(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // A subnormal: the addition rounds at its last bit.
        const float shifted = std::fabs(value) + 0.5f;
        return (u16)(sign | (__float_as_uint(shifted) - 0x3f000000));
    }
    const u32 odd = magnitude >> 13 & 1;
    return (u16)(sign | (magnitude + 0xfff + odd - 0x38000000) >> 13);
#endif
}

// The upper half of a binary32, to the nearest, ties to even; NaN stays NaN.
__device__ __forceinline__ u16 float_to_bf16(float value) {
    const u32 word = __float_as_uint(value);
    if ((word & 0x7fffffff) > 0x7f800000) return (u16)(word >> 16 | 0x40);
    return (u16)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

__device__ __forceinline__ float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

// To 10 bits of mantissa, to the nearest, ties away from zero (as cvt.rna.tf32); NaN and infinity stay.
__device__ __forceinline__ float float_to_tf32(float value) {
    const u32 word = __float_as_uint(value);
    if ((word & 0x7f800000) == 0x7f800000) return value;
    return __uint_as_float((word + 0x1000) & 0xffffe000);
}

// e^x as `ops/exp.rs` computes it, bit for bit; its page derives the error of 1.2 ulp.
__device__ __forceinline__ float exp_f32(float x) {
    if (x > 88.37625f) return __uint_as_float(0x7f800000);
    if (x < -87.33654f) return 0.0f;
    const float n = rintf(x * 1.44269504088896340736f);
    const float r = fmaf(n, 2.1219444e-4f, fmaf(n, -0.6933594f, x));
    float p = 1.0f / 5040.0f;
    p = fmaf(p, r, 1.0f / 720.0f);
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    // NaN comes here too: its n must not be converted.
    return x == x ? p * __uint_as_float((u32)((int)n + 127) << 23) : x;
}

__device__ __forceinline__ float sigmoid_f32(float x) { return 1.0f / (1.0f + exp_f32(-x)); }
// 2σ(2x) − 1; at most 2^-23 absolute.
__device__ __forceinline__ float tanh_f32(float x) { return fmaf(2.0f, sigmoid_f32(x + x), -1.0f); }
__device__ __forceinline__ float softcap_f32(float x, float cap) { return cap * tanh_f32(x / cap); }

// The sum over a warp, in every lane, as a tree.
__device__ __forceinline__ float warp_sum(float x) {
    for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(ALL_LANES, x, mask);
    return x;
}
