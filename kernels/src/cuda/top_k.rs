//! The likeliest tokens of rows of logits: pieces are reduced to their k largest until one is left.

use super::backend::State;
use super::memory::CudaBuffer;
use super::products::word;
use super::scratch::Slot;
use super::tables::Kind;
use crate::backend::{BackendError, Likeliest};

/// Keys of a block, and how many of them it leaves at most (`kernels/top_k.cu`).
const PIECE: usize = 4096;
const MOST: usize = 1024;
/// Rows at a time: with the most of a vocabulary of 256k, 42 MB of keys.
const ROWS: usize = 64;
/// Bytes of a key, and of a token with its logit.
const KEY: usize = 8;
/// The token behind the last one.
const END: u32 = u32::MAX;

/// Some lines of logits on the device.
struct Lines<'a> {
    /// Address of line 0.
    logits: u64,
    width: usize,
    /// Values of a line that count.
    real: usize,
    /// Which lines.
    rows: &'a [u32],
}

impl State {
    /// [`Backend::top_k`](crate::Backend::top_k); `None` for more than [`MOST`].
    pub fn top_k(
        &mut self,
        logits: &CudaBuffer,
        width: usize,
        real: usize,
        rows: &[u32],
        k: usize,
    ) -> Result<Option<Vec<Likeliest>>, BackendError> {
        assert!(real <= width, "{real} of {width} logits");
        let k = k.min(real);
        if k > MOST {
            return Ok(None);
        }
        if k == 0 {
            return Ok(Some(vec![Vec::new(); rows.len()]));
        }
        let lines = rows.iter().max().map_or(0, |row| *row as usize + 1);
        let logits = logits.first(lines * width);
        let mut found = Vec::with_capacity(rows.len());
        for rows in rows.chunks(ROWS) {
            // SAFETY: `first` has checked that every line is there.
            found.extend(unsafe { self.top_k_of(&Lines { logits, width, real, rows }, k) }?);
        }
        Ok(Some(found))
    }

    /// # Safety
    /// The lines are allocated.
    unsafe fn top_k_of(&mut self, lines: &Lines<'_>, k: usize) -> Result<Vec<Likeliest>, BackendError> {
        let numbers = self.tables.address(Kind::Ranked, lines.rows)?;
        // SAFETY: the caller's promise; the numbers are on the device.
        let kept = unsafe { self.reduce(lines, numbers, k) }?;
        let bytes = lines.rows.len() * k * KEY;
        let out = self.scratch.room(Slot::Ranked, bytes)?;
        let arguments = [
            kept.into(),
            lines.logits.into(),
            word(lines.width).into(),
            numbers.into(),
            word(k).into(),
            out.into(),
        ];
        // SAFETY: the parameters of `top_k_rank`; k keys of every line are left, whose tokens are below `real`, and the kernel
        // holds as many.
        unsafe { self.device.launch("top_k_rank", [word(lines.rows.len()), 1, 1], &arguments) }?;
        let mut ranked = vec![0; bytes];
        self.scratch.read(Slot::Ranked, &mut ranked)?;
        let (ranked, _) = ranked.as_chunks::<KEY>();
        let row = |row: &[[u8; KEY]]| {
            let pairs = row.iter().map(|bytes| u64::from_le_bytes(*bytes));
            let tokens = pairs.map(|pair| (pair as u32, f32::from_bits((pair >> 32) as u32)));
            tokens.take_while(|(token, _)| *token != END).collect()
        };
        Ok(ranked.chunks_exact(k).map(row).collect())
    }

    /// The address of the k largest keys of every line, in no order.
    ///
    /// # Safety
    /// The lines are allocated, and `numbers` is the address of their numbers.
    unsafe fn reduce(&mut self, lines: &Lines<'_>, numbers: u64, k: usize) -> Result<u64, BackendError> {
        let (rows, mut pieces) = (lines.rows.len(), lines.real.div_ceil(PIECE));
        // A pass reads what the last one left and writes beside it, in turns: less each time.
        let first = rows * pieces * k * KEY;
        let second = rows * (pieces * k).div_ceil(PIECE) * k * KEY;
        let keys = self.scratch.room(Slot::Keys, first + second)?;
        let (mut kept, mut free) = (keys, keys + first as u64);
        let arguments = [
            lines.logits.into(),
            word(lines.width).into(),
            word(lines.real).into(),
            numbers.into(),
            word(k).into(),
            kept.into(),
        ];
        // SAFETY: the parameters of `top_k_logits`; the lines are the caller's promise, and `first` bytes hold k keys of every piece.
        unsafe { self.device.launch("top_k_logits", [word(pieces), word(rows), 1], &arguments) }?;
        while pieces > 1 {
            let n = pieces * k;
            pieces = n.div_ceil(PIECE);
            let arguments = [kept.into(), word(n).into(), word(k).into(), free.into()];
            // SAFETY: the parameters of `top_k_keys`; n keys of every line were written, and there is room for k of every piece.
            unsafe { self.device.launch("top_k_keys", [word(pieces), word(rows), 1], &arguments) }?;
            std::mem::swap(&mut kept, &mut free);
        }
        Ok(kept)
    }
}
