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
pub struct Tensor(Arc<Inner>);

/// Behind one pointer, so that the cores of an adapter, hundreds of which are put together when it is read, are small.
#[derive(Clone)]
struct Inner {
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
        Ok(Tensor(Arc::new(Inner { file, name: name.into(), ty, rows, cols, bytes, range })))
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
        let Inner { ty, rows, cols, bytes, range, .. } = &*self.0;
        let view = (**bytes).as_ref().get(range.clone()).unwrap_or(&[]);
        let matrix = QMatrix::new(*ty, *rows, *cols, view);
        matrix.expect("checked when the tensor was made").kept_by(bytes)
    }

    /// Rows `range` as a tensor of its own, without a copy (fused q/k/v, gate/up).
    pub fn slice_rows(&self, range: Range<usize>) -> Result<Tensor> {
        let Range { start, end } = range;
        if start > end || end > self.rows() {
            let message = format!("rows {start}..{end} of {} were asked for", self.rows());
            return Err(Error::tensor(self.file(), self.name(), message));
        }
        let (first, row) = (self.0.range.start, self.matrix().row_bytes());
        let range = first + start * row..first + end * row;
        Ok(Tensor(Arc::new(Inner { rows: end - start, range, ..(*self.0).clone() })))
    }

    /// The file that holds it.
    pub fn file(&self) -> &str {
        &self.0.file
    }

    /// Its name in the file.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Its weight format.
    pub fn ty(&self) -> QuantType {
        self.0.ty
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.0.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.0.cols
    }
}

impl std::fmt::Debug for Tensor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} x {} {}", self.name(), self.rows(), self.cols(), self.ty())
    }
}
