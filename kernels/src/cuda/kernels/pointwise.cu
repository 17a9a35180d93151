// Activations of gated units and the soft cap, with the roundings of `ops/glu.rs` and its error bounds.
//
// Bytes: glu 12 per value (two reads, one write), softcap 8. Some 25 operations per value, far below the
// memory's pace.
#include "device.cuh"

// gate = x · σ(x) · up for `gelu` = 0; gate = x · σ(2 √(2/π) (x + 0.044715 x³)) · up for 1.
KERNEL(glu, 256, float *gate, const float *up, u64 len, u32 gelu) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at >= len) return;
    const float x = gate[at];
    const float inner = gelu ? 1.595769f * fmaf(0.044715f * x * x, x, x) : x;
    gate[at] = x * sigmoid_f32(inner) * up[at];
}

// x = cap · tanh(x / cap).
KERNEL(softcap, 256, float *x, u64 len, float cap) {
    const u64 at = (u64)blockIdx.x * 256 + threadIdx.x;
    if (at < len) x[at] = softcap_f32(x[at], cap);
}
