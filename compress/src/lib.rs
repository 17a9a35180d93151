//! Joint compression of LoRA adapters into one shared-basis pack.
//!
//! The objective and the algorithms are those of "Compress then Serve" (arXiv 2407.00066); what this
//! crate adds is written in its README.

#![forbid(unsafe_code)]

mod diag;
mod factors;
mod full;
mod linalg;
mod rng;

pub use diag::{Diag, jd_diag};
pub use factors::{Factors, Stack};
pub use full::{Full, FullOptions, jd_full, jd_full_shared};
pub use rng::Rng;
