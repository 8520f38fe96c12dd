//! The definition of H-Transformer-1D in f64, pair by pair.
//!
//! Tokens `i` and `j` meet on the first level `l` on which their blocks of `b 2^l` tokens are the same or neighbours.
//! There they are represented by their groups of `2^l` tokens:
//!
//! ```text
//! s_ij  = scale * Q . K,     Q = mean of q over the group of i (causal: its first q),  K = mean of k over that of j
//! out_i = sum_j e^(s_ij) v_j / sum_j e^(s_ij)         over all j (causal: j <= i)
//! ```
//!
//! Groups at the end of the sequence are shorter: only tokens that exist are averaged.

use attn_core::Qkv;
use attn_core::exact::Reference;

/// What the definition depends on.
pub(super) struct Definition {
    pub(super) block: usize,
    pub(super) causal: bool,
    pub(super) scale: f64,
}

impl Definition {
    /// All rows, in time `O(n^2 head_dim)` a head.
    pub(super) fn all(&self, x: &Qkv<'_>) -> Reference {
        let shape = x.shape();
        let (mut out, mut lse) = (Vec::new(), Vec::new());
        for batch in 0..shape.batch {
            for head in 0..shape.n_heads_q {
                let kv_head = shape.kv_head(head);
                let q = x.q().head_f64(batch, head);
                let k = x.k().head_f64(batch, kv_head);
                let v = x.v().head_f64(batch, kv_head);
                for i in 0..shape.n_q {
                    let (row, row_lse) = self.row(i, &q, &k, &v, [shape.head_dim, shape.head_dim_v]);
                    out.extend(row);
                    lse.push(row_lse);
                }
            }
        }
        Reference { out, lse: Some(lse) }
    }

    fn row(&self, i: usize, q: &[f64], k: &[f64], v: &[f64], [d, d_v]: [usize; 2]) -> (Vec<f64>, f64) {
        let n = k.len() / d;
        let end = if self.causal { i + 1 } else { n };
        let mut scores = vec![0.0; end];
        let mut j = 0;
        while j < end {
            let level = self.level(i, j);
            let group_of = |t: usize| (t >> level << level)..(((t >> level) + 1) << level).min(n);
            let (rows, keys) = (group_of(i), group_of(j));
            let query_rows = if self.causal { rows.start..rows.start + 1 } else { rows };
            let (query, key) = (mean(q, query_rows, d), mean(k, keys.clone(), d));
            let dot: f64 = query.iter().zip(&key).map(|(a, b)| a * b).sum();
            // The tokens of one group meet `i` on the same level, with the same score.
            scores[keys.start..keys.end.min(end)].fill(self.scale * dot);
            j = keys.end;
        }

        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let (mut sum, mut out) = (0.0, vec![0.0; d_v]);
        for (score, value) in scores.iter().zip(v.chunks_exact(d_v)) {
            let weight = (score - max).exp();
            sum += weight;
            out.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
        }
        out.iter_mut().for_each(|o| *o /= sum);
        (out, max + sum.ln())
    }

    /// The first level on which the blocks of `i` and `j` touch.
    fn level(&self, i: usize, j: usize) -> usize {
        let mut level = 0;
        while (i / (self.block << level)).abs_diff(j / (self.block << level)) > 1 {
            level += 1;
        }
        level
    }
}

fn mean(rows: &[f64], range: std::ops::Range<usize>, width: usize) -> Vec<f64> {
    let count = range.len() as f64;
    let sum = |c: usize| -> f64 { range.clone().map(|i| rows[i * width + c]).sum() };
    (0..width).map(|c| sum(c) / count).collect()
}
