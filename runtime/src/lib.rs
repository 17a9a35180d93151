//! The public Rust API of Lory: engine, sessions, adapters.

mod error;
pub mod mapping;

pub use error::Error;

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
