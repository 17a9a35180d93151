//! Weights as numbers: dequantized, and checked for NaN and infinity.

use lory_kernels::{
    QMatrix, QuantType,
    quant::{FormatError, dequantize_row},
};

use crate::{Error, Result, Tensor};

/// All weights of a tensor, row-major.
pub(super) fn to_f32(t: &Tensor) -> Result<Vec<f32>> {
    let m = t.matrix();
    let mut out = vec![0.0; m.rows() * m.cols()];
    // One call for all rows: rows are whole blocks, so a matrix is one long row.
    dequantize_row(m.ty(), m.bytes(), &mut out)
        .map_err(|e| Error::tensor(t.file(), t.name(), e.to_string()))?;
    Ok(out)
}

/// Refuses formats that no kernel computes with.
pub(super) fn check_type(t: &Tensor) -> Result<()> {
    match t.ty().is_readable() {
        true => Ok(()),
        false => Err(Error::tensor(t.file(), t.name(), FormatError::Unsupported { ty: t.ty() }.to_string())),
    }
}

/// Refuses a tensor with a weight that is NaN or infinite.
pub(super) fn check_finite(t: &Tensor) -> Result<()> {
    match first_bad(t.matrix()) {
        None => Ok(()),
        Some((row, col)) => {
            let m = format!("weight {col} of row {row} is not a finite number");
            Err(Error::tensor(t.file(), t.name(), m))
        }
    }
}

fn first_bad(m: QMatrix<'_>) -> Option<(usize, usize)> {
    // Exponent all ones, read straight from the bytes: the common formats at memory speed.
    let bad = match m.ty() {
        QuantType::F32 => words::<4>(m.bytes(), |b| u32::from_le_bytes(b) & 0x7f80_0000 == 0x7f80_0000),
        QuantType::F16 => words::<2>(m.bytes(), |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00),
        QuantType::BF16 => words::<2>(m.bytes(), |b| u16::from_le_bytes(b) & 0x7f80 == 0x7f80),
        _ => return first_bad_block(m),
    };
    bad.filter(|_| m.cols() > 0).map(|i| (i / m.cols(), i % m.cols()))
}

fn words<const N: usize>(bytes: &[u8], bad: impl Fn([u8; N]) -> bool) -> Option<usize> {
    let (words, _) = bytes.as_chunks::<N>();
    // Without an early exit inside a chunk the loop is vectorised.
    let chunk = 256;
    words.chunks(chunk).enumerate().find_map(|(i, c)| {
        let any = c.iter().fold(false, |any, w| any | bad(*w));
        let at = if any { c.iter().position(|w| bad(*w)) } else { None };
        at.map(|at| i * chunk + at)
    })
}

fn first_bad_block(m: QMatrix<'_>) -> Option<(usize, usize)> {
    let mut row = vec![0.0; m.cols()];
    (0..m.rows()).find_map(|r| {
        dequantize_row(m.ty(), m.row(r), &mut row).ok()?;
        row.iter().position(|v| !v.is_finite()).map(|c| (r, c))
    })
}
