// What adapters add to a product, between and after the ordinary products with V (shrink) and U (expand).
//
// Bytes: a core per row, r² weights of its format (8 KiB for F16 of rank 64), which is all that differs between 256
// rows on one adapter and 256 rows on 256; apply reads and writes y once per group, 12 per output.
#include "formats.cuh"

enum CoreKind : u32 { IDENTITY = 0, DIAGONAL = 1, FULL = 2 };

// λ · C of one adapter.
struct CoreTerm {
    const u8 *core;
    u32 type, kind;
    float scale;
    u32 unused;
};

// One line of z': the terms that are summed in it, and the line of z they take.
struct CoreLine {
    u32 first_term, terms, source;
};

// out[line] = Σ scale · C z[source] over the line's terms, with unrounded activations. Grid: lines, ceil(rank / 8); a warp
// per output: lane l the columns ≡ l (mod 32), then a tree.
KERNEL(lora_core, 256, const float *z, u32 rank, const CoreLine *lines, const CoreTerm *terms, float *out) {
    const u32 lane = threadIdx.x % 32, i = blockIdx.y * 8 + threadIdx.x / 32;
    if (i >= rank) return;
    const CoreLine line = lines[blockIdx.x];
    const float *from = z + (u64)line.source * rank;
    float sum = 0.0f;
    for (u32 t = line.first_term; t < line.first_term + line.terms; t++) {
        const CoreTerm term = terms[t];
        float value = from[i];
        if (term.kind == DIAGONAL) value *= weight(term.type, term.core, i);
        if (term.kind == FULL) {
            const u8 *row = term.core + i * row_bytes(term.type, rank);
            float dot = 0.0f;
            for (u32 k = lane; k < rank; k += 32) dot = fmaf(weight(term.type, row, k), from[k], dot);
            value = warp_sum(dot);
        }
        sum = fmaf(term.scale, value, sum);
    }
    if (lane == 0) out[(u64)blockIdx.x * rank + i] = sum;
}

// out[line][32 b + i] = Σ_k U[k][i] z[line][k] in order, for U in bands of 32 outputs: a band's row holds the 32 coefficients of the
// first column of U, then those of the second, and so on. Grid: ceil(bands / 8), ceil(lines / 8); a warp per band, and each
// coefficient is decoded once for 8 lines.
KERNEL(lora_expand_bands, 256, const u8 *u, u32 type, u32 bands, const float *z, u32 rank, u32 lines, float *out) {
    const u32 lane = threadIdx.x % 32, band = blockIdx.x * 8 + threadIdx.x / 32, first = blockIdx.y * 8;
    if (band >= bands) return;
    const u8 *row = u + band * row_bytes(type, 32 * rank);
    const u32 n = min_u32(8, lines - first);
    float sums[8] = {};
    for (u32 k = 0; k < rank; k++) {
        const float coefficient = weight(type, row, 32 * k + lane);
        for (u32 l = 0; l < 8; l++)
            if (l < n) sums[l] = fmaf(coefficient, z[(u64)(first + l) * rank + k], sums[l]);
    }
    for (u32 l = 0; l < n; l++) out[((u64)(first + l) * bands + band) * 32 + lane] = sums[l];
}

enum ApplyKind : u32 { DELTA = 0, SCALED_DELTA = 1, ROW_SCALE = 2, BIAS = 3 };

// One step on a row of y: += delta; += λ g ⊙ delta; += λ (s − 1) ⊙ y₀; += λ b.
struct ApplyStep {
    // g, s or b: a line of `width` weights.
    const u8 *line;
    u32 type, kind, delta;
    float scale;
};

struct ApplyRow {
    u32 row, first_step, steps;
};

// Grid: rows, ceil(width / 256). The steps of a row in order; rows of one launch are different.
KERNEL(lora_apply, 256, float *y, const float *y0, const float *deltas, u32 width, const ApplyRow *rows,
       const ApplyStep *steps) {
    const u32 i = blockIdx.y * 256 + threadIdx.x;
    if (i >= width) return;
    const ApplyRow row = rows[blockIdx.x];
    float value = y[(u64)row.row * width + i];
    for (u32 s = row.first_step; s < row.first_step + row.steps; s++) {
        const ApplyStep step = steps[s];
        const float of_line = step.kind == DELTA ? 1.0f : weight(step.type, step.line, i);
        switch (step.kind) {
        case DELTA: value += deltas[(u64)step.delta * width + i]; break;
        case SCALED_DELTA: value = fmaf(step.scale * of_line, deltas[(u64)step.delta * width + i], value); break;
        case ROW_SCALE: value = fmaf(step.scale * (of_line - 1.0f), y0[(u64)row.row * width + i], value); break;
        default: value = fmaf(step.scale, of_line, value);
        }
    }
    y[(u64)row.row * width + i] = value;
}
