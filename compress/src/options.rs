//! What a compression is asked to do.

use crate::allocate::Goal;
use crate::frozen::Method;
use crate::storage::Storage;
use crate::{Error, Result};

/// Options of [`compress`](crate::compress).
#[derive(Clone, Debug)]
pub struct Options {
    /// Columns of every basis; by default the paper's rule.
    pub rank: Option<usize>,
    /// Number of bases; by default the paper's rule.
    pub clusters: Option<usize>,
    /// Full or diagonal cores.
    pub method: Method,
    /// Ranks per module and number of clusters chosen for this goal, instead of the same rank everywhere.
    pub auto: Option<Goal>,
    /// Adapters whose mean err² is above this keep their own factors. As a limit for each adapter it is no companion of
    /// the same number as [`Goal::Error`], the mean of all, which many adapters exceed.
    pub max_error: Option<f64>,
    /// One V for q, k and v, and one for gate and up.
    pub share_v: bool,
    /// Weight formats of bases and cores.
    pub storage: Storage,
    /// Seed of everything that is drawn.
    pub seed: u64,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            rank: None,
            clusters: None,
            method: Method::Full,
            auto: None,
            max_error: None,
            share_v: false,
            storage: Storage::default(),
            seed: 0,
        }
    }
}

/// The paper's rank for up to 100 adapters on one basis; beyond, it uses clusters of rank 16.
pub(crate) fn single_basis_rank(adapters: usize) -> usize {
    adapters / 2 + 7
}

/// Rank of clustered bases by the paper's rule.
pub(crate) const CLUSTER_RANK: usize = 16;
/// Up to here the paper uses one basis.
pub(crate) const SINGLE_BASIS: usize = 100;
/// The paper takes the fewest clusters with a mean err² below this on one module.
pub(crate) const CLUSTER_ERROR: f64 = 0.6;

impl Options {
    /// # Errors
    /// Options that contradict each other or that no pack can hold.
    pub fn check(&self) -> Result<()> {
        let fail = |m: &str| Err(Error::Request(m.into()));
        if self.rank == Some(0) || self.rank.is_some_and(|r| r > 4096) {
            return fail("the rank must be 1 to 4096");
        }
        if self.clusters == Some(0) {
            return fail("the number of clusters must be at least 1");
        }
        if self.share_v && self.method == Method::Diag {
            return fail("a shared V needs full cores");
        }
        if self.share_v && self.auto.is_some() {
            return fail("a shared V needs the same rank for its projections; --auto gives each its own");
        }
        if self.auto.is_some() && (self.rank.is_some() || self.clusters.is_some()) {
            return fail("--auto chooses ranks and clusters; give either it or them");
        }
        if self.max_error.is_some_and(|e| e.is_nan() || e <= 0.0) {
            return fail("the largest error must be above 0");
        }
        Ok(())
    }
}
