//! How much of exact attention a choice of pairs keeps, for chosen rows, in f64.
//!
//! With `s_ij = softmax_scale * q_i . k_j`, `A(i)` all keys that exact attention sees and `B(i)` the chosen ones among them:
//!
//! ```text
//! kept_i   = sum_{j in B(i)} e^(s_ij) / sum_{j in A(i)} e^(s_ij)
//! recall_i = |B(i) ∩ top_k(i)| / |top_k(i)|        top_k(i): the k keys of A(i) with the largest scores
//! ```
//!
//! Ties go to the lower key. The output of the chosen pairs differs from the exact one by at most `2 (1 - kept_i)` times the
//! largest value.

use attn_core::exact::RowId;
use attn_core::mask::{Head, Mask};
use attn_core::{AttnError, Qkv, Result};

/// What to measure.
#[derive(Clone, Copy)]
pub struct Mass<'a> {
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
    /// The pairs of exact attention.
    pub all: &'a dyn Mask,
    /// The pairs that were chosen; those outside of `all` do not count.
    pub chosen: &'a dyn Mask,
    /// How many true top keys are looked for; `None` is as many as were chosen in the row.
    pub top_k: Option<usize>,
}

/// What a row keeps.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowMass {
    /// The row.
    pub row: RowId,
    /// Keys of exact attention.
    pub n_all: usize,
    /// Those of them that were chosen.
    pub n_chosen: usize,
    /// Share of the attention mass on the chosen keys; 1 for a row that sees nothing.
    pub kept: f64,
    /// Share of the true top keys that were chosen; 1 if none are looked for.
    pub recall: f64,
}

impl Mass<'_> {
    /// Measures the chosen rows, in the order given. Time: `n_kv * head_dim` a row; memory: one row of scores.
    ///
    /// # Errors
    /// [`AttnError::Value`] for a row outside the problem or a scale that is not finite; those of [`Mask::check`].
    pub fn rows(&self, x: &Qkv<'_>, rows: &[RowId]) -> Result<Vec<RowMass>> {
        let s = x.shape();
        self.all.check(&s)?;
        self.chosen.check(&s)?;
        let scale = self.softmax_scale.map_or(1.0 / (s.head_dim as f64).sqrt(), f64::from);
        if !scale.is_finite() {
            return Err(AttnError::value("softmax_scale", scale, "a finite number"));
        }
        let outside = |r: &&RowId| r.batch >= s.batch || r.head >= s.n_heads_q || r.i >= s.n_q;
        if let Some(row) = rows.iter().find(outside) {
            let expected = format!("a row of {} x {} x {}", s.batch, s.n_heads_q, s.n_q);
            return Err(AttnError::value("row", format!("{row:?}"), expected));
        }
        Ok(rows.iter().map(|row| self.row(x, *row, scale)).collect())
    }

    fn row(&self, x: &Qkv<'_>, row: RowId, scale: f64) -> RowMass {
        let (s, head) = (x.shape(), Head { batch: row.batch, head: row.head });
        let (mut q, mut k) = (vec![0.0; s.head_dim], vec![0.0; s.head_dim]);
        x.q().read_row(row.batch, row.head, row.i, &mut q);
        // Score, key, chosen.
        let mut keys: Vec<(f64, usize, bool)> = Vec::new();
        for j in 0..s.n_kv {
            let pair = head.pair(row.i, j);
            if self.all.sees(pair) {
                x.k().read_row(row.batch, s.kv_head(row.head), j, &mut k);
                let score = scale * q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>();
                keys.push((score, j, self.chosen.sees(pair)));
            }
        }
        let max = keys.iter().fold(f64::NEG_INFINITY, |max, key| max.max(key.0));
        let weight =
            |key: &(f64, usize, bool)| if max == f64::NEG_INFINITY { 0.0 } else { (key.0 - max).exp() };
        let total: f64 = keys.iter().map(weight).sum();
        let chosen: f64 = keys.iter().filter(|key| key.2).map(weight).sum();
        let n_chosen = keys.iter().filter(|key| key.2).count();
        let n_all = keys.len();
        let top_k = self.top_k.unwrap_or(n_chosen).min(n_all);
        if top_k > 0 && top_k < n_all {
            keys.select_nth_unstable_by(top_k, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        }
        let found = keys[..top_k].iter().filter(|key| key.2).count();
        RowMass {
            row,
            n_all,
            n_chosen,
            kept: if total > 0.0 { chosen / total } else { 1.0 },
            recall: if top_k > 0 { found as f64 / top_k as f64 } else { 1.0 },
        }
    }
}
