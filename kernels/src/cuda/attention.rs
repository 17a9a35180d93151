//! Attention: rows of one sequence gathered into tiles, in pieces whose partial sums fit.

use super::backend::State;
use super::kv::CudaKv;
use super::memory::CudaBuffer;
use super::products::word;
use super::scratch::Slot;
use super::tables::Kind;
use crate::backend::{AttentionParams, AttentionRow, BackendError, KvShape, KvType};
use crate::ops::attention::first_visible;

/// Positions of a span, lines of a matrix instruction, and dimensions up to which a block takes two of these
/// (`kernels/attention.cu`). A line is a row and a query head.
const SPAN: usize = 256;
const TILE: usize = 16;
const DIMS_OF_TWO: usize = 256;
/// Bytes of partial sums at a time, unless others are asked for.
pub(super) const PARTIAL: usize = 64 << 20;
/// Rows at a time: the most that a grid has in its third dimension.
const MOST_ROWS: usize = 65_535;

/// Spans that a row reaches into.
fn spans(row: &AttentionRow<'_>, window: Option<u32>) -> usize {
    row.position as usize / SPAN - first_visible(row.position, window) as usize / SPAN + 1
}

/// The number of rows of each sequence, where the list goes on to another.
fn runs(rows: &[AttentionRow<'_>]) -> Vec<usize> {
    rows.chunk_by(|a, b| std::ptr::eq(a.pages, b.pages)).map(<[_]>::len).collect()
}

/// How a launch shares out lines among blocks. Bits do not depend on it.
struct Blocks {
    kernel: &'static str,
    /// Query heads of a key-value head that a block takes, and rows.
    heads: usize,
    rows: usize,
}

impl Blocks {
    fn choose(shape: &KvShape, group: usize, runs: &[usize]) -> Blocks {
        // Parts of a large group as equal as they can be.
        let heads = group.div_ceil(group.div_ceil(TILE));
        let of = |kernel, tiles: usize| Blocks { kernel, heads, rows: tiles * TILE / heads };
        let one = match shape.ty {
            KvType::F16 => of("attention_span_f16", 1),
            KvType::F32 => return of("attention_span_f32", 1),
            KvType::Q8_0 => return of("attention_span_q8_0", 1),
        };
        // Two tiles read keys and values once for twice the lines, where a sequence has them.
        let more = runs.iter().any(|rows| *rows > one.rows);
        if more && shape.head_dim <= DIMS_OF_TWO { of("attention_prompt_f16", 2) } else { one }
    }
}

impl State {
    #[allow(clippy::too_many_arguments)]
    pub fn attention(
        &mut self,
        kv: &CudaKv,
        layer: usize,
        q: &CudaBuffer,
        rows: &[AttentionRow<'_>],
        params: &AttentionParams,
        out: &mut CudaBuffer,
    ) -> Result<(), BackendError> {
        let width = params.n_heads * kv.shape.head_dim;
        let (q, out) = (q.first(rows.len() * width), out.first(rows.len() * width));
        assert!(
            params.n_heads.is_multiple_of(kv.shape.kv_heads) && params.n_heads > 0,
            "{} query heads for {} heads of keys",
            params.n_heads,
            kv.shape.kv_heads
        );
        let of_a_span = params.n_heads * (kv.shape.head_dim + 2) * 4;
        let mut start = 0;
        while start < rows.len() {
            // As many rows as fit beside the longest of them.
            let (mut n, mut longest) = (0, 0);
            for row in rows[start..].iter().take(MOST_ROWS) {
                let with = longest.max(spans(row, params.window));
                if n > 0 && (n + 1) * with * of_a_span > self.partial_bytes {
                    break;
                }
                (n, longest) = (n + 1, with);
            }
            let offset = (start * width * 4) as u64;
            self.some_rows(kv, layer, q + offset, &rows[start..start + n], params, longest, out + offset)?;
            start += n;
        }
        Ok(())
    }

    /// `q` and `out` are addresses of as many lines as there are rows.
    #[allow(clippy::too_many_arguments)]
    fn some_rows(
        &mut self,
        kv: &CudaKv,
        layer: usize,
        q: u64,
        rows: &[AttentionRow<'_>],
        params: &AttentionParams,
        spans: usize,
        out: u64,
    ) -> Result<(), BackendError> {
        let KvShape { kv_heads, head_dim, page_len, .. } = kv.shape;
        let n_heads = params.n_heads;
        let runs = runs(rows);
        let blocks = Blocks::choose(&kv.shape, n_heads / kv_heads, &runs);
        // Rows of one sequence share its page numbers, and tiles.
        let (mut places, mut pages) = (Vec::with_capacity(2 * rows.len()), Vec::new());
        let (mut tiles, mut reach) = (Vec::new(), 0);
        let mut first = 0;
        for run in runs {
            let run = &rows[first..first + run];
            let table = run[0].pages;
            assert!(table.iter().all(|page| (*page as usize) < kv.pages), "a page beyond {}", kv.pages);
            for row in run {
                let (position, held) = (row.position, table.len());
                assert!(position as usize / page_len < held, "position {position} in {held} pages");
                places.extend([word(pages.len()), position]);
            }
            for tile in run.chunks(blocks.rows) {
                tiles.extend([word(first), word(tile.len())]);
                first += tile.len();
                let seen = tile.iter().map(|row| first_visible(row.position, params.window)).min();
                let last = tile.iter().map(|row| row.position).max();
                let (Some(seen), Some(last)) = (seen, last) else { continue };
                reach = reach.max(last as usize / SPAN - seen as usize / SPAN + 1);
            }
            pages.extend_from_slice(table);
        }
        let places = self.tables.address(Kind::Places, &places)?;
        let pages = self.tables.address(Kind::Pages, &pages)?;
        let row_tiles = self.tables.address(Kind::Tiles, &tiles)?;
        let partial = rows.len() * n_heads * spans * (head_dim + 2) * 4;
        let partial = self.scratch.room(Slot::Partial, partial)?;
        let window = params.window.unwrap_or(0);
        let arguments = [
            q.into(),
            kv.layer(layer).into(),
            word(kv_heads).into(),
            word(head_dim).into(),
            word(page_len).into(),
            places.into(),
            pages.into(),
            row_tiles.into(),
            word(n_heads).into(),
            word(blocks.heads).into(),
            params.scale.into(),
            params.softcap.unwrap_or(0.0).into(),
            window.into(),
            word(spans).into(),
            partial.into(),
        ];
        let parts = (n_heads / kv_heads).div_ceil(blocks.heads);
        let grid = [word(reach), word(kv_heads * parts), word(tiles.len() / 2)];
        // SAFETY: the parameters of the kernels of spans; q has the lines, pages and positions lie in the cache, tiles are of
        // rows of one sequence, no more lines than the kernel takes, and `partial` has room for every row, head and span.
        unsafe { self.device.launch(blocks.kernel, grid, &arguments) }?;
        let arguments = [
            partial.into(),
            places.into(),
            word(n_heads).into(),
            word(head_dim).into(),
            window.into(),
            word(spans).into(),
            out.into(),
        ];
        // SAFETY: the parameters of `attention_merge`; it reads the spans that were written and fills the lines of `out`.
        unsafe { self.device.launch("attention_merge", [word(n_heads), word(rows.len()), 1], &arguments) }
    }
}
