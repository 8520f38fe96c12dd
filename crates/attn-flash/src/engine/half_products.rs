//! How products of half types are made.

use attn_core::AttnError;
use std::fmt;
use std::str::FromStr;

/// How the forward pass multiplies bf16 and f16: widened to f32, or bf16 as it is, by the CPU's own instruction.
///
/// Both accumulate scores, normalisers and outputs in f32. [`HalfProducts::Native`] rounds the weights to bf16 before they
/// meet the values, as kernels for GPUs do. Decoding (up to four queries at once) and the backward pass always widen.
///
/// Measured against the definition in f64 on the same bf16 inputs (standard normal, `head_dim` 64 and 128, `n` 1024 to
/// 16384, nothing masked), relative to the outputs:
///
/// | | root mean square | largest, of the largest output | log-sum-exp, absolute |
/// |---|---|---|---|
/// | the exact output, rounded to bf16 | 1.6e-3 to 1.7e-3 | | |
/// | bf16 widened | 1.6e-3 to 1.7e-3 | 2.5e-3 | 9e-7 |
/// | bf16 native | 2.3e-3 to 2.4e-3 | 3.8e-3 | 2.2e-4 |
/// | f16 widened | 2.0e-4 to 2.1e-4 | 3.0e-4 | 9e-7 |
///
/// What native products add is the size of the rounding that a bf16 output has anyway; so they are the default. The
/// log-sum-exp of a single row can be off by 2^-8.
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
