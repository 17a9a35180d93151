// Root-mean-square normalisation: out = x / sqrt(mean(x²) + eps) ⊙ weight; `out` may be `x`.
//
// A block per line. Each thread sums the columns ≡ its number (mod 256), a warp folds its lanes as a tree, and
// the eight warps are added in order: at most width/256 + 13 roundings. Bytes: 12 per value, of which one read
// hits the cache.
#include "device.cuh"

KERNEL(rms_norm, 256, const float *x, const float *weight, u32 width, float eps, float *out) {
    __shared__ float sums[8];
    const float *line = x + (u64)blockIdx.x * width;
    float *to = out + (u64)blockIdx.x * width;
    float sum = 0.0f;
    for (u32 k = threadIdx.x; k < width; k += 256) sum = fmaf(line[k], line[k], sum);
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    float total = 0.0f;
    for (u32 w = 0; w < 8; w++) total += sums[w];
    const float scale = 1.0f / sqrtf(total / (float)width + eps);
    for (u32 k = threadIdx.x; k < width; k += 256) to[k] = line[k] * scale * weight[k];
}
