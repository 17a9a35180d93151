//! The error type of the public API.

use crate::engine::CONTEXTS;

/// Anything that can go wrong between a file's name and a generated token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The operating system refused, or what the path names is no ordinary file.
    #[error("{file}: {message}")]
    Io {
        /// The file's name.
        file: String,
        /// What went wrong and what to do.
        message: String,
    },
    /// The file's contents, or a request on the model.
    #[error(transparent)]
    Model(#[from] lory_models::Error),
    /// A sampler option out of its range, or logits that are not numbers.
    #[error(transparent)]
    Sampler(#[from] crate::sampler::SamplerError),
    /// The host gave up while a file was being read.
    #[error("{file}: given up by the host after {done} of {total} bytes")]
    Aborted {
        /// The file's name.
        file: String,
        /// Bytes read by then.
        done: u64,
        /// Bytes to be read.
        total: u64,
    },
    /// No adapter has this name.
    #[error("no adapter named `{name}`: {hint}")]
    UnknownAdapter {
        /// The name asked for.
        name: String,
        /// What there is.
        hint: String,
    },
    /// An adapter does not fit beside those that are in use.
    #[error(
        "adapter `{name}` has {needed} bytes, but {used} of the {budget} that adapters may have are in use; unload some, or raise the budget"
    )]
    AdapterBudget {
        /// The adapter.
        name: String,
        /// Its bytes.
        needed: usize,
        /// Bytes of the adapters that cannot be given up.
        used: usize,
        /// Bytes that all may have.
        budget: usize,
    },
    /// A context whose keys and values this system has no memory for.
    #[error(
        "a context of {n_ctx} tokens takes {} GB of keys and values, for {CONTEXTS} of them together; this system gives memory for at most {fitting} tokens",
        gigabytes(.bytes)
    )]
    ContextTooLong {
        /// Tokens asked for.
        n_ctx: usize,
        /// Bytes that the KV cache would have.
        bytes: u128,
        /// Tokens that there is memory for, about.
        fitting: usize,
    },
    /// A saved session that cannot be restored here.
    #[error("{file}: {message}")]
    Restore {
        /// The file's name.
        file: String,
        /// The kind of reason.
        problem: crate::RestoreProblem,
        /// The reason in words.
        message: String,
    },
    /// A grammar that cannot be used.
    #[error(transparent)]
    Grammar(#[from] crate::grammar::GrammarError),
    /// A request that cannot be carried out as it is.
    #[error("{0}")]
    Request(String),
}

fn gigabytes(bytes: &u128) -> String {
    format!("{:.1}", *bytes as f64 / 1e9)
}

impl Error {
    /// [`Error::Io`] in short.
    pub fn io(file: &str, message: impl ToString) -> Self {
        Error::Io { file: file.into(), message: message.to_string() }
    }
}
