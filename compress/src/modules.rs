//! Modules in the order of their sites, a few at a time in memory, many threads at work.

use std::sync::atomic::AtomicBool;

use lory_models::adapter::Site;
use rayon::prelude::*;

use crate::Result;
use crate::collection::Collection;
use crate::factors::Stack;
use crate::progress::{Progress, check};
use crate::rng::Rng;

/// Bytes of stacks that are in memory at once, unless a single one is larger.
const BATCH_BYTES: usize = 512 << 20;

/// Runs `work` on the stacks of every group of sites and returns the results in the order of the groups.
///
/// Groups that fit into memory together run in parallel; results do not depend on which did.
///
/// # Errors
/// Of reading, of `work`, and [`crate::Error::Interrupted`].
pub(crate) fn for_each<T: Send>(
    collection: &Collection,
    groups: &[Vec<Site>],
    progress: &dyn Progress,
    cancel: &AtomicBool,
    work: impl Fn(&[Site], Vec<Stack>) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let mut results = Vec::with_capacity(groups.len());
    let mut rest = groups;
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = rest.iter().take_while(|group| {
            bytes += group.iter().map(|s| collection.stack_bytes(*s)).sum::<usize>();
            bytes <= BATCH_BYTES
        });
        let (batch, later) = rest.split_at(fits.count().max(1));
        let one = |group: &Vec<Site>| {
            check(cancel)?;
            let stacks = group.iter().map(|s| collection.stack(*s)).collect::<Result<Vec<_>>>()?;
            let result = work(group, stacks);
            progress.step();
            result
        };
        results.extend(batch.par_iter().map(one).collect::<Result<Vec<T>>>()?);
        rest = later;
    }
    Ok(results)
}

/// Each site by itself.
pub(crate) fn single(sites: &[Site]) -> Vec<Vec<Site>> {
    sites.iter().map(|s| vec![*s]).collect()
}

/// At most `most` sites, drawn by `seed` (equal steps would always meet the same projections), ascending.
pub(crate) fn sample(sites: &[Site], most: usize, seed: u64) -> Vec<Site> {
    let mut drawn = sites.to_vec();
    let mut rng = Rng::stream(seed, 4242);
    for i in (1..drawn.len()).rev() {
        drawn.swap(i, rng.below(i + 1));
    }
    drawn.truncate(most);
    drawn.sort_unstable();
    drawn
}
