//! The public Rust API of Lory: engine, sessions, adapters.
//!
//! ```no_run
//! use lory_runtime::{Engine, EngineOptions, Event, Request, SessionOptions};
//!
//! let engine = Engine::open("model.gguf".as_ref(), &EngineOptions::default())?;
//! let mut session = engine.session(&SessionOptions::default())?;
//! let tokens = engine.model().encode_prompt("Once upon a time");
//! for event in session.generate(Request { tokens, ..Request::default() })? {
//!     if let Event::Token { text, .. } = event? {
//!         print!("{text}");
//!     }
//! }
//! # Ok::<(), lory_runtime::Error>(())
//! ```

mod adapters;
mod bare;
mod embed;
mod engine;
mod error;
mod generate;
pub mod grammar;
pub mod mapping;
mod memory;
mod metrics;
mod model;
mod order;
mod placement;
mod progress;
mod repacking;
mod room;
pub mod sampler;
mod saved;
mod scheduler;
mod score;
mod sequence;
mod session;
mod step;
pub mod stop;
mod stream;

pub use adapters::{AdapterId, AdapterInfo, AdapterStore, AdapterUsage, open_pack};
pub use bare::{Bare, BareOptions, random_tokens};
pub use embed::{Pooling, normalize};
pub use engine::{Engine, EngineOptions};
pub use error::Error;
pub use generate::{Canceller, Event, FinishReason, Generation, Hidden, Request, Stats, Watch};
pub use grammar::{Grammar, GrammarError, GrammarSource};
pub use metrics::{BUCKETS, Endings, Histogram, Metrics};
pub use model::{DeviceOptions, LoadedModel, OpenOptions};
pub use placement::GpuLayers;
pub use repacking::Repacking;
pub use room::KvPolicy;
pub use sampler::{Sampler, SamplerError, SamplerOptions};
pub use saved::RestoreProblem;
pub use score::Score;
pub use session::{OnSwitch, Session, SessionAdapter, SessionOptions};

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Locks, also after a panic of another holder: every state here is valid between calls, and a step
/// that panics takes back what it has not computed.
fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
