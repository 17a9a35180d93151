//! Numbers that begin with a line of the cache.

use std::ops::{Deref, DerefMut};

/// Bytes of a line, and of the longest vector.
const LINE: usize = 64;

/// Like a vector, which begins anywhere: every other half of a line that is read from it, and every whole one, then lies across two.
pub(crate) struct Aligned<T> {
    numbers: Vec<T>,
    start: usize,
    len: usize,
}

impl<T: Copy + Default> Aligned<T> {
    /// So many zeros.
    pub fn zeros(len: usize) -> Self {
        let spare = LINE / size_of::<T>();
        let numbers = vec![T::default(); len + spare];
        let start = numbers.as_ptr().align_offset(LINE).min(spare);
        Aligned { numbers, start, len }
    }
}

impl<T> Deref for Aligned<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.numbers[self.start..][..self.len]
    }
}

impl<T> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.numbers[self.start..][..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn begins_with_a_line() {
        for len in [0, 1, 15, 16, 100_000] {
            let mut floats = Aligned::<f32>::zeros(len);
            floats.fill(1.0);
            assert_eq!((floats.len(), floats.as_ptr().addr() % LINE), (len, 0));
            assert_eq!(Aligned::<u16>::zeros(len).as_ptr().addr() % LINE, 0);
        }
    }
}
