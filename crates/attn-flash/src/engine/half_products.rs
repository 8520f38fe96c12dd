//! How products of half types are made.

use attn_core::AttnError;
use std::fmt;
use std::str::FromStr;

/// How the forward pass multiplies bf16 and f16: widened to f32, or bf16 as it is, by the CPU's own instruction.
///
/// Both accumulate scores, normalisers and outputs in f32. [`HalfProducts::Native`] rounds the weights to bf16 before they
/// meet the values, as kernels for GPUs do. Decoding (up to four queries at once) and the backward pass always widen.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum HalfProducts {
    /// [`HalfProducts::Native`] where it can run, else [`HalfProducts::Widen`].
    #[default]
    Auto,
    /// Widened to f32: as accurate as f32 inputs.
    Widen,
    /// Pairs of bf16, at up to twice the speed of f32. An error unless queries, keys and values are bf16, the CPU has
    /// AVX-512 with `avx512bf16`, and there is neither dropout nor a norm of queries and keys.
    Native,
}

impl fmt::Display for HalfProducts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Widen => "widen",
            Self::Native => "native",
        })
    }
}

impl FromStr for HalfProducts {
    type Err = AttnError;

    fn from_str(name: &str) -> Result<Self, AttnError> {
        [Self::Auto, Self::Widen, Self::Native]
            .into_iter()
            .find(|choice| choice.to_string() == name)
            .ok_or_else(|| AttnError::value("half_products", name, "auto, widen or native"))
    }
}
