//! What a variant promises; the conformance suite holds it to these words.

use crate::DType;
use serde::Serialize;

/// Which crate a variant lives in, and what kind of idea it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Softmax over all visible pairs.
    Exact,
    /// Softmax over chosen pairs.
    Sparse,
    /// Kernel features and recurrences.
    Linear,
    /// Levels of resolution.
    Hier,
    /// The mechanisms that came first.
    Classic,
}

impl std::fmt::Display for Family {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Exact => "exact",
            Self::Sparse => "sparse",
            Self::Linear => "linear",
            Self::Hier => "hier",
            Self::Classic => "classic",
        })
    }
}

impl std::str::FromStr for Family {
    type Err = crate::AttnError;

    fn from_str(s: &str) -> crate::Result<Self> {
        [Self::Exact, Self::Sparse, Self::Linear, Self::Hier, Self::Classic]
            .into_iter()
            .find(|f| f.to_string() == s)
            .ok_or_else(|| crate::AttnError::value("family", s, "exact, sparse, linear, hier or classic"))
    }
}

/// What the variant computes, seen from softmax attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Softmax attention over every visible pair, exactly.
    Softmax,
    /// Softmax attention over chosen pairs, exactly; with every pair chosen it equals [`Target::Softmax`].
    SoftmaxOverChosen,
    /// An approximation of softmax attention.
    SoftmaxApproximately,
    /// Another function of q, k and v.
    Own,
}

/// Which keys may influence a query's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Causality {
    /// All of them.
    Bidirectional,
    /// No query attends a later key, but which of the earlier ones it attends may depend on later queries and keys: block
    /// selectors for prefill. Changing later values never changes an earlier output, not by one bit.
    Masked,
    /// Changing inputs at later positions never changes an earlier output, not by one bit.
    Strict,
}

impl Causality {
    /// Whether no query attends a later key.
    pub fn is_causal(self) -> bool {
        self != Self::Bidirectional
    }
}

/// How time or memory beyond the inputs and the output grows with the length `n`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Growth {
    /// Not at all.
    Constant,
    /// As `n`.
    Linear,
    /// As `n log n`.
    Linearithmic,
    /// As `n^1.5`.
    SubQuadratic,
    /// As `n^2`.
    Quadratic,
}

/// The promises of one configured variant.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Profile {
    /// Its family.
    pub family: Family,
    /// What it computes.
    pub target: Target,
    /// What may influence a row.
    pub causality: Causality,
    /// Each output coordinate lies between the smallest and the largest value of the keys seen.
    pub convex: bool,
    /// Permuting keys together with their values changes nothing but rounding.
    pub key_order_free: bool,
    /// Accepts `n_q != n_kv`.
    pub cross_lengths: bool,
    /// Accepts `n_heads_q > n_heads_kv`.
    pub grouped_heads: bool,
    /// Storage types it accepts.
    pub dtypes: &'static [DType],
    /// Largest error of an f32 output against the variant's own definition in f64, as a share of the largest
    /// absolute value, for inputs of order one.
    pub max_error: f64,
    /// Growth of time.
    pub time: Growth,
    /// Growth of memory beyond q, k, v and out.
    pub memory: Growth,
}
