//! What the same bytes buy without sharing: a truncated SVD of every adapter by itself.
//!
//! The baseline is the best of its kind: bytes are given to whichever adapter and module they help most, and
//! factors are taken as exact, without the rounding that the pack pays.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// One adapter at one module.
#[derive(Clone, Debug)]
pub struct Single {
    /// Squared singular values, falling, adding up to 1.
    pub spectrum: Vec<f64>,
    /// Bytes of one more rank: a column of B and a row of A.
    pub rank_bytes: f64,
}

struct Next {
    gain: f64,
    item: usize,
    rank: usize,
}

impl PartialEq for Next {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}
impl Eq for Next {}
impl PartialOrd for Next {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Next {
    fn cmp(&self, other: &Self) -> Ordering {
        self.gain.total_cmp(&other.gain).then(other.item.cmp(&self.item))
    }
}

/// Mean err² of per-adapter SVDs that together take at most `bytes`.
pub fn svd_at_equal_bytes(singles: &[Single], bytes: u64) -> f64 {
    let next = |item: usize, rank: usize| {
        let s: &Single = &singles[item];
        Some(Next { gain: s.spectrum.get(rank)? / s.rank_bytes.max(1.0), item, rank })
    };
    // Spectra fall, so giving out the best gain per byte first is the best for these bytes.
    let mut heap: BinaryHeap<Next> = (0..singles.len()).filter_map(|i| next(i, 0)).collect();
    let (mut left, mut kept) = (bytes as f64, 0.0);
    while let Some(top) = heap.pop() {
        let single = &singles[top.item];
        if single.rank_bytes > left {
            continue;
        }
        left -= single.rank_bytes;
        kept += single.spectrum[top.rank];
        heap.extend(next(top.item, top.rank + 1));
    }
    (1.0 - kept / singles.len().max(1) as f64).max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_where_they_help_most() {
        let singles = [
            Single { spectrum: vec![0.9, 0.1], rank_bytes: 10.0 },
            Single { spectrum: vec![0.6, 0.4], rank_bytes: 10.0 },
        ];
        assert_eq!(svd_at_equal_bytes(&singles, 5), 1.0);
        assert!((svd_at_equal_bytes(&singles, 10) - (1.0 - 0.45)).abs() < 1e-12);
        assert!((svd_at_equal_bytes(&singles, 30) - 0.05).abs() < 1e-12);
        assert!(svd_at_equal_bytes(&singles, 40).abs() < 1e-12);
    }
}
