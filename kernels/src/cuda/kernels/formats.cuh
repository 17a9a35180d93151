// The weight formats as they lie in a GGUF file (`quant/*.rs` says where each layout comes from), decoded to what
// the products need: of 32 consecutive weights of a row, a lane's eight codes as bytes, and scale and
// minimum of the group.
//
//     weight[k] = scale[g] · (code[k] − ZERO) − min[g]
//
// A lane with number `quad` in its group of four gets the codes 4 quad … + 3 (`low`) and 16 + those (`high`): the
// fragment of mma.m16n8k32. The four lanes together read the whole 32 codes, a row's 16 to 32 consecutive bytes.
#pragma once
#include "device.cuh"

struct Codes {
    u32 low, high;
    // Of weights 0–15 and 16–31; the same where the group is 32.
    float scale[2];
    float min;
};

template <Type T> struct Format;

template <> struct Format<Q8_0> {
    // Two's complement, so that the zero is 0.
    static constexpr u32 LEN = 32, BYTES = 34, GROUP = 32;
    static constexpr int ZERO = 0;
    static constexpr bool HAS_MIN = false;

    static __device__ __forceinline__ Codes load(const u8 *row, u32 group, u32 quad) {
        const u8 *block = row + (u64)group * BYTES;
        const float d = half_to_float(load_u16(block));
        return {load_u32_even(block + 2 + 4 * quad), load_u32_even(block + 18 + 4 * quad), {d, d}, 0};
    }
};

template <> struct Format<Q4_0> {
    static constexpr u32 LEN = 32, BYTES = 18, GROUP = 32;
    static constexpr int ZERO = 8;
    static constexpr bool HAS_MIN = false;

    static __device__ __forceinline__ Codes load(const u8 *row, u32 group, u32 quad) {
        const u8 *block = row + (u64)group * BYTES;
        const float d = half_to_float(load_u16(block));
        const u32 codes = load_u32_even(block + 2 + 4 * quad);
        return {codes & 0x0f0f0f0f, codes >> 4 & 0x0f0f0f0f, {d, d}, 0};
    }
};

// Scale and minimum of group `j` out of twelve bytes (`quant/k_scales.rs`).
__device__ __forceinline__ void k_scale_min(const u8 *packed, u32 j, u32 &scale, u32 &min) {
    if (j < 4) {
        scale = packed[j] & 63;
        min = packed[j + 4] & 63;
    } else {
        scale = (packed[j + 4] & 15) | packed[j - 4] >> 6 << 4;
        min = packed[j + 4] >> 4 | packed[j] >> 6 << 4;
    }
}

template <> struct Format<Q4_K> {
    static constexpr u32 LEN = 256, BYTES = 144, GROUP = 32;
    static constexpr int ZERO = 0;
    static constexpr bool HAS_MIN = true;

    static __device__ __forceinline__ Codes load(const u8 *row, u32 group, u32 quad) {
        const u8 *block = row + (u64)(group / 8) * BYTES;
        const u32 j = group % 8, shift = j % 2 * 4;
        const u8 *codes = block + 16 + j / 2 * 32 + 4 * quad;
        u32 scale, min;
        k_scale_min(block + 4, j, scale, min);
        const float s = half_to_float(load_u16(block)) * (float)scale;
        const float m = half_to_float(load_u16(block + 2)) * (float)min;
        return {load_u32(codes) >> shift & 0x0f0f0f0f, load_u32(codes + 16) >> shift & 0x0f0f0f0f, {s, s}, m};
    }
};

template <> struct Format<Q5_K> {
    static constexpr u32 LEN = 256, BYTES = 176, GROUP = 32;
    static constexpr int ZERO = 0;
    static constexpr bool HAS_MIN = true;

    static __device__ __forceinline__ Codes load(const u8 *row, u32 group, u32 quad) {
        const u8 *block = row + (u64)(group / 8) * BYTES;
        const u32 j = group % 8, shift = j % 2 * 4;
        const u8 *codes = block + 48 + j / 2 * 32 + 4 * quad, *fifth = block + 16 + 4 * quad;
        u32 scale, min;
        k_scale_min(block + 4, j, scale, min);
        const float s = half_to_float(load_u16(block)) * (float)scale;
        const float m = half_to_float(load_u16(block + 2)) * (float)min;
        const u32 low = (load_u32(codes) >> shift & 0x0f0f0f0f) | (load_u32(fifth) >> j & 0x01010101) << 4;
        const u32 high =
            (load_u32(codes + 16) >> shift & 0x0f0f0f0f) | (load_u32(fifth + 16) >> j & 0x01010101) << 4;
        return {low, high, {s, s}, m};
    }
};

template <> struct Format<Q6_K> {
    static constexpr u32 LEN = 256, BYTES = 210, GROUP = 16;
    static constexpr int ZERO = 32;
    static constexpr bool HAS_MIN = false;

    static __device__ __forceinline__ Codes load(const u8 *row, u32 group, u32 quad) {
        const u8 *block = row + (u64)(group / 8) * BYTES;
        const u32 j = group % 8, half = j / 4, part = j % 4;
        const u8 *low4 = block + half * 64 + part % 2 * 32 + 4 * quad;
        const u8 *top2 = block + 128 + half * 32 + 4 * quad;
        const u32 nibble = part / 2 * 4, pair = 2 * part;
        const float d = half_to_float(load_u16(block + 208));
        const i8 *scales = reinterpret_cast<const i8 *>(block + 192 + 2 * j);
        const u32 low =
            (load_u32_even(low4) >> nibble & 0x0f0f0f0f) | (load_u32_even(top2) >> pair & 0x03030303) << 4;
        const u32 high = (load_u32_even(low4 + 16) >> nibble & 0x0f0f0f0f) |
                         (load_u32_even(top2 + 16) >> pair & 0x03030303) << 4;
        return {low, high, {d * (float)scales[0], d * (float)scales[1]}, 0};
    }
};

// One weight, with the roundings of `dequantize_parts`.
template <Type T> __device__ __forceinline__ float weight_of(const u8 *row, u32 k) {
    using F = Format<T>;
    const u32 in_group = k % 32;
    const Codes codes = F::load(row, k / 32, in_group % 16 / 4);
    const u32 byte = (in_group < 16 ? codes.low : codes.high) >> in_group % 4 * 8 & 0xff;
    const int code = T == Q8_0 ? (int)(i8)byte : (int)byte - F::ZERO;
    const float product = codes.scale[in_group / 16] * (float)code;
    return F::HAS_MIN ? product - codes.min : product;
}

// Weight `k` of a row in any format.
__device__ inline float weight(u32 type, const u8 *row, u32 k) {
    switch (type) {
    case F32: return __uint_as_float(load_u32(row + 4 * (u64)k));
    case F16: return half_to_float(load_u16(row + 2 * (u64)k));
    case BF16: return bf16_to_float(load_u16(row + 2 * (u64)k));
    case Q8_0: return weight_of<Q8_0>(row, k);
    case Q4_0: return weight_of<Q4_0>(row, k);
    case Q4_K: return weight_of<Q4_K>(row, k);
    case Q5_K: return weight_of<Q5_K>(row, k);
    case Q6_K: return weight_of<Q6_K>(row, k);
    default: return __uint_as_float(0x7fffffff);
    }
}

// Bytes of a row of `columns` weights.
__device__ inline u64 row_bytes(u32 type, u32 columns) {
    switch (type) {
    case F32: return 4 * (u64)columns;
    case F16:
    case BF16: return 2 * (u64)columns;
    case Q8_0: return (u64)columns / 32 * Format<Q8_0>::BYTES;
    case Q4_0: return (u64)columns / 32 * Format<Q4_0>::BYTES;
    case Q4_K: return (u64)columns / 256 * Format<Q4_K>::BYTES;
    case Q5_K: return (u64)columns / 256 * Format<Q5_K>::BYTES;
    case Q6_K: return (u64)columns / 256 * Format<Q6_K>::BYTES;
    default: return 0;
    }
}
