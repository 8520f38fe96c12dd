//! Longhorn: each channel of the value is learned online by one implicit step of least squares, diagonally approximated.
//!
//! ```text
//! delta_t = beta_t / (1 + beta_t k_t . k_t)                                   a value channel
//! S_t[n, c] = (1 - k_t[n]^2 delta_t[c]) S_(t-1)[n, c] + k_t[n] delta_t[c] x_t[c]          o_t = S_t^T q_t
//! ```
//!
//! As attention `x = v` and `beta` is a constant.
//!
//! Source: Liu, Wang, Wu, Feng, Stone, Liu 2024 (Longhorn: State Space Models are Amortized Online Learners), equation 6.

use super::front::panels;
use crate::scan::cell::{Cell, Panel, PanelMut, Piece, PieceGrads};
use crate::scan::outer::{Outer, OuterGrads, OuterLoss};
use crate::scan::{HeadInputs, ScanState, ScanVariant, Tokens, backward, forward, sequences_of};
use attn_core::simd::{Simd, SimdBase};
use attn_core::tile::MAX_LANES;
use attn_core::{AttnError, OutMut, Result, TensorView};

/// Longhorn, see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Longhorn {
    /// Write strength of all tokens, above 0; used by the form on q, k and v.
    pub beta: f32,
}

impl Default for Longhorn {
    fn default() -> Self {
        Self { beta: 0.5 }
    }
}

/// Token rows, `(batch, heads, length, width)` each.
#[derive(Debug, Clone, Copy)]
pub struct LonghornInputs<'a> {
    /// `[.., head_dim]`.
    pub q: TensorView<'a>,
    /// `[.., head_dim]`.
    pub k: TensorView<'a>,
    /// What is written, `[.., head_dim_v]`.
    pub x: TensorView<'a>,
    /// Write strengths, above 0, `[.., head_dim_v]`.
    pub beta: TensorView<'a>,
    /// Prefix sums of the lengths of sequences packed one behind the other, from 0 to all tokens: each is a run of its own, and has
    /// a batch entry of its own in states.
    pub cu_seqlens: Option<&'a [usize]>,
}

/// Gradients by [`LonghornInputs`], of their shapes, and by the initial state `[batch, heads, head_dim, head_dim_v]`.
#[derive(Debug, Clone, PartialEq)]
pub struct LonghornGrads {
    /// By `q`.
    pub q: Vec<f32>,
    /// By `k`.
    pub k: Vec<f32>,
    /// By `x`.
    pub x: Vec<f32>,
    /// By `beta`.
    pub beta: Vec<f32>,
    /// By the initial state.
    pub state: Vec<f32>,
}

impl<'a> LonghornInputs<'a> {
    fn cell(&self) -> LonghornCell {
        LonghornCell { key_dim: self.k.shape()[3], value_dim: self.x.shape()[3], beta: None }
    }

    fn tokens(&self, cell: &LonghornCell) -> Result<Tokens<'a>> {
        Tokens::new(cell, &[("q", self.q), ("k", self.k), ("x", self.x), ("beta", self.beta)])?
            .packed(self.cu_seqlens)
    }
}

impl Longhorn {
    /// The state before the first token: part 0 is `S [batch, heads, head_dim, head_dim_v]`.
    pub fn state(inputs: &LonghornInputs<'_>) -> ScanState {
        let [batch, heads, ..] = inputs.q.shape();
        ScanState::new(&inputs.cell(), sequences_of(inputs.cu_seqlens, batch), heads)
    }

    /// Writes `out (batch, heads, length, head_dim_v)`; `state` moves to the end.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward(
        inputs: &LonghornInputs<'_>,
        out: OutMut<'_>,
        state: Option<&mut ScanState>,
    ) -> Result<()> {
        let cell = inputs.cell();
        forward(&cell, &inputs.tokens(&cell)?, out, state)
    }

    /// Gradients, given those by the output; `state` is the one before the first token.
    ///
    /// # Errors
    /// As [`Longhorn::forward`].
    pub fn backward(
        inputs: &LonghornInputs<'_>,
        state: Option<&ScanState>,
        grad_out: &TensorView<'_>,
    ) -> Result<LonghornGrads> {
        let cell = inputs.cell();
        let all = backward(&cell, &inputs.tokens(&cell)?, state, grad_out, None)?;
        let mut by = all.inputs.into_iter();
        let mut next = || by.next().unwrap_or_default();
        Ok(LonghornGrads { q: next(), k: next(), x: next(), beta: next(), state: all.state.part(0) })
    }

    /// The definition of one token in f64: moves `s [head_dim, head_dim_v]` and gives the read.
    pub fn naive_step(q: &[f64], k: &[f64], x: &[f64], beta: &[f64], s: &mut [f64]) -> Vec<f64> {
        let norm: f64 = k.iter().map(|k| k * k).sum();
        let mut out = vec![0.0; x.len()];
        for (n, row) in s.chunks_exact_mut(x.len()).enumerate() {
            for (c, s) in row.iter_mut().enumerate() {
                let delta = beta[c] / (1.0 + beta[c] * norm);
                *s = (1.0 - k[n] * k[n] * delta) * *s + k[n] * delta * x[c];
                out[c] += q[n] * *s;
            }
        }
        out
    }
}

/// Reads `q, k, x` and `beta` unless that is a constant.
#[derive(Debug, Clone)]
pub struct LonghornCell {
    key_dim: usize,
    value_dim: usize,
    beta: Option<f32>,
}

/// `l = k^2 delta`.
#[derive(Clone, Copy)]
struct KeySquared;

impl OuterLoss for KeySquared {
    #[inline(always)]
    fn loss<S: Simd>(self, _: S, key: f32, s: S::f32s, _: S::f32s) -> S::f32s {
        s * (key * key)
    }

    #[inline(always)]
    fn back<S: Simd>(self, simd: S, key: f32, s: S::f32s, _: S::f32s, by: S::f32s) -> [S::f32s; 3] {
        [by * s * (2.0 * key), by * (key * key), S::f32s::splat(simd, 0.0)]
    }
}

impl LonghornCell {
    fn stride(&self) -> usize {
        self.value_dim.next_multiple_of(MAX_LANES)
    }

    fn beta(&self, inputs: &[Panel<'_>], t: usize, c: usize) -> f32 {
        self.beta.unwrap_or_else(|| inputs[3].row(t)[c])
    }

    /// `delta` and `delta x` of all tokens.
    #[inline(always)]
    fn front(&self, piece: Piece<'_>, delta: &mut PanelMut<'_>, x: &mut PanelMut<'_>) {
        for t in 0..piece.len {
            let norm: f32 = piece.inputs[1].row(t).iter().map(|k| k * k).sum();
            let rows = delta.row(t).iter_mut().zip(x.row(t)).zip(piece.inputs[2].row(t));
            for (c, ((delta, x), from)) in rows.enumerate() {
                let beta = self.beta(piece.inputs, t, c);
                *delta = beta / (1.0 + beta * norm);
                *x = *delta * from;
            }
        }
    }
}

impl Cell for LonghornCell {
    fn inputs(&self) -> Vec<usize> {
        let mut widths = vec![self.key_dim, self.key_dim, self.value_dim];
        widths.extend(self.beta.is_none().then_some(self.value_dim));
        widths
    }

    fn out_width(&self) -> usize {
        self.value_dim
    }

    fn state(&self) -> Vec<[usize; 2]> {
        vec![[self.key_dim, self.value_dim]]
    }

    fn piece_len(&self) -> usize {
        32
    }

    fn scratch(&self, len: usize) -> usize {
        4 * len * self.stride() + Outer::scratch(len, self.key_dim)
    }

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        out: PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        let (scratch, rest) = scratch.split_at_mut(4 * piece.len * self.stride());
        let [mut s, mut x] = panels(scratch, piece.len, self.stride());
        self.front(piece, &mut s, &mut x);
        self.outer(piece, s.as_panel(), x.as_panel()).forward(simd, KeySquared, state[0], out.data, rest);
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
        let (scratch, rest) = scratch.split_at_mut(4 * piece.len * self.stride());
        let [mut s, mut x, mut ds, mut dx] = panels(scratch, piece.len, self.stride());
        self.front(piece, &mut s, &mut x);
        let [dq, dk, dv, dbeta @ ..] = grads.inputs else { return };
        let by = OuterGrads { read: dq.data, write: dk.data, s: ds.data, x: dx.data, a: &mut [] };
        let outer = self.outer(piece, s.as_panel(), x.as_panel());
        outer.backward(simd, KeySquared, (state[0], grads.out, grads.state[0]), by, rest);
        for t in 0..piece.len {
            let (k, v) = (piece.inputs[1].row(t), piece.inputs[2].row(t));
            let norm: f32 = k.iter().map(|k| k * k).sum();
            let (delta, ds, dx, dv) = (s.row(t), ds.row(t), dx.row(t), dv.row(t));
            let mut by_norm = 0.0;
            for c in 0..self.value_dim {
                let beta = self.beta(piece.inputs, t, c);
                let by_delta = ds[c] + dx[c] * v[c];
                let share = 1.0 / (1.0 + beta * norm);
                by_norm -= by_delta * delta[c] * delta[c];
                dv[c] = dx[c] * delta[c];
                if let [dbeta] = &mut *dbeta {
                    dbeta.row(t)[c] = by_delta * share * share;
                }
            }
            dk.row(t).iter_mut().zip(k).for_each(|(dk, k)| *dk += 2.0 * k * by_norm);
        }
    }
}

impl LonghornCell {
    fn outer<'a>(&self, piece: Piece<'a>, s: Panel<'a>, x: Panel<'a>) -> Outer<'a> {
        let [q, k, ..] = *piece.inputs else { unreachable!("a cell is given its inputs") };
        Outer { len: piece.len, rows: self.key_dim, read: q, write: k, s, x, a: &[] }
    }
}

impl ScanVariant for Longhorn {
    const NAME: &'static str = "longhorn";
    type Cell = LonghornCell;

    fn cell(&self, _: usize, head_dim: usize, head_dim_v: usize) -> Result<LonghornCell> {
        if !(self.beta > 0.0 && self.beta.is_finite()) {
            return Err(AttnError::value("beta", self.beta, "a finite number above 0"));
        }
        Ok(LonghornCell { key_dim: head_dim, value_dim: head_dim_v, beta: Some(self.beta) })
    }

    fn define(&self, head: HeadInputs<'_>) -> Vec<f64> {
        let mut s = vec![0.0; head.head_dim * head.head_dim_v];
        let beta = vec![f64::from(self.beta); head.head_dim_v];
        let rows = head.q.chunks_exact(head.head_dim).zip(head.k.chunks_exact(head.head_dim));
        let rows = rows.zip(head.v.chunks_exact(head.head_dim_v));
        rows.flat_map(|((q, k), x)| Self::naive_step(q, k, x, &beta, &mut s)).collect()
    }

    fn flops(&self, head_dim: usize, head_dim_v: usize) -> usize {
        8 * head_dim * head_dim_v
    }
}
