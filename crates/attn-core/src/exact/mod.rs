//! Exact softmax attention in f64, row by row: the slow truth everything else is judged against.
//!
//! For query row `i` of head `h`, over the keys `j` that the mask lets it see, with `q` and `k` normalised if there is a
//! norm:
//!
//! ```text
//! s_j = score_mod(softmax_scale * q_i . k_j) + key_bias_j
//! m   = max_j s_j            (and the sink logit, if there is one)
//! Z   = sum_j e^(s_j - m)    (+ e^(sink_h - m))
//! p_j = e^(s_j - m) / Z                    lse = m + ln Z
//! out = sum_j f_j p_j v_j                  (f_j: what dropout multiplies the weight with, else 1)
//! ```
//!
//! [`Exact::backward`] gives the gradients, in `O(n)` memory. No tiles, no SIMD, no threads. A row that sees nothing gives zeros and `lse = -inf`; so does a row whose
//! scores are all -inf. [`Exact::rows`] computes chosen rows only, so that the truth is affordable at a million
//! keys.

mod backward;
#[cfg(test)]
mod tests;

pub use backward::ExactGrads;

use crate::dropout::Dropout;
use crate::mask::{Head, Mask, Pair, SeeAll};
use crate::qk_norm::QkNorm;
use crate::score::{ScoreMod, Unchanged};
use crate::{AttnError, Qkv, Result};

/// One query row of one head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowId {
    /// Batch entry.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Query row.
    pub i: usize,
}

/// The output of one query row.
#[derive(Debug, Clone, PartialEq)]
pub struct ExactRow {
    /// `[head_dim_v]`.
    pub out: Vec<f64>,
    /// Natural log of the sum of exponentials, sink included; -inf for a row that sees nothing.
    pub lse: f64,
}

/// What a variant's definition gives, in f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    /// `[batch, n_heads_q, n_q, head_dim_v]`, row-major.
    pub out: Vec<f64>,
    /// `[batch, n_heads_q, n_q]`, for variants whose rows are softmax rows.
    pub lse: Option<Vec<f64>>,
}

/// Exact attention with everything that shapes it.
#[derive(Clone, Copy)]
pub struct Exact<'a> {
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f64>,
    /// Who sees whom.
    pub mask: &'a dyn Mask,
    /// Applied after the scale and before the mask.
    pub score_mod: &'a dyn ScoreMod,
    /// Added to the scores of each key after the score mod, `[n_kv]`, the same for all heads.
    pub key_bias: Option<&'a [f32]>,
    /// One logit a query head that enters the normaliser and has no value.
    pub sinks: Option<&'a [f64]>,
    /// Drops weights after normalisation.
    pub dropout: Option<Dropout<'a>>,
    /// Normalises rows of q and k first.
    pub qk_norm: Option<QkNorm<'a>>,
}

impl Default for Exact<'_> {
    fn default() -> Self {
        Self {
            softmax_scale: None,
            mask: &SeeAll,
            score_mod: &Unchanged,
            key_bias: None,
            sinks: None,
            dropout: None,
            qk_norm: None,
        }
    }
}

impl Exact<'_> {
    /// All rows. Time `O(batch * n_heads_q * n_q * n_kv * (head_dim + head_dim_v))`, in scalar f64.
    ///
    /// # Errors
    /// As [`Exact::rows`].
    pub fn all(&self, x: &Qkv<'_>) -> Result<Reference> {
        let s = x.shape();
        let mut ids = Vec::with_capacity(s.rows());
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                ids.extend((0..s.n_q).map(|i| RowId { batch, head, i }));
            }
        }
        let rows = self.rows(x, &ids)?;
        let lse = rows.iter().map(|r| r.lse).collect();
        Ok(Reference { out: rows.into_iter().flat_map(|r| r.out).collect(), lse: Some(lse) })
    }

    /// Chosen rows, in the order given. Memory: one row of scores.
    ///
    /// # Errors
    /// [`AttnError::Value`] for a row outside the problem or a scale that is not finite; [`AttnError::Shape`]
    /// unless there is one sink a query head and one bias a key; as [`QkNorm::check`].
    pub fn rows(&self, x: &Qkv<'_>, rows: &[RowId]) -> Result<Vec<ExactRow>> {
        let s = x.shape();
        let scale = self.check(x)?;
        let outside = |r: &&RowId| r.batch >= s.batch || r.head >= s.n_heads_q || r.i >= s.n_q;
        if let Some(row) = rows.iter().find(outside) {
            let expected = format!("a row of {} x {} x {}", s.batch, s.n_heads_q, s.n_q);
            return Err(AttnError::value("row", format!("{row:?}"), expected));
        }
        Ok(rows.iter().map(|&row| self.row(x, row, scale)).collect())
    }

    /// Checks everything against the problem and gives the scale.
    fn check(&self, x: &Qkv<'_>) -> Result<f64> {
        let s = x.shape();
        self.mask.check(&s)?;
        self.score_mod.check(&s)?;
        self.dropout.map_or(Ok(()), |dropout| dropout.check(&s))?;
        let scale = self.softmax_scale.unwrap_or(1.0 / (s.head_dim as f64).sqrt());
        if !scale.is_finite() {
            return Err(AttnError::value("softmax_scale", scale, "a finite number"));
        }
        if let Some(sinks) = self.sinks
            && sinks.len() != s.n_heads_q
        {
            return Err(AttnError::shape("sinks", "n_heads_q", sinks.len(), s.n_heads_q));
        }
        if let Some(key_bias) = self.key_bias
            && key_bias.len() != s.n_kv
        {
            return Err(AttnError::shape("key_bias", "n_kv", key_bias.len(), s.n_kv));
        }
        self.qk_norm.map_or(Ok(()), |norm| norm.check(&s))?;
        Ok(scale)
    }

    /// A query row, normalised.
    fn q(&self, x: &Qkv<'_>, RowId { batch, head, i }: RowId) -> Vec<f64> {
        let mut q = vec![0.0; x.shape().head_dim];
        x.q().read_row(batch, head, i, &mut q);
        if let Some(norm) = self.qk_norm {
            norm.q().apply_f64(&mut q);
        }
        q
    }

    /// The keys that a row sees, with their scores; `q` is its query.
    fn scores(&self, x: &Qkv<'_>, q: &[f64], RowId { batch, head, i }: RowId, scale: f64) -> Vec<Score> {
        let s = x.shape();
        let mut k = vec![0.0; s.head_dim];
        let mut seen = Vec::new();
        for j in 0..s.n_kv {
            let at = Head { batch, head }.pair(i, j);
            if self.mask.sees(at) {
                x.k().read_row(batch, s.kv_head(head), j, &mut k);
                if let Some(norm) = self.qk_norm {
                    norm.k().apply_f64(&mut k);
                }
                let scaled = scale * dot(q, &k);
                let key_bias = self.key_bias.map_or(0.0, |bias| f64::from(bias[j]));
                seen.push(Score { j, scaled, score: self.score_mod.apply_f64(scaled, at) + key_bias });
            }
        }
        seen
    }

    /// The log-sum-exp of a row's scores and its sink, as the maximum and the sum; `None` for a row that sees nothing.
    fn normaliser(&self, seen: &[Score], head: usize) -> Option<(f64, f64)> {
        let sink = self.sinks.map_or(f64::NEG_INFINITY, |sinks| sinks[head]);
        // `f64::max` ignores NaN: a NaN score reaches the result through its exponential instead.
        let max = seen.iter().fold(sink, |max, seen| max.max(seen.score));
        if max == f64::NEG_INFINITY && !seen.iter().any(|seen| seen.score.is_nan()) {
            return None;
        }
        Some((max, seen.iter().fold((sink - max).exp(), |sum, seen| sum + (seen.score - max).exp())))
    }

    fn dropout_factor(&self, at: Pair) -> f64 {
        self.dropout.map_or(1.0, |dropout| f64::from(dropout.factor(at)))
    }

    fn row(&self, x: &Qkv<'_>, id: RowId, scale: f64) -> ExactRow {
        let RowId { batch, head, i } = id;
        let s = x.shape();
        let mut out = vec![0.0; s.head_dim_v];
        let seen = self.scores(x, &self.q(x, id), id, scale);
        let Some((max, sum)) = self.normaliser(&seen, head) else {
            return ExactRow { out, lse: f64::NEG_INFINITY };
        };
        let mut v = vec![0.0; s.head_dim_v];
        for Score { j, score, .. } in seen {
            let weight = (score - max).exp() * self.dropout_factor(Head { batch, head }.pair(i, j));
            if weight == 0.0 {
                continue; // an infinite value behind a weight of zero is not seen
            }
            x.v().read_row(batch, s.kv_head(head), j, &mut v);
            out.iter_mut().zip(&v).for_each(|(o, v)| *o += weight * v);
        }
        out.iter_mut().for_each(|o| *o /= sum);
        ExactRow { out, lse: max + sum.ln() }
    }
}

/// The score of a visible key.
struct Score {
    j: usize,
    /// `softmax_scale * q . k`.
    scaled: f64,
    /// What the softmax takes.
    score: f64,
}

/// Sum of products in eight running sums, which the compiler can keep in vector registers.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a8, a_rest) = a.as_chunks::<8>();
    let (b8, b_rest) = b.as_chunks::<8>();
    for (a, b) in a8.iter().zip(b8) {
        for lane in 0..8 {
            sums[lane] += a[lane] * b[lane];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}
