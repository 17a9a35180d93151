//! The public Rust API of Lory: engine, sessions, adapters.
