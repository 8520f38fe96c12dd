//! HGRN: a gated linear recurrence a channel.
//!
//! ```text
//! h_t = e^(g_t) h_(t-1) + x_t
//! ```
//!
//! As attention, with the lower bound `b` of the forget gate:
//!
//! ```text
//! f_t = b + (1 - b) sigmoid(k_t)      h_t = f_t h_(t-1) + (1 - f_t) v_t      o_t = sigmoid(q_t) h_t
//! ```
//!
//! channel by channel; with `head_dim_v > head_dim` queries and keys start over from their first channel.
//!
//! Source: Qin, Yang, Zhong 2023 (Hierarchically Gated Recurrent Neural Network); the layer's norms stay outside.

use super::front::{Channels, ElementCell, Front};
use crate::scan::math::{loss, sigmoid, sigmoid64};
use crate::scan::{HeadInputs, ScanState, ScanVariant, Tokens, backward, forward, sequences_of};
use attn_core::simd::{Simd, SimdBase};
use attn_core::{AttnError, OutMut, Result, TensorView};

/// HGRN, see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Hgrn {
    /// Smallest forget gate, in `[0, 1)`; used by the form on q, k and v.
    pub lower_bound: f32,
}

impl Default for Hgrn {
    fn default() -> Self {
        Self { lower_bound: 0.0 }
    }
}

/// Token rows of the recurrence itself, `(batch, heads, length, width)` each.
#[derive(Debug, Clone, Copy)]
pub struct HgrnInputs<'a> {
    /// What is written.
    pub x: TensorView<'a>,
    /// Natural log of the decay, at most 0.
    pub log_decay: TensorView<'a>,
    /// Prefix sums of the lengths of sequences packed one behind the other, from 0 to all tokens: each is a run of its own, and has
    /// a batch entry of its own in states.
    pub cu_seqlens: Option<&'a [usize]>,
}

/// Gradients by [`HgrnInputs`], of their shapes, and by the initial state `[batch, heads, width]`.
#[derive(Debug, Clone, PartialEq)]
pub struct HgrnGrads {
    /// By `x`.
    pub x: Vec<f32>,
    /// By `log_decay`.
    pub log_decay: Vec<f32>,
    /// By the initial state.
    pub state: Vec<f32>,
}

impl Hgrn {
    /// The state before the first token: part 0 is `h [batch, heads, 1, width]`.
    pub fn state(inputs: &HgrnInputs<'_>) -> ScanState {
        let [batch, heads, _, width] = inputs.x.shape();
        ScanState::new(&raw(width), sequences_of(inputs.cu_seqlens, batch), heads)
    }

    /// Writes all `h_t` to `out (batch, heads, length, width)`; `state` moves to the end.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward(inputs: &HgrnInputs<'_>, out: OutMut<'_>, state: Option<&mut ScanState>) -> Result<()> {
        let cell = raw(inputs.x.shape()[3]);
        forward(&cell, &inputs.tokens(&cell)?, out, state)
    }

    /// Gradients, given those by the output; `state` is the one before the first token.
    ///
    /// # Errors
    /// As [`Hgrn::forward`].
    pub fn backward(
        inputs: &HgrnInputs<'_>,
        state: Option<&ScanState>,
        grad_out: &TensorView<'_>,
    ) -> Result<HgrnGrads> {
        let cell = raw(inputs.x.shape()[3]);
        let mut all = backward(&cell, &inputs.tokens(&cell)?, state, grad_out, None)?;
        let (log_decay, x) = (all.inputs.pop(), all.inputs.pop());
        let (x, log_decay) = (x.unwrap_or_default(), log_decay.unwrap_or_default());
        Ok(HgrnGrads { x, log_decay, state: all.state.part(0) })
    }

    /// The definition of one head in f64: `x`, `log_decay [length, width]` from `h [width]`, which moves to the end.
    pub fn naive(x: &[f64], log_decay: &[f64], h: &mut [f64]) -> Vec<f64> {
        let rows = x.chunks_exact(h.len()).zip(log_decay.chunks_exact(h.len()));
        rows.flat_map(|(x, g)| {
            h.iter_mut().zip(x.iter().zip(g)).for_each(|(h, (x, g))| *h = g.exp() * *h + x);
            h.to_vec()
        })
        .collect()
    }
}

impl<'a> HgrnInputs<'a> {
    fn tokens(&self, cell: &ElementCell<LogDecay>) -> Result<Tokens<'a>> {
        Tokens::new(cell, &[("x", self.x), ("log_decay", self.log_decay)])?.packed(self.cu_seqlens)
    }
}

fn raw(width: usize) -> ElementCell<LogDecay> {
    ElementCell { front: LogDecay, width, gated: false, params: Vec::new() }
}

/// `x` and `g` as given.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogDecay;

impl Front for LogDecay {
    const INPUTS: usize = 2;

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        _: bool,
        _: S::f32s,
        [x, g, _]: Channels<S::f32s>,
    ) -> (S::f32s, S::f32s) {
        (loss(simd, g), x)
    }

    #[inline(always)]
    fn backward<S: Simd>(
        &self,
        simd: S,
        _: bool,
        _: S::f32s,
        [_, g, _]: Channels<S::f32s>,
        (dloss, dx): (S::f32s, S::f32s),
    ) -> (Channels<S::f32s>, S::f32s) {
        let zero = S::f32s::splat(simd, 0.0);
        // d(1 - e^g) = -e^g dg
        ([dx, -dloss * crate::scan::math::exp(simd, g), zero], zero)
    }
}

/// A gate from pre-activations `a` and a candidate `v`: `loss = share sigmoid(sign a)`, `x = loss v`.
#[derive(Debug, Clone, Copy)]
pub struct SigmoidGate {
    pub(crate) sign: f32,
    pub(crate) share: f32,
}

impl Front for SigmoidGate {
    const INPUTS: usize = 2;

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        _: bool,
        _: S::f32s,
        [a, v, _]: Channels<S::f32s>,
    ) -> (S::f32s, S::f32s) {
        let loss = sigmoid(simd, a * self.sign) * self.share;
        (loss, loss * v)
    }

    #[inline(always)]
    fn backward<S: Simd>(
        &self,
        simd: S,
        _: bool,
        _: S::f32s,
        [a, v, _]: Channels<S::f32s>,
        (dloss, dx): (S::f32s, S::f32s),
    ) -> (Channels<S::f32s>, S::f32s) {
        let zero = S::f32s::splat(simd, 0.0);
        let (s, other) = (sigmoid(simd, a * self.sign), sigmoid(simd, a * -self.sign));
        let by = (dloss + dx * v) * s * other * (self.share * self.sign);
        ([by, dx * s * self.share, zero], zero)
    }
}

impl ScanVariant for Hgrn {
    const NAME: &'static str = "hgrn";
    type Cell = ElementCell<SigmoidGate>;

    fn cell(&self, _: usize, _: usize, head_dim_v: usize) -> Result<Self::Cell> {
        if !(0.0..1.0).contains(&self.lower_bound) {
            return Err(AttnError::value("lower_bound", self.lower_bound, "at least 0 and below 1"));
        }
        // 1 - f = (1 - b) sigmoid(-k)
        let front = SigmoidGate { sign: -1.0, share: 1.0 - self.lower_bound };
        Ok(ElementCell { front, width: head_dim_v, gated: true, params: Vec::new() })
    }

    fn define(&self, head: HeadInputs<'_>) -> Vec<f64> {
        let b = f64::from(self.lower_bound);
        let mut h = vec![0.0; head.head_dim_v];
        let mut out = Vec::with_capacity(head.v.len());
        for t in 0..head.len() {
            for (c, h) in h.iter_mut().enumerate() {
                let [q, k, v] = head.channel(t, c);
                let f = b + (1.0 - b) * sigmoid64(k);
                *h = f * *h + (1.0 - f) * v;
                out.push(sigmoid64(q) * *h);
            }
        }
        out
    }

    fn flops(&self, _: usize, head_dim_v: usize) -> usize {
        6 * head_dim_v
    }
}
