//! What adapters add to one line: `y += λ U C V x` and its other forms (source: "Compress then Serve", arXiv 2407.00066, and PEFT's layers
//! for the scales and biases).
//!
//! Error: that of three canonical products one after the other ([`dot_row`] has the bound of each; what the first two are off by passes
//! through the absolute values of the factors behind them), and 2⁻²⁴ of the result for every addition.

use crate::QMatrix;
use crate::backend::{BAND, Core, Expand, LoraGroup, LoraTerm};
use crate::quant::{FormatError, dequantize_row, dot_row};

/// `W x`, every output by the canonical product.
pub fn matvec(w: QMatrix<'_>, x: &[f32]) -> Result<Vec<f32>, FormatError> {
    (0..w.rows()).map(|i| dot_row(w.ty(), w.row(i), x)).collect()
}

/// `U z`. In bands every output sums over the columns in order, each by one fused multiply-add.
pub fn expand(u: Expand<'_>, z: &[f32]) -> Result<Vec<f32>, FormatError> {
    let bands = match u {
        Expand::Rows(u) => return matvec(u, z),
        Expand::Bands(u) => u,
    };
    let (mut out, mut band) = (vec![0f32; u.outputs()], vec![0.0; bands.cols()]);
    for (i, out) in out.chunks_exact_mut(BAND).enumerate() {
        dequantize_row(bands.ty(), bands.row(i), &mut band)?;
        for (column, z) in band.chunks_exact(BAND).zip(z) {
            for (y, u) in out.iter_mut().zip(column) {
                *y = u.mul_add(*z, *y);
            }
        }
    }
    Ok(out)
}

/// A 1 × n matrix as floats.
pub fn line(m: QMatrix<'_>) -> Result<Vec<f32>, FormatError> {
    let mut out = vec![0.0; m.rows() * m.cols()];
    dequantize_row(m.ty(), m.bytes(), &mut out)?;
    Ok(out)
}

/// `C z`.
pub fn core(core: Core<'_>, z: &[f32]) -> Result<Vec<f32>, FormatError> {
    match core {
        Core::Full(c) => matvec(c, z),
        Core::Diagonal(c) => Ok(line(c)?.iter().zip(z).map(|(c, z)| c * z).collect()),
        Core::Identity => Ok(z.to_vec()),
    }
}

/// Adds the terms of one row of a group to `y`; `y0` is its value before any group.
///
/// Terms without a `delta_scale` share one expansion, `U Σ λ C z`; the others, the row scales
/// and the biases follow term by term. Every addition is one fused multiply-add.
pub fn apply(
    group: &LoraGroup<'_>,
    terms: &[LoraTerm<'_>],
    x: &[f32],
    y0: &[f32],
    y: &mut [f32],
) -> Result<(), FormatError> {
    let z = match (group.v, group.u) {
        (Some(v), Some(_)) => Some(matvec(v, x)?),
        // The input was shrunk already: an embedding's look-up.
        (None, Some(_)) => Some(x.to_vec()),
        (_, None) => None,
    };
    if let (Some(z), Some(u)) = (&z, group.u)
        && terms.iter().any(|t| t.delta_scale.is_none())
    {
        let mut sum = vec![0f32; u.rank()];
        for term in terms.iter().filter(|t| t.delta_scale.is_none()) {
            for (sum, c) in sum.iter_mut().zip(core(term.core, z)?) {
                *sum = term.scale.mul_add(c, *sum);
            }
        }
        for (y, delta) in y.iter_mut().zip(expand(u, &sum)?) {
            *y += delta;
        }
    }
    for term in terms {
        if let (Some(z), Some(u), Some(g)) = (&z, group.u, term.delta_scale) {
            let delta = expand(u, &core(term.core, z)?)?;
            for ((y, g), delta) in y.iter_mut().zip(line(g)?).zip(delta) {
                *y = (term.scale * g).mul_add(delta, *y);
            }
        }
        if let Some(s) = term.row_scale {
            for ((y, s), y0) in y.iter_mut().zip(line(s)?).zip(y0) {
                *y = (term.scale * (s - 1.0)).mul_add(*y0, *y);
            }
        }
        if let Some(b) = term.bias {
            for (y, b) in y.iter_mut().zip(line(b)?) {
                *y = term.scale.mul_add(b, *y);
            }
        }
    }
    Ok(())
}
