// The order of summation of every matrix product, so that an output has the same bits in a batch of one
// row as in one of hundreds: the columns are cut into STRANDS consecutive parts, each part is
// summed in order, and the parts are added in order. A small batch gives each strand to a warp of its
// own (enough loads in flight to fill the memory's latency); a large one walks them one after the other.
#pragma once
#include "device.cuh"

constexpr u32 STRANDS = 8;
// Strands start at multiples of so many groups of 32 columns.
constexpr u32 STRAND_STEP = 4;

// Groups per strand, of `groups` in all; the last strands may be short or empty.
__device__ __forceinline__ u32 strand_len(u32 groups) {
    const u32 even = (groups + STRANDS - 1) / STRANDS;
    return (even + STRAND_STEP - 1) / STRAND_STEP * STRAND_STEP;
}

// Output rows of a warp's tile, and tokens of one matrix instruction.
constexpr u32 TILE_ROWS = 16, TILE_TOKENS = 8;
// A block of the large products: four warps, one tile of rows each, and as many tokens.
constexpr u32 WARPS = 4, BLOCK_ROWS = WARPS * TILE_ROWS, TILES = 8, BLOCK_TOKENS = TILES * TILE_TOKENS;

// What one strand leaves of a tile, in shared memory.
using Partial = float[TILE_TOKENS][TILE_ROWS];

// Adds up what the strands of a small product left: partial[strand][token][row] → out[token · n + row].
// Called by the 256 threads of a block after a barrier.
__device__ __forceinline__ void fold_strands(const Partial *partial, u32 first_row, u32 n, u32 tokens,
                                             float *out) {
    const u32 token = threadIdx.x / TILE_ROWS, row = threadIdx.x % TILE_ROWS;
    if (token >= tokens || token >= TILE_TOKENS || first_row + row >= n) return;
    float sum = 0.0f;
    for (u32 s = 0; s < STRANDS; s++) sum += partial[s][token][row];
    out[(u64)token * n + first_row + row] = sum;
}

// The index, in a tile of 16 × 8, of the lane's element `i` of an accumulator.
__device__ __forceinline__ u32 element_row(u32 i) { return threadIdx.x % 32 / 4 + i / 2 * 8; }
__device__ __forceinline__ u32 element_token(u32 i) { return threadIdx.x % 4 * 2 + i % 2; }
