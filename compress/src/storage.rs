//! How bases and cores are written: weight formats, and the numbers that readers will get back.

use faer::Mat;
use lory_kernels::QuantType;
use lory_kernels::quant::{FormatError, dequantize_row, quantize_row};

use crate::frozen::Method;

/// Weight formats of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Storage {
    /// Of U and V.
    pub basis: QuantType,
    /// Of the cores.
    pub core: QuantType,
}

impl Default for Storage {
    fn default() -> Self {
        Storage { basis: QuantType::Q8_0, core: QuantType::Q8_0 }
    }
}

/// The format in which rows of `cols` numbers can be stored: blocks do not cross rows, so rows of partial
/// blocks are stored as F16. As the pack format has it.
pub fn row_type(wanted: QuantType, cols: usize) -> QuantType {
    if wanted.bytes_for(cols).is_some() { wanted } else { QuantType::F16 }
}

/// Format of U, whose rows have r numbers, and the rank it is padded to: up to whole blocks where that takes
/// fewer bytes than F16 does. As the pack format has it.
pub fn plan_rank(wanted: QuantType, rank: usize) -> (QuantType, usize) {
    let padded = rank.next_multiple_of(wanted.block_len());
    match wanted.bytes_for(padded) {
        Some(bytes) if padded == rank || bytes < 2 * rank => (wanted, padded),
        _ => (QuantType::F16, rank),
    }
}

fn matrix_bytes(ty: QuantType, rows: usize, cols: usize) -> usize {
    row_type(ty, cols).bytes_for(cols).unwrap_or(4 * cols) * rows
}

impl Storage {
    /// Bytes of one cluster's U and V at a module of d_out × d_in.
    pub fn basis_bytes(self, (d_out, d_in): (usize, usize), rank: usize) -> usize {
        self.u_bytes(d_out, rank) + matrix_bytes(self.basis, plan_rank(self.basis, rank).1, d_in)
    }

    /// Bytes of U alone, where V is another module's.
    pub fn u_bytes(self, d_out: usize, rank: usize) -> usize {
        let (u_type, padded) = plan_rank(self.basis, rank);
        matrix_bytes(u_type, d_out, padded)
    }

    /// Bytes of one adapter's core at a module.
    pub fn core_bytes(self, method: Method, rank: usize) -> usize {
        let (_, padded) = plan_rank(self.basis, rank);
        match method {
            Method::Full => matrix_bytes(self.core, padded, padded),
            Method::Diag => matrix_bytes(self.core, 1, padded),
        }
    }
}

/// A matrix as it lies in a file.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Its format.
    pub ty: QuantType,
    /// Number of rows.
    pub rows: usize,
    /// Numbers in a row.
    pub cols: usize,
    /// The blocks, row by row.
    pub bytes: Vec<u8>,
}

impl Stored {
    /// Writes `rows` × `cols` numbers, given by position, in `wanted` or what [`row_type`] makes of it.
    ///
    /// # Errors
    /// A format that this program cannot write.
    pub fn new(
        wanted: QuantType,
        rows: usize,
        cols: usize,
        number: impl Fn(usize, usize) -> f32,
    ) -> Result<Stored, FormatError> {
        let ty = row_type(wanted, cols);
        let row_bytes = ty.bytes_for(cols).unwrap_or(0);
        let mut bytes = vec![0; row_bytes * rows];
        let mut row = vec![0.0f32; cols];
        for (i, out) in bytes.chunks_exact_mut(row_bytes.max(1)).enumerate() {
            for (j, x) in row.iter_mut().enumerate() {
                *x = number(i, j);
            }
            quantize_row(ty, &row, out)?;
        }
        Ok(Stored { ty, rows, cols, bytes })
    }

    /// The numbers that a reader gets.
    ///
    /// # Errors
    /// A format that this program cannot read.
    pub fn read(&self) -> Result<Mat<f32>, FormatError> {
        read_matrix(self.ty, self.rows, self.cols, &self.bytes)
    }
}

/// The numbers of a matrix in any format, rows × cols.
///
/// # Errors
/// A format that this program cannot read, or bytes of another length.
pub fn read_matrix(ty: QuantType, rows: usize, cols: usize, bytes: &[u8]) -> Result<Mat<f32>, FormatError> {
    let mut flat = vec![0.0f32; rows * cols];
    dequantize_row(ty, bytes, &mut flat)?;
    Ok(Mat::from_fn(rows, cols, |i, j| flat[i * cols + j]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Rng, linalg};

    #[test]
    fn what_is_written_comes_back_within_the_format() {
        let x = linalg::random(5, 64, &mut Rng::new(1));
        for (ty, tolerance) in [(QuantType::F32, 0.0), (QuantType::F16, 2e-3), (QuantType::Q8_0, 0.02)] {
            let stored = Stored::new(ty, 5, 64, |i, j| x[(i, j)]).unwrap();
            assert_eq!(stored.bytes.len(), matrix_bytes(ty, 5, 64));
            let back = stored.read().unwrap();
            let worst = (0..64).flat_map(|j| (0..5).map(move |i| (i, j)));
            assert!(worst.into_iter().all(|p| (x[p] - back[p]).abs() <= tolerance), "{ty}");
        }
    }

    #[test]
    fn partial_blocks_are_padded_or_stored_as_halves() {
        assert_eq!(row_type(QuantType::Q8_0, 16), QuantType::F16);
        assert_eq!(row_type(QuantType::Q8_0, 64), QuantType::Q8_0);
        assert_eq!(plan_rank(QuantType::Q8_0, 16), (QuantType::F16, 16));
        assert_eq!(plan_rank(QuantType::Q8_0, 24), (QuantType::Q8_0, 32));
        let s = Storage::default();
        assert_eq!(s.basis_bytes((8, 64), 16), 8 * 16 * 2 + 16 * 68);
        assert_eq!(s.core_bytes(Method::Full, 32), 32 * 34);
        assert_eq!(s.core_bytes(Method::Diag, 32), 34);
        assert_eq!(s.core_bytes(Method::Full, 24), 32 * 34);
    }
}
