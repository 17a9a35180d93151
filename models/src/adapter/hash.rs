//! Hashes of content: XXH3, 128 bits. They tell files apart, they do not resist forgery.

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
        self.number(u64::from(t.ty() as u32)).number(t.rows() as u64).number(t.cols() as u64);
        self.bytes(t.matrix().bytes())
    }

    pub(super) fn finish(&self) -> u128 {
        self.0.digest128()
    }
}
