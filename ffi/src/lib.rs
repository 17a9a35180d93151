//! liblory: the C interface of Lory. Its manual is the header, `include/lory.h`, which is
//! generated from this crate; the rules that all functions obey stand at its top.
//!
//! Functions here have no logic: they check what C hands over, convert it, make one call into
//! `lory-runtime`, and convert what comes back. `status::guard` is around every fallible one:
//! it turns errors and panics into a status and the thread's error text.
//!
//! Handles are reference-counted objects behind a lock that is only ever tried: a call keeps its
//! object alive even if a callback frees the handle, and a handle that is exclusive but used twice
//! at once (by two threads, or by its own callback) gives `LORY_E_BUSY` instead of a data race.

// The names are C's.
#![allow(non_camel_case_types)]
// Options that the engine gets later keep their defaults until the header has them.
#![allow(clippy::needless_update)]

// In the order in which the header has them.
pub mod status;
pub mod version;

pub mod memory;

pub mod callbacks;

pub mod options;

pub mod open;

pub mod engine;

pub mod metrics;
pub mod model_info;

pub mod tokenizer;

pub mod chat;

pub mod grammar;

pub mod adapters;

pub mod adapter_list;

pub mod session;

pub mod session_adapters;

pub mod saved;

pub mod sampler;

pub mod request;

pub mod event;
pub mod generation;
pub mod stats;

mod args;
mod log;
mod source;
mod structs;
