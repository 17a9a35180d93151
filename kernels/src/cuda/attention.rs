//! Attention: rows described for the kernel, in pieces whose partial sums fit.

use super::backend::State;
use super::kv::{CudaKv, type_number};
use super::memory::CudaBuffer;
use super::products::word;
use super::scratch::Slot;
use super::tables::Kind;
use crate::backend::{AttentionParams, AttentionRow, BackendError, KvShape};
use crate::ops::attention::first_visible;

/// Positions of a span, and query heads of a block (`kernels/attention.cu`).
const SPAN: usize = 256;
const HEADS: usize = 8;
/// Bytes of partial sums at a time.
const PARTIAL: usize = 64 << 20;
/// Rows at a time: the most that a grid has in its third dimension.
const MOST_ROWS: usize = 65_535;

/// Spans that a row reaches into.
fn spans(row: &AttentionRow<'_>, window: Option<u32>) -> usize {
    row.position as usize / SPAN - first_visible(row.position, window) as usize / SPAN + 1
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
        let mut start = 0;
        while start < rows.len() {
            // As many rows as fit beside the longest of them.
            let (mut n, mut longest) = (0, 0);
            for row in rows[start..].iter().take(MOST_ROWS) {
                let with = longest.max(spans(row, params.window));
                if n > 0 && (n + 1) * with * params.n_heads * (kv.shape.head_dim + 2) * 4 > PARTIAL {
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
        let KvShape { kv_heads, head_dim, page_len, ty, .. } = kv.shape;
        let n_heads = params.n_heads;
        // Rows of one sequence share its page numbers.
        let (mut places, mut pages) = (Vec::with_capacity(2 * rows.len()), Vec::new());
        let mut last: Option<(&[u32], u32)> = None;
        for row in rows {
            assert!(
                row.position as usize / page_len < row.pages.len(),
                "position {} in {} pages",
                row.position,
                row.pages.len()
            );
            let first = match last {
                Some((held, first)) if std::ptr::eq(held, row.pages) => first,
                _ => {
                    assert!(
                        row.pages.iter().all(|page| (*page as usize) < kv.pages),
                        "a page beyond {}",
                        kv.pages
                    );
                    let first = word(pages.len());
                    pages.extend_from_slice(row.pages);
                    first
                }
            };
            last = Some((row.pages, first));
            places.extend([first, row.position]);
        }
        let places = self.tables.address(Kind::Places, &places)?;
        let pages = self.tables.address(Kind::Pages, &pages)?;
        let partial = rows.len() * n_heads * spans * (head_dim + 2) * 4;
        let partial = self.scratch.room(Slot::Partial, partial)?;
        let window = params.window.unwrap_or(0);
        let parts = (n_heads / kv_heads).div_ceil(HEADS);
        let arguments = [
            q.into(),
            kv.layer(layer).into(),
            type_number(ty).into(),
            word(kv_heads).into(),
            word(head_dim).into(),
            word(page_len).into(),
            places.into(),
            pages.into(),
            word(n_heads).into(),
            params.scale.into(),
            params.softcap.unwrap_or(0.0).into(),
            window.into(),
            word(spans).into(),
            partial.into(),
        ];
        let grid = [word(spans), word(kv_heads * parts), word(rows.len())];
        // SAFETY: the parameters of `attention_span`; q has the lines, pages and positions lie in the cache, and `partial` has
        // room for every row, head and span.
        unsafe { self.device.launch("attention_span", grid, &arguments) }?;
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
