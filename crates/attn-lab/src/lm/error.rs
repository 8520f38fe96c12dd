use std::path::{Path, PathBuf};

/// What can go wrong while reading text or weights and while running a model.
#[derive(Debug, thiserror::Error)]
pub enum LmError {
    /// A file or directory could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// A file was read, but does not hold what it should.
    #[error("{what}: {problem}")]
    Format {
        /// The file, or another name for the source.
        what: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The text is shorter than what was asked for.
    #[error(
        "text: {found} bytes found in {place}, {asked} asked for; choose a smaller --n or give more text with \
         --text FILE|DIR"
    )]
    TextTooShort {
        /// Bytes found.
        found: usize,
        /// Bytes asked for.
        asked: usize,
        /// Where they were looked for.
        place: String,
    },
    /// No text where text is expected.
    #[error("text: {0}; give a text with --text FILE|DIR")]
    NoText(String),
    /// An argument outside of what the model can do.
    #[error("{0}")]
    Argument(String),
    /// A tensor operation failed.
    #[error("tensor operation: {0}")]
    Candle(#[from] candle_core::Error),
}

/// The result of this module's functions.
pub type Result<T> = std::result::Result<T, LmError>;

impl LmError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn format(what: impl Into<String>, problem: impl ToString) -> Self {
        Self::Format { what: what.into(), problem: problem.to_string() }
    }
}
