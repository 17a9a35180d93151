//! What can go wrong while adapters are read, compressed and written.

use std::path::{Path, PathBuf};

/// Errors of this crate; each names the file, adapter or option at fault.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of a model, adapter or pack that cannot be used.
    #[error(transparent)]
    Models(#[from] lory_models::Error),
    /// The operating system refused a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Adapters that cannot be compressed together, or options that make no sense.
    #[error("{0}")]
    Request(String),
    /// A weight format that cannot be read or written.
    #[error(transparent)]
    Format(#[from] lory_kernels::quant::FormatError),
    /// The caller asked to stop; nothing was written.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

impl Error {
    /// [`Error::Io`] in short, for `map_err`.
    pub fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
        move |source| Error::Io { path: path.into(), source }
    }
}

impl Error {
    /// Names the file in an error of writing it.
    pub(crate) fn at(self, path: &Path) -> Error {
        match self {
            // What stands in for a name in closures that write; others name their own file.
            Error::Io { path: unnamed, source } if unnamed == Path::new(UNNAMED) => {
                Error::Io { path: path.into(), source }
            }
            Error::Models(lory_models::Error::Write(why)) => {
                Error::Request(format!("{}: {why}", path.display()))
            }
            other => other,
        }
    }
}

const UNNAMED: &str = "(output)";

/// For closures that write files.
impl From<std::io::Error> for Error {
    fn from(source: std::io::Error) -> Self {
        Error::Io { path: PathBuf::from(UNNAMED), source }
    }
}

/// Results of this crate.
pub type Result<T> = std::result::Result<T, Error>;
