//! RWKV-4: a running softmax a channel, fading at a constant rate, with a bonus for the present token.
//!
//! ```text
//! o_t = (N_(t-1) + e^(u + k_t) v_t) / (D_(t-1) + e^(u + k_t))
//! N_t = e^w N_(t-1) + e^(k_t) v_t      D_t = e^w D_(t-1) + e^(k_t)      w = -e^time_decay,  u = time_first
//! ```
//!
//! The state is `(num, den, max)` with `N = num e^max`, `D = den e^max`. As attention the output is gated by
//! `sigmoid(q)`, the receptance, and `w`, `u` are those RWKV starts training with, spread over the channels; with
//! `head_dim_v > head_dim` queries and keys start over from their first channel.
//!
//! Source: Peng et al. 2023 (RWKV: Reinventing RNNs for the Transformer Era), equations 16 to 19 and appendix D.

use super::log_sum_cell::LogSumCell;
use crate::scan::math::sigmoid64;
use crate::scan::{HeadInputs, ScanState, ScanVariant, Tokens, backward, forward, sequences_of};
use attn_core::{AttnError, OutMut, Result, TensorView};

/// RWKV-4, see the [module](self).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rwkv4;

/// Token rows `(batch, heads, length, width)` and what belongs to channels, `[heads, width]`.
#[derive(Debug, Clone, Copy)]
pub struct Rwkv4Inputs<'a> {
    /// Keys.
    pub k: TensorView<'a>,
    /// Values.
    pub v: TensorView<'a>,
    /// The log decay is `-e^time_decay`.
    pub time_decay: &'a [f32],
    /// Added to the key of the present token.
    pub time_first: &'a [f32],
    /// Prefix sums of the lengths of sequences packed one behind the other, from 0 to all tokens: each is a run of its own, and has
    /// a batch entry of its own in states.
    pub cu_seqlens: Option<&'a [usize]>,
}

/// Gradients by [`Rwkv4Inputs`], of their shapes, and by the initial state.
#[derive(Debug, Clone, PartialEq)]
pub struct Rwkv4Grads {
    /// By `k`.
    pub k: Vec<f32>,
    /// By `v`.
    pub v: Vec<f32>,
    /// By `time_decay`.
    pub time_decay: Vec<f32>,
    /// By `time_first`.
    pub time_first: Vec<f32>,
    /// By the initial numerator, denominator and maximum, `[batch, heads, width]` each.
    pub state: [Vec<f32>; 3],
}

impl Rwkv4Inputs<'_> {
    fn cell(&self) -> Result<LogSumCell> {
        let [_, heads, _, width] = self.v.shape();
        for (name, data) in [("time_decay", self.time_decay), ("time_first", self.time_first)] {
            if data.len() != heads * width {
                return Err(AttnError::shape(name, "elements", data.len(), heads * width));
            }
        }
        let at = |h: usize, c: usize| h * width + c;
        let decay = |h, c| -self.time_decay[at(h, c)].exp();
        Ok(LogSumCell::new(width, false, heads, decay, |h, c| self.time_first[at(h, c)]))
    }
}

impl<'a> Rwkv4Inputs<'a> {
    fn tokens(&self, cell: &LogSumCell) -> Result<Tokens<'a>> {
        Tokens::new(cell, &[("k", self.k), ("v", self.v)])?.packed(self.cu_seqlens)
    }
}

impl Rwkv4 {
    /// The state before the first token: parts numerator, denominator, maximum, `[batch, heads, 1, width]` each.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for channel parameters of another length.
    pub fn state(inputs: &Rwkv4Inputs<'_>) -> Result<ScanState> {
        let [batch, heads, ..] = inputs.v.shape();
        Ok(ScanState::new(&inputs.cell()?, sequences_of(inputs.cu_seqlens, batch), heads))
    }

    /// Writes `out (batch, heads, length, width)`; `state` moves to the end.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward(inputs: &Rwkv4Inputs<'_>, out: OutMut<'_>, state: Option<&mut ScanState>) -> Result<()> {
        let cell = inputs.cell()?;
        forward(&cell, &inputs.tokens(&cell)?, out, state)
    }

    /// Gradients, given those by the output; `state` is the one before the first token.
    ///
    /// # Errors
    /// As [`Rwkv4::forward`].
    pub fn backward(
        inputs: &Rwkv4Inputs<'_>,
        state: Option<&ScanState>,
        grad_out: &TensorView<'_>,
    ) -> Result<Rwkv4Grads> {
        let cell = inputs.cell()?;
        let mut all = backward(&cell, &inputs.tokens(&cell)?, state, grad_out, None)?;
        let [batch, heads, _, width] = inputs.v.shape();
        let (mut time_decay, mut time_first) = (vec![0.0; heads * width], vec![0.0; heads * width]);
        for (memory, params) in all.params.iter().enumerate() {
            let (dw, du) = params.split_at(params.len() / 2);
            let head = memory % heads;
            for c in 0..width {
                let at = head * width + c;
                // w = -e^time_decay, so dw/dtime_decay = w.
                time_decay[at] -= dw[c] * inputs.time_decay[at].exp();
                time_first[at] += du[c];
            }
        }
        // The gradient by N_0 is a e^p, and N_0 = num e^max.
        let before = match state {
            Some(state) => state.clone(),
            None => ScanState::new(&cell, sequences_of(inputs.cu_seqlens, batch), heads),
        };
        let [num, den, max] = [0, 1, 2].map(|part| before.part(part));
        let [a, b, p] = [0, 1, 2].map(|part| all.state.part(part));
        let unit: Vec<f32> = p.iter().zip(&max).map(|(p, max)| (p + max).exp()).collect();
        let by = |a: &[f32]| -> Vec<f32> { a.iter().zip(&unit).map(|(a, unit)| a * unit).collect() };
        let (by_num, by_den) = (by(&a), by(&b));
        let sums = by_num.iter().zip(&num).zip(by_den.iter().zip(&den));
        let by_max = sums.map(|((a, n), (b, d))| a * n + b * d).collect();
        let v = all.inputs.pop().unwrap_or_default();
        let k = all.inputs.pop().unwrap_or_default();
        Ok(Rwkv4Grads { k, v, time_decay, time_first, state: [by_num, by_den, by_max] })
    }

    /// The definition of one channel in f64, from the true `(N, D)`, which move to the end.
    pub fn naive(k: &[f64], v: &[f64], w: f64, u: f64, state: &mut [f64; 2]) -> Vec<f64> {
        let rows = k.iter().zip(v);
        rows.map(|(k, v)| {
            let [n, d] = *state;
            *state = [w.exp() * n + k.exp() * v, w.exp() * d + k.exp()];
            (n + (u + k).exp() * v) / (d + (u + k).exp())
        })
        .collect()
    }

    /// Log decay and bonus that training starts with, of channel `c` of `width`.
    fn start(c: usize, width: usize) -> (f32, f32) {
        let share = c as f32 / (width.max(2) - 1) as f32;
        let time_decay = -5.0 + 8.0 * share.powf(0.7);
        let zigzag = ((c + 1) % 3) as f32 - 1.0;
        (-time_decay.exp(), 0.3f32.ln() + 0.5 * zigzag)
    }
}

impl ScanVariant for Rwkv4 {
    const NAME: &'static str = "rwkv4";
    type Cell = LogSumCell;

    fn cell(&self, n_heads_q: usize, _: usize, head_dim_v: usize) -> Result<LogSumCell> {
        let of = |c| Self::start(c, head_dim_v);
        Ok(LogSumCell::new(head_dim_v, true, n_heads_q, |_, c| of(c).0, |_, c| of(c).1))
    }

    fn define(&self, head: HeadInputs<'_>) -> Vec<f64> {
        let width = head.head_dim_v;
        let mut out = vec![0.0; head.v.len()];
        for c in 0..width {
            let rows: Vec<[f64; 3]> = (0..head.len()).map(|t| head.channel(t, c)).collect();
            let k: Vec<f64> = rows.iter().map(|[_, k, _]| *k).collect();
            let v: Vec<f64> = rows.iter().map(|[_, _, v]| *v).collect();
            let (w, u) = Self::start(c, width);
            let o = Self::naive(&k, &v, w.into(), u.into(), &mut [0.0; 2]);
            for (t, (o, [q, ..])) in o.iter().zip(&rows).enumerate() {
                out[t * width + c] = sigmoid64(*q) * o;
            }
        }
        out
    }

    fn flops(&self, _: usize, head_dim_v: usize) -> usize {
        12 * head_dim_v
    }
}
