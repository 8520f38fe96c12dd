//! The memory of Infini-attention.
//!
//! ```text
//! o_i = phi(q_i) S / (phi(q_i) . z + eps)            phi = elu + 1; S, z of the segments before
//! S <- S + sum phi(k_j) w_j^T      z <- z + sum phi(k_j)          over a segment, at its end
//! w_j = v_j, or with the delta rule v_j - phi(k_j) S / (phi(k_j) . z + eps)
//! ```
//!
//! The first segment reads nothing: zeros. Mixing with attention inside the segment stays outside.
//!
//! Source: Munkhdalai, Faruqui, Gopal 2024 (Leave No Context Behind), equations 3 to 8.

use crate::elementwise::front_panels as panels;
use crate::features::{Map, Place, Side};
use crate::scan::cell::{Cell, Panel, PanelMut, Piece, PieceGrads};
use crate::scan::gemm::{outer, pad, rows, turned};
use crate::scan::{HeadInputs, ScanState, ScanVariant, Tokens, backward, forward};
use attn_core::simd::Simd;
use attn_core::tile::Start;
use attn_core::{AttnError, AttnShape, OutMut, Qkv, Result, TensorView};

/// Infini-attention's memory, see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Infini {
    /// Tokens of a segment.
    pub segment: usize,
    /// Writes what the memory does not hold yet.
    pub delta: bool,
    /// Added to the sum of weights.
    pub eps: f32,
}

impl Default for Infini {
    fn default() -> Self {
        Self { segment: 32, delta: false, eps: 1e-6 }
    }
}

/// Gradients by q, k, v, of their shapes, and by the initial state.
#[derive(Debug, Clone, PartialEq)]
pub struct InfiniGrads {
    /// By `q`.
    pub q: Vec<f32>,
    /// By `k`.
    pub k: Vec<f32>,
    /// By `v`.
    pub v: Vec<f32>,
    /// Part 0 is that by `[S, z]`.
    pub state: ScanState,
}

impl Infini {
    /// The memory before the first token: part 0 is `[S, z] [batch, n_heads_q, head_dim, head_dim_v + 1]`, part 1 what the present
    /// segment will add to it.
    ///
    /// # Errors
    /// [`AttnError::Value`] for an option that makes no sense.
    pub fn state(&self, s: &AttnShape) -> Result<ScanState> {
        Ok(ScanState::new(&self.cell(s.n_heads_q, s.head_dim, s.head_dim_v)?, s.batch, s.n_heads_q))
    }

    /// Writes `out` from a memory, which moves to the end. `cu_seqlens` are the prefix sums of the lengths of sequences packed one
    /// behind the other: each is a run of its own, with a batch entry of its own in the memory.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward_from(
        &self,
        x: &Qkv<'_>,
        cu_seqlens: Option<&[usize]>,
        out: OutMut<'_>,
        state: &mut ScanState,
    ) -> Result<()> {
        let s = x.shape();
        let cell = self.cell(s.n_heads_q, s.head_dim, s.head_dim_v)?;
        x.check_out(&out)?;
        let tokens = Tokens::new(&cell, &[("q", *x.q()), ("k", *x.k()), ("v", *x.v())])?;
        forward(&cell, &tokens.packed(cu_seqlens)?, out, Some(state))
    }

    /// Gradients, given those by the output.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit.
    pub fn gradients(
        &self,
        x: &Qkv<'_>,
        cu_seqlens: Option<&[usize]>,
        state: Option<&ScanState>,
        grad_out: &TensorView<'_>,
    ) -> Result<InfiniGrads> {
        let s = x.shape();
        let cell = self.cell(s.n_heads_q, s.head_dim, s.head_dim_v)?;
        let tokens = Tokens::new(&cell, &[("q", *x.q()), ("k", *x.k()), ("v", *x.v())])?;
        let tokens = tokens.packed(cu_seqlens)?;
        let all = backward(&cell, &tokens, state, grad_out, None)?;
        let mut by = all.inputs.into_iter();
        let mut next = || by.next().unwrap_or_default();
        Ok(InfiniGrads { q: next(), k: next(), v: next(), state: all.state })
    }
}

/// Reads `q, k, v`.
#[derive(Debug, Clone)]
pub struct InfiniCell {
    options: Infini,
    key_dim: usize,
    value_dim: usize,
}

impl InfiniCell {
    fn columns(&self) -> usize {
        self.value_dim + 1
    }

    #[inline(always)]
    fn features<S: Simd>(&self, simd: S, len: usize, x: Panel<'_>, side: Side, out: &mut PanelMut<'_>) {
        let at = Place { side, head: 0, first: 0, len, shift: &[] };
        let out = PanelMut { data: &mut *out.data, stride: out.stride };
        Map::EluPlusOne.apply(simd, at, (x, self.key_dim), out, &mut []);
    }

    fn ends(&self, piece: Piece<'_>) -> bool {
        (piece.first + piece.len).is_multiple_of(self.options.segment)
    }

    /// `[w_j, 1]`, `read` being `phi(k) [S, z]`.
    #[inline(always)]
    fn written(&self, piece: Piece<'_>, read: Panel<'_>, out: &mut PanelMut<'_>) {
        for t in 0..piece.len {
            let (row, read) = (out.row(t), read.row(t));
            row[..self.value_dim].copy_from_slice(&piece.inputs[2].row(t)[..self.value_dim]);
            if self.options.delta {
                let inverse = 1.0 / (read[self.value_dim] + self.options.eps);
                row[..self.value_dim].iter_mut().zip(read).for_each(|(w, r)| *w -= r * inverse);
            }
            row[self.value_dim] = 1.0;
        }
    }

    /// The gradient by a read `[N, D]` of its quotient `N / (D + eps)`, given that by the quotient times `sign`.
    #[inline(always)]
    fn quotient_back(
        &self,
        len: usize,
        sign: f32,
        (by, read): (Panel<'_>, Panel<'_>),
        out: &mut PanelMut<'_>,
    ) {
        for t in 0..len {
            let (by, read, out) = (by.row(t), read.row(t), out.row(t));
            let inverse = sign / (read[self.value_dim] + self.options.eps);
            let along: f32 = by.iter().zip(read).take(self.value_dim).map(|(b, r)| b * r).sum();
            out[..self.value_dim].iter_mut().zip(by).for_each(|(o, b)| *o = b * inverse);
            out[self.value_dim] = -along * inverse * inverse * sign;
        }
    }
}

impl Cell for InfiniCell {
    fn inputs(&self) -> Vec<usize> {
        vec![self.key_dim, self.key_dim, self.value_dim]
    }

    fn out_width(&self) -> usize {
        self.value_dim
    }

    fn state(&self) -> Vec<[usize; 2]> {
        vec![[self.key_dim, self.columns()]; 2]
    }

    fn piece_len(&self) -> usize {
        self.options.segment
    }

    fn scratch(&self, len: usize) -> usize {
        len * (4 * pad(self.key_dim) + 5 * pad(self.columns())) + self.columns() * pad(self.key_dim)
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
        let (len, d, c) = (piece.len, self.key_dim, self.columns());
        let (features, scratch) = scratch.split_at_mut(2 * len * pad(d));
        let [mut p, mut r] = panels(features, len, pad(d));
        let [mut n, mut w] = panels(scratch, len, pad(c));
        let [memory, pending] = state else { return };
        self.features(simd, len, piece.inputs[0], Side::Query, &mut p);
        self.features(simd, len, piece.inputs[1], Side::Key, &mut r);
        rows(simd, [len, c, d], p.as_panel(), memory, &mut n, Start::Zero);
        for t in 0..len {
            let n = n.row(t);
            let inverse = 1.0 / (n[self.value_dim] + self.options.eps);
            out.row(t)[..self.value_dim].iter_mut().zip(&*n).for_each(|(o, n)| *o = n * inverse);
        }
        if self.options.delta {
            rows(simd, [len, c, d], r.as_panel(), memory, &mut n, Start::Zero);
        }
        self.written(piece, n.as_panel(), &mut w);
        outer(simd, [d, c, len], (r.as_panel(), w.as_panel()), (pending, pad(c)), Start::Keep);
        if self.ends(piece) {
            memory.iter_mut().zip(&**pending).for_each(|(m, p)| *m += p);
            pending.fill(0.0);
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
        let (len, d, c) = (piece.len, self.key_dim, self.columns());
        let (features, scratch) = scratch.split_at_mut(4 * len * pad(d));
        let (sums, turn) = scratch.split_at_mut(5 * len * pad(c));
        let [mut p, mut r, mut dp, mut dr] = panels(features, len, pad(d));
        let [mut n, mut m, mut w, mut by, mut dw] = panels(sums, len, pad(c));
        let ([by_memory, by_pending], [dq, dk, dv]) = (grads.state, grads.inputs) else { return };
        self.features(simd, len, piece.inputs[0], Side::Query, &mut p);
        self.features(simd, len, piece.inputs[1], Side::Key, &mut r);
        rows(simd, [len, c, d], p.as_panel(), state[0], &mut n, Start::Zero);
        rows(simd, [len, c, d], r.as_panel(), state[0], &mut m, Start::Zero);
        self.written(piece, m.as_panel(), &mut w);
        if self.ends(piece) {
            by_pending.copy_from_slice(by_memory);
        }
        // The write.
        let pending_turned = turned(simd, (by_pending, d, c), turn);
        rows(simd, [len, d, c], w.as_panel(), pending_turned, &mut dr, Start::Zero);
        rows(simd, [len, c, d], r.as_panel(), by_pending, &mut dw, Start::Zero);
        for t in 0..len {
            dv.row(t)[..self.value_dim].copy_from_slice(&dw.row(t)[..self.value_dim]);
        }
        let memory_turned = turned(simd, (state[0], d, c), turn);
        if self.options.delta {
            self.quotient_back(len, -1.0, (dw.as_panel(), m.as_panel()), &mut by);
            rows(simd, [len, d, c], by.as_panel(), memory_turned, &mut dr, Start::Keep);
            outer(simd, [d, c, len], (r.as_panel(), by.as_panel()), (by_memory, pad(c)), Start::Keep);
        }
        // The read.
        self.quotient_back(len, 1.0, (grads.out, n.as_panel()), &mut by);
        rows(simd, [len, d, c], by.as_panel(), memory_turned, &mut dp, Start::Zero);
        outer(simd, [d, c, len], (p.as_panel(), by.as_panel()), (by_memory, pad(c)), Start::Keep);
        let all = [(0, &p, &dp, dq, Side::Query), (1, &r, &dr, dk, Side::Key)];
        for (input, phi, by, dx, side) in all {
            let at = Place { side, head: 0, first: 0, len, shift: &[] };
            let dx = PanelMut { data: &mut *dx.data, stride: dx.stride };
            let by = (phi.as_panel(), by.as_panel());
            Map::EluPlusOne.back(simd, at, (piece.inputs[input], d), by, dx, (&mut [], &mut []));
        }
    }
}

impl ScanVariant for Infini {
    const NAME: &'static str = "infini";
    type Cell = InfiniCell;

    fn cell(&self, _: usize, head_dim: usize, head_dim_v: usize) -> Result<InfiniCell> {
        if self.segment == 0 {
            return Err(AttnError::value("segment", 0, "at least 1"));
        }
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return Err(AttnError::value("eps", self.eps, "a finite number above 0"));
        }
        Ok(InfiniCell { options: *self, key_dim: head_dim, value_dim: head_dim_v })
    }

    fn define(&self, head: HeadInputs<'_>) -> Vec<f64> {
        let (d, width) = (head.head_dim, head.head_dim_v);
        let phi =
            |x: &[f64]| -> Vec<f64> { x.iter().map(|x| if *x > 0.0 { x + 1.0 } else { x.exp() }).collect() };
        let (mut s, mut z) = (vec![0.0; d * width], vec![0.0; d]);
        let read = |p: &[f64], s: &[f64], z: &[f64]| -> Vec<f64> {
            let den: f64 = p.iter().zip(z).map(|(p, z)| p * z).sum::<f64>() + f64::from(self.eps);
            (0..width).map(|c| (0..d).map(|n| p[n] * s[n * width + c]).sum::<f64>() / den).collect()
        };
        let mut out = Vec::with_capacity(head.v.len());
        let all: Vec<usize> = (0..head.len()).collect();
        for segment in all.chunks(self.segment) {
            let (before_s, before_z) = (s.clone(), z.clone());
            for &t in segment {
                let (p, r) = (phi(&head.q[t * d..][..d]), phi(&head.k[t * d..][..d]));
                out.extend(read(&p, &before_s, &before_z));
                let held = read(&r, &before_s, &before_z);
                for (n, r) in r.iter().enumerate() {
                    z[n] += r;
                    for c in 0..width {
                        let known = if self.delta { held[c] } else { 0.0 };
                        s[n * width + c] += r * (head.v[t * width + c] - known);
                    }
                }
            }
        }
        out
    }

    fn flops(&self, head_dim: usize, head_dim_v: usize) -> usize {
        (4 + 2 * usize::from(self.delta)) * head_dim * (head_dim_v + 1)
    }

    fn max_error(&self) -> f64 {
        1e-5
    }
}
