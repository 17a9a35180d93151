//! Random weights.

use lory_kernels::quant::format::quantize_row;
use lory_kernels::{QMatrix, QuantType};

use super::noise;

/// A matrix of random weights.
pub struct Weights {
    ty: QuantType,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl Weights {
    /// Of `rows` × `cols`; the same sixteen rows over and over. Fewer columns than a block has are as many as it has.
    pub fn new(ty: QuantType, rows: usize, cols: usize) -> Weights {
        let cols = cols.next_multiple_of(ty.block_len());
        let line = noise(cols * 16);
        let mut bytes = vec![0; ty.bytes_for(line.len()).expect("whole blocks")];
        quantize_row(ty, &line, &mut bytes).expect("a native format");
        let len = bytes.len() / 16 * rows;
        bytes = bytes.repeat(rows.div_ceil(16));
        bytes.truncate(len);
        Weights { ty, rows, cols, bytes }
    }

    pub fn matrix(&self) -> QMatrix<'_> {
        QMatrix::new(self.ty, self.rows, self.cols, &self.bytes).expect("whole rows")
    }

    pub fn numbers(&self) -> usize {
        self.rows * self.cols
    }

    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }
}
