//! What adapters add to one line: `y += λ U C V x` and its other forms (source: "Compress then Serve", arXiv 2407.00066, and PEFT's layers
//! for the scales and biases).
//!
//! Error: that of three canonical products one after the other ([`dot_row`] has the bound of each; what the first two are off by passes
//! through the absolute values of the factors behind them), and 2⁻²⁴ of the result for every addition.

use crate::QMatrix;
use crate::backend::{BAND, Core, Expand, LoraGroup, LoraTerm};
use crate::quant::{FormatError, dequantize_row, dot_row, dot_row_onto};

/// `W x`, every output by the canonical product.
pub fn matvec(w: QMatrix<'_>, x: &[f32]) -> Result<Vec<f32>, FormatError> {
    (0..w.rows()).map(|i| dot_row(w.ty(), w.row(i), x)).collect()
}

/// `y += U z`: each output is a sum that goes on from `y`, [`dot_row_onto`] for rows, and in bands over the columns in order, each by one
/// fused multiply-add.
pub fn expand_onto(y: &mut [f32], u: Expand<'_>, z: &[f32]) -> Result<(), FormatError> {
    let bands = match u {
        Expand::Rows(u) => {
            for (i, y) in y.iter_mut().enumerate() {
                *y = dot_row_onto(*y, u.ty(), u.row(i), z)?;
            }
            return Ok(());
        }
        Expand::Bands(u) => u,
    };
    let mut band = vec![0.0; bands.cols()];
    for (i, y) in y.chunks_exact_mut(BAND).enumerate() {
        dequantize_row(bands.ty(), bands.row(i), &mut band)?;
        for (column, z) in band.chunks_exact(BAND).zip(z) {
            for (y, u) in y.iter_mut().zip(column) {
                *y = u.mul_add(*z, *y);
            }
        }
    }
    Ok(())
}

/// `U z` alone.
pub fn expand(u: Expand<'_>, z: &[f32]) -> Result<Vec<f32>, FormatError> {
    match u {
        Expand::Rows(u) => matvec(u, z),
        Expand::Bands(_) => {
            let mut out = vec![0.0; u.outputs()];
            expand_onto(&mut out, u, z).map(|()| out)
        }
    }
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

/// What is expanded for a row of a group: `V x`, or `x` where it was shrunk already (an embedding's look-up); `None` without U.
fn shrunk(group: &LoraGroup<'_>, x: &[f32]) -> Result<Option<Vec<f32>>, FormatError> {
    match (group.v, group.u) {
        (Some(v), Some(_)) => matvec(v, x).map(Some),
        (None, Some(_)) => Ok(Some(x.to_vec())),
        (_, None) => Ok(None),
    }
}

/// Adds to `y` the terms of one row of a group that have no `delta_scale`: one expansion, `U Σ λ C z`.
pub fn apply_plain(
    group: &LoraGroup<'_>,
    terms: &[LoraTerm<'_>],
    x: &[f32],
    y: &mut [f32],
) -> Result<(), FormatError> {
    if let (Some(z), Some(u)) = (shrunk(group, x)?, group.u)
        && terms.iter().any(|t| t.delta_scale.is_none())
    {
        let mut sum = vec![0f32; u.rank()];
        for term in terms.iter().filter(|t| t.delta_scale.is_none()) {
            for (sum, c) in sum.iter_mut().zip(core(term.core, &z)?) {
                *sum = term.scale.mul_add(c, *sum);
            }
        }
        expand_onto(y, u, &sum)?;
    }
    Ok(())
}

/// Adds what else the terms of one row of a group have, term by term: expansions with a `delta_scale`, row scales, biases. `y0` is the
/// row before any group; all groups' [`apply_plain`] come first. Every addition is one fused multiply-add.
pub fn apply_scaled(
    group: &LoraGroup<'_>,
    terms: &[LoraTerm<'_>],
    x: &[f32],
    y0: &[f32],
    y: &mut [f32],
) -> Result<(), FormatError> {
    let any = terms.iter().any(|t| t.delta_scale.is_some());
    let z = if any { shrunk(group, x)? } else { None };
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
