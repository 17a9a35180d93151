//! A named weight: a matrix of blocks inside bytes that somebody keeps alive.

use std::{ops::Range, sync::Arc};

use lory_kernels::{QMatrix, QuantType, quant::Keeper};

use crate::{Error, Result};

/// A file's bytes, mapped or read, shared by everything that points into them.
pub type Bytes = Keeper;

/// A tensor of a file: `rows` × `cols` weights of one format, cheap to clone.
///
/// GGUF's `ne[0]` is `cols`; further dimensions are folded into `rows`.
#[derive(Clone)]
pub struct Tensor {
    file: Arc<str>,
    name: Arc<str>,
    ty: QuantType,
    rows: usize,
    cols: usize,
    bytes: Bytes,
    range: Range<usize>,
}

impl Tensor {
    /// Checks that `range` lies inside `bytes` and has the length of the shape.
    pub fn new(
        file: Arc<str>,
        name: &str,
        ty: QuantType,
        rows: usize,
        cols: usize,
        bytes: Bytes,
        range: Range<usize>,
    ) -> Result<Self> {
        let view = (*bytes).as_ref().get(range.clone()).ok_or_else(|| {
            let have = (*bytes).as_ref().len();
            Error::tensor(
                &file,
                name,
                format!("bytes {}..{} lie outside the file's {have}", range.start, range.end),
            )
        })?;
        QMatrix::new(ty, rows, cols, view).map_err(|e| Error::tensor(&file, name, e.to_string()))?;
        Ok(Tensor { file, name: name.into(), ty, rows, cols, bytes, range })
    }

    /// A tensor over bytes of its own, for weights made at load time.
    pub fn owned(name: &str, ty: QuantType, rows: usize, cols: usize, bytes: Vec<u8>) -> Result<Self> {
        let range = 0..bytes.len();
        Tensor::new("(memory)".into(), name, ty, rows, cols, Arc::new(bytes), range)
    }

    /// The matrix, borrowed.
    pub fn matrix(&self) -> QMatrix<'_> {
        // Both steps were checked in `new`; a mapping that shrank since then faults, it cannot
        // change its length here.
        let view = (*self.bytes).as_ref().get(self.range.clone()).unwrap_or(&[]);
        let matrix = QMatrix::new(self.ty, self.rows, self.cols, view);
        matrix.expect("checked when the tensor was made").kept_by(&self.bytes)
    }

    /// Rows `range` as a tensor of its own, without a copy (fused q/k/v, gate/up).
    pub fn slice_rows(&self, range: Range<usize>) -> Result<Tensor> {
        if range.start > range.end || range.end > self.rows {
            return Err(Error::tensor(
                &self.file,
                &self.name,
                format!("rows {}..{} of {} were asked for", range.start, range.end, self.rows),
            ));
        }
        let row = self.matrix().row_bytes();
        let bytes = self.range.start + range.start * row..self.range.start + range.end * row;
        Ok(Tensor { rows: range.len(), range: bytes, ..self.clone() })
    }

    /// The file that holds it.
    pub fn file(&self) -> &str {
        &self.file
    }

    /// Its name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its weight format.
    pub fn ty(&self) -> QuantType {
        self.ty
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} x {} {}", self.name, self.rows, self.cols, self.ty)
    }
}
