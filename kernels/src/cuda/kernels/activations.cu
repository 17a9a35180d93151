// Activations brought into the form that a product wants. `rows` (may be null) names the line of x that
// becomes line i; without it, line i itself.
//
// Bytes: reads 4 per value, writes 1.25 (blocks of 8-bit codes), 2 (BF16) or 4 (TF32). The products that follow
// read them once per tile of outputs, from the L2 cache.
#include "device.cuh"

// Blocks of 32 signed bytes: scale (f32), sums of the first and the last 16 codes (i16), codes. The formula, with its
// care for NaN and denormals, is `quant/activation.rs`, and so are the bits.
//
//     scale = max|x| / 127,   code[k] = round(x[k] · (127 / max|x|))
//
// A warp per block, a lane per value.
KERNEL(quantize_activations, 256, const float *x, const u32 *rows, u32 n_rows, u32 width, u8 *out) {
    const u32 lane = threadIdx.x % 32, per_row = width / 32;
    const u64 block = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    if (block >= (u64)n_rows * per_row) return;
    const u32 row = (u32)(block / per_row), first = (u32)(block % per_row) * 32;
    const float value = x[(u64)(rows ? rows[row] : row) * width + first + lane];

    // As integers, because there NaN and infinity are larger than every number.
    u32 largest = __float_as_uint(value) & 0x7fffffff;
    for (int mask = 16; mask > 0; mask /= 2) {
        const u32 other = __shfl_xor_sync(ALL_LANES, largest, mask);
        largest = other > largest ? other : largest;
    }
    const bool finite = largest < 0x7f800000;
    const float amax = __uint_as_float(finite ? largest : 0);
    float scale = amax / 127.0f;
    // 2^-126: below it the scale would be denormal.
    const bool empty = !(scale >= 1.17549435e-38f);
    const int code = empty ? 0 : (int)rintf(value * (127.0f / amax));
    if (empty) scale = finite ? 0.0f : __uint_as_float(0x7fc00000);
    int sum = code;
    for (int mask = 8; mask > 0; mask /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, mask);

    u8 *to = out + block * 40;
    if (lane == 0) *reinterpret_cast<float *>(to) = scale;
    if (lane % 16 == 0) *reinterpret_cast<i16 *>(to + 4 + lane / 8) = (i16)sum;
    to[8 + lane] = (u8)code;
}

// BF16, each line padded with zeros to `padded` values.
KERNEL(activations_to_bf16, 256, const float *x, const u32 *rows, u32 n_rows, u32 width, u32 padded, u16 *out) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= (u64)n_rows * padded) return;
    const u32 row = (u32)(at / padded), k = (u32)(at % padded);
    out[at] = k < width ? float_to_bf16(x[(u64)(rows ? rows[row] : row) * width + k]) : 0;
}

// TF32 (a float with 10 bits of mantissa), padded likewise.
KERNEL(activations_to_tf32, 256, const float *x, const u32 *rows, u32 n_rows, u32 width, u32 padded, float *out) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= (u64)n_rows * padded) return;
    const u32 row = (u32)(at / padded), k = (u32)(at % padded);
    out[at] = k < width ? float_to_tf32(x[(u64)(rows ? rows[row] : row) * width + k]) : 0.0f;
}
