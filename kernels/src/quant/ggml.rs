//! Formats without code of their own, through ggml (feature `ggml`).
//!
//! Reading goes through ggml's table of types (`ggml_get_type_traits`, `to_float`), writing
//! through `ggml_quantize_chunk`. Both are scalar code; products with such weights dequantize a
//! row and then multiply floats.

use std::borrow::Cow;

use super::QuantType;

/// The largest finite half: no scale of these formats goes beyond, and far beyond it the
/// searches of ggml overflow, which some of them answer by ending the process.
const BOUND: f32 = 65504.0;

/// Writes the weights of a row. `false` if ggml cannot read the type.
///
/// The caller has checked that `bytes` hold `out.len()` weights of type `ty`.
pub(super) fn dequantize(ty: QuantType, bytes: &[u8], out: &mut [f32]) -> bool {
    debug_assert_eq!(ty.bytes_for(out.len()), Some(bytes.len()));
    if !ty.ggml_reads() {
        return false;
    }
    // SAFETY: `ty` is in ggml's table, as all of `QuantType` is; the entry is a constant of ggml.
    let traits = unsafe { &*llama_cpp_sys_2::ggml_get_type_traits(ty as _) };
    let Some(to_float) = traits.to_float else { return false };
    let bytes = aligned(bytes);
    // SAFETY: `bytes` hold exactly `out.len()` weights (the caller's check), aligned for every
    // block struct of ggml, and `to_float` reads these and writes as many floats.
    unsafe { to_float(bytes.as_ptr().cast(), out.as_mut_ptr(), out.len() as i64) };
    true
}

/// Quantizes a row. `false` if ggml cannot write the type.
///
/// Values count as in [`super::Block::quantize`]: NaN is 0, and the rest saturates at ±65504.
/// Types that ggml quantizes only with measured importances get equal ones.
/// The caller has checked that `out` holds `x.len()` weights of type `ty`.
pub(super) fn quantize(ty: QuantType, x: &[f32], out: &mut [u8]) -> bool {
    debug_assert_eq!(ty.bytes_for(x.len()), Some(out.len()));
    if !ty.ggml_reads() {
        return false;
    }
    if x.is_empty() {
        return true;
    }
    let finite = |v: &f32| if v.is_nan() { 0.0 } else { v.clamp(-BOUND, BOUND) };
    let x: Vec<f32> = x.iter().map(finite).collect();
    // SAFETY: reads nothing but its argument.
    let importance = unsafe { llama_cpp_sys_2::ggml_quantize_requires_imatrix(ty as _) };
    let importance = if importance { vec![1.0; x.len()] } else { Vec::new() };
    let weights = if importance.is_empty() { std::ptr::null() } else { importance.as_ptr() };
    let mut buffer = vec![0u64; out.len().div_ceil(8)];
    // SAFETY: one row of `x.len()` values, whole blocks by the caller's check; `buffer` is
    // aligned for every block struct and at least as long as `out`, the row's size; `weights`
    // is null only where ggml does not ask for them, and as long as the row otherwise.
    let written = unsafe {
        llama_cpp_sys_2::ggml_quantize_chunk(
            ty as _,
            x.as_ptr(),
            buffer.as_mut_ptr().cast(),
            0,
            1,
            x.len() as i64,
            weights,
        )
    };
    debug_assert_eq!(written, out.len());
    for (out, word) in out.chunks_mut(8).zip(buffer) {
        out.copy_from_slice(&word.to_ne_bytes()[..out.len()]);
    }
    true
}

/// `bytes` at an address that is a multiple of 8: ggml's structs have fields of two and more.
fn aligned(bytes: &[u8]) -> Cow<'_, [u64]> {
    // SAFETY: every bit pattern is a valid u64.
    let (before, words, after) = unsafe { bytes.align_to::<u64>() };
    if before.is_empty() && after.is_empty() {
        return Cow::Borrowed(words);
    }
    let word = |chunk: &[u8]| {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        u64::from_ne_bytes(word)
    };
    Cow::Owned(bytes.chunks(8).map(word).collect())
}
