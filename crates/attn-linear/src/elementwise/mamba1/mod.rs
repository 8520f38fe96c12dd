//! Mamba-1 (S6): a selective state space a channel.
//!
//! ```text
//! s_t = softplus(dt_t + dt_bias)                                                    a channel
//! h_t[n, c] = e^(A[n, c] s_t[c]) h_(t-1)[n, c] + B_t[n] s_t[c] u_t[c]
//! o_t[c] = (sum_n C_t[n] h_t[n, c] + D[c] u_t[c]) silu(z_t[c])                      A < 0
//! ```
//!
//! As attention `C = q`, `B = k`, `u = v`, no `z`, and the constants Mamba starts training with: `A[n, .] = -(n + 1)`, `D = 1`,
//! `s` from 0.001 to 0.1 over the channels.
//!
//! Source: Gu and Dao 2023 (Mamba: Linear-Time Sequence Modeling with Selective State Spaces), algorithm 2; the convolution
//! before it stays outside.

mod cell;

use crate::scan::{HeadInputs, ScanState, ScanVariant, Tokens, backward, forward, sequences_of};
use attn_core::{AttnError, OutMut, Result, TensorView};
pub use cell::Mamba1Cell;
use cell::Steps;

/// Mamba-1, see the [module](self).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Mamba1;

/// Token rows `(batch, heads, length, width)` and what belongs to channels. All channels are one head, or blocks of them are
/// heads: then `b` and `c` have one head which all share.
#[derive(Debug, Clone, Copy)]
pub struct Mamba1Inputs<'a> {
    /// What is written, `[.., width]`.
    pub u: TensorView<'a>,
    /// Step sizes before `dt_bias` and softplus, `[.., width]`.
    pub dt: TensorView<'a>,
    /// `[.., state]`.
    pub b: TensorView<'a>,
    /// `[.., state]`.
    pub c: TensorView<'a>,
    /// Pre-activations of the output gate, `[.., width]`.
    pub z: Option<TensorView<'a>>,
    /// `[heads, width, state]`, below 0.
    pub a: &'a [f32],
    /// `[heads, width]`.
    pub d: Option<&'a [f32]>,
    /// `[heads, width]`.
    pub dt_bias: Option<&'a [f32]>,
    /// Prefix sums of the lengths of sequences packed one behind the other, from 0 to all tokens: each is a run of its own, and has
    /// a batch entry of its own in states.
    pub cu_seqlens: Option<&'a [usize]>,
}

/// Gradients by [`Mamba1Inputs`], of their shapes, and by the initial state `[batch, heads, state, width]`.
#[derive(Debug, Clone, PartialEq)]
pub struct Mamba1Grads {
    /// By `u`.
    pub u: Vec<f32>,
    /// By `dt`.
    pub dt: Vec<f32>,
    /// By `b`.
    pub b: Vec<f32>,
    /// By `c`.
    pub c: Vec<f32>,
    /// By `z`; empty without.
    pub z: Vec<f32>,
    /// By `a`.
    pub a: Vec<f32>,
    /// By `d`.
    pub d: Vec<f32>,
    /// By `dt_bias`.
    pub dt_bias: Vec<f32>,
    /// By the initial state.
    pub state: Vec<f32>,
}

impl<'a> Mamba1Inputs<'a> {
    fn cell(&self) -> Result<Mamba1Cell> {
        let [_, heads, _, width] = self.u.shape();
        let rows = self.b.shape()[3];
        if self.a.len() != heads * width * rows {
            return Err(AttnError::shape("a", "elements", self.a.len(), heads * width * rows));
        }
        for (name, data) in [("d", self.d), ("dt_bias", self.dt_bias)] {
            if let Some(data) = data
                && data.len() != heads * width
            {
                return Err(AttnError::shape(name, "elements", data.len(), heads * width));
            }
        }
        let at = |h: usize, c: usize| h * width + c;
        let mut cell = Mamba1Cell::new([heads, rows, width], |h, n, c| self.a[at(h, c) * rows + n]);
        cell.set_channels(2, |h, c| self.d.map_or(0.0, |d| d[at(h, c)]));
        cell.set_channels(3, |h, c| self.dt_bias.map_or(0.0, |bias| bias[at(h, c)]));
        Ok(Mamba1Cell { steps: Steps::Given, gated: self.z.is_some(), ..cell })
    }

    fn tokens(&self, cell: &Mamba1Cell) -> Result<Tokens<'a>> {
        let mut all = vec![("c", self.c), ("b", self.b), ("u", self.u), ("dt", self.dt)];
        all.extend(self.z.map(|z| ("z", z)));
        Tokens::new(cell, &all)?.packed(self.cu_seqlens)
    }
}

impl Mamba1 {
    /// The state before the first token: part 0 is `h [batch, heads, state, width]`.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for channel parameters of another length.
    pub fn state(inputs: &Mamba1Inputs<'_>) -> Result<ScanState> {
        let [batch, heads, ..] = inputs.u.shape();
        Ok(ScanState::new(&inputs.cell()?, sequences_of(inputs.cu_seqlens, batch), heads))
    }

    /// Writes `out (batch, heads, length, width)`; `state` moves to the end.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward(inputs: &Mamba1Inputs<'_>, out: OutMut<'_>, state: Option<&mut ScanState>) -> Result<()> {
        let cell = inputs.cell()?;
        forward(&cell, &inputs.tokens(&cell)?, out, state)
    }

    /// Gradients, given those by the output; `state` is the one before the first token.
    ///
    /// # Errors
    /// As [`Mamba1::forward`].
    pub fn backward(
        inputs: &Mamba1Inputs<'_>,
        state: Option<&ScanState>,
        grad_out: &TensorView<'_>,
    ) -> Result<Mamba1Grads> {
        let cell = inputs.cell()?;
        let all = backward(&cell, &inputs.tokens(&cell)?, state, grad_out, None)?;
        let [_, heads, _, width] = inputs.u.shape();
        let (rows, stride) = (cell.rows, cell.stride());
        let mut a = vec![0.0; heads * width * rows];
        let (mut d, mut dt_bias) = (vec![0.0; heads * width], vec![0.0; heads * width]);
        for (memory, params) in all.params.iter().enumerate() {
            for c in 0..width {
                let at = memory % heads * width + c;
                (0..rows).for_each(|n| a[at * rows + n] += params[n * stride + c]);
                d[at] += params[rows * stride + c];
                dt_bias[at] += params[(rows + 1) * stride + c];
            }
        }
        let mut by = all.inputs.into_iter();
        let mut next = || by.next().unwrap_or_default();
        let (c, b, u, dt, z) = (next(), next(), next(), next(), next());
        Ok(Mamba1Grads { u, dt, b, c, z, a, d, dt_bias, state: all.state.part(0) })
    }

    /// The definition of one token of one channel in f64: moves `h [state]` and gives the read, before `D u` and the gate.
    pub fn naive_step(step: f64, u: f64, a: &[f64], b: &[f64], c: &[f64], h: &mut [f64]) -> f64 {
        for (n, h) in h.iter_mut().enumerate() {
            *h = (a[n] * step).exp() * *h + b[n] * step * u;
        }
        h.iter().zip(c).map(|(h, c)| h * c).sum()
    }

    /// Step size of channel `c` of `width` in the form on q, k and v.
    fn constant_step(c: usize, width: usize) -> f32 {
        0.001 * 100f32.powf(c as f32 / (width.max(2) - 1) as f32)
    }
}

impl ScanVariant for Mamba1 {
    const NAME: &'static str = "mamba1";
    type Cell = Mamba1Cell;

    fn cell(&self, n_heads_q: usize, head_dim: usize, head_dim_v: usize) -> Result<Mamba1Cell> {
        let mut cell = Mamba1Cell::new([n_heads_q, head_dim, head_dim_v], |_, n, _| -((n + 1) as f32));
        cell.set_channels(2, |_, _| 1.0);
        let mut steps = vec![0.0; cell.stride()];
        steps[..head_dim_v].iter_mut().enumerate().for_each(|(c, s)| *s = Self::constant_step(c, head_dim_v));
        Ok(Mamba1Cell { steps: Steps::Constant(steps), ..cell })
    }

    fn define(&self, head: HeadInputs<'_>) -> Vec<f64> {
        let (keys, width) = (head.head_dim, head.head_dim_v);
        let a: Vec<f64> = (0..keys).map(|n| -((n + 1) as f64)).collect();
        let mut h = vec![vec![0.0; keys]; width];
        let mut out = Vec::with_capacity(head.v.len());
        let rows = head.q.chunks_exact(keys).zip(head.k.chunks_exact(keys)).zip(head.v.chunks_exact(width));
        for ((q, k), v) in rows {
            for (c, h) in h.iter_mut().enumerate() {
                let step = f64::from(Self::constant_step(c, width));
                out.push(Self::naive_step(step, v[c], &a, k, q, h) + v[c]);
            }
        }
        out
    }

    fn flops(&self, head_dim: usize, head_dim_v: usize) -> usize {
        20 * head_dim * head_dim_v
    }
}
