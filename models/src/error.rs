//! The error type of this crate: every variant names the file and the thing in it at fault.

/// A file, or a request on it, that cannot be used; the text says what, where and how much.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The container itself is broken or of an unsupported kind.
    #[error("{file}: {message}")]
    Container {
        /// The file's name.
        file: String,
        /// What is wrong, with its numbers.
        message: String,
    },
    /// A metadata key is missing, of the wrong type, or has an impossible value.
    #[error("{file}: key `{key}`: {message}")]
    Key {
        /// The file's name.
        file: String,
        /// The key at fault.
        key: String,
        /// What is wrong, with its numbers.
        message: String,
    },
    /// A tensor is missing, misplaced, or of the wrong shape or type.
    #[error("{file}: tensor `{tensor}`: {message}")]
    Tensor {
        /// The file's name.
        file: String,
        /// The tensor at fault.
        tensor: String,
        /// What is wrong, with its numbers.
        message: String,
    },
    /// The file is sound, but this program does not implement what it asks for.
    #[error("{file}: {message}")]
    Unsupported {
        /// The file's name.
        file: String,
        /// What is not supported, and what to do.
        message: String,
    },
    /// An adapter does not belong to the base it is used with.
    #[error("{file}: {message}")]
    WrongBase {
        /// The adapter's file.
        file: String,
        /// Both sides, named.
        message: String,
    },
    /// A chat template failed to parse or to render.
    #[error("{file}: chat template: {message}")]
    Template {
        /// The file's name.
        file: String,
        /// The template engine's words.
        message: String,
    },
    /// The device failed in the middle of a forward pass.
    #[error(transparent)]
    Backend(#[from] BackendFailure),
    /// The key-value cache has no room for a sequence to grow.
    #[error("the KV cache is full: {needed} more pages needed, {free} of {total} free")]
    KvFull {
        /// Pages that were needed.
        needed: usize,
        /// Pages that nobody holds.
        free: usize,
        /// All pages.
        total: usize,
    },
    /// An output that cannot be written; whoever opened it knows its name.
    #[error("writing failed: {0}")]
    Write(String),
    /// A request that cannot be carried out: token out of range, batch too large.
    #[error("{0}")]
    Request(String),
}

/// A device error, comparable by its text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct BackendFailure(pub String);

impl From<lory_kernels::BackendError> for Error {
    fn from(e: lory_kernels::BackendError) -> Self {
        Error::Backend(BackendFailure(e.to_string()))
    }
}

impl Error {
    /// [`Error::Container`] in short.
    pub fn container(file: &str, message: impl Into<String>) -> Self {
        Error::Container { file: file.into(), message: message.into() }
    }

    /// [`Error::Key`] in short.
    pub fn key(file: &str, key: &str, message: impl Into<String>) -> Self {
        Error::Key { file: file.into(), key: key.into(), message: message.into() }
    }

    /// [`Error::Tensor`] in short.
    pub fn tensor(file: &str, tensor: &str, message: impl Into<String>) -> Self {
        Error::Tensor { file: file.into(), tensor: tensor.into(), message: message.into() }
    }

    /// [`Error::Unsupported`] in short.
    pub fn unsupported(file: &str, message: impl Into<String>) -> Self {
        Error::Unsupported { file: file.into(), message: message.into() }
    }
}
