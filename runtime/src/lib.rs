//! The public Rust API of Lory: engine, sessions, adapters.

mod error;
pub mod mapping;
pub mod sampler;
pub mod stop;

pub use error::Error;
pub use sampler::{Sampler, SamplerError, SamplerOptions};

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
