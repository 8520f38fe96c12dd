//! Why a file is not a golden case.

use std::path::{Path, PathBuf};

/// What is wrong with a file, in one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}{}{problem}", path.display(), if path.as_os_str().is_empty() { "" } else { ": " })]
pub struct GoldenError {
    /// The file; empty for bytes from memory.
    pub path: PathBuf,
    /// What is wrong, with what was expected.
    pub problem: String,
}

impl GoldenError {
    pub(super) fn new(path: &Path, problem: impl Into<String>) -> Self {
        Self { path: path.to_path_buf(), problem: problem.into() }
    }
}
