//! Samples of times, and what is said of them.

mod samples;

pub use samples::{Ratio, Samples};
