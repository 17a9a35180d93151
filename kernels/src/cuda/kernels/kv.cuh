// The key-value cache in the device's memory: [layer][page][kv_head], in it the keys, [position][dim], then
// the values likewise. Q8_0 pads a line to blocks of 32 codes and keeps the blocks' scales (half
// precision, [position][block]) behind the codes. Each half is padded to 16 bytes, and a head has a multiple of 8
// dimensions, so that eight elements are one aligned load.
#pragma once
#include "device.cuh"

// The types as the launches number them.
enum KvType : u32 { KV_F32 = 0, KV_F16 = 1, KV_Q8_0 = 2 };

struct KvLayout {
    u32 type, kv_heads, head_dim, page_len;

    __device__ __forceinline__ u32 blocks() const { return (head_dim + 31) / 32; }
    // Bytes of the elements of one position.
    __device__ __forceinline__ u32 line() const {
        return type == KV_F32 ? 4 * head_dim : type == KV_F16 ? 2 * head_dim : 32 * blocks();
    }
    __device__ __forceinline__ u64 half() const {
        const u64 scales = type == KV_Q8_0 ? 2 * blocks() : 0;
        return (page_len * (line() + scales) + 15) / 16 * 16;
    }
    // Where the keys (`part` 0) or the values (1) of a head of a page lie in a layer.
    __device__ __forceinline__ u64 start(u32 page, u32 head, u32 part) const {
        return (((u64)page * kv_heads + head) * 2 + part) * half();
    }
};

// Elements 8 chunk … + 7 of a position as floats.
__device__ __forceinline__ void load_elements(const KvLayout &layout, const u8 *half, u32 position, u32 chunk,
                                              float out[8]) {
    const u8 *line = half + position * layout.line();
    if (layout.type == KV_F32) {
        const float *from = reinterpret_cast<const float *>(line) + 8 * chunk;
        for (u32 i = 0; i < 8; i++) out[i] = from[i];
    } else if (layout.type == KV_F16) {
        const uint4 words = *reinterpret_cast<const uint4 *>(line + 16 * chunk);
        const u32 pairs[4] = {words.x, words.y, words.z, words.w};
        for (u32 i = 0; i < 8; i++) out[i] = half_to_float((u16)(pairs[i / 2] >> i % 2 * 16));
    } else {
        const uint2 words = *reinterpret_cast<const uint2 *>(line + 8 * chunk);
        const u32 codes[2] = {words.x, words.y};
        const u8 *scales = half + layout.page_len * layout.line() + 2 * (position * layout.blocks() + chunk / 4);
        const float scale = half_to_float(load_u16(scales));
        for (u32 i = 0; i < 8; i++) out[i] = scale * (float)(i8)(codes[i / 4] >> i % 4 * 8);
    }
}
