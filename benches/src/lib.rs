//! Samples of times, and what is said of them.

mod likeness;
mod samples;

pub use likeness::{Sums, pearson};
pub use samples::{Ratio, Samples};
