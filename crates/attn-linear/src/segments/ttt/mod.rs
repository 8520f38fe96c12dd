//! TTT-linear: the state is a linear model, trained on every mini-batch of tokens by one step of gradient descent.
//!
//! With the model `y = k W + c` at the start of a mini-batch, the normalisation `LN(x) = a n(x) + b`,
//! `n(x) = (x - mean x) / s`, `s^2 = var x + eps`, and `G_j` the gradient of `|LN(y_j) - (v_j - k_j)|^2 / 2` by `y_j`:
//!
//! ```text
//! e_j = a o (LN(y_j) - v_j + k_j)      G_j = (e_j - mean e_j - n(y_j) mean(e_j o n(y_j))) / s_j
//! r_i = q_i W + c - eta_i sum_(j <= i) (q_i . k_j + 1) G_j          over the mini-batch;  o_i = r_i + LN(r_i)
//! W <- W - eta sum_j k_j^T G_j      c <- c - eta sum_j G_j          at its end, eta that of its last token
//! ```
//!
//! Queries are scaled first. As attention `a = 1`, `b = 0`, `eta = 1 / (mini_batch head_dim_v)`; with other widths than
//! `head_dim_v` queries and keys start over from their first channel, or are cut.
//!
//! Source: Sun et al. 2024 (Learning to (Learn at Test Time)), sections 2.4 and 2.5.

mod cell;

use crate::scan::{HeadInputs, ScanState, ScanVariant, Tokens, backward, forward, sequences_of};
use attn_core::{AttnError, OutMut, Result, TensorView};
pub use cell::TttCell;

/// TTT-linear, see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TttLinear {
    /// Tokens of a mini-batch.
    pub mini_batch: usize,
    /// Multiplies queries; `None` is `1/sqrt(head_dim_v)`.
    pub scale: Option<f32>,
    /// Added to variances.
    pub eps: f32,
}

impl Default for TttLinear {
    fn default() -> Self {
        Self { mini_batch: 16, scale: None, eps: 1e-6 }
    }
}

/// Token rows `(batch, heads, length, width)` and what the normalisation learned.
#[derive(Debug, Clone, Copy)]
pub struct TttInputs<'a> {
    /// Queries.
    pub q: TensorView<'a>,
    /// Keys.
    pub k: TensorView<'a>,
    /// Values.
    pub v: TensorView<'a>,
    /// Step sizes, `(batch, heads, length, 1)`.
    pub eta: TensorView<'a>,
    /// `a [heads, width]`.
    pub norm_weight: &'a [f32],
    /// `b [heads, width]`.
    pub norm_bias: &'a [f32],
    /// Prefix sums of the lengths of sequences packed one behind the other, from 0 to all tokens: each is a run of its own, and has
    /// a batch entry of its own in states.
    pub cu_seqlens: Option<&'a [usize]>,
}

/// Gradients by [`TttInputs`], of their shapes, and by the initial state.
#[derive(Debug, Clone, PartialEq)]
pub struct TttGrads {
    /// By `q`.
    pub q: Vec<f32>,
    /// By `k`.
    pub k: Vec<f32>,
    /// By `v`.
    pub v: Vec<f32>,
    /// By `eta`.
    pub eta: Vec<f32>,
    /// By `norm_weight`.
    pub norm_weight: Vec<f32>,
    /// By `norm_bias`.
    pub norm_bias: Vec<f32>,
    /// Parts 0 and 1 are those by `W` and `c`.
    pub state: ScanState,
}

impl TttLinear {
    fn cell_of(&self, inputs: &TttInputs<'_>) -> Result<TttCell> {
        let [_, heads, _, width] = inputs.v.shape();
        for (name, data) in [("norm_weight", inputs.norm_weight), ("norm_bias", inputs.norm_bias)] {
            if data.len() != heads * width {
                return Err(AttnError::shape(name, "elements", data.len(), heads * width));
            }
        }
        let norm = (inputs.norm_weight.to_vec(), inputs.norm_bias.to_vec());
        Ok(TttCell { options: *self, scale: self.check(width)?, width, eta: None, norm })
    }

    fn check(&self, width: usize) -> Result<f32> {
        if self.mini_batch == 0 {
            return Err(AttnError::value("mini_batch", 0, "at least 1"));
        }
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return Err(AttnError::value("eps", self.eps, "a finite number above 0"));
        }
        attn_core::softmax_scale_or_default(self.scale, width)
    }

    /// The state before the first token: parts `W [batch, heads, width, width]`, `c [batch, heads, 1, width]`, and the sums of the
    /// present mini-batch that will change them.
    ///
    /// # Errors
    /// [`AttnError`] naming the option or parameter that does not fit.
    pub fn state(&self, inputs: &TttInputs<'_>) -> Result<ScanState> {
        let [batch, heads, ..] = inputs.v.shape();
        Ok(ScanState::new(&self.cell_of(inputs)?, sequences_of(inputs.cu_seqlens, batch), heads))
    }

    /// Writes `out (batch, heads, length, width)`; `state` moves to the end.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward(
        &self,
        inputs: &TttInputs<'_>,
        out: OutMut<'_>,
        state: Option<&mut ScanState>,
    ) -> Result<()> {
        let cell = self.cell_of(inputs)?;
        forward(&cell, &inputs.tokens(&cell)?, out, state)
    }

    /// Gradients, given those by the output; `state` is the one before the first token.
    ///
    /// # Errors
    /// As [`TttLinear::forward`].
    pub fn backward(
        &self,
        inputs: &TttInputs<'_>,
        state: Option<&ScanState>,
        grad_out: &TensorView<'_>,
    ) -> Result<TttGrads> {
        let cell = self.cell_of(inputs)?;
        let all = backward(&cell, &inputs.tokens(&cell)?, state, grad_out, None)?;
        let [_, heads, _, width] = inputs.v.shape();
        let (mut norm_weight, mut norm_bias) = (vec![0.0; heads * width], vec![0.0; heads * width]);
        for (memory, params) in all.params.iter().enumerate() {
            let at = memory % heads * width;
            let (weight, bias) = params.split_at(width);
            norm_weight[at..at + width].iter_mut().zip(weight).for_each(|(sum, x)| *sum += x);
            norm_bias[at..at + width].iter_mut().zip(bias).for_each(|(sum, x)| *sum += x);
        }
        let mut by = all.inputs.into_iter();
        let mut next = || by.next().unwrap_or_default();
        let (q, k, v, eta) = (next(), next(), next(), next());
        Ok(TttGrads { q, k, v, eta, norm_weight, norm_bias, state: all.state })
    }
}

impl<'a> TttInputs<'a> {
    fn tokens(&self, cell: &TttCell) -> Result<Tokens<'a>> {
        Tokens::new(cell, &[("q", self.q), ("k", self.k), ("v", self.v), ("eta", self.eta)])?
            .packed(self.cu_seqlens)
    }
}

impl ScanVariant for TttLinear {
    const NAME: &'static str = "ttt-linear";
    type Cell = TttCell;

    fn cell(&self, n_heads_q: usize, _: usize, head_dim_v: usize) -> Result<TttCell> {
        let scale = self.check(head_dim_v)?;
        let norm = (vec![1.0; n_heads_q * head_dim_v], vec![0.0; n_heads_q * head_dim_v]);
        let eta = Some(1.0 / (self.mini_batch * head_dim_v) as f32);
        Ok(TttCell { options: *self, scale, width: head_dim_v, eta, norm })
    }

    fn define(&self, head: HeadInputs<'_>) -> Vec<f64> {
        let d = head.head_dim_v;
        let (n, eps) = (d as f64, f64::from(self.eps));
        let scale = self.scale.map_or(1.0 / n.sqrt(), f64::from);
        let eta = f64::from(1.0 / (self.mini_batch * d) as f32);
        let norm = |x: &[f64]| -> (Vec<f64>, f64) {
            let mean = x.iter().sum::<f64>() / n;
            let s = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + eps).sqrt();
            (x.iter().map(|x| (x - mean) / s).collect(), s)
        };
        let (mut w, mut c) = (vec![0.0; d * d], vec![0.0; d]);
        let apply = |x: &[f64], w: &[f64], c: &[f64]| -> Vec<f64> {
            (0..d).map(|j| c[j] + (0..d).map(|i| x[i] * w[i * d + j]).sum::<f64>()).collect()
        };
        let mut out = Vec::with_capacity(head.v.len());
        let all: Vec<usize> = (0..head.len()).collect();
        for batch in all.chunks(self.mini_batch) {
            let (mut dw, mut dc) = (vec![0.0; d * d], vec![0.0; d]);
            for &t in batch {
                let row: Vec<[f64; 3]> = (0..d).map(|c| head.channel(t, c)).collect();
                let k: Vec<f64> = row.iter().map(|[_, k, _]| *k).collect();
                let q: Vec<f64> = row.iter().map(|[q, ..]| scale * q).collect();
                let (normal, s) = norm(&apply(&k, &w, &c));
                let e: Vec<f64> = (0..d).map(|i| normal[i] - row[i][2] + k[i]).collect();
                let mean = e.iter().sum::<f64>() / n;
                let along = e.iter().zip(&normal).map(|(e, x)| e * x).sum::<f64>() / n;
                for j in 0..d {
                    let g = (e[j] - mean - normal[j] * along) / s;
                    dc[j] += g;
                    (0..d).for_each(|i| dw[i * d + j] += k[i] * g);
                }
                let stepped: Vec<f64> = w.iter().zip(&dw).map(|(w, d)| w - eta * d).collect();
                let bias: Vec<f64> = c.iter().zip(&dc).map(|(c, d)| c - eta * d).collect();
                let r = apply(&q, &stepped, &bias);
                out.extend(norm(&r).0.iter().zip(&r).map(|(x, r)| x + r));
            }
            w.iter_mut().zip(&dw).for_each(|(w, d)| *w -= eta * d);
            c.iter_mut().zip(&dc).for_each(|(c, d)| *c -= eta * d);
        }
        out
    }

    fn flops(&self, _: usize, head_dim_v: usize) -> usize {
        2 * head_dim_v * (4 * head_dim_v + 2 * self.mini_batch)
    }

    /// Normalising a row of nearly equal numbers divides by their spread.
    fn max_error(&self) -> f64 {
        1e-3
    }
}
