//! A matrix of quantized rows, borrowed.

use std::{fmt, sync::Arc};

use super::{Block, QuantType, blocks_of};

/// Whoever keeps a file's bytes, mapped or read, for everything that points into them.
pub type Keeper = Arc<dyn AsRef<[u8]> + Send + Sync>;

/// Bytes that do not make the matrix that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A row is not a whole number of blocks.
    #[error("rows of {cols} are not whole {ty} blocks of {}", ty.block_len())]
    PartialBlock {
        /// The weight format.
        ty: QuantType,
        /// Columns asked for.
        cols: usize,
    },
    /// The slice has another length than the shape needs.
    #[error("{rows} x {cols} of {ty} needs {needed} bytes, got {got}")]
    Length {
        /// The weight format.
        ty: QuantType,
        /// Rows asked for.
        rows: usize,
        /// Columns asked for.
        cols: usize,
        /// Bytes that the shape takes (`usize::MAX` where it overflows).
        needed: usize,
        /// Bytes given.
        got: usize,
    },
}

/// `rows` rows of `cols` weights each, row-major, in one format, borrowed from a mapping.
///
/// Row `i` of a weight holds the coefficients of output `i`: a product with it is `y = W x`
/// with `x` of length `cols` and `y` of length `rows` (GGUF's `ne[0]` is `cols`).
#[derive(Clone, Copy)]
pub struct QMatrix<'a> {
    ty: QuantType,
    rows: usize,
    cols: usize,
    /// Bytes of a row.
    stride: usize,
    bytes: &'a [u8],
    keeper: Option<&'a Keeper>,
}

impl fmt::Debug for QMatrix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let QMatrix { ty, rows, cols, bytes, .. } = self;
        write!(f, "QMatrix({rows} x {cols} {ty} at {:p})", bytes.as_ptr())
    }
}

impl<'a> QMatrix<'a> {
    /// Checks that `bytes` are exactly `rows` × `cols` weights of type `ty`.
    pub fn new(ty: QuantType, rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self, ShapeError> {
        let stride = ty.bytes_for(cols).ok_or(ShapeError::PartialBlock { ty, cols })?;
        let needed = stride.saturating_mul(rows);
        if needed != bytes.len() {
            return Err(ShapeError::Length { ty, rows, cols, needed, got: bytes.len() });
        }
        Ok(QMatrix { ty, rows, cols, stride, bytes, keeper: None })
    }

    /// The same matrix, with the owner of its bytes: as long as that lives, they stay where and what they are. So a
    /// device that keeps a copy needs no more than the address and a weak reference to tell whether it still holds.
    pub fn kept_by(self, keeper: &'a Keeper) -> Self {
        QMatrix { keeper: Some(keeper), ..self }
    }

    /// The owner of the bytes, where it is known.
    pub fn keeper(&self) -> Option<&'a Keeper> {
        self.keeper
    }

    /// The weight format.
    pub fn ty(&self) -> QuantType {
        self.ty
    }

    /// Number of rows: outputs of the product.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: inputs of the product.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All the bytes, row after row.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Bytes of one row.
    pub fn row_bytes(&self) -> usize {
        self.stride
    }

    /// The bytes of row `i`.
    ///
    /// # Panics
    /// If `i` is not below `rows`.
    pub fn row(&self, i: usize) -> &'a [u8] {
        let n = self.row_bytes();
        &self.bytes[i * n..(i + 1) * n]
    }

    /// All blocks, row after row; `None` if `B` is another format than the matrix's.
    pub fn blocks<B: Block>(&self) -> Option<&'a [B]> {
        if self.ty == B::TYPE { blocks_of(self.bytes) } else { None }
    }

    /// The blocks of row `i`; `None` if `B` is another format than the matrix's.
    ///
    /// # Panics
    /// If `i` is not below `rows`.
    pub fn row_blocks<B: Block>(&self, i: usize) -> Option<&'a [B]> {
        if self.ty == B::TYPE { blocks_of(self.row(i)) } else { None }
    }
}
