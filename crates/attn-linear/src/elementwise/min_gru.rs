//! minGRU: a recurrent unit whose gates do not look at the state.
//!
//! ```text
//! z_t = sigmoid(a_t)      h_t = (1 - z_t) h_(t-1) + z_t c_t
//! ```
//!
//! with the pre-activations `a` of the update gate and the candidates `c`. As attention `a = k`, `c = v` and
//! `o_t = sigmoid(q_t) h_t`, channel by channel; with `head_dim_v > head_dim` queries and keys start over from their first
//! channel.
//!
//! Source: Feng, Tung, Ahmed, Bengio, Hajimirsadeghi 2024 (Were RNNs All We Needed?), section 3.1.

use super::front::ElementCell;
use super::hgrn::SigmoidGate;
use crate::scan::math::sigmoid64;
use crate::scan::{HeadInputs, ScanState, ScanVariant, Tokens, backward, forward, sequences_of};
use attn_core::{OutMut, Result, TensorView};

/// minGRU, see the [module](self).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct MinGru;

/// Token rows, `(batch, heads, length, width)` each.
#[derive(Debug, Clone, Copy)]
pub struct MinGruInputs<'a> {
    /// Pre-activations `a` of the update gate.
    pub update: TensorView<'a>,
    /// Candidates `c`.
    pub candidate: TensorView<'a>,
    /// Prefix sums of the lengths of sequences packed one behind the other, from 0 to all tokens: each is a run of its own, and has
    /// a batch entry of its own in states.
    pub cu_seqlens: Option<&'a [usize]>,
}

/// Gradients by [`MinGruInputs`], of their shapes, and by the initial state `[batch, heads, width]`.
#[derive(Debug, Clone, PartialEq)]
pub struct MinGruGrads {
    /// By `update`.
    pub update: Vec<f32>,
    /// By `candidate`.
    pub candidate: Vec<f32>,
    /// By the initial state.
    pub state: Vec<f32>,
}

impl MinGru {
    /// The state before the first token: part 0 is `h [batch, heads, 1, width]`.
    pub fn state(inputs: &MinGruInputs<'_>) -> ScanState {
        let [batch, heads, _, width] = inputs.candidate.shape();
        ScanState::new(&cell(width, false), sequences_of(inputs.cu_seqlens, batch), heads)
    }

    /// Writes all `h_t` to `out (batch, heads, length, width)`; `state` moves to the end.
    ///
    /// # Errors
    /// [`attn_core::AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward(inputs: &MinGruInputs<'_>, out: OutMut<'_>, state: Option<&mut ScanState>) -> Result<()> {
        let cell = cell(inputs.candidate.shape()[3], false);
        forward(&cell, &inputs.tokens(&cell)?, out, state)
    }

    /// Gradients, given those by the output; `state` is the one before the first token.
    ///
    /// # Errors
    /// As [`MinGru::forward`].
    pub fn backward(
        inputs: &MinGruInputs<'_>,
        state: Option<&ScanState>,
        grad_out: &TensorView<'_>,
    ) -> Result<MinGruGrads> {
        let cell = cell(inputs.candidate.shape()[3], false);
        let mut all = backward(&cell, &inputs.tokens(&cell)?, state, grad_out, None)?;
        let candidate = all.inputs.pop().unwrap_or_default();
        let update = all.inputs.pop().unwrap_or_default();
        Ok(MinGruGrads { update, candidate, state: all.state.part(0) })
    }

    /// The definition of one head in f64: `update`, `candidate [length, width]` from `h [width]`, which moves to the end.
    pub fn naive(update: &[f64], candidate: &[f64], h: &mut [f64]) -> Vec<f64> {
        let rows = update.chunks_exact(h.len()).zip(candidate.chunks_exact(h.len()));
        rows.flat_map(|(a, c)| {
            for (h, (a, c)) in h.iter_mut().zip(a.iter().zip(c)) {
                let z = sigmoid64(*a);
                *h = (1.0 - z) * *h + z * c;
            }
            h.to_vec()
        })
        .collect()
    }
}

impl<'a> MinGruInputs<'a> {
    fn tokens(&self, cell: &ElementCell<SigmoidGate>) -> Result<Tokens<'a>> {
        Tokens::new(cell, &[("update", self.update), ("candidate", self.candidate)])?.packed(self.cu_seqlens)
    }
}

fn cell(width: usize, gated: bool) -> ElementCell<SigmoidGate> {
    ElementCell { front: SigmoidGate { sign: 1.0, share: 1.0 }, width, gated, params: Vec::new() }
}

impl ScanVariant for MinGru {
    const NAME: &'static str = "mingru";
    type Cell = ElementCell<SigmoidGate>;

    fn cell(&self, _: usize, _: usize, head_dim_v: usize) -> Result<Self::Cell> {
        Ok(cell(head_dim_v, true))
    }

    fn define(&self, head: HeadInputs<'_>) -> Vec<f64> {
        let mut h = vec![0.0; head.head_dim_v];
        let mut out = Vec::with_capacity(head.v.len());
        for t in 0..head.len() {
            for (c, h) in h.iter_mut().enumerate() {
                let [q, k, v] = head.channel(t, c);
                let z = sigmoid64(k);
                *h = (1.0 - z) * *h + z * v;
                out.push(sigmoid64(q) * *h);
            }
        }
        out
    }

    fn flops(&self, _: usize, head_dim_v: usize) -> usize {
        6 * head_dim_v
    }
}
