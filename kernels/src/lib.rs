//! Arithmetic on slices: quantized blocks, matrix products, attention, and the
//! [`Backend`] trait behind which a device carries them out.
//!
//! This crate knows nothing of files, models or adapters. A weight is a
//! [`quant::QMatrix`]: rows of blocks borrowed from wherever the caller keeps them.

pub mod backend;
pub mod ceilings;
pub mod cpu;
#[cfg(feature = "cuda")]
pub mod cuda;
pub mod device;
mod host;
pub mod ops;
pub mod quant;
pub mod split;

pub use backend::{Backend, BackendError};
pub use cpu::Cpu;
#[cfg(feature = "cuda")]
pub use cuda::Cuda;
pub use device::{Device, DeviceChoice};
pub use ops::Reference;
pub use quant::{QMatrix, QuantType};
pub use split::Split;
