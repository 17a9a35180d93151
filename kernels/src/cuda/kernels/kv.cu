// Writing keys and values into the pages of one layer.
//
// Bytes: reads 8 per element of k and v together, writes their size in the cache. A warp per 32 dimensions of one head
// of one line.
#include "kv.cuh"

// slots[row] = page · page_len + offset; k and v are rows × kv_heads · head_dim. blockIdx.y chooses keys or values.
KERNEL(kv_write, 256, const float *k, const float *v, const u32 *slots, u32 rows, u8 *layer, u32 type, u32 kv_heads,
       u32 head_dim, u32 page_len) {
    const KvLayout layout = {type, kv_heads, head_dim, page_len};
    const u32 lane = threadIdx.x % 32, part = blockIdx.y, blocks = layout.blocks();
    const u64 unit = (u64)blockIdx.x * 8 + threadIdx.x / 32;
    if (unit >= (u64)rows * kv_heads * blocks) return;
    const u32 block = (u32)(unit % blocks), dim = block * 32 + lane;
    const u64 line = unit / blocks;
    const u32 head = (u32)(line % kv_heads), slot = slots[line / kv_heads], position = slot % page_len;
    const float value = dim < head_dim ? (part ? v : k)[line * head_dim + dim] : 0.0f;
    u8 *half = layer + layout.start(slot / page_len, head, part);
    u8 *to = half + position * layout.line();
    if (type == KV_F32) {
        if (dim < head_dim) reinterpret_cast<float *>(to)[dim] = value;
    } else if (type == KV_F16) {
        if (dim < head_dim) reinterpret_cast<u16 *>(to)[dim] = float_to_half(value);
    } else {
        // Q8_0's own quantization (`quant/q8_0.rs`): what is not a number is 0, infinities are 2^30.
        const float finite = value == value ? fminf(fmaxf(value, -1073741824.0f), 1073741824.0f) : 0.0f;
        float amax = fabsf(finite);
        for (int mask = 16; mask > 0; mask /= 2) amax = fmaxf(amax, __shfl_xor_sync(ALL_LANES, amax, mask));
        const float d = amax / 127.0f, used = fminf(d, 65504.0f), inverse = 1.0f / used;
        const float scaled = inverse <= 3.402823466e38f ? finite * inverse : 0.0f;
        // To the nearest, ties away from zero.
        to[dim] = (u8)(int)fminf(fmaxf(roundf(scaled), -127.0f), 127.0f);
        u8 *scale = half + page_len * layout.line() + 2 * (position * blocks + block);
        if (lane == 0) *reinterpret_cast<u16 *>(scale) = float_to_half(used);
    }
}
