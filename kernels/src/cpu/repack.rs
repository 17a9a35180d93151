//! Weights in a second order, for those who have the memory.
//!
//! In a file, 16 rows lie apart: their blocks are fetched from 16 places and transposed in registers at every use. A
//! repacked weight has gone through that once ([`Woven`]); reading it is reading memory from front to back, which the
//! processor does at full speed by itself, in pages of 2 MiB where the system has them.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};

use super::ThreadPool;
use super::activations::Shared;
use super::int_matmul::IntKernel;
use super::panel::{PanelBlock, ROWS};
use super::source::Woven;
use crate::backend::BackendError;
use crate::host::huge_pages;
use crate::quant::QMatrix;

/// A format that can be repacked.
pub(crate) trait Weave: PanelBlock {
    /// Where in a block the numbers lie that are read as 16 bits; everything else is read in words of 32.
    const HALVES: &[usize];
}

/// Where matrices begin: whole lines of cache.
const ALIGN: usize = 64;
/// Bytes behind the last matrix: who loads the last eight rows alone names whole vectors (`Woven::columns`) and reads half of them.
const SLACK: usize = 64;
/// Memory is taken in pieces of so many bytes, or of one matrix: most pages are huge ones, and few are half empty.
const CHUNK: usize = 64 << 20;
/// What the system calls a huge page.
const HUGE: usize = 2 << 20;

/// Memory that is never given back before its owner goes.
struct Chunk {
    start: NonNull<u8>,
    layout: Layout,
    used: usize,
}

// SAFETY: plain memory, owned.
unsafe impl Send for Chunk {}
// SAFETY: written once, by the one who took it, before anybody reads it.
unsafe impl Sync for Chunk {}

impl Chunk {
    fn new(bytes: usize) -> Option<Chunk> {
        let layout = Layout::from_size_align(bytes, HUGE).ok()?;
        // SAFETY: not of size zero.
        let start = NonNull::new(unsafe { alloc(layout) })?;
        huge_pages(start.as_ptr(), bytes);
        Some(Chunk { start, layout, used: 0 })
    }

    /// `bytes` of it that nobody has.
    fn take(&mut self, bytes: usize) -> Option<NonNull<u8>> {
        let end = self.used.checked_add(bytes)?;
        if end.checked_add(SLACK)? > self.layout.size() {
            return None;
        }
        // SAFETY: within the chunk.
        let start = unsafe { self.start.add(self.used) };
        self.used = end.next_multiple_of(ALIGN);
        Some(start)
    }
}

impl Drop for Chunk {
    fn drop(&mut self) {
        // SAFETY: made so in `new`.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// A matrix in panels of 16 rows. The last one repeats the last row where rows are missing.
pub(crate) struct Repacked {
    start: NonNull<u8>,
    panel_bytes: usize,
    /// To know it again.
    like: (crate::QuantType, usize, usize),
}

// SAFETY: read only.
unsafe impl Send for Repacked {}
// SAFETY: as above.
unsafe impl Sync for Repacked {}

impl Repacked {
    /// The first block of the 16 rows from `16 · i` on. One past the end may be asked for, but not read.
    pub fn panel(&self, i: usize) -> Woven {
        Woven::new(self.start.as_ptr().wrapping_add(i * self.panel_bytes))
    }
}

/// All repacked weights, by the address of the original.
#[derive(Default)]
pub(crate) struct RepackedWeights(RwLock<Weights>);

#[derive(Default)]
struct Weights {
    by_address: HashMap<usize, Repacked>,
    chunks: Vec<Chunk>,
}

/// The weights, while a product uses them.
pub(crate) struct Reading<'a>(RwLockReadGuard<'a, Weights>);

impl Reading<'_> {
    /// This weight, if it was repacked.
    pub fn of(&self, weight: QMatrix<'_>) -> Option<&Repacked> {
        let found = self.0.by_address.get(&weight.bytes().as_ptr().addr())?;
        (found.like == (weight.ty(), weight.rows(), weight.cols())).then_some(found)
    }
}

impl RepackedWeights {
    /// For a product.
    pub fn read(&self) -> Reading<'_> {
        Reading(self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Bytes of all of them.
    pub fn bytes(&self) -> usize {
        self.read().0.chunks.iter().map(|chunk| chunk.used).sum()
    }

    /// Repacks a weight unless its format has no kernel for that.
    ///
    /// # Errors
    /// [`BackendError::OutOfMemory`].
    pub fn add(&self, pool: &ThreadPool, weight: QMatrix<'_>) -> Result<(), BackendError> {
        let halves = IntKernel::of(weight.ty()).and_then(IntKernel::halves);
        let (Some(halves), false) = (halves, weight.bytes().is_empty()) else { return Ok(()) };
        let panel_bytes = weight.row_bytes() * ROWS;
        let bytes = weight.rows().div_ceil(ROWS) * panel_bytes;
        let mut weights = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let address = weight.bytes().as_ptr().addr();
        if weights.by_address.contains_key(&address) {
            return Ok(());
        }
        let start = weights.take(bytes).ok_or_else(|| BackendError::OutOfMemory {
            device: "cpu".into(),
            what: "repacked weights (--repack off does without)",
            bytes,
        })?;
        let out = Shared(start.as_ptr());
        pool.run(weight.rows().div_ceil(ROWS), &|panel| {
            // SAFETY: panels are disjoint, and `bytes` have room for all of them.
            weave(weight, halves, panel * ROWS, unsafe { out.slice(panel * panel_bytes, panel_bytes) });
        });
        let like = (weight.ty(), weight.rows(), weight.cols());
        weights.by_address.insert(address, Repacked { start, panel_bytes, like });
        Ok(())
    }
}

impl Weights {
    fn take(&mut self, bytes: usize) -> Option<NonNull<u8>> {
        if let Some(start) = self.chunks.last_mut().and_then(|chunk| chunk.take(bytes)) {
            return Some(start);
        }
        self.chunks.push(Chunk::new(bytes.checked_add(SLACK)?.max(CHUNK).checked_next_multiple_of(HUGE)?)?);
        self.chunks.last_mut()?.take(bytes)
    }
}

/// 16 rows from `first` on: bytes `o..` of row `r`'s block go to `16·o + r·unit`, `unit` being 2 or 4.
fn weave(weight: QMatrix<'_>, halves: &[usize], first: usize, out: &mut [u8]) {
    let size = weight.ty().block_bytes();
    let mut units = Vec::new();
    let mut offset = 0;
    while offset < size {
        let unit = if halves.contains(&offset) { 2 } else { 4 };
        units.push((offset, unit));
        offset += unit;
    }
    for r in 0..ROWS {
        let row = weight.row((first + r).min(weight.rows() - 1));
        for (block, out) in row.chunks_exact(size).zip(out.chunks_exact_mut(size * ROWS)) {
            for &(offset, unit) in &units {
                let to = ROWS * offset + r * unit;
                out[to..to + unit].copy_from_slice(&block[offset..offset + unit]);
            }
        }
    }
}
