//! The operations in plain Rust: what defines correct.
//!
//! Scalar functions in one fixed order of roundings. [`Reference`] strings them together,
//! single-threaded and obvious; [`crate::cpu`] computes the same sums, most of them to the same bit.

pub mod attention;
pub mod exp;
pub mod glu;
pub mod lora;
pub mod norm;
mod reference;
pub mod rope;
pub mod sum;
pub mod top_k;

pub use reference::{Reference, ReferenceKv};
