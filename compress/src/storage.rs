//! How bases and cores are written: weight formats, and the numbers that readers will get back.

use faer::Mat;
use lory_kernels::QuantType;
use lory_kernels::quant::{FormatError, dequantize_row, quantize_row};
use lory_models::adapter::Factors;
use lory_models::adapter::pack::{ULayout, row_type};

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

fn matrix_bytes(ty: QuantType, rows: usize, cols: usize) -> usize {
    row_type(ty, cols).bytes_for(cols).unwrap_or(4 * cols) * rows
}

impl Storage {
    /// Bytes of one cluster's U and V at a module of d_out × d_in.
    pub fn basis_bytes(self, (d_out, d_in): (usize, usize), rank: usize) -> usize {
        self.u_bytes(d_out, rank) + matrix_bytes(self.basis, rank, d_in)
    }

    /// Bytes of U alone, where V is another module's.
    pub fn u_bytes(self, d_out: usize, rank: usize) -> usize {
        let layout = ULayout::plan(self.basis, d_out, rank);
        let (rows, cols) = layout.size(d_out);
        matrix_bytes(layout.ty, rows, cols)
    }

    /// Bytes of one adapter's core at a module.
    pub fn core_bytes(self, method: Method, rank: usize) -> usize {
        match method {
            Method::Full => matrix_bytes(self.core, rank, rank),
            Method::Diag => matrix_bytes(self.core, 1, rank),
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
    /// Whether it is a U that lies in bands ([`ULayout`]).
    pub bands: bool,
    /// The blocks, row by row or band by band.
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
        Stored::laid_out(ULayout { ty: row_type(wanted, cols), rank: cols, bands: false }, rows, number)
    }

    /// A U of d_out × rank numbers, laid out as a pack has it.
    ///
    /// # Errors
    /// A format that this program cannot write.
    pub fn u(
        wanted: QuantType,
        d_out: usize,
        rank: usize,
        number: impl Fn(usize, usize) -> f32,
    ) -> Result<Stored, FormatError> {
        Stored::laid_out(ULayout::plan(wanted, d_out, rank), d_out, number)
    }

    fn laid_out(
        layout: ULayout,
        rows: usize,
        number: impl Fn(usize, usize) -> f32,
    ) -> Result<Stored, FormatError> {
        let ULayout { ty, rank: cols, bands } = layout;
        let (stored_rows, stored_cols) = layout.size(rows);
        let row_bytes = ty.bytes_for(stored_cols).unwrap_or(0);
        let mut bytes = vec![0; row_bytes * stored_rows];
        let mut row = vec![0.0f32; stored_cols];
        for (i, out) in bytes.chunks_exact_mut(row_bytes.max(1)).enumerate() {
            for (j, x) in row.iter_mut().enumerate() {
                let (i, j) = layout.place(i, j);
                *x = number(i, j);
            }
            quantize_row(ty, &row, out)?;
        }
        Ok(Stored { ty, rows, cols, bands, bytes })
    }

    /// Bytes of its numbers, also where they are elsewhere.
    pub fn byte_len(&self) -> usize {
        let numbers = self.rows * self.cols;
        numbers / self.ty.block_len() * self.ty.block_bytes()
    }

    /// The numbers that a reader gets.
    ///
    /// # Errors
    /// A format that this program cannot read.
    pub fn read(&self) -> Result<Mat<f32>, FormatError> {
        let layout = ULayout { ty: self.ty, rank: self.cols, bands: self.bands };
        let mut stored = vec![0.0f32; self.rows * self.cols];
        dequantize_row(self.ty, &self.bytes, &mut stored)?;
        Ok(from_rows(&layout.numbers(stored), self.cols))
    }
}

/// The numbers of a matrix in any format, rows × cols.
///
/// # Errors
/// A format that this program cannot read, or bytes of another length.
pub fn read_matrix(ty: QuantType, rows: usize, cols: usize, bytes: &[u8]) -> Result<Mat<f32>, FormatError> {
    let mut flat = vec![0.0f32; rows * cols];
    dequantize_row(ty, bytes, &mut flat)?;
    Ok(from_rows(&flat, cols))
}

/// Rows of `cols` numbers.
fn from_rows(numbers: &[f32], cols: usize) -> Mat<f32> {
    Mat::from_fn(numbers.len() / cols.max(1), cols, |i, j| numbers[i * cols + j])
}

/// U of stored factors as numbers, d_out × r.
pub(crate) fn u_of(factors: &Factors) -> Result<Mat<f32>, lory_models::Error> {
    Ok(from_rows(&factors.u_numbers()?, factors.rank()))
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
    fn bytes_are_those_of_the_layout() {
        let s = Storage::default();
        assert_eq!(s.basis_bytes((64, 96), 16), 2 * 16 * 34 + 16 * 3 * 34);
        assert_eq!(s.basis_bytes((8, 64), 16), 8 * 16 * 2 + 16 * 68);
        assert_eq!(s.core_bytes(Method::Full, 32), 32 * 34);
        assert_eq!(s.core_bytes(Method::Diag, 32), 34);
        assert_eq!(s.core_bytes(Method::Full, 24), 24 * 48);
        let x = linalg::random(64, 16, &mut Rng::new(2));
        let u = Stored::u(s.basis, 64, 16, |i, j| x[(i, j)]).unwrap();
        assert_eq!((u.bands, u.bytes.len(), u.byte_len()), (true, s.u_bytes(64, 16), s.u_bytes(64, 16)));
        let back = u.read().unwrap();
        assert_eq!(back.shape(), (64, 16));
        assert!((0..64 * 16).all(|i| (x[(i / 16, i % 16)] - back[(i / 16, i % 16)]).abs() <= 0.02));
    }
}
