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
    if !may_be_bad(m.ty(), m.bytes()) {
        return None;
    }
    let mut row = vec![0.0; m.cols()];
    (0..m.rows()).find_map(|r| {
        dequantize_row(m.ty(), m.row(r), &mut row).ok()?;
        row.iter().position(|v| !v.is_finite()).map(|c| (r, c))
    })
}

/// Whether a half-precision number in any block is NaN or infinite. Where all are finite so are the weights: the integers that
/// multiply them are below 2¹⁶. A record of an adapter is checked at memory speed this way, number by number ten times slower.
fn may_be_bad(ty: QuantType, bytes: &[u8]) -> bool {
    let halves: &[usize] = match ty {
        QuantType::Q8_0 | QuantType::Q4_0 | QuantType::Q5_0 | QuantType::IQ4_NL | QuantType::IQ4_XS => &[0],
        QuantType::Q4_1 | QuantType::Q5_1 | QuantType::Q4_K | QuantType::Q5_K => &[0, 2],
        QuantType::Q2_K => &[80, 82],
        QuantType::Q3_K => &[108],
        QuantType::Q6_K => &[208],
        _ => return true,
    };
    // The exponent stands in the upper byte; all of its bits, plus the least of them, is the bit above. Without an early exit, blocks do not wait
    // for each other.
    let carries = |half: &usize| {
        let uppers =
            bytes.chunks_exact(ty.block_bytes()).map(|block| block.get(half + 1).copied().unwrap_or(0));
        uppers.fold(0, |carries, upper| carries | ((upper & 0x7c) + 0x04))
    };
    halves.iter().any(|half| carries(half) & 0x80 != 0)
}

#[cfg(test)]
mod tests {
    use lory_kernels::quant::format::{FORMATS, quantize_row};

    use super::*;

    /// Every half of every block format, in the last block of a row, against weights one by one.
    #[test]
    fn bad_halves_are_found_where_the_weights_are() {
        for ty in FORMATS.iter().map(|format| format.ty) {
            let (rows, cols) = (3, 512);
            let values: Vec<f32> = (0..rows * cols).map(|i| (i % 37) as f32 - 18.0).collect();
            let mut bytes = vec![0; ty.bytes_for(values.len()).unwrap()];
            quantize_row(ty, &values, &mut bytes).unwrap();
            let find = |bytes: &[u8]| first_bad(QMatrix::new(ty, rows, cols, bytes).unwrap());
            assert_eq!(find(&bytes), None, "{ty}");
            let block = ty.block_bytes();
            let last = bytes.len() / rows * 2 - block;
            for at in 0..block - 1 {
                for upper in [0x7c, 0xff] {
                    let mut bytes = bytes.clone();
                    bytes[last + at..last + at + 2].copy_from_slice(&[0, upper]);
                    let mut weights = vec![0.0; cols * rows];
                    dequantize_row(ty, &bytes, &mut weights).unwrap();
                    let bad = weights.iter().position(|w| !w.is_finite()).map(|i| (i / cols, i % cols));
                    assert_eq!(find(&bytes), bad, "{ty}, byte {at}");
                }
            }
        }
    }
}
