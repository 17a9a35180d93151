// Rotary position embedding (`ops/rope.rs`).
//
// The angles are formed and reduced in double precision and rounded once, as the reference does; the table of a
// batch is computed once and serves all layers with the same frequencies. Bytes of the rotation: 8 per
// value, the table from the cache.
#include "device.cuh"

// table[row][pair] = (cos, sin)(position · inv_freq) · magnitude.
KERNEL(rope_table, 256, const u32 *positions, const float *inv_freq, u32 rows, u32 pairs, float magnitude, float2 *table) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= (u64)rows * pairs) return;
    const double angle = (double)positions[at / pairs] * (double)inv_freq[at % pairs];
    float2 entry;
    entry.x = (float)(cos(angle) * (double)magnitude);
    entry.y = (float)(sin(angle) * (double)magnitude);
    table[at] = entry;
}

// (a, b) ← (a cos − b sin, a sin + b cos) in each head; pairs are (2i, 2i + 1), or (i, i + pairs) for `neox`.
KERNEL(rope, 256, float *x, const float2 *table, u32 rows, u32 heads, u32 head_dim, u32 pairs, u32 neox) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= (u64)rows * heads * pairs) return;
    const u32 pair = (u32)(at % pairs);
    const u64 head = at / pairs;
    const float2 entry = table[head / heads * pairs + pair];
    float *line = x + head * head_dim;
    const u32 ia = neox ? pair : 2 * pair, ib = neox ? pair + pairs : 2 * pair + 1;
    const float a = line[ia], b = line[ib];
    line[ia] = fmaf(a, entry.x, -(b * entry.y));
    line[ib] = fmaf(a, entry.y, b * entry.x);
}
