//! What can be wrong with a call, with the numbers in it.

/// Why an attention call was refused. On any error nothing has been written.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum AttnError {
    /// An axis of a tensor has the wrong length.
    #[error("{tensor}: {axis} is {found}, expected {expected}")]
    Shape {
        /// The tensor's argument name, for example `k`.
        tensor: String,
        /// The axis, for example `head_dim`.
        axis: &'static str,
        /// Its length as given.
        found: usize,
        /// What it has to be, in words or digits.
        expected: String,
    },
    /// The strides of a view do not fit its buffer, or make two of its rows overlap.
    #[error("{tensor}: {reason}")]
    Layout {
        /// The tensor's argument name.
        tensor: String,
        /// What is wrong, with both numbers.
        reason: String,
    },
    /// Two tensors that must share a dtype do not.
    #[error("{tensor}: dtype is {found}, expected {expected}")]
    DType {
        /// The tensor's argument name.
        tensor: String,
        /// Its dtype as given.
        found: String,
        /// What it has to be.
        expected: String,
    },
    /// A scalar argument or option is outside what it can be.
    #[error("{name} is {found}, expected {expected}")]
    Value {
        /// The argument or option.
        name: String,
        /// Its value as given.
        found: String,
        /// What it has to be.
        expected: String,
    },
    /// A valid request that this variant does not compute. Never silently ignored.
    #[error("{variant} does not support {what}")]
    Unsupported {
        /// The variant's registry name.
        variant: String,
        /// The feature or option asked for.
        what: String,
    },
    /// A tensor that the variant needs is missing from a set of named tensors.
    #[error("missing tensor `{name}`; found: {found}")]
    Missing {
        /// The tensor's name.
        name: String,
        /// The names that are there.
        found: String,
    },
}

impl AttnError {
    /// [`AttnError::Shape`] from anything printable.
    pub fn shape(
        tensor: impl Into<String>,
        axis: &'static str,
        found: usize,
        expected: impl ToString,
    ) -> Self {
        Self::Shape { tensor: tensor.into(), axis, found, expected: expected.to_string() }
    }

    /// [`AttnError::Value`] from anything printable.
    pub fn value(name: impl Into<String>, found: impl ToString, expected: impl ToString) -> Self {
        Self::Value { name: name.into(), found: found.to_string(), expected: expected.to_string() }
    }

    /// [`AttnError::Unsupported`] from anything printable.
    pub fn unsupported(variant: impl Into<String>, what: impl ToString) -> Self {
        Self::Unsupported { variant: variant.into(), what: what.to_string() }
    }
}

/// `Result` with [`AttnError`].
pub type Result<T> = std::result::Result<T, AttnError>;
