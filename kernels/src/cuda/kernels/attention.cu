// out = softmax(scale · q Kᵀ) V over a paged cache, for each row (a token of some sequence) and query head: a line.
//
// The positions are cut into spans of 256 at multiples of 256. A block computes one span for up to 16 or 32 lines of one key-value
// head: scores, their maximum m and Σ exp(score − m) = l, and a = Σ exp(score − m) · v. A second kernel adds
// the spans in order: out = Σ exp(m_s − M) a_s / Σ exp(m_s − M) l_s.
//
// Lines are the 16 rows of a matrix instruction: rows of one sequence times the query heads that share the key-value head. Decoding
// fills as many of them as heads share one; a prompt fills them all, two tiles where heads have up to 256 dimensions and the cache
// is F16, so that a span is read once for 32 lines. A line's bits depend on its own position, window and sequence alone, in whatever
// company: a row of a matrix product needs nothing of the other rows; positions are added in one order; and a position that a line
// does not see has weight 0 and a finite value there, so it adds nothing. (Values that are not finite are added outside the
// instructions, to the lines that see them. An infinite key makes its score a NaN, and with it the lines that see it.)
//
// Error, with ε and p = 2 (F16) or 6 products of parts from `parts.cuh`, if the instruction's additions round by 2⁻²³ at most: of a score
// (ε + p · dim · 2⁻²³) scale · Σ |q k|, of a span's sum (ε + p · 256 · 2⁻²³) Σ |weight · v|, beside the roundings of softmax.
//
// Bytes: decoding reads a sequence's keys and values once (2 · positions · kv_heads · head_dim · size) and writes and reads
// partial sums, (head_dim + 2) · 8 bytes per line and span: 1.6 % of an F16 cache's bytes where 8 query heads share
// a key-value head of 128, 0.8 % where 4 do. A prompt reads them once per block's lines, from the L2 cache, 128 KiB for a span of
// 128 dimensions, beside 33 KB of partial sums. Operations: 4 · positions · heads · head_dim per row, times p on tensor cores: 1,024
// instructions of 16 × 8 × 16 per tile and span of 128 dimensions in F16, 3,072 otherwise. Of issue slots (sm_90, F16, 128 dimensions) a
// warp takes some 720 for these and their loads with one tile and 1,050 with two, and some 320 for the weights of each of its two or four lines.
//
// Keys and values go from memory to the fragments directly, 16 bytes a lane, since each is needed by one warp only: while
// scores are computed a warp has 32 positions, while values are added 64 dimensions. Only queries, weights and the warps'
// sums meet in shared memory.
#include "parts.cuh"

constexpr u32 SPAN = 256, WARPS = 8, MOST_DIMS = 512;
// Lines of a matrix instruction.
constexpr u32 TILE = 16;
// Positions of a warp while scores are computed, in columns of 8; positions of a step while values are added.
constexpr u32 WARP_SPAN = SPAN / WARPS, COLUMNS = WARP_SPAN / 8, STEP = 16;
// Dimensions of a warp while values are added.
constexpr u32 WARP_DIMS = 64;

struct RowPlace {
    // Of its first page in `pages`.
    u32 first_page, position;
};

// Rows of one sequence that follow one another.
struct RowTile {
    u32 first, rows;
};

// A row and a query head; it sees the positions from `visible` to `position`.
struct Line {
    u32 visible, position;
    // Undoes the scale of its staged query.
    float unscale;

    __device__ __forceinline__ bool sees(u32 at) const { return at >= visible && at <= position; }
};

// Words of a staged line: strides that put a warp's loads of 16 bytes from neighbouring lines into different banks.
__device__ __forceinline__ u32 query_stride(u32 head_dim) { return (head_dim + 31) / 32 * 32 + 4; }
constexpr u32 WEIGHT_STRIDE = SPAN + 16, FOLD_STRIDE = WARP_DIMS + 4;
// The most of: 16 queries of 512 dimensions or 32 of 256; weights of 32 lines; what eight warps leave of 16 lines.
constexpr u32 ROOM = 8704;
static_assert(TILE * (MOST_DIMS + 4) <= ROOM && 2 * TILE * (MOST_DIMS / 2 + 4) <= ROOM, "queries");
static_assert(2 * TILE * WEIGHT_STRIDE <= ROOM && WARPS * TILE * FOLD_STRIDE <= ROOM, "weights, sums");

struct Shared {
    // Of a block's queries, then its scores, then its weights, then its warps' sums.
    uint4 room[ROOM / 4];
    // Where each position of the span lies (`Parts::place`); before the first that the block sees and behind the last, these.
    uint2 places[SPAN];
    Line lines[2 * TILE];
};

// The first position that a row sees (`ops/attention.rs`); window 0 is none.
__device__ __forceinline__ u32 first_visible(u32 position, u32 window) {
    return window == 0 || position + 1 < window ? 0 : position + 1 - window;
}

// Adds weight · value for values that are infinite or not numbers, to the lines that see them and to no others. `sums` are
// of the columns that a warp has of the dimensions from `first_chunk` on.
template <class Parts>
__device__ __forceinline__ void add_odd(float sums[8][4], const Shared &shared, const KvLayout &layout,
                                        const u8 *values_at, u32 start, u32 first_offset, u32 last_offset,
                                        u32 first_line, u32 first_chunk) {
    const u32 lane = threadIdx.x % 32;
    const u32 *weights = reinterpret_cast<const u32 *>(shared.room);
    for (u32 offset = first_offset; offset < last_offset; offset++)
        UNROLL for (u32 side = 0; side < 2; side++) {
            const u32 chunk = first_chunk + lane % 4 * 2 + side;
            if (8 * chunk >= layout.head_dim) continue;
            const typename Parts::Row row = Parts::load(layout, values_at, shared.places[offset], chunk);
            UNROLL for (u32 i = 0; i < 2; i++) {
                const u32 line = first_line + lane / 4 + 8 * i;
                if (!shared.lines[line].sees(start + offset)) continue;
                const float weight = Parts::element(weights + line * WEIGHT_STRIDE, offset);
                UNROLL for (u32 d = 0; d < 8; d++) {
                    const float value = Parts::value(row, d);
                    if (!is_finite(value)) sums[d][2 * i + side] += weight * value;
                }
            }
        }
}

// One span for the rows of a tile and `heads_each` of the query heads of a key-value head, row by row the lines of a
// block. partial: [row][head][span]{m, l, a[head_dim]}, `spans` of them for every row.
template <class Parts, u32 TILES>
__device__ __forceinline__ void span_of(Shared &shared, const float *q, const u8 *layer, const KvLayout &layout,
                                        const RowPlace *rows, const u32 *pages, const RowTile *row_tiles, u32 n_heads,
                                        u32 heads_each, float scale, float cap, u32 window, u32 spans, float *partial) {
    const u32 head_dim = layout.head_dim, group = n_heads / layout.kv_heads;
    const u32 parts = (group + heads_each - 1) / heads_each;
    const u32 kv_head = blockIdx.y / parts, first_in_group = blockIdx.y % parts * heads_each;
    const u32 first_head = kv_head * group + first_in_group, heads = min_u32(heads_each, group - first_in_group);
    const RowTile tile = row_tiles[blockIdx.z];
    const u32 lines = tile.rows * heads;
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, chunks = head_dim / 8;
    const u8 *keys_at = layer + layout.start(0, kv_head, 0), *values_at = layer + layout.start(0, kv_head, 1);
    u32 *room = reinterpret_cast<u32 *>(shared.room);
    float *floats = reinterpret_cast<float *>(shared.room);

    // From the first to the last position that any of the rows sees.
    u32 lowest = 0xffffffff, highest = 0;
    for (u32 r = 0; r < tile.rows; r++) {
        const u32 position = rows[tile.first + r].position;
        lowest = min_u32(lowest, first_visible(position, window));
        highest = position > highest ? position : highest;
    }
    const u32 start = (lowest / SPAN + blockIdx.x) * SPAN;
    if (start > highest) return;

    {
        const u32 position = min_u32(start + thread > lowest ? start + thread : lowest, highest);
        const u32 page = pages[rows[tile.first].first_page + position / layout.page_len];
        shared.places[thread] = Parts::place(layout, page, position % layout.page_len);
    }

    // Queries, a warp per line. Lines that the block has no row for see nothing, and their queries are zeros.
    const u32 stride = query_stride(head_dim);
    for (u32 line = warp; line < TILES * TILE; line += WARPS) {
        const bool used = line < lines;
        const u32 row = tile.first + (used ? line / heads : 0), position = rows[row].position;
        const float *from = q + ((u64)row * n_heads + first_head + line % heads) * head_dim;
        float most = 0.0f;
        if (used)
            for (u32 d = lane; d < head_dim; d += 32) most = fmaxf(most, fabsf(from[d]));
        for (int mask = 16; mask > 0; mask /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, mask));
        const float2 by = Parts::scale(most);
        if (lane == 0) shared.lines[line] = {used ? first_visible(position, window) : 1, used ? position : 0, by.y};
        for (u32 d = 2 * lane; d < stride - 4; d += 64) {
            const bool there = used && d < head_dim;
            const uint2 pair = Parts::staged(there ? from[d] * by.x : 0.0f, there ? from[d + 1] * by.x : 0.0f);
            *reinterpret_cast<uint2 *>(room + line * stride + d) = pair;
        }
    }
    __syncthreads();

    // Scores: 32 positions a warp, in columns of 8; a lane loads 8 dimensions of the position of its column.
    float dots[TILES][COLUMNS][4] = {};
    const u32 first_column = start + warp * WARP_SPAN;
    if (first_column <= highest && first_column + WARP_SPAN > lowest) {
        uint2 places[COLUMNS];
        for (u32 c = 0; c < COLUMNS; c++) places[c] = shared.places[warp * WARP_SPAN + 8 * c + lane / 4];
        for (u32 chunk = lane % 4; chunk < (chunks + 3) / 4 * 4; chunk += 4) {
            // Behind the last dimension, where queries are zeros, any keys do.
            typename Parts::Row keys[COLUMNS];
            for (u32 c = 0; c < COLUMNS; c++)
                keys[c] = Parts::load(layout, keys_at, places[c], min_u32(chunk, chunks - 1));
            for (u32 i = 0; i < 2; i++) {
                typename Parts::Left queries[TILES];
                for (u32 t = 0; t < TILES; t++) {
                    const u32 *line = room + (t * TILE + lane / 4) * stride + 8 * chunk + 4 * i;
                    queries[t] = Parts::left(*reinterpret_cast<const uint4 *>(line),
                                             *reinterpret_cast<const uint4 *>(line + 8 * stride));
                }
                for (u32 c = 0; c < COLUMNS; c++) {
                    const typename Parts::Right right = Parts::along(keys[c], i);
                    for (u32 t = 0; t < TILES; t++) Parts::add(dots[t][c], queries[t], right);
                }
            }
        }
    }
    // The room changes hands.
    __syncthreads();
    UNROLL for (u32 t = 0; t < TILES; t++)
        UNROLL for (u32 c = 0; c < COLUMNS; c++)
            for (u32 i = 0; i < 2; i++) {
                float *line = floats + (t * TILE + lane / 4 + 8 * i) * WEIGHT_STRIDE;
                *reinterpret_cast<float2 *>(line + warp * WARP_SPAN + 8 * c + lane % 4 * 2) = {dots[t][c][2 * i],
                                                                                             dots[t][c][2 * i + 1]};
            }
    __syncthreads();

    // Weights, a warp per line, each lane in the places of what it has read.
    const auto to = [&](u32 line) {
        const u32 row = tile.first + line / heads, span = start / SPAN - shared.lines[line].visible / SPAN;
        return partial + (((u64)row * n_heads + first_head + line % heads) * spans + span) * (head_dim + 2);
    };
    const auto seen = [&](u32 line) {
        const Line &of = shared.lines[line];
        return of.position >= start && of.visible < start + SPAN && line < lines;
    };
    for (u32 line = warp; line < TILES * TILE; line += WARPS) {
        uint2 *pairs = reinterpret_cast<uint2 *>(room + line * WEIGHT_STRIDE) + lane;
        if (!seen(line)) {
            for (u32 i = 0; i < SPAN / 64; i++) pairs[32 * i] = {0, 0};
            continue;
        }
        const Line of = shared.lines[line];
        float scores[SPAN / 32], most = -__uint_as_float(0x7f800000), sum = 0.0f;
        for (u32 i = 0; i < SPAN / 32; i++) {
            const uint2 pair = pairs[i / 2 * 32];
            const float score = __uint_as_float(i % 2 ? pair.y : pair.x) * of.unscale * scale;
            scores[i] = !of.sees(start + i / 2 * 64 + 2 * lane + i % 2) ? -__uint_as_float(0x7f800000)
                        : cap > 0.0f                                    ? softcap_f32(score, cap)
                                                                        : score;
            most = fmaxf(most, scores[i]);
        }
        // Not −∞: the line sees something of the span.
        for (int mask = 16; mask > 0; mask /= 2) most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, mask));
        for (u32 i = 0; i < SPAN / 32; i += 2) {
            const float a = exp_f32(scores[i] - most), b = exp_f32(scores[i + 1] - most);
            sum += a + b;
            pairs[i / 2 * 32] = Parts::staged(a * Parts::WEIGHT, b * Parts::WEIGHT);
        }
        sum = warp_sum(sum);
        if (lane == 0) {
            to(line)[0] = most;
            to(line)[1] = sum;
        }
    }
    __syncthreads();

    // Values: 64 dimensions a warp, and where these are fewer than the warps, a slice of the span. A lane loads 8 dimensions of
    // each of four positions: column `lane / 4` of eight products, of which the j-th has the dimensions ≡ j (mod 8).
    const u32 dim_groups = (head_dim + WARP_DIMS - 1) / WARP_DIMS, slices = WARPS / dim_groups;
    const u32 slice = warp / dim_groups, first_chunk = warp % dim_groups * (WARP_DIMS / 8);
    const u32 slice_len = SPAN / slices / STEP * STEP;
    float sums[TILES][8][4];
    // A value that is infinite or not a number spoils the sums of lines that do not see it, for zero times such a one is not a number:
    // then everything again with zeros in their place, and they by themselves.
    bool odd = false, again = slice < slices;
    while (again) {
        const u32 chunk = min_u32(first_chunk + lane / 4, chunks - 1);
        UNROLL for (u32 t = 0; t < TILES; t++)
            for (u32 d = 0; d < 8; d++)
                for (u32 i = 0; i < 4; i++) sums[t][d][i] = 0.0f;
        for (u32 first = slice * slice_len; first < (slice + 1) * slice_len; first += STEP) {
            if (start + first > highest || start + first + STEP <= lowest) continue;
            typename Parts::Row values[4];
            for (u32 i = 0; i < 4; i++)
                values[i] = Parts::load(layout, values_at, shared.places[first + lane % 4 * 4 + i], chunk);
            if (odd)
                for (u32 i = 0; i < 4; i++) Parts::make_finite(values[i]);
            typename Parts::Left weights[TILES];
            for (u32 t = 0; t < TILES; t++) {
                const u32 *line = room + (t * TILE + lane / 4) * WEIGHT_STRIDE + first + lane % 4 * 4;
                weights[t] = Parts::left(*reinterpret_cast<const uint4 *>(line),
                                         *reinterpret_cast<const uint4 *>(line + 8 * WEIGHT_STRIDE));
            }
            for (u32 d = 0; d < 8; d++) {
                const typename Parts::Right right = Parts::across(values, d);
                for (u32 t = 0; t < TILES; t++) Parts::add(sums[t][d], weights[t], right);
            }
        }
        if (odd) {
            UNROLL for (u32 t = 0; t < TILES; t++)
                add_odd<Parts>(sums[t], shared, layout, values_at, start, slice * slice_len, (slice + 1) * slice_len,
                               t * TILE, first_chunk);
            break;
        }
        UNROLL for (u32 t = 0; t < TILES; t++)
            for (u32 d = 0; d < 8; d++)
                for (u32 i = 0; i < 4; i++) odd |= !is_finite(sums[t][d][i]);
        odd = again = __any_sync(ALL_LANES, odd);
    }

    // The slices are added in order, sixteen lines at a time.
    UNROLL for (u32 t = 0; t < TILES; t++) {
        __syncthreads();
        for (u32 i = 0; i < 4; i++) {
            float *line = floats + (warp * TILE + lane / 4 + i / 2 * 8) * FOLD_STRIDE + 8 * (lane % 4 * 2 + i % 2);
            if (slice < slices)
                for (u32 d = 0; d < 8; d++) line[d] = sums[t][d][i];
        }
        __syncthreads();
        for (u32 i = thread; i < TILE * head_dim; i += WARPS * 32) {
            const u32 line = i / head_dim, d = i % head_dim;
            if (!seen(t * TILE + line)) continue;
            float sum = 0.0f;
            for (u32 s = 0; s < slices; s++)
                sum += floats[((s * dim_groups + d / WARP_DIMS) * TILE + line) * FOLD_STRIDE + d % WARP_DIMS];
            to(t * TILE + line)[2 + d] = sum * (1.0f / Parts::WEIGHT);
        }
    }
}

// Grid: spans that the farthest tile reaches into, kv_heads · ceil(group / heads_each), tiles.
#define SPAN_KERNEL(name, parts, tiles, type)                                                                        \
    KERNEL(name, 256, const float *q, const u8 *layer, u32 kv_heads, u32 head_dim, u32 page_len,                      \
           const RowPlace *rows, const u32 *pages, const RowTile *row_tiles, u32 n_heads, u32 heads_each, float scale,\
           float cap, u32 window, u32 spans, float *partial) {                                                        \
        __shared__ Shared shared;                                                                                     \
        span_of<parts, tiles>(shared, q, layer, {type, kv_heads, head_dim, page_len}, rows, pages, row_tiles, n_heads,\
                              heads_each, scale, cap, window, spans, partial);                                        \
    }
SPAN_KERNEL(attention_span_f16, HalfParts, 1, KV_F16)
SPAN_KERNEL(attention_prompt_f16, HalfParts, 2, KV_F16)
SPAN_KERNEL(attention_span_f32, Bf16Parts, 1, KV_F32)
SPAN_KERNEL(attention_span_q8_0, Bf16Parts, 1, KV_Q8_0)
#undef SPAN_KERNEL

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
