// y = W x for BF16 and F16 weights on the tensor cores, and for F32 weights without them.
//
// BF16: activations rounded to BF16, products exact, sums in f32: |error| ≤ (2⁻⁸ + columns · 2⁻²³) Σ |w x| to first order,
// as on the CPU's `vdpbf16ps`.
// F16: activations rounded to TF32 (11 significant bits and the exponents of f32, so nothing overflows), weights
// widened to TF32 without loss: |error| ≤ (2⁻¹¹ + columns · 2⁻²³) Σ |w x|. It runs at half the rate of BF16.
// F32: fused multiply-adds of a warp, lane l the columns ≡ l (mod 32), then a tree. For the few small
// matrices that are kept in F32.
//
// A lane's fragment is 8 consecutive weights of a row (16 bytes), because the sum does not mind which columns an
// instruction calls its first: the four lanes of a row read 64 consecutive bytes. Activations are padded with zeros
// to whole groups of 32 columns, and so are weights while they are read.
//
// Small (up to 8 tokens): bytes n · columns · 2; a block takes 16 rows, its 8 warps a strand each. Large:
// operations 2 · n · columns · tokens; 64 rows × 64 tokens a block, activations staged in shared memory.
#include "mma.cuh"
#include "strands.cuh"

// Eight weights from column `k` on, two to a word; zeros beyond the end of the row.
__device__ __forceinline__ uint4 load_weights(const u16 *row, u32 k, u32 columns) {
    if (columns % 8 == 0 && k < columns) return *reinterpret_cast<const uint4 *>(row + k);
    u32 words[4];
    for (u32 i = 0; i < 4; i++) {
        const u32 at = k + 2 * i;
        words[i] = (at < columns ? row[at] : 0) | (at + 1 < columns ? (u32)row[at + 1] << 16 : 0);
    }
    return {words[0], words[1], words[2], words[3]};
}

template <Type T> struct Float;

template <> struct Float<BF16> {
    using Activation = u16;
    static constexpr u32 PAD = 4;

    // Adds 32 columns; `x` is this lane's 8 activations.
    static __device__ __forceinline__ void add(float acc[4], const uint4 &upper, const uint4 &lower, const u16 *x) {
        const uint4 b = *reinterpret_cast<const uint4 *>(x);
        const u32 a0[4] = {upper.x, lower.x, upper.y, lower.y}, a1[4] = {upper.z, lower.z, upper.w, lower.w};
        const u32 b0[2] = {b.x, b.y}, b1[2] = {b.z, b.w};
        mma_bf16_k16(acc, a0, b0);
        mma_bf16_k16(acc, a1, b1);
    }
};

template <> struct Float<F16> {
    using Activation = float;
    static constexpr u32 PAD = 1;

    static __device__ __forceinline__ void add(float acc[4], const uint4 &upper, const uint4 &lower, const float *x) {
        const u32 up[4] = {upper.x, upper.y, upper.z, upper.w}, low[4] = {lower.x, lower.y, lower.z, lower.w};
        const uint4 first = *reinterpret_cast<const uint4 *>(x), last = *reinterpret_cast<const uint4 *>(x + 4);
        const u32 b[4][2] = {{first.x, first.y}, {first.z, first.w}, {last.x, last.y}, {last.z, last.w}};
        for (u32 i = 0; i < 4; i++) {
            const u32 a[4] = {__float_as_uint(half_to_float((u16)up[i])), __float_as_uint(half_to_float((u16)low[i])),
                              __float_as_uint(half_to_float((u16)(up[i] >> 16))),
                              __float_as_uint(half_to_float((u16)(low[i] >> 16)))};
            mma_tf32_k8(acc, a, b[i]);
        }
    }
};

template <Type T>
__device__ __forceinline__ void small(const u16 *w, u32 n, u32 columns, const typename Float<T>::Activation *x,
                                      u32 tokens, float *out, Partial *partial) {
    const u32 strand = threadIdx.x / 32, lane = threadIdx.x % 32, first_row = blockIdx.x * TILE_ROWS;
    const u32 groups = (columns + 31) / 32, mine = lane % 4 * 8;
    const u16 *upper = w + (u64)min_u32(first_row + lane / 4, n - 1) * columns;
    const u16 *lower = w + (u64)min_u32(first_row + lane / 4 + 8, n - 1) * columns;
    const typename Float<T>::Activation *token = x + (u64)min_u32(lane / 4, tokens - 1) * groups * 32;
    const u32 len = strand_len(groups), start = min_u32(strand * len, groups), end = min_u32(start + len, groups);
    float acc[4] = {};
#ifdef __CUDACC__
#pragma unroll 4
#endif
    for (u32 g = start; g < end; g++) {
        const u32 k = g * 32 + mine;
        Float<T>::add(acc, load_weights(upper, k, columns), load_weights(lower, k, columns), token + k);
    }
    for (u32 i = 0; i < 4; i++) partial[strand][element_token(i)][element_row(i)] = acc[i];
    __syncthreads();
    fold_strands(partial, first_row, n, tokens, out);
}

// Groups of 32 columns that are staged at once, and the 16-byte words of a token's line of them.
constexpr u32 STEP = 2;
template <Type T> constexpr u32 WORDS = STEP * 32 * sizeof(typename Float<T>::Activation) / 16;
// With PAD words more, so that what eight lanes load at once, 16 bytes each of two tokens' lines, lies in different banks. BF16: 64 bytes in a
// row of each line, lines of 192 bytes. F16: every other 16 of 128 bytes, lines of 272.
template <Type T> using Staged = uint4[WORDS<T> + Float<T>::PAD];

template <Type T>
__device__ __forceinline__ void large(const u16 *w, u32 n, u32 columns, const typename Float<T>::Activation *x,
                                      u32 tokens, float *out, Staged<T> *staged) {
    using Activation = typename Float<T>::Activation;
    const u32 lane = threadIdx.x % 32, first_row = blockIdx.x * BLOCK_ROWS + threadIdx.x / 32 * TILE_ROWS;
    const u32 first_token = blockIdx.y * BLOCK_TOKENS, groups = (columns + 31) / 32, mine = lane % 4 * 8;
    const u16 *upper = w + (u64)min_u32(first_row + lane / 4, n - 1) * columns;
    const u16 *lower = w + (u64)min_u32(first_row + lane / 4 + 8, n - 1) * columns;
    const u32 len = strand_len(groups);
    float total[TILES][4] = {};
    for (u32 strand = 0; strand < STRANDS; strand++) {
        const u32 start = min_u32(strand * len, groups), end = min_u32(start + len, groups);
        float acc[TILES][4] = {};
        for (u32 first = start; first < end; first += STEP) {
            const u32 here = min_u32(STEP, end - first), words = here * WORDS<T> / STEP;
            __syncthreads();
            for (u32 i = threadIdx.x; i < BLOCK_TOKENS * words; i += WARPS * 32) {
                const u32 token = min_u32(first_token + i / words, tokens - 1);
                const uint4 *from = reinterpret_cast<const uint4 *>(x + ((u64)token * groups + first) * 32);
                staged[i / words][i % words] = from[i % words];
            }
            __syncthreads();
            for (u32 g = 0; g < here; g++) {
                const u32 k = (first + g) * 32 + mine;
                const uint4 up = load_weights(upper, k, columns), low = load_weights(lower, k, columns);
#ifdef __CUDACC__
#pragma unroll
#endif
                for (u32 tile = 0; tile < TILES; tile++) {
                    const uint4 *line = staged[tile * TILE_TOKENS + lane / 4];
                    Float<T>::add(acc[tile], up, low, reinterpret_cast<const Activation *>(line) + g * 32 + mine);
                }
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

KERNEL(matmul_small_bf16, 256, const u16 *w, u32 n, u32 columns, const u16 *x, u32 tokens, float *out) {
    __shared__ Partial partial[STRANDS];
    small<BF16>(w, n, columns, x, tokens, out, partial);
}
KERNEL(matmul_large_bf16, 128, const u16 *w, u32 n, u32 columns, const u16 *x, u32 tokens, float *out) {
    __shared__ Staged<BF16> staged[BLOCK_TOKENS];
    large<BF16>(w, n, columns, x, tokens, out, staged);
}
KERNEL(matmul_small_f16, 256, const u16 *w, u32 n, u32 columns, const float *x, u32 tokens, float *out) {
    __shared__ Partial partial[STRANDS];
    small<F16>(w, n, columns, x, tokens, out, partial);
}
KERNEL(matmul_large_f16, 128, const u16 *w, u32 n, u32 columns, const float *x, u32 tokens, float *out) {
    __shared__ Staged<F16> staged[BLOCK_TOKENS];
    large<F16>(w, n, columns, x, tokens, out, staged);
}

// A warp per output. Grid: tokens, ceil(n / 8). `rows` as in activations.cu.
KERNEL(matmul_f32, 256, const float *w, u32 n, u32 columns, const float *x, const u32 *rows, float *out) {
    const u32 lane = threadIdx.x % 32, row = blockIdx.y * 8 + threadIdx.x / 32, token = blockIdx.x;
    if (row >= n) return;
    const float *weights = w + (u64)row * columns, *values = x + (u64)(rows ? rows[token] : token) * columns;
    float sum = 0.0f;
    for (u32 k = lane; k < columns; k += 32) sum = fmaf(weights[k], values[k], sum);
    sum = warp_sum(sum);
    if (lane == 0) out[(u64)token * n + row] = sum;
}
