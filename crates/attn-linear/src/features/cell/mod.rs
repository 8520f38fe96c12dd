//! Kernelised attention as a cell: features, the chunk form, the normaliser; forwards and backwards.
//!
//! With features `p_i = phi(q_i)`, `r_j = phi(k_j)`, values with a one behind them `v'_j = [v_j, 1]` (so that the last column of
//! every sum is the sum of weights), and the state `S' = sum_j r_j v'_j^T` before the piece:
//!
//! ```text
//! A_ij = w_ij p_i . r_j for j <= i      N' = f o (P S') + A V'      o_i of N' = [N, D]: see [`quotient`]
//! S' <- f_len S' + R^T (e o V')
//! ```
//!
//! where `w_ij`, `f_i` and `e_j` are 1 without gates, see [`fading`]. In the first piece, where a query may see hardly more than
//! one key, values in `A V'` are taken relative to the first of all, `m`, and those of the state made so by `N - D m`. Backwards, with `(dN, dD)` the gradients by a row of `N'`, `dN' = [dN, dD]`,
//! `dN* = [dN, dD - dN . m]` and `G` the gradient by the state after the piece:
//!
//! ```text
//! dA = dN' (V' - m)^T      dP = (w o dA) R + f o (dN* S'^T)      dR = (w o dA)^T P + e o (V' G^T)      dV = A^T dN + e o (R G)
//! G <- f_len G + P^T (f o dN*)
//! ```
//!
//! Without `causal` keys are absorbed first ([`Part::Absorb`]), their values relative to the mean of all, and all queries
//! read the same state ([`Part::Read`]).
//!
//! Source: Katharopoulos et al. 2020.

mod fading;
mod matrices;
mod quotient;
mod rows;
mod sums;

use super::maps::{Map, Side};
use super::{Gate, Normaliser};
use crate::elementwise::front_panels as panels;
use crate::scan::cell::{Cell, PanelMut, Piece, PieceGrads};
use crate::scan::gemm::{outer, pad, rows as rows_by};
use attn_core::simd::Simd;
use attn_core::tile::{Start, transpose};
use attn_core::view::Rows;
use fading::Fading;
use quotient::Divisor;
use rows::{again, dot, scale_rows};
use sums::Sums;

/// What a cell does with tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Reads `q, k, v` and, where gates are given, one number a token: a query sees the keys up to its own.
    Causal,
    /// Reads `k, v`: they go into the state; there is no output.
    Absorb,
    /// Reads `q`; the state stays as it is.
    Read,
}

/// See the module.
#[derive(Debug, Clone)]
pub(super) struct FeatureCell {
    pub(crate) part: Part,
    pub(crate) queries: Map,
    pub(crate) keys: Map,
    pub(crate) normaliser: Normaliser,
    /// Multiplies the features of queries.
    pub(crate) scale: f32,
    pub(crate) gate: Gate,
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
    /// What keys' exponents are lowered by: `[sequences, heads of keys][one or one a feature, padded]`, or empty.
    pub(crate) shifts: Vec<Vec<f32>>,
    /// What values are taken relative to without `causal`: `[sequences, heads of keys][value_dim]`, or empty.
    pub(crate) references: Vec<Vec<f32>>,
    /// Heads of the output, and of the keys among them.
    pub(crate) heads: (usize, usize),
}

/// Most tokens of a piece.
const PIECE: usize = 64;

impl Cell for FeatureCell {
    fn inputs(&self) -> Vec<usize> {
        match self.part {
            Part::Causal if self.gate == Gate::Given => vec![self.key_dim, self.key_dim, self.value_dim, 1],
            Part::Causal => vec![self.key_dim, self.key_dim, self.value_dim],
            Part::Absorb => vec![self.key_dim, self.value_dim],
            Part::Read => vec![self.key_dim],
        }
    }

    fn out_width(&self) -> usize {
        self.value_dim
    }

    fn state(&self) -> Vec<[usize; 2]> {
        vec![[self.features(), self.columns()]]
    }

    /// By what queries' features learn, then keys'.
    fn params(&self) -> usize {
        self.queries.params(self.key_dim) + self.keys.params(self.key_dim)
    }

    fn piece_len(&self) -> usize {
        PIECE
    }

    fn scratch(&self, len: usize) -> usize {
        let (f, c) = (self.features(), self.columns());
        len * (4 * pad(f) + 6 * pad(c) + 3 * pad(len) + 2)
            + Fading::scratch(len)
            + self.value_dim
            + pad(len) * f.max(c)
            + c * pad(f)
            + self.map_scratch(len)
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
        let (len, f, c) = (piece.len, self.features(), self.columns());
        let (map, scratch) = scratch.split_at_mut(self.map_scratch(len));
        let (features, scratch) = scratch.split_at_mut(2 * len * pad(f));
        let (sums, scratch) = scratch.split_at_mut(2 * len * pad(c));
        let (weights, scratch) = scratch.split_at_mut(2 * len * pad(len));
        let (gates, scratch) = scratch.split_at_mut(Fading::scratch(len));
        let (reference, turned) = scratch.split_at_mut(self.value_dim);
        let [mut p, mut r] = panels(features, len, pad(f));
        let [mut n, mut v] = panels(sums, len, pad(c));
        let [mut a, mut w] = panels(weights, len, pad(len));
        let fading = self.fading(piece, gates);
        let to = Sums {
            p: &mut p,
            r: &mut r,
            n: &mut n,
            v: &mut v,
            held: None,
            a: &mut a,
            w: &mut w,
            reference: &mut *reference,
        };
        self.sums(simd, piece, state[0], fading.as_ref(), to, [turned, map]);
        if self.part == Part::Causal {
            self.values(piece, None, &mut v);
        }
        if self.part != Part::Read {
            if let Some(fading) = &fading {
                let all = fading.all();
                state[0].iter_mut().for_each(|s| *s *= all);
                scale_rows(&mut r, fading.end);
            }
            outer(simd, [f, c, len], (r.as_panel(), v.as_panel()), (state[0], pad(c)), Start::Keep);
        }
        if self.part != Part::Absorb {
            for t in 0..len {
                let n = n.row(t);
                let divisor = Divisor::new(self.normaliser, self.sum_of_weights(n), &p.row(t)[..f]);
                divisor.divide(n, reference, &mut out.row(t)[..self.value_dim]);
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
        let (len, f, c) = (piece.len, self.features(), self.columns());
        let (map, scratch) = scratch.split_at_mut(self.map_scratch(len));
        let (features, scratch) = scratch.split_at_mut(4 * len * pad(f));
        let (sums, scratch) = scratch.split_at_mut(6 * len * pad(c));
        let (weights, scratch) = scratch.split_at_mut(3 * len * pad(len));
        let (gates, scratch) = scratch.split_at_mut(Fading::scratch(len));
        let (crossing, scratch) = scratch.split_at_mut(2 * len);
        let (reads, writes) = crossing.split_at_mut(len);
        let (reference, scratch) = scratch.split_at_mut(self.value_dim);
        let (turned, state_turned) = scratch.split_at_mut(pad(len) * f.max(c));
        let [mut p, mut r, mut dp, mut dr] = panels(features, len, pad(f));
        let [mut n, mut v, mut dn, mut dv, mut held, mut d_held] = panels(sums, len, pad(c));
        let [mut a, mut da, mut w] = panels(weights, len, pad(len));
        let PieceGrads { out, state: grad_state, inputs, params } = grads;
        let grad_state = &mut *grad_state[0];
        let (query_params, key_params) = params.split_at_mut(self.queries.params(self.key_dim));
        let fading = self.fading(piece, gates);

        // Forwards again.
        let to = Sums {
            p: &mut p,
            r: &mut r,
            n: &mut n,
            v: &mut v,
            held: Some(&mut held),
            a: &mut a,
            w: &mut w,
            reference: &mut *reference,
        };
        self.sums(simd, piece, state[0], fading.as_ref(), to, [&mut *turned, &mut *map]);

        if self.part != Part::Absorb {
            // By N' and, through the divisor, by features.
            for t in 0..len {
                let (n, p, dn) = (n.row(t), &p.row(t)[..f], dn.row(t));
                let divisor = Divisor::new(self.normaliser, self.sum_of_weights(n), p);
                let (values, one) = dn.split_at_mut(self.value_dim);
                let (by_sum, by_divisor) = divisor.back(n, reference, &out.row(t)[..self.value_dim], values);
                one.fill(by_sum);
                let held = d_held.row(t);
                held.copy_from_slice(dn);
                if self.part == Part::Causal {
                    let along = dot(&dn[..self.value_dim], reference);
                    held[self.value_dim..].iter_mut().for_each(|d| *d -= along);
                }
                let each =
                    if let Normaliser::EachPlus(eps) = self.normaliser { eps * by_divisor } else { 0.0 };
                dp.row(t).fill(each);
            }
            if let Some(fading) = &fading {
                // Reads are faded already.
                (0..len).for_each(|t| reads[t] = dot(&held.row(t)[..c], &d_held.row(t)[..c]));
                scale_rows(&mut d_held, fading.past);
            }
            transpose(simd, Rows::new(state[0], f, c, pad(c)), 1.0, state_turned, pad(f));
            rows_by(simd, [len, f, c], d_held.as_panel(), state_turned, &mut dp, Start::Keep);
        }
        if self.part == Part::Causal {
            transpose(simd, Rows::new(v.data, len, c, pad(c)), 1.0, turned, pad(len));
            rows_by(simd, [len, len, c], dn.as_panel(), turned, &mut da, Start::Zero);
            (0..len).for_each(|t| da.row(t)[t + 1..].fill(0.0));
            self.values(piece, None, &mut v);
        }
        if self.part != Part::Read {
            transpose(simd, Rows::new(grad_state, f, c, pad(c)), 1.0, state_turned, pad(f));
            rows_by(simd, [len, f, c], v.as_panel(), state_turned, &mut dr, Start::Zero);
            rows_by(simd, [len, c, f], r.as_panel(), grad_state, &mut dv, Start::Zero);
            if let Some(fading) = &fading {
                scale_rows(&mut dr, fading.end);
                scale_rows(&mut dv, fading.end);
                (0..len).for_each(|t| writes[t] = dot(&v.row(t)[..c], &dv.row(t)[..c]));
                let all = fading.all();
                let stays = all
                    * (0..f)
                        .map(|row| dot(&state[0][row * pad(c)..][..c], &grad_state[row * pad(c)..][..c]))
                        .sum::<f32>();
                grad_state.iter_mut().for_each(|g| *g *= all);
                // Of A, times it; and that of the scores before they faded.
                for ((da, w), a) in da.data.iter_mut().zip(w.data.iter_mut()).zip(&*a.data) {
                    (*da, *w) = (*da * *w, *da * a);
                }
                if self.gate == Gate::Given {
                    fading.back(w.as_panel(), reads, writes, stays, again(&mut inputs[3]));
                }
            }
            if self.part == Part::Causal {
                rows_by(simd, [len, f, len], da.as_panel(), r.data, &mut dp, Start::Keep);
                let by = (da.as_panel(), p.as_panel());
                outer(simd, [len, f, len], by, (dr.data, pad(f)), Start::Keep);
                let by = (a.as_panel(), dn.as_panel());
                outer(simd, [len, c, len], by, (dv.data, pad(c)), Start::Keep);
            }
            let k = self.key_value(piece).0;
            let at = usize::from(self.part == Part::Causal);
            for t in 0..len {
                inputs[at + 1].row(t)[..self.value_dim].copy_from_slice(&dv.row(t)[..self.value_dim]);
            }
            let by = (r.as_panel(), dr.as_panel());
            let dk = again(&mut inputs[at]);
            self.keys.back(simd, self.place(piece, Side::Key), (k, self.key_dim), by, dk, (key_params, map));
        }
        if self.part != Part::Absorb {
            let by = (p.as_panel(), d_held.as_panel());
            outer(simd, [f, c, len], by, (grad_state, pad(c)), Start::Keep);
            if self.scale != 1.0 {
                for t in 0..len {
                    dp.row(t).iter_mut().for_each(|x| *x *= self.scale);
                    p.row(t).iter_mut().for_each(|x| *x /= self.scale);
                }
            }
            let at = self.place(piece, Side::Query);
            let (q, by) = (piece.inputs[0], (p.as_panel(), dp.as_panel()));
            self.queries.back(simd, at, (q, self.key_dim), by, again(&mut inputs[0]), (query_params, map));
        }
    }
}
