//! What can go wrong in the program, each in one line that says what to do.

use attn_core::AttnError;
use std::path::{Path, PathBuf};

/// Why a subcommand stopped. The program prints it in one line and ends with exit code 2.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LabError {
    /// An attention call was refused.
    #[error(transparent)]
    Attn(#[from] AttnError),
    /// A language model or its text cannot be used.
    #[error(transparent)]
    Lm(#[from] crate::lm::LmError),
    /// A file or folder could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// `read`, `write`, ...
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file was read, but does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what is expected.
        reason: String,
    },
    /// An argument is outside what it can be.
    #[error("{0}")]
    Argument(String),
}

impl LabError {
    /// [`LabError::Io`] while `action` was done to `path`.
    pub fn io(action: &'static str, path: &Path, source: std::io::Error) -> Self {
        Self::Io { action, path: path.to_path_buf(), source }
    }

    /// [`LabError::Format`] about `path`.
    pub fn format(path: &Path, reason: impl ToString) -> Self {
        Self::Format { path: path.to_path_buf(), reason: reason.to_string() }
    }
}

/// `Result` with [`LabError`].
pub type Result<T> = std::result::Result<T, LabError>;
