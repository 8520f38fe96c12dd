//! The running softmax of a channel as a cell, with an output gate if wanted.

use super::front::{gate, gate_back, panels, reborrow};
use crate::scan::cell::{Cell, Panel, PanelMut, Piece, PieceGrads};
use crate::scan::log_sum::{LogSumBack, NO_MAX, Triple, log_sum, log_sum_back};
use attn_core::simd::Simd;
use attn_core::tile::MAX_LANES;

/// Reads `k, v`, and with `gated` before them the pre-activations of the output gate. The state is (numerator, denominator,
/// maximum), one row each; its gradient is `(a, b, p)`, see [`crate::scan::log_sum`].
#[derive(Debug, Clone)]
pub struct LogSumCell {
    width: usize,
    gated: bool,
    /// `[heads, channels padded to vectors]`, at most 0.
    decay: Vec<f32>,
    /// As `decay`.
    bonus: Vec<f32>,
}

impl LogSumCell {
    /// `decay(head, channel)` and `bonus(head, channel)` are the logs `w` and `u`.
    pub(crate) fn new(
        width: usize,
        gated: bool,
        heads: usize,
        decay: impl Fn(usize, usize) -> f32,
        bonus: impl Fn(usize, usize) -> f32,
    ) -> Self {
        let stride = width.next_multiple_of(MAX_LANES);
        let padded = |of: &dyn Fn(usize, usize) -> f32| {
            let rows = (0..heads).flat_map(|h| (0..stride).map(move |c| (h, c)));
            rows.map(|(h, c)| if c < width { of(h, c) } else { 0.0 }).collect()
        };
        Self { width, gated, decay: padded(&decay), bonus: padded(&bonus) }
    }

    fn stride(&self) -> usize {
        self.width.next_multiple_of(MAX_LANES)
    }

    fn of_head(&self, head: usize) -> (&[f32], &[f32]) {
        let range = head * self.stride()..(head + 1) * self.stride();
        (&self.decay[range.clone()], &self.bonus[range])
    }
}

impl Cell for LogSumCell {
    fn inputs(&self) -> Vec<usize> {
        vec![self.width; 2 + usize::from(self.gated)]
    }

    fn out_width(&self) -> usize {
        self.width
    }

    fn state(&self) -> Vec<[usize; 2]> {
        vec![[1, self.width]; 3]
    }

    fn initial(&self, part: usize) -> f32 {
        if part == 2 { NO_MAX } else { 0.0 }
    }

    fn initial_grad(&self, part: usize) -> f32 {
        if part == 2 { NO_MAX } else { 0.0 }
    }

    /// By `w`, then by `u`.
    fn params(&self) -> usize {
        2 * self.stride()
    }

    fn scratch(&self, len: usize) -> usize {
        (5 * len + 3) * self.stride()
    }

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        mut out: PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        let [num, den, max] = state else { return };
        let triple = Triple { num, den, max };
        let options = self.of_head(piece.head);
        let at = usize::from(self.gated);
        let kv = (piece.inputs[at], piece.inputs[at + 1]);
        if self.gated {
            let [mut o] = panels(scratch, piece.len, self.stride());
            log_sum(simd, piece.len, kv, options, triple, reborrow(&mut o));
            gate(simd, piece.len, piece.inputs[0], o.as_panel(), &mut out);
        } else {
            log_sum(simd, piece.len, kv, options, triple, out);
        }
    }

    #[inline(always)]
    fn backward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &[&[f32]],
        grads: PieceGrads<'_, '_>,
        scratch: &mut [f32],
    ) {
        let (len, stride) = (piece.len, self.stride());
        let (scratch, rows) = scratch.split_at_mut(5 * len * stride);
        let [nums, dens, maxs, mut o, mut dout] = panels(scratch, len, stride);
        let (decay, bonus) = self.of_head(piece.head);
        let at = usize::from(self.gated);
        let (k, v) = (piece.inputs[at], piece.inputs[at + 1]);
        let PieceGrads { out, state: grad_state, inputs, params } = grads;
        let (dq, kv) = inputs.split_at_mut(at);
        let grad: Panel<'_> = match dq {
            [dq] => {
                let parts = rows.chunks_exact_mut(stride).zip(state);
                parts.for_each(|(to, from)| to.copy_from_slice(from));
                let (num, rest) = rows.split_at_mut(stride);
                let (den, max) = rest.split_at_mut(stride);
                log_sum(simd, len, (k, v), (decay, bonus), Triple { num, den, max }, reborrow(&mut o));
                gate_back(simd, len, (piece.inputs[0], o.as_panel(), out), dq, &mut dout);
                dout.as_panel()
            }
            _ => out,
        };
        let ([dk, dv], [a, b, p]) = (kv, grad_state) else { return };
        let before = [state[0], state[1], state[2]];
        let given = LogSumBack { len, k, v, decay, bonus, before, grad };
        let (dw, du) = params.split_at_mut(stride);
        let triple = Triple { num: a, den: b, max: p };
        log_sum_back(simd, given, triple, [nums, dens, maxs], (reborrow(dk), reborrow(dv)), (dw, du));
    }
}
