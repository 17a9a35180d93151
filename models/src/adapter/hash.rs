//! Hashes of content: XXH3, 128 bits. They tell files apart, they do not resist forgery.

use lory_kernels::QuantType;
use xxhash_rust::xxh3::Xxh3;

use crate::Tensor;

/// Collects fields, each with its length, so that no two lists of fields look alike.
#[derive(Default)]
pub(super) struct Hasher(Xxh3);

impl Hasher {
    pub(super) fn new() -> Self {
        Hasher(Xxh3::new())
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
        self
    }

    pub(super) fn number(&mut self, n: u64) -> &mut Self {
        self.0.update(&n.to_le_bytes());
        self
    }

    pub(super) fn tensor(&mut self, t: &Tensor) -> &mut Self {
        self.stored(t.ty(), t.rows(), t.cols(), t.matrix().bytes())
    }

    /// A matrix as it is stored.
    pub(super) fn stored(&mut self, ty: QuantType, rows: usize, cols: usize, bytes: &[u8]) -> &mut Self {
        self.number(u64::from(ty as u32)).number(rows as u64).number(cols as u64).bytes(bytes)
    }

    pub(super) fn finish(&self) -> u128 {
        self.0.digest128()
    }
}
