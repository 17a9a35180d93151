// out = softmax(scale · q Kᵀ) V over a paged cache, for each row (a token of some sequence) and query head.
//
// The positions are cut into spans of 256 at multiples of 256. A block computes one span for up to 8 query heads of
// one key-value head: scores, their maximum m and Σ exp(score − m) = l, and a = Σ exp(score − m) · v. A second kernel adds
// the spans in order: out = Σ exp(m_s − M) a_s / Σ exp(m_s − M) l_s. So a row's bits depend on its own position
// and window alone, whether it is decoded or part of a prompt.
//
// Bytes: decoding reads a sequence's keys and values once (2 · positions · kv_heads · head_dim · size) and writes and reads
// partial sums, (head_dim + 2) · 8 bytes per head and span: 1.6 % of an F16 cache's bytes where 8 query heads share
// a key-value head of 128, 0.8 % where 4 do. Operations: 4 · positions · heads · head_dim per row in f32
// without tensor cores, with q and the weights in full precision. A prompt's rows read the same pages one
// after the other, from the L2 cache; that is where tensor cores would pay, and they are not used yet.
#include "kv.cuh"

constexpr u32 SPAN = 256, HEADS = 8, MOST_DIMS = 512;

struct RowPlace {
    // Of its first page in `pages`.
    u32 first_page, position;
};

// The first position that a row sees (`ops/attention.rs`); window 0 is none.
__device__ __forceinline__ u32 first_visible(u32 position, u32 window) {
    return window == 0 || position + 1 < window ? 0 : position + 1 - window;
}

// Grid: spans of the longest row, kv_heads · ceil(group / 8), rows. partial: [row][head][span]{m, l, a[head_dim]}, `spans`
// of them for every row.
KERNEL(attention_span, 256, const float *q, const u8 *layer, u32 type, u32 kv_heads, u32 head_dim, u32 page_len,
       const RowPlace *rows, const u32 *pages, u32 n_heads, float scale, float cap, u32 window, u32 spans, float *partial) {
    __shared__ float queries[HEADS][MOST_DIMS];
    __shared__ float scores[HEADS][SPAN];
    __shared__ float fold[SPAN * 8];
    const KvLayout layout = {type, kv_heads, head_dim, page_len};
    const u32 group = n_heads / kv_heads, parts = (group + HEADS - 1) / HEADS;
    const u32 kv_head = blockIdx.y / parts, first_in_group = blockIdx.y % parts * HEADS;
    const u32 first_head = kv_head * group + first_in_group, heads = min_u32(HEADS, group - first_in_group);
    const RowPlace row = rows[blockIdx.z];
    const u32 visible = first_visible(row.position, window);
    const u32 start = (visible / SPAN + blockIdx.x) * SPAN;
    if (start > row.position) return;
    const u32 *table = pages + row.first_page;
    const u32 thread = threadIdx.x, chunks = head_dim / 8;

    for (u32 i = thread; i < HEADS * head_dim; i += 256) {
        const u32 h = i / head_dim;
        queries[h][i % head_dim] =
            h < heads ? q[((u64)blockIdx.z * n_heads + first_head + h) * head_dim + i % head_dim] : 0.0f;
    }
    __syncthreads();

    // Scores: eight lanes per position, each an eighth of the chunks of 8 dimensions.
    for (u32 offset = thread / 8; offset < SPAN; offset += 32) {
        const u32 position = start + offset;
        const bool seen = position >= visible && position <= row.position;
        float dots[HEADS] = {};
        if (seen) {
            const u8 *keys = layer + layout.start(table[position / page_len], kv_head, 0);
            for (u32 chunk = thread % 8; chunk < chunks; chunk += 8) {
                float key[8];
                load_elements(layout, keys, position % page_len, chunk, key);
                for (u32 h = 0; h < HEADS; h++)
                    for (u32 i = 0; i < 8; i++) dots[h] = fmaf(queries[h][8 * chunk + i], key[i], dots[h]);
            }
        }
        for (u32 h = 0; h < HEADS; h++)
            for (int mask = 4; mask > 0; mask /= 2) dots[h] += __shfl_xor_sync(ALL_LANES, dots[h], mask);
        for (u32 h = 0; h < HEADS; h++) {
            if (thread % 8 != h) continue;
            const float score = dots[h] * scale;
            scores[h][offset] = !seen ? -__uint_as_float(0x7f800000) : cap > 0.0f ? softcap_f32(score, cap) : score;
        }
    }
    __syncthreads();

    // Weights: a warp per head. The span holds at least one visible position, so m is not −∞.
    float *to = partial + (((u64)blockIdx.z * n_heads + first_head) * spans + blockIdx.x) * (head_dim + 2);
    const u64 next_head = (u64)spans * (head_dim + 2);
    {
        const u32 h = thread / 32, lane = thread % 32;
        float most = -__uint_as_float(0x7f800000), sum = 0.0f;
        for (u32 i = lane; i < SPAN; i += 32) most = fmaxf(most, scores[h][i]);
        for (int mask = 16; mask > 0; mask /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, mask));
        for (u32 i = lane; i < SPAN; i += 32) {
            scores[h][i] = exp_f32(scores[h][i] - most);
            sum += scores[h][i];
        }
        sum = warp_sum(sum);
        if (lane == 0 && h < heads) {
            to[h * next_head] = most;
            to[h * next_head + 1] = sum;
        }
    }
    __syncthreads();

    // Values: each thread 8 dimensions of every `slices`-th position.
    const u32 slices = SPAN / chunks, chunk = thread % chunks, slice = thread / chunks;
    float sums[HEADS][8] = {};
    if (slice < slices) {
        for (u32 offset = slice; offset < SPAN; offset += slices) {
            const u32 position = start + offset;
            if (position < visible || position > row.position) continue;
            const u8 *values = layer + layout.start(table[position / page_len], kv_head, 1);
            float value[8];
            load_elements(layout, values, position % page_len, chunk, value);
            for (u32 h = 0; h < HEADS; h++)
                for (u32 i = 0; i < 8; i++) sums[h][i] = fmaf(scores[h][offset], value[i], sums[h][i]);
        }
    }
    for (u32 h = 0; h < heads; h++) {
        if (slice < slices)
            for (u32 i = 0; i < 8; i++) fold[slice * head_dim + 8 * chunk + i] = sums[h][i];
        __syncthreads();
        for (u32 d = thread; d < head_dim; d += 256) {
            float sum = 0.0f;
            for (u32 s = 0; s < slices; s++) sum += fold[s * head_dim + d];
            to[h * next_head + 2 + d] = sum;
        }
        __syncthreads();
    }
}

// Grid: heads, rows. Adds the spans of a row and head.
KERNEL(attention_merge, 128, const float *partial, const RowPlace *rows, u32 n_heads, u32 head_dim, u32 window, u32 spans,
       float *out) {
    const RowPlace row = rows[blockIdx.y];
    const u32 used = row.position / SPAN - first_visible(row.position, window) / SPAN + 1;
    const u64 head = (u64)blockIdx.y * n_heads + blockIdx.x;
    const float *from = partial + head * spans * (head_dim + 2);
    float most = -__uint_as_float(0x7f800000);
    for (u32 s = 0; s < used; s++) most = fmaxf(most, from[(u64)s * (head_dim + 2)]);
    for (u32 d = threadIdx.x; d < head_dim; d += 128) {
        float sum = 0.0f, total = 0.0f;
        for (u32 s = 0; s < used; s++) {
            const float *span = from + (u64)s * (head_dim + 2);
            const float factor = exp_f32(span[0] - most);
            total = fmaf(factor, span[1], total);
            sum = fmaf(factor, span[2 + d], sum);
        }
        out[head * head_dim + d] = sum / total;
    }
}
