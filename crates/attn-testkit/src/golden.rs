//! Golden files: what a mechanism is given and what must come out, computed by other people's code.
//!
//! A file is a safetensors file whose metadata says `format = attn-golden-1`, with one case:
//!
//! | Tensor | Meaning |
//! | --- | --- |
//! | `in.*` | everything the mechanism is given: `in.q`, `in.k`, `in.v`, gates, masks, states |
//! | `out.*` | what must come out: `out.o`, and where stored `out.lse` (natural log), `out.sT`, ... |
//! | `grad.X` | the gradient of `sum(out.o * w)` by `in.X`; `w` is stored beside it |
//! | `given.*` | the decision of a selection stage, to test the attention stage apart from it |
//! | `aux.*` | intermediates that help a reader |
//!
//! Floats are stored as f32 (read as they are), masks as u8 or bool, indices as i32. The metadata names the `family`, the
//! `variant`, the `case`, the `reference` (package, version, function), the `options` (JSON) and the `tolerance` (JSON) for
//! an f32 implementation.

mod error;
pub mod exact;
mod forms;
mod layout;
mod outputs;
mod plan;
mod resolution;
mod tensors;
mod verdict;

pub use error::GoldenError;
pub use plan::{Computed, Form, Onnx, Outcome, Plan, Weights};
pub use verdict::{Failure, Unchecked, Verdict, judge};

use crate::compare::Tol;
use attn_core::Family;
use attn_core::registry::{NamedTensor, NamedTensors};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// What the metadata's `format` must say.
pub const FORMAT: &str = "attn-golden-1";

/// One case.
#[derive(Debug, Clone, PartialEq)]
pub struct GoldenCase {
    /// The file it was read from; empty if it was read from memory.
    pub path: PathBuf,
    /// The family of the mechanism.
    pub family: Family,
    /// The variant's name, in the words of the reference.
    pub variant: String,
    /// The case's name.
    pub case: String,
    /// Who computed it: package, version and function.
    pub reference: String,
    /// What the variant was configured with, in the words of the reference.
    pub options: Map<String, Value>,
    /// All metadata, notes included.
    pub metadata: BTreeMap<String, String>,
    /// `in.*`, without the prefix.
    pub inputs: NamedTensors,
    /// `out.*`, without the prefix.
    pub outputs: NamedTensors,
    /// `grad.*`, without the prefix.
    pub grads: NamedTensors,
    /// `given.*`, without the prefix.
    pub given: NamedTensors,
    /// `aux.*`, without the prefix.
    pub aux: NamedTensors,
    /// The weights of the scalar whose gradients are stored.
    pub w: Option<NamedTensor>,
    tolerance: BTreeMap<String, Tol>,
}

impl GoldenCase {
    /// Reads a file.
    ///
    /// # Errors
    /// [`GoldenError`] with the path and what is wrong.
    pub fn load(path: impl AsRef<Path>) -> Result<Self, GoldenError> {
        let path = path.as_ref();
        let bytes =
            std::fs::read(path).map_err(|e| GoldenError::new(path, format!("cannot be read: {e}")))?;
        tensors::parse(path, &bytes)
    }

    /// Reads the bytes of a file.
    ///
    /// # Errors
    /// [`GoldenError`] with what is wrong.
    pub fn parse(bytes: &[u8]) -> Result<Self, GoldenError> {
        tensors::parse(Path::new(""), bytes)
    }

    /// The tolerance of a tensor: `out.o`, `out.lse`, `grad.q`, `given.mask`, ...
    ///
    /// An entry with the tensor's full name comes first, then, for outputs, one with its name behind `out.`; then that of
    /// its group, `out` or `grad`. `given.*` and `aux.*` have no tolerance unless one names them: `None`.
    pub fn tolerance_for(&self, tensor: &str) -> Option<Tol> {
        let find = |key: &str| self.tolerance.get(key).copied();
        match tensor.split_once('.') {
            Some(("out", name)) => find(tensor).or_else(|| find(name)).or_else(|| find("out")),
            Some(("grad", _)) => find(tensor).or_else(|| find("grad")),
            _ => find(tensor),
        }
    }
}

/// The golden files at `path`: itself, or, if it is a folder, every `.safetensors` file in it and in the folders inside, in
/// the order of their paths.
///
/// # Errors
/// [`GoldenError`] if a folder cannot be read or does not exist.
pub fn files(path: impl AsRef<Path>) -> Result<Vec<PathBuf>, GoldenError> {
    let path = path.as_ref();
    let unreadable = |e: std::io::Error| GoldenError::new(path, format!("cannot be read: {e}"));
    if !std::fs::metadata(path).map_err(unreadable)?.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(path).map_err(unreadable)? {
        let entry = entry.map_err(unreadable)?;
        let (inside, kind) = (entry.path(), entry.file_type().map_err(unreadable)?);
        // A link to a folder is not followed: it could lead back here.
        if kind.is_dir() {
            found.extend(files(&inside)?);
        } else if inside.extension().is_some_and(|e| e == "safetensors") {
            found.push(inside);
        }
    }
    found.sort();
    Ok(found)
}

/// Every case in a folder, in the order of their paths; see [`files`].
///
/// # Errors
/// [`GoldenError`] of the first file that is not a golden case.
pub fn load_dir(path: impl AsRef<Path>) -> Result<Vec<GoldenCase>, GoldenError> {
    files(path)?.iter().map(GoldenCase::load).collect()
}
