//! What needs the base's weights: DoRA's row norms, and saved copies of the base.

use lory_kernels::{QuantType, quant::dequantize_row};

use crate::{Error, Result, Tensor};

use super::{container::Dtype, container::decode, factors::Factors};

/// `m / ‖W + scale · B A‖` per row.
///
/// One pass over W, one row of W + ΔW in memory at a time, which costs as much as W Aᵀ would for the
/// expanded formula, and loses no digits where W and ΔW nearly cancel. The norm is that of the
/// base's *quantized* weights, not of those that the adapter was trained on. Source: PEFT
/// `tuners/lora/dora.py`, arXiv 2402.09353.
///
/// # Errors
/// A base whose shape or format does not fit; a row of norm 0.
pub(super) fn dora_scales(weight: &Tensor, factors: &Factors, magnitude: &[f32]) -> Result<Vec<f32>> {
    let fail = |m: String| Error::tensor(weight.file(), weight.name(), m);
    let matrix = weight.matrix();
    let (rows, cols) = (factors.b.rows, factors.a.cols);
    if (matrix.rows(), matrix.cols()) != (rows, cols) || magnitude.len() != rows {
        let m = format!("is {} x {}, the adapter's is {rows} x {cols}", matrix.rows(), matrix.cols());
        return Err(fail(m));
    }
    let mut row = vec![0.0f32; cols];
    let mut scales = Vec::with_capacity(rows);
    for (r, m) in magnitude.iter().enumerate() {
        dequantize_row(matrix.ty(), matrix.row(r), &mut row).map_err(|e| fail(e.to_string()))?;
        for (k, b) in factors.b.row(r).iter().enumerate() {
            let b = b * factors.scale;
            row.iter_mut().zip(factors.a.row(k)).for_each(|(w, a)| *w += b * a);
        }
        let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let scale = (f64::from(*m) / norm) as f32;
        if !scale.is_finite() {
            return Err(fail(format!(
                "row {r} and the adapter's change of it have norm {norm}: DoRA divides by it"
            )));
        }
        scales.push(scale);
    }
    Ok(scales)
}

/// A weight of the base that `save_pretrained` stored beside the factors, in the file's bytes.
#[derive(Clone, Debug)]
pub(super) struct BaseCopy {
    pub name: String,
    pub dtype: Dtype,
    pub rows: usize,
    pub cols: usize,
    /// Where its data begins in the file.
    pub start: usize,
}

impl BaseCopy {
    /// Adapters of the embedding come with a copy of it. Only an unchanged one may be left aside.
    ///
    /// Half-precision copies of one model differ by 2⁻⁹ per weight, its quantizations by what their
    /// format loses; a resized or retrained embedding differs by far more than either.
    ///
    /// # Errors
    /// [`Error::WrongBase`] with the relative distance.
    pub fn check(&self, file: &str, bytes: &[u8], weight: &Tensor) -> Result<()> {
        let matrix = weight.matrix();
        let wrong = |what: String| {
            let message = format!(
                "carries `{}`, a copy of the base's weight, which {what} {} of {}; an adapter that \
                 replaces it is not supported",
                self.name,
                weight.name(),
                weight.file()
            );
            Err(Error::WrongBase { file: file.into(), message })
        };
        if (matrix.rows(), matrix.cols()) != (self.rows, self.cols) {
            let (rows, cols) = (self.rows, self.cols);
            return wrong(format!(
                "with {rows} x {cols} is not as large as the {} x {}",
                matrix.rows(),
                matrix.cols()
            ));
        }
        let width = self.cols * if self.dtype == Dtype::F32 { 4 } else { 2 };
        let mut row = vec![0.0f32; self.cols];
        let (mut distance, mut norm) = (0.0f64, 0.0f64);
        for r in 0..self.rows {
            let start = self.start + r * width;
            let copy = decode(self.dtype, bytes.get(start..start + width).unwrap_or_default());
            dequantize_row(matrix.ty(), matrix.row(r), &mut row)
                .map_err(|e| Error::tensor(weight.file(), weight.name(), e.to_string()))?;
            for (c, w) in copy.iter().zip(&row) {
                distance += f64::from(c - w).powi(2);
                norm += f64::from(*w).powi(2);
            }
        }
        let limit = match matrix.ty() {
            QuantType::F32 | QuantType::F16 | QuantType::BF16 => 5e-3,
            QuantType::Q8_0 | QuantType::Q6_K => 3e-2,
            _ => 0.25,
        };
        let relative = (distance / norm).sqrt();
        // Written so that NaN is refused.
        if relative <= limit { Ok(()) } else { wrong(format!("differs by {relative:.3} (relative) from")) }
    }
}
