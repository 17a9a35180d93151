// Products of f32 numbers on tensor cores, nearly exact: an operand is written as a sum of 16-bit parts, and the
// parts' products, which are exact, are added in f32.
//
// `HalfParts`, where the right operand is F16 already. The left one is two F16 parts, high = F16(x) and low = F16(x − high),
// with |x − high − low| ≤ 2⁻²² |x|, as long as x keeps clear of F16's ends: whoever stages x scales it, so that the
// largest of a line is 2¹⁴ … 2¹⁵. What is 2⁻¹⁷ of the largest or more keeps the bound; below it F16 has no more bits, and the error stays
// under 2⁻³⁹ of the largest. Two instructions for 16 × 8 × 16 products.
//
// `Bf16Parts`, for everything else. Both operands are three BF16 parts, each the upper half of what the ones before left: 8
// bits thrice, so the three together are exact, in all of f32's range. Of the nine products the three smallest are
// left out: |error| ≤ (2 · 2⁻⁷ · 2⁻¹⁵ + 2⁻³⁰) |x y| < 2⁻²⁰·⁹ |x y|. Six instructions.
//
// (Three TF32 products would be as many cycles as six of BF16: an instruction of TF32 has half the depth. F16 has no
// range for two operands that are both arbitrary.)
//
// Both have the same fragments. The sum does not mind which of the 16 columns an instruction calls its first, so a
// lane's share is four consecutive ones: `Left` of two lines of A (lane / 4 and 8 + that), `Right` of one column of B.
// A is staged in shared memory with a word per element, four of them a `uint4`.
#pragma once
#include "kv.cuh"
#include "mma.cuh"

__device__ __forceinline__ bool is_finite(float value) { return (__float_as_uint(value) & 0x7f800000) != 0x7f800000; }
// The lower and the upper halves of two words.
__device__ __forceinline__ u32 lower_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x5410); }
__device__ __forceinline__ u32 upper_halves(u32 a, u32 b) { return __byte_perm(a, b, 0x7632); }

struct HalfParts {
    // What weights of 0 … 1 are multiplied by; the results are so much too large.
    static constexpr float WEIGHT = 32768.0f;

    struct Left {
        u32 high[4], low[4];
    };
    struct Right {
        u32 words[2];
    };
    // Eight elements of a line of the cache.
    struct Row {
        uint4 pairs;
    };

    // A power of two by which numbers up to `most` are multiplied, and its reciprocal.
    static __device__ __forceinline__ float2 scale(float most) {
        // The exponent, kept where both are normal numbers; what is not finite ends as NaN anyway.
        u32 exponent = __float_as_uint(most) >> 23;
        exponent = exponent < 15 ? 15 : min_u32(exponent, 254);
        return {__uint_as_float((268 - exponent) << 23), __uint_as_float((exponent - 14) << 23)};
    }

    // Two neighbouring elements as they are staged: both high parts, both low parts.
    static __device__ __forceinline__ uint2 staged(float a, float b) {
        const u16 high_a = float_to_half(a), high_b = float_to_half(b);
        const u16 low_a = float_to_half(a - half_to_float(high_a)), low_b = float_to_half(b - half_to_float(high_b));
        return {high_a | (u32)high_b << 16, low_a | (u32)low_b << 16};
    }
    // An element of a staged line.
    static __device__ __forceinline__ float element(const u32 *line, u32 i) {
        const u32 *pair = line + i / 2 * 2;
        return half_to_float((u16)(pair[0] >> i % 2 * 16)) + half_to_float((u16)(pair[1] >> i % 2 * 16));
    }
    static __device__ __forceinline__ Left left(const uint4 &upper, const uint4 &lower) {
        return {{upper.x, lower.x, upper.z, lower.z}, {upper.y, lower.y, upper.w, lower.w}};
    }

    // What finds a position's line, from the start of its head's keys or values in page 0: its bytes.
    static __device__ __forceinline__ uint2 place(const KvLayout &layout, u32 page, u32 position) {
        const u64 bytes = layout.start(page, 0, 0) + position * layout.line();
        return {(u32)bytes, (u32)(bytes >> 32)};
    }
    static __device__ __forceinline__ Row load(const KvLayout &, const u8 *base, uint2 place, u32 chunk) {
        const u64 bytes = place.x | (u64)place.y << 32;
        return {*reinterpret_cast<const uint4 *>(base + bytes + 16 * chunk)};
    }
    static __device__ __forceinline__ float value(const Row &row, u32 i) {
        const u32 words[4] = {row.pairs.x, row.pairs.y, row.pairs.z, row.pairs.w};
        return half_to_float((u16)(words[i / 2] >> i % 2 * 16));
    }
    // What is infinite or not a number becomes zero.
    static __device__ __forceinline__ void make_finite(Row &row) {
        u32 words[4] = {row.pairs.x, row.pairs.y, row.pairs.z, row.pairs.w};
        for (u32 i = 0; i < 4; i++) {
            // An exponent of ones carries into the sign's place.
            const u32 bad = ((words[i] & 0x7fff7fff) + 0x04000400) & 0x80008000;
            words[i] &= ~((bad >> 15) * 0xffff);
        }
        row.pairs = {words[0], words[1], words[2], words[3]};
    }
    // Elements 4 i … + 3 of a line.
    static __device__ __forceinline__ Right along(const Row &row, u32 i) {
        return i == 0 ? Right{{row.pairs.x, row.pairs.y}} : Right{{row.pairs.z, row.pairs.w}};
    }
    // Element i of four lines.
    static __device__ __forceinline__ Right across(const Row rows[4], u32 i) {
        u32 words[4];
        for (u32 r = 0; r < 4; r++) {
            const uint4 &pairs = rows[r].pairs;
            words[r] = i / 2 == 0 ? pairs.x : i / 2 == 1 ? pairs.y : i / 2 == 2 ? pairs.z : pairs.w;
        }
        return i % 2 ? Right{{upper_halves(words[0], words[1]), upper_halves(words[2], words[3])}}
                     : Right{{lower_halves(words[0], words[1]), lower_halves(words[2], words[3])}};
    }

    static __device__ __forceinline__ void add(float sums[4], const Left &a, const Right &b) {
        mma_f16_k16(sums, a.high, b.words);
        mma_f16_k16(sums, a.low, b.words);
    }
};

struct Bf16Parts {
    static constexpr float WEIGHT = 1.0f;

    struct Left {
        u32 parts[3][4];
    };
    struct Right {
        u32 parts[3][2];
    };
    struct Row {
        float values[8];
    };

    static __device__ __forceinline__ float2 scale(float) { return {1.0f, 1.0f}; }
    static __device__ __forceinline__ uint2 staged(float a, float b) { return {__float_as_uint(a), __float_as_uint(b)}; }
    static __device__ __forceinline__ float element(const u32 *line, u32 i) { return __uint_as_float(line[i]); }

    // The parts of two numbers, the first number's below.
    static __device__ __forceinline__ void split(u32 a, u32 b, u32 parts[3]) {
        for (u32 p = 0; p < 3; p++) {
            parts[p] = upper_halves(a, b);
            a = __float_as_uint(__uint_as_float(a) - __uint_as_float(a & 0xffff0000));
            b = __float_as_uint(__uint_as_float(b) - __uint_as_float(b & 0xffff0000));
        }
    }
    static __device__ __forceinline__ Left left(const uint4 &upper, const uint4 &lower) {
        u32 of[4][3];
        split(upper.x, upper.y, of[0]);
        split(lower.x, lower.y, of[1]);
        split(upper.z, upper.w, of[2]);
        split(lower.z, lower.w, of[3]);
        Left left;
        for (u32 p = 0; p < 3; p++)
            for (u32 i = 0; i < 4; i++) left.parts[p][i] = of[i][p];
        return left;
    }
    static __device__ __forceinline__ Right right(float a, float b, float c, float d) {
        u32 of[2][3];
        split(__float_as_uint(a), __float_as_uint(b), of[0]);
        split(__float_as_uint(c), __float_as_uint(d), of[1]);
        Right right;
        for (u32 p = 0; p < 3; p++)
            for (u32 i = 0; i < 2; i++) right.parts[p][i] = of[i][p];
        return right;
    }

    static __device__ __forceinline__ uint2 place(const KvLayout &, u32 page, u32 position) { return {page, position}; }
    static __device__ __forceinline__ Row load(const KvLayout &layout, const u8 *base, uint2 place, u32 chunk) {
        Row row;
        load_elements(layout, base + layout.start(place.x, 0, 0), place.y, chunk, row.values);
        return row;
    }
    static __device__ __forceinline__ float value(const Row &row, u32 i) { return row.values[i]; }
    static __device__ __forceinline__ void make_finite(Row &row) {
        for (u32 i = 0; i < 8; i++) row.values[i] = is_finite(row.values[i]) ? row.values[i] : 0.0f;
    }
    static __device__ __forceinline__ Right along(const Row &row, u32 i) {
        const float *values = row.values + 4 * i;
        return right(values[0], values[1], values[2], values[3]);
    }
    static __device__ __forceinline__ Right across(const Row rows[4], u32 i) {
        return right(rows[0].values[i], rows[1].values[i], rows[2].values[i], rows[3].values[i]);
    }

    // The smallest first.
    static __device__ __forceinline__ void add(float sums[4], const Left &a, const Right &b) {
        mma_bf16_k16(sums, a.parts[2], b.parts[0]);
        mma_bf16_k16(sums, a.parts[1], b.parts[1]);
        mma_bf16_k16(sums, a.parts[0], b.parts[2]);
        mma_bf16_k16(sums, a.parts[1], b.parts[0]);
        mma_bf16_k16(sums, a.parts[0], b.parts[1]);
        mma_bf16_k16(sums, a.parts[0], b.parts[0]);
    }
};
