// y = W x for the integer formats: weights n × columns in blocks, activations in blocks of 32 signed bytes.
//
//     acc = 0
//     for each group g of a strand, in order:
//         i   = Σ (code[k] − ZERO) · q[k]                     exact, on the tensor cores
//         acc = fma(i, scale[g] · act_scale, acc)
//         acc = fma(min[g], −(act_scale · Σ q[k]), acc)       where the format has minima
//     y = Σ strands, in order
//
// which is the reference's product (`quant/dot.rs`) but for the strands; its error bound holds here too. Weights are
// the 16 rows of a matrix instruction and tokens its 8 columns, so decoding needs no other kernel than
// prefill: with one token the instruction is mostly empty, and the memory is the limit all the same.
//
// Small (up to 8 tokens). Bytes: n · row bytes of weights, once; activations from the caches. A block takes 16 rows,
// its 8 warps one strand each. Per 512 weights a warp issues about 40 instructions, so an H100's 132 · 4
// schedulers could decode some 10¹³ weights a second, and its memory brings 6 · 10¹² (Q4_K).
//
// Large. Operations: 2 · n · columns · tokens; a weight is decoded once per 64 tokens and warp. The floats after each
// instruction (4 outputs × 3 operations a lane per 4096 products) bound it to about a third of the int8
// rate, which is two thirds of the BF16 rate. Activations of 64 tokens × 128 columns are staged in
// shared memory, 11 KiB.
#include "formats.cuh"
#include "mma.cuh"
#include "strands.cuh"

constexpr u32 ACT_BYTES = 40;
// A token's blocks of STRAND_STEP groups, in shared memory, and 16 bytes more: with lines of 176 bytes what the lanes of a warp load at
// once, four words in a row of each of eight tokens or one word of every other token, lies in different banks.
using Staged = uint2[STRAND_STEP * ACT_BYTES / 8 + 2];

// Adds 32 columns of 16 rows and 8 tokens. `upper` and `lower` are the codes of rows `lane / 4` and + 8; `of_token`
// gives the activation block of a token of the tile.
template <Type T, class OfToken>
__device__ __forceinline__ void add_group(float acc[4], const Codes &upper, const Codes &lower, OfToken of_token) {
    using F = Format<T>;
    const u32 lane = threadIdx.x % 32, quad = lane % 4;
    const u8 *mine = of_token(lane / 4);
    const u32 b[2] = {load_u32(mine + 8 + 4 * quad), load_u32(mine + 24 + 4 * quad)};
    int sums[2][4] = {};
    if (F::GROUP == 32) {
        const u32 a[4] = {upper.low, lower.low, upper.high, lower.high};
        mma_s8_k32(sums[0], a, b);
    } else {
        const u32 low[2] = {upper.low, lower.low}, high[2] = {upper.high, lower.high};
        mma_s8_k16(sums[0], low, b[0]);
        mma_s8_k16(sums[1], high, b[1]);
    }
    for (u32 i = 0; i < 4; i++) {
        const u8 *act = of_token(element_token(i));
        const Codes &codes = i < 2 ? upper : lower;
        const float act_scale = *reinterpret_cast<const float *>(act);
        const i16 *halves = reinterpret_cast<const i16 *>(act + 4);
        if (F::GROUP == 32) {
            const int sum = halves[0] + halves[1];
            acc[i] = fmaf((float)(sums[0][i] - F::ZERO * sum), codes.scale[0] * act_scale, acc[i]);
            if (F::HAS_MIN) acc[i] = fmaf(codes.min, -(act_scale * (float)sum), acc[i]);
        } else {
            for (u32 h = 0; h < 2; h++)
                acc[i] = fmaf((float)(sums[h][i] - F::ZERO * halves[h]), codes.scale[h] * act_scale, acc[i]);
        }
    }
}

template <Type T>
__device__ __forceinline__ void small(const u8 *w, u32 n, u32 groups, const u8 *x, u32 tokens, float *out,
                                      Partial *partial) {
    using F = Format<T>;
    const u32 strand = threadIdx.x / 32, lane = threadIdx.x % 32, first_row = blockIdx.x * TILE_ROWS;
    const u64 bytes = (u64)groups * 32 / F::LEN * F::BYTES;
    // Rows and tokens beyond the ends repeat the last one; nobody stores them.
    const u8 *upper = w + min_u32(first_row + lane / 4, n - 1) * bytes;
    const u8 *lower = w + min_u32(first_row + lane / 4 + 8, n - 1) * bytes;
    const u32 len = strand_len(groups), start = min_u32(strand * len, groups), end = min_u32(start + len, groups);
    float acc[4] = {};
#ifdef __CUDACC__
#pragma unroll 4
#endif
    for (u32 g = start; g < end; g++) {
        const Codes up = F::load(upper, g, lane % 4), low = F::load(lower, g, lane % 4);
        add_group<T>(acc, up, low, [&](u32 token) {
            return x + ((u64)min_u32(token, tokens - 1) * groups + g) * ACT_BYTES;
        });
    }
    for (u32 i = 0; i < 4; i++) partial[strand][element_token(i)][element_row(i)] = acc[i];
    __syncthreads();
    fold_strands(partial, first_row, n, tokens, out);
}

template <Type T>
__device__ __forceinline__ void large(const u8 *w, u32 n, u32 groups, const u8 *x, u32 tokens, float *out,
                                      Staged *staged) {
    using F = Format<T>;
    const u32 lane = threadIdx.x % 32, first_row = blockIdx.x * BLOCK_ROWS + threadIdx.x / 32 * TILE_ROWS;
    const u32 first_token = blockIdx.y * BLOCK_TOKENS;
    const u64 bytes = (u64)groups * 32 / F::LEN * F::BYTES;
    const u8 *upper = w + min_u32(first_row + lane / 4, n - 1) * bytes;
    const u8 *lower = w + min_u32(first_row + lane / 4 + 8, n - 1) * bytes;
    const u32 len = strand_len(groups);
    float total[TILES][4] = {};
    for (u32 strand = 0; strand < STRANDS; strand++) {
        const u32 start = min_u32(strand * len, groups), end = min_u32(start + len, groups);
        float acc[TILES][4] = {};
        for (u32 first = start; first < end; first += STRAND_STEP) {
            const u32 here = min_u32(STRAND_STEP, end - first), words = here * ACT_BYTES / 8;
            __syncthreads();
            for (u32 i = threadIdx.x; i < BLOCK_TOKENS * words; i += WARPS * 32) {
                const u32 token = min_u32(first_token + i / words, tokens - 1);
                const uint2 *from = reinterpret_cast<const uint2 *>(x + ((u64)token * groups + first) * ACT_BYTES);
                staged[i / words][i % words] = from[i % words];
            }
            __syncthreads();
            for (u32 g = 0; g < here; g++) {
                const Codes up = F::load(upper, first + g, lane % 4), low = F::load(lower, first + g, lane % 4);
#ifdef __CUDACC__
#pragma unroll
#endif
                for (u32 tile = 0; tile < TILES; tile++)
                    add_group<T>(acc[tile], up, low, [&](u32 token) {
                        return reinterpret_cast<const u8 *>(staged[tile * TILE_TOKENS + token]) + g * ACT_BYTES;
                    });
            }
        }
        for (u32 tile = 0; tile < TILES; tile++)
            for (u32 i = 0; i < 4; i++) total[tile][i] += acc[tile][i];
    }
    for (u32 tile = 0; tile < TILES; tile++)
        for (u32 i = 0; i < 4; i++) {
            const u32 row = first_row + element_row(i), token = first_token + tile * TILE_TOKENS + element_token(i);
            if (row < n && token < tokens) out[(u64)token * n + row] = total[tile][i];
        }
}

#define PRODUCTS(NAME, TYPE)                                                                                   \
    KERNEL(matmul_small_##NAME, 256, const u8 *w, u32 n, u32 groups, const u8 *x, u32 tokens, float *out) {    \
        __shared__ Partial partial[STRANDS];                                                                   \
        small<TYPE>(w, n, groups, x, tokens, out, partial);                                                    \
    }                                                                                                          \
    KERNEL(matmul_large_##NAME, 128, const u8 *w, u32 n, u32 groups, const u8 *x, u32 tokens, float *out) {    \
        __shared__ Staged staged[BLOCK_TOKENS];                                                                \
        large<TYPE>(w, n, groups, x, tokens, out, staged);                                                     \
    }

PRODUCTS(q8_0, Q8_0)
PRODUCTS(q4_0, Q4_0)
PRODUCTS(q4_k, Q4_K)
PRODUCTS(q5_k, Q5_K)
PRODUCTS(q6_k, Q6_K)
