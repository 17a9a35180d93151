// Lines of matrices moved, scaled and added.
//
// Bytes: what is read and written once each (4 per value; a table row of `embed` in its format). No operation
// worth counting: each is bound by the memory, or, for one token, by the launch.
#include "formats.cuh"

// dst[i] = src[rows[i]] for lines of `width`.
KERNEL(gather, 256, const float *src, const u32 *rows, u32 n_rows, u32 width, float *dst) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= (u64)n_rows * width) return;
    dst[at] = src[(u64)rows[at / width] * width + at % width];
}

// out[i] = scale · table[tokens[i]], each weight decoded by itself.
KERNEL(embed, 256, const u8 *table, u32 type, u32 width, const u32 *tokens, u32 n, float scale, float *out) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= (u64)n * width) return;
    const u8 *row = table + tokens[at / width] * row_bytes(type, width);
    out[at] = weight(type, row, (u32)(at % width)) * scale;
}

// x += y.
KERNEL(add, 256, float *x, const float *y, u64 len) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at < len) x[at] += y[at];
}

// Every line of x += bias.
KERNEL(add_bias, 256, float *x, const float *bias, u32 width, u64 len) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at < len) x[at] += bias[at % width];
}
