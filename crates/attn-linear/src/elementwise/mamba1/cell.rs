//! The recurrence of Mamba-1, forwards and backwards.

use super::super::front::panels;
use crate::scan::cell::{Cell, Panel, PanelMut, Piece, PieceGrads};
use crate::scan::math::{exp, loss};
use crate::scan::outer::{Outer, OuterGrads, OuterLoss};
use attn_core::simd::{Simd, SimdBase};
use attn_core::tile::MAX_LANES;

/// Where step sizes come from.
#[derive(Debug, Clone)]
pub(super) enum Steps {
    /// Softplus of an input.
    Given,
    /// One for each channel.
    Constant(Vec<f32>),
}

/// Reads `C, B, u`, then `dt` unless steps are constant, then `z` if gated.
#[derive(Debug, Clone)]
pub struct Mamba1Cell {
    pub(super) rows: usize,
    pub(super) width: usize,
    pub(super) gated: bool,
    pub(super) steps: Steps,
    /// `[heads, rows + 2, channels padded to vectors]`: A, then D, then dt_bias.
    pub(super) params: Vec<f32>,
}

/// `l = 1 - e^(A s)`.
#[derive(Clone, Copy)]
struct Discretised;

impl OuterLoss for Discretised {
    #[inline(always)]
    fn loss<S: Simd>(self, simd: S, _: f32, s: S::f32s, a: S::f32s) -> S::f32s {
        loss(simd, a * s)
    }

    #[inline(always)]
    fn back<S: Simd>(self, simd: S, _: f32, s: S::f32s, a: S::f32s, by: S::f32s) -> [S::f32s; 3] {
        let kept = -(by * exp(simd, a * s));
        [S::f32s::splat(simd, 0.0), kept * a, kept * s]
    }
}

impl Mamba1Cell {
    pub(super) fn new([heads, rows, width]: [usize; 3], a: impl Fn(usize, usize, usize) -> f32) -> Self {
        let stride = width.next_multiple_of(MAX_LANES);
        let mut params = vec![0.0; heads * (rows + 2) * stride];
        for (at, row) in params.chunks_exact_mut(stride).enumerate() {
            let (head, n) = (at / (rows + 2), at % (rows + 2));
            if n < rows {
                row[..width].iter_mut().enumerate().for_each(|(c, x)| *x = a(head, n, c));
            }
        }
        Self { rows, width, gated: false, steps: Steps::Given, params }
    }

    /// Row `rows + from_end - 2` of the parameters: 2 is D, 3 is dt_bias.
    pub(super) fn set_channels(&mut self, row: usize, of: impl Fn(usize, usize) -> f32) {
        let (rows, stride) = (self.rows, self.stride());
        for (head, params) in self.params.chunks_exact_mut((rows + 2) * stride).enumerate() {
            let to = &mut params[(rows + row - 2) * stride..][..self.width];
            to.iter_mut().enumerate().for_each(|(c, x)| *x = of(head, c));
        }
    }

    pub(super) fn stride(&self) -> usize {
        self.width.next_multiple_of(MAX_LANES)
    }

    /// A, D and dt_bias of a head.
    fn params_of(&self, head: usize) -> (&[f32], &[f32], &[f32]) {
        let all = &self.params[head * (self.rows + 2) * self.stride()..][..(self.rows + 2) * self.stride()];
        let (a, rest) = all.split_at(self.rows * self.stride());
        let (d, bias) = rest.split_at(self.stride());
        (a, d, bias)
    }

    /// Steps and what is written.
    #[inline(always)]
    fn front(&self, piece: Piece<'_>, s: &mut PanelMut<'_>, x: &mut PanelMut<'_>) {
        let (_, _, bias) = self.params_of(piece.head);
        for t in 0..piece.len {
            let (s, x) = (s.row(t), x.row(t));
            match &self.steps {
                Steps::Constant(steps) => s.copy_from_slice(steps),
                Steps::Given => {
                    let dt = piece.inputs[3].row(t).iter().zip(bias);
                    s.iter_mut().zip(dt).for_each(|(s, (dt, bias))| {
                        let dt = dt + bias;
                        *s = dt.max(0.0) + (-dt.abs()).exp().ln_1p();
                    });
                }
            }
            let u = piece.inputs[2].row(t).iter().zip(&*s);
            x.iter_mut().zip(u).for_each(|(x, (u, s))| *x = u * s);
        }
    }

    fn outer<'a>(&'a self, piece: Piece<'a>, s: Panel<'a>, x: Panel<'a>) -> Outer<'a> {
        let (a, ..) = self.params_of(piece.head);
        Outer { len: piece.len, rows: self.rows, read: piece.inputs[0], write: piece.inputs[1], s, x, a }
    }

    fn z<'a>(&self, piece: Piece<'a>) -> Option<Panel<'a>> {
        if self.gated { piece.inputs.last().copied() } else { None }
    }
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

impl Cell for Mamba1Cell {
    fn inputs(&self) -> Vec<usize> {
        let mut widths = vec![self.rows, self.rows, self.width];
        widths.extend(matches!(self.steps, Steps::Given).then_some(self.width));
        widths.extend(self.gated.then_some(self.width));
        widths
    }

    fn out_width(&self) -> usize {
        self.width
    }

    fn state(&self) -> Vec<[usize; 2]> {
        vec![[self.rows, self.width]]
    }

    /// By A, then by D, then by dt_bias.
    fn params(&self) -> usize {
        (self.rows + 2) * self.stride()
    }

    fn piece_len(&self) -> usize {
        32
    }

    fn scratch(&self, len: usize) -> usize {
        6 * len * self.stride() + Outer::scratch(len, self.rows)
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
        let (scratch, rest) = scratch.split_at_mut(6 * piece.len * self.stride());
        let [mut s, mut x] = panels(scratch, piece.len, self.stride());
        self.front(piece, &mut s, &mut x);
        let outer = self.outer(piece, s.as_panel(), x.as_panel());
        outer.forward(simd, Discretised, state[0], out.data, rest);
        let (_, d, _) = self.params_of(piece.head);
        for t in 0..piece.len {
            let skip = d.iter().zip(piece.inputs[2].row(t));
            out.row(t).iter_mut().zip(skip).for_each(|(o, (d, u))| *o += d * u);
            if let Some(z) = self.z(piece) {
                out.row(t).iter_mut().zip(z.row(t)).for_each(|(o, z)| *o *= z * sigmoid(*z));
            }
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
        let (scratch, rest) = scratch.split_at_mut(6 * len * stride);
        let [mut s, mut x, mut ds, mut dx, mut y, mut dy] = panels(scratch, len, stride);
        self.front(piece, &mut s, &mut x);
        let outer = self.outer(piece, s.as_panel(), x.as_panel());
        let PieceGrads { out, state: grad_state, inputs, params } = grads;
        let (da, rest_params) = params.split_at_mut(self.rows * stride);
        let (dd, dbias) = rest_params.split_at_mut(stride);
        let (_, d, bias) = self.params_of(piece.head);
        let u = piece.inputs[2];
        let [dc, db, du, others @ ..] = inputs else { return };

        // The gate: its gradient needs what it gates.
        dy.data[..len * stride].copy_from_slice(&out.data[..len * stride]);
        if let (Some(z), Some(dz)) = (self.z(piece), others.last_mut()) {
            let mut now = state[0].to_vec();
            outer.forward(simd, Discretised, &mut now, y.data, rest);
            for t in 0..len {
                let (z, u, y, dy, dz) = (z.row(t), u.row(t), y.row(t), dy.row(t), dz.row(t));
                for c in 0..stride {
                    let g = sigmoid(z[c]);
                    dz[c] = dy[c] * (y[c] + d[c] * u[c]) * g * (1.0 + z[c] * (1.0 - g));
                    dy[c] *= z[c] * g;
                }
            }
        }
        let by = OuterGrads { read: dc.data, write: db.data, s: ds.data, x: dx.data, a: da };
        outer.backward(simd, Discretised, (state[0], dy.as_panel(), grad_state[0]), by, rest);
        for t in 0..len {
            let (s, dy, ds, dx, u) = (s.row(t), dy.row(t), ds.row(t), dx.row(t), u.row(t));
            for (c, du) in du.row(t).iter_mut().enumerate() {
                *du = dx[c] * s[c] + dy[c] * d[c];
                dd[c] += dy[c] * u[c];
            }
            if let (Steps::Given, Some(ddt)) = (&self.steps, others.first_mut()) {
                for (c, ddt) in ddt.row(t).iter_mut().enumerate() {
                    *ddt = (ds[c] + dx[c] * u[c]) * sigmoid(piece.inputs[3].row(t)[c] + bias[c]);
                    dbias[c] += *ddt;
                }
            }
        }
    }
}
