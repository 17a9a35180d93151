// The k largest of each of some rows of logits: all that a sampler with a top-k looks at.
//
// A logit and its token make one key of 64 bits: the logit's bits, turned so that integers compare as `f32::total_cmp` does, above
// the token's complement, so that the lower token is the larger of equals. No two keys of a row are equal, hence the k largest
// are one set, whatever the order of the threads. A block takes a piece of 4096 keys into registers, finds the k-th
// largest bit by bit from the top (one comparison per key and bit, no sorting, nothing that depends on how the logits lie), and
// leaves k of them. Pieces of what was left follow until one is left, 32 pieces of a vocabulary of 128k and then one for k up
// to 128; the last kernel brings it into order.
//
// Bytes: 4 per logit, read once, and 16 · k per piece of 4096, written and read: 4 % of the logits for k = 40. Back to the host
// travel 8 · k bytes a row instead of 4 per logit. Operations: 3 per key and bit, of which some 20 tell the k-th from the next one
// (64 where logits are equal): on an H100 nearly twice as long as the memory takes. A histogram of bytes would need fewer passes,
// but the logits of a row share their first byte, and its counters would be added to one after the other.
#include "device.cuh"

constexpr u32 THREADS = 256, WARPS = THREADS / 32, ITEMS = 16, PIECE = THREADS * ITEMS, MOST = 1024;

// A key that is none: smaller than all others.
constexpr u64 NO_KEY = 0;

// −∞ is no choice. Whatever is no number (NaN of either sign, +∞) comes first, and the lowest such token before the others.
__device__ __forceinline__ u64 key_of(float logit, u32 token) {
    constexpr u32 INFINITE = 0x7f800000, SIGN = 0x80000000;
    const u32 bits = __float_as_uint(logit);
    if (bits == (SIGN | INFINITE)) return NO_KEY;
    const u32 finite = (bits & SIGN) ? ~bits : bits | SIGN;
    const u32 ordered = (bits & ~SIGN) >= INFINITE ? SIGN | INFINITE : finite;
    return (u64)ordered << 32 | (u32)~token;
}
__device__ __forceinline__ u32 token_of(u64 key) { return ~(u32)key; }

struct Shared {
    // Of the warps; twice, because a warp may be one sum ahead.
    u32 sums[2][WARPS];
    u32 kept;
};

// How many of the block's keys are at least `floor`.
__device__ __forceinline__ u32 count(const u64 (&keys)[ITEMS], u64 floor, u32 turn, Shared &shared) {
    u32 mine = 0;
    for (u32 i = 0; i < ITEMS; i++) mine += keys[i] >= floor;
    const u32 of_warp = __reduce_add_sync(ALL_LANES, mine);
    u32(&sums)[WARPS] = shared.sums[turn % 2];
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = of_warp;
    __syncthreads();
    u32 all = 0;
    for (u32 w = 0; w < WARPS; w++) all += sums[w];
    return all;
}

// Writes the k largest of the block's keys in any order, and NO_KEY where there are fewer.
__device__ __forceinline__ void keep_largest(const u64 (&keys)[ITEMS], u32 k, Shared &shared, u64 *to) {
    if (threadIdx.x == 0) shared.kept = 0;
    u64 floor = NO_KEY + 1;
    if (count(keys, floor, 0, shared) > k) {
        floor = 0;
        for (u32 bit = 64; bit-- > 0;) {
            const u64 higher = floor | 1ull << bit;
            const u32 reached = count(keys, higher, bit, shared);
            if (reached >= k) floor = higher;
            if (reached == k) break;
        }
    }
    for (u32 i = 0; i < ITEMS; i++)
        if (keys[i] >= floor) to[atomicAdd(&shared.kept, 1u)] = keys[i];
    __syncthreads();
    for (u32 i = shared.kept + threadIdx.x; i < k; i += THREADS) to[i] = NO_KEY;
}

// Grid: pieces, rows. The first `real` of the `width` logits of line rows[…] → kept[row][piece][k].
KERNEL(top_k_logits, 256, const float *logits, u32 width, u32 real, const u32 *rows, u32 k, u64 *kept) {
    __shared__ Shared shared;
    const float *line = logits + (u64)rows[blockIdx.y] * width;
    u64 keys[ITEMS];
    for (u32 i = 0; i < ITEMS; i++) {
        const u32 token = blockIdx.x * PIECE + i * THREADS + threadIdx.x;
        keys[i] = token < real ? key_of(line[token], token) : NO_KEY;
    }
    keep_largest(keys, k, shared, kept + ((u64)blockIdx.y * gridDim.x + blockIdx.x) * k);
}

// Grid: pieces, rows. from[row][n] → kept[row][piece][k].
KERNEL(top_k_keys, 256, const u64 *from, u32 n, u32 k, u64 *kept) {
    __shared__ Shared shared;
    const u64 *line = from + (u64)blockIdx.y * n;
    u64 keys[ITEMS];
    for (u32 i = 0; i < ITEMS; i++) {
        const u32 at = blockIdx.x * PIECE + i * THREADS + threadIdx.x;
        keys[i] = at < n ? line[at] : NO_KEY;
    }
    keep_largest(keys, k, shared, kept + ((u64)blockIdx.y * gridDim.x + blockIdx.x) * k);
}

// Grid: rows. kept[row][k] → out[row][k]{token, the bits of its logit}, the largest first; behind the last one the token is 2³² − 1.
// A key's rank is how many are larger: k² / 256 comparisons a thread.
KERNEL(top_k_rank, 256, const u64 *kept, const float *logits, u32 width, const u32 *rows, u32 k, uint2 *out) {
    __shared__ u64 keys[MOST];
    for (u32 i = threadIdx.x; i < k; i += THREADS) keys[i] = kept[(u64)blockIdx.x * k + i];
    __syncthreads();
    const float *line = logits + (u64)rows[blockIdx.x] * width;
    uint2 *to = out + (u64)blockIdx.x * k;
    for (u32 i = threadIdx.x; i < k; i += THREADS) {
        const u64 key = keys[i];
        if (key == NO_KEY) {
            // They stand behind all others.
            to[i] = {token_of(NO_KEY), 0};
            continue;
        }
        u32 rank = 0;
        for (u32 j = 0; j < k; j++) rank += keys[j] > key;
        to[rank] = {token_of(key), __float_as_uint(line[token_of(key)])};
    }
}
