//! The sizes of one attention problem.

use crate::{AttnError, DType, Result};
use serde::{Deserialize, Serialize};

/// Sizes of `q [batch, n_heads_q, n_q, head_dim]`, `k [batch, n_heads_kv, n_kv, head_dim]`,
/// `v [batch, n_heads_kv, n_kv, head_dim_v]` and `out [batch, n_heads_q, n_q, head_dim_v]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct AttnShape {
    /// Independent problems.
    pub batch: usize,
    /// Query heads; a multiple of `n_heads_kv`.
    pub n_heads_q: usize,
    /// Key/value heads. Query head `h` reads key/value head `h / group_size`.
    pub n_heads_kv: usize,
    /// Query rows.
    pub n_q: usize,
    /// Key and value rows.
    pub n_kv: usize,
    /// Width of queries and keys.
    pub head_dim: usize,
    /// Width of values and outputs.
    pub head_dim_v: usize,
}

impl AttnShape {
    /// Self-attention of `n` rows with equal widths: one batch, `heads` heads of both kinds.
    pub fn square(heads: usize, n: usize, head_dim: usize) -> Self {
        Self {
            batch: 1,
            n_heads_q: heads,
            n_heads_kv: heads,
            n_q: n,
            n_kv: n,
            head_dim,
            head_dim_v: head_dim,
        }
    }

    /// Query heads that share one key/value head.
    pub fn group_size(&self) -> usize {
        self.n_heads_q.checked_div(self.n_heads_kv).unwrap_or(1).max(1)
    }

    /// The key/value head that query head `h` reads.
    pub fn kv_head(&self, h: usize) -> usize {
        h / self.group_size()
    }

    /// `[batch, n_heads_q, n_q, head_dim]`.
    pub fn q(&self) -> [usize; 4] {
        [self.batch, self.n_heads_q, self.n_q, self.head_dim]
    }

    /// `[batch, n_heads_kv, n_kv, head_dim]`.
    pub fn k(&self) -> [usize; 4] {
        [self.batch, self.n_heads_kv, self.n_kv, self.head_dim]
    }

    /// `[batch, n_heads_kv, n_kv, head_dim_v]`.
    pub fn v(&self) -> [usize; 4] {
        [self.batch, self.n_heads_kv, self.n_kv, self.head_dim_v]
    }

    /// `[batch, n_heads_q, n_q, head_dim_v]`.
    pub fn out(&self) -> [usize; 4] {
        [self.batch, self.n_heads_q, self.n_q, self.head_dim_v]
    }

    /// Output rows of the whole problem: `batch * n_heads_q * n_q`, the length of a log-sum-exp buffer.
    pub fn rows(&self) -> usize {
        let axes = [self.batch, self.n_heads_q, self.n_q];
        // Only an empty problem can have axes whose product is no number.
        if axes.contains(&0) { 0 } else { axes.iter().fold(1, |rows: usize, n| rows.saturating_mul(*n)) }
    }

    /// Elements of q, k, v and out together, times the bytes of `dtype`: what any method has to move.
    pub fn io_bytes(&self, dtype: DType) -> u64 {
        let elements: usize =
            [self.q(), self.k(), self.v(), self.out()].iter().map(|s| s.iter().product::<usize>()).sum();
        elements as u64 * dtype.size() as u64
    }

    /// Derives the shape from the three tensors' own sizes.
    ///
    /// # Errors
    /// [`AttnError::Shape`] naming the tensor and axis that disagree; heads that do not divide; a zero
    /// `head_dim`, for which no default scale exists.
    pub fn from_tensors(q: [usize; 4], k: [usize; 4], v: [usize; 4]) -> Result<Self> {
        let equal = |tensor: &str, axis, found, expected: usize, like: &str| {
            if found == expected {
                return Ok(());
            }
            Err(AttnError::shape(tensor, axis, found, format!("{expected} (as in {like})")))
        };
        equal("k", "batch", k[0], q[0], "q")?;
        equal("v", "batch", v[0], q[0], "q")?;
        equal("v", "n_heads_kv", v[1], k[1], "k")?;
        equal("v", "n_kv", v[2], k[2], "k")?;
        equal("k", "head_dim", k[3], q[3], "q")?;
        let divides = if k[1] == 0 { q[1] == 0 } else { q[1].is_multiple_of(k[1]) };
        if !divides {
            let expected = format!("a multiple of k's {} heads", k[1]);
            return Err(AttnError::shape("q", "n_heads_q", q[1], expected));
        }
        if q[3] == 0 {
            return Err(AttnError::shape("q", "head_dim", 0, "at least 1"));
        }
        if v[3] == 0 {
            return Err(AttnError::shape("v", "head_dim_v", 0, "at least 1"));
        }
        Ok(Self {
            batch: q[0],
            n_heads_q: q[1],
            n_heads_kv: k[1],
            n_q: q[2],
            n_kv: k[2],
            head_dim: q[3],
            head_dim_v: v[3],
        })
    }
}

/// `softmax_scale` as given, or `1/sqrt(head_dim)`.
///
/// # Errors
/// [`AttnError::Value`] for a NaN or infinite scale; zero and negative values are legal.
pub fn softmax_scale_or_default(given: Option<f32>, head_dim: usize) -> Result<f32> {
    match given {
        Some(s) if !s.is_finite() => Err(AttnError::value("softmax_scale", s, "a finite number")),
        Some(s) => Ok(s),
        None => Ok((1.0 / (head_dim as f64).sqrt()) as f32),
    }
}
