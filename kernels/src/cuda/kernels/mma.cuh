// Matrix products of a warp on tensor cores (compute_80): D = A · B + C with A 16 × K by rows and
// B K × 8 by columns.
//
// With `group = lane / 4` and `quad = lane % 4` (source: PTX ISA, "Matrix Fragments for mma.m16n8k…"), a
// lane holds of C and D the elements (group, 2 quad), (group, 2 quad + 1), (group + 8, 2 quad),
// (group + 8, 2 quad + 1). Which columns of A and rows of B it holds is said at each function. The host
// version gathers the fragments of all lanes and computes the definition.
//
// The integer products are exact. The float ones add K products to C in an order and with an
// intermediate rounding that the hardware does not specify; products themselves are exact.
#pragma once
#include "device.cuh"

#ifndef __CUDACC__
// D += A · B from the fragments shown by the lanes: `dot(c, a, b)` adds to `c` what the elements of a lane's word of A times those
// of the matching word of B contribute.
template <unsigned A_ROWS_WORDS, class T, class Dot>
inline void mma_by_definition(T c[4], const u32 *a, const u32 *b, Dot dot) {
    // Words of a lane: A for row `group`, A for row `group + 8`, B.
    constexpr unsigned N = A_ROWS_WORDS;
    u32 mine[3 * N];
    for (unsigned i = 0; i < N; i++) {
        mine[i] = a[2 * i];
        mine[N + i] = a[2 * i + 1];
        mine[2 * N + i] = b[i];
    }
    auto *lanes = emulator::show(mine, 3 * N);
    const unsigned group = emulator::current->lane / 4, quad = emulator::current->lane % 4;
    for (unsigned i = 0; i < 4; i++) {
        const unsigned row = group, upper = i / 2, column = 2 * quad + i % 2;
        for (unsigned q = 0; q < 4; q++)
            for (unsigned n = 0; n < N; n++)
                dot(c[i], lanes[row * 4 + q][upper * N + n], lanes[column * 4 + q][2 * N + n]);
    }
}

inline void dot_s8(int &c, u32 a, u32 b) {
    for (unsigned i = 0; i < 4; i++) c += (int)(i8)(a >> 8 * i) * (int)(i8)(b >> 8 * i);
}
inline void dot_tf32(float &c, u32 a, u32 b) { c += __uint_as_float(a) * __uint_as_float(b); }

// For K = 16 of two 16-bit elements a word: widened once by the lane that shows them.
template <class Widen> inline void mma_of_pairs(float c[4], const u32 a[4], const u32 b[2], Widen widen) {
    u32 wide_a[8], wide_b[4];
    for (unsigned i = 0; i < 8; i++) {
        // a[0] and a[1] are the two rows' first words, so their elements take turns.
        const unsigned word = i / 4 * 2 + i % 2, upper = i / 2 % 2;
        wide_a[i] = __float_as_uint(widen((u16)(a[word] >> 16 * upper)));
    }
    for (unsigned i = 0; i < 4; i++) wide_b[i] = __float_as_uint(widen((u16)(b[i / 2] >> 16 * (i % 2))));
    mma_by_definition<4>(c, wide_a, wide_b, dot_tf32);
}
#endif

// Signed bytes, K = 32. a[0], a[1]: rows group and group + 8, columns 4 quad … + 3; a[2], a[3]: columns 16 + those.
// b[0], b[1]: column `group` of B, rows 4 quad … + 3 and 16 + those.
__device__ __forceinline__ void mma_s8_k32(int c[4], const u32 a[4], const u32 b[2]) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_by_definition<2>(c, a, b, dot_s8);
#endif
}

// Signed bytes, K = 16: the first halves of the above.
__device__ __forceinline__ void mma_s8_k16(int c[4], const u32 a[2], u32 b) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
#else
    mma_by_definition<1>(c, a, &b, dot_s8);
#endif
}

// BF16, K = 16. a[0], a[1]: rows group and group + 8, columns 2 quad, + 1; a[2], a[3]: columns 8 + those.
// b[0], b[1]: column `group` of B, rows 2 quad, + 1 and 8 + those.
__device__ __forceinline__ void mma_bf16_k16(float c[4], const u32 a[4], const u32 b[2]) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_of_pairs(c, a, b, bf16_to_float);
#endif
}

// F16, K = 16: as BF16.
__device__ __forceinline__ void mma_f16_k16(float c[4], const u32 a[4], const u32 b[2]) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_of_pairs(c, a, b, half_to_float);
#endif
}

// TF32, K = 8. a[0], a[1]: rows group and group + 8, column quad; a[2], a[3]: column 4 + quad. b[0], b[1]: column
// `group` of B, rows quad and 4 + quad.
__device__ __forceinline__ void mma_tf32_k8(float c[4], const u32 a[4], const u32 b[2]) {
#ifdef __CUDACC__
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    mma_by_definition<2>(c, a, b, dot_tf32);
#endif
}
