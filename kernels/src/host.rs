//! Buffers in the memory of the host, as both [`crate::Reference`] and [`crate::Cpu`] have them: allocation that can fail, and what is
//! only copying.

use std::alloc::{Layout, alloc_zeroed};

use crate::backend::BackendError;
use crate::quant::{FormatError, QMatrix, dequantize_row};

/// Numbers for which all-zero bytes are the value 0.
pub(crate) trait Zeroable: Copy {}
impl Zeroable for f32 {}
impl Zeroable for u8 {}

/// `len` zeros, of pages that the system hands out only when they are touched; an error instead of an abort when
/// there is no room.
pub(crate) fn zeros<T: Zeroable>(
    device: &str,
    what: &'static str,
    len: usize,
) -> Result<Vec<T>, BackendError> {
    let failed = || BackendError::OutOfMemory {
        device: device.into(),
        what,
        bytes: len.saturating_mul(size_of::<T>()),
    };
    let layout = Layout::array::<T>(len).map_err(|_| failed())?;
    if layout.size() == 0 {
        return Ok(Vec::new());
    }
    // SAFETY: the size of the layout is not 0.
    let pointer = unsafe { alloc_zeroed(layout) }.cast::<T>();
    if pointer.is_null() {
        return Err(failed());
    }
    // SAFETY: the pointer comes from the global allocator with the layout of `len` values of T, and
    // `Zeroable` makes zeroed bytes `len` valid values.
    Ok(unsafe { Vec::from_raw_parts(pointer, len, len) })
}

/// Asks for pages of 2 MiB where memory holds whole ones: products write lines of many outputs, each on a page of its own, and small
/// pages would be looked up anew for every one. Before they are first touched.
pub(crate) fn huge_pages(start: *mut u8, bytes: usize) {
    #[cfg(target_os = "linux")]
    {
        const HUGE: usize = 2 << 20;
        let skip = start.align_offset(HUGE);
        let whole = bytes.saturating_sub(skip) / HUGE * HUGE;
        if whole > 0 {
            // SAFETY: a hint that changes no contents, on memory that the caller has taken; it may fail.
            unsafe { libc::madvise(start.wrapping_add(skip).cast(), whole, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = (start, bytes);
}

/// [`Backend::upload`](crate::Backend::upload).
pub(crate) fn upload(src: &[f32], dst: &mut [f32]) {
    dst[..src.len()].copy_from_slice(src);
}

/// [`Backend::download`](crate::Backend::download).
pub(crate) fn download(src: &[f32], offset: usize, dst: &mut [f32]) {
    dst.copy_from_slice(&src[offset..offset + dst.len()]);
}

/// [`Backend::gather`](crate::Backend::gather).
pub(crate) fn gather(src: &[f32], width: usize, rows: &[u32], dst: &mut [f32]) {
    for (dst, row) in dst.chunks_exact_mut(width).zip(rows) {
        dst.copy_from_slice(&src[*row as usize * width..][..width]);
    }
}

/// [`Backend::embed`](crate::Backend::embed).
pub(crate) fn embed(
    table: QMatrix<'_>,
    tokens: &[u32],
    scale: f32,
    out: &mut [f32],
) -> Result<(), FormatError> {
    for (out, token) in out.chunks_exact_mut(table.cols()).zip(tokens) {
        dequantize_row(table.ty(), table.row(*token as usize), out)?;
        out.iter_mut().for_each(|v| *v *= scale);
    }
    Ok(())
}

/// A saved page of the wrong length.
pub(crate) fn wrong_page(device: &str, needed: usize, got: usize) -> BackendError {
    BackendError::Device {
        device: device.into(),
        message: format!("a saved cache page has {got} bytes, this cache needs {needed}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_is_an_error() {
        assert_eq!(zeros::<f32>("cpu", "a buffer", 3).unwrap(), [0.0; 3]);
        assert!(zeros::<f32>("cpu", "a buffer", 0).unwrap().is_empty());
        let error = zeros::<f32>("cpu", "a buffer", usize::MAX / 2).unwrap_err();
        assert!(error.to_string().contains("out of memory"), "{error}");
        assert!(zeros::<f32>("cpu", "a buffer", 1 << 60).is_err());
    }
}
