//! What a long run tells its caller, and how the caller stops it.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::{Error, Result};

/// Receives progress; called from several threads.
pub trait Progress: Sync {
    /// A stage begins that has `steps` steps.
    fn stage(&self, name: &str, steps: usize);
    /// One step of the current stage is done.
    fn step(&self);
}

/// Tells nobody.
pub struct Silent;

impl Progress for Silent {
    fn stage(&self, _: &str, _: usize) {}
    fn step(&self) {}
}

/// [`Error::Interrupted`] once `cancel` is set.
pub(crate) fn check(cancel: &AtomicBool) -> Result<()> {
    if cancel.load(Ordering::Relaxed) { Err(Error::Interrupted) } else { Ok(()) }
}
