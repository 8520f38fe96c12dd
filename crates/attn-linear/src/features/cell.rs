//! Kernelised attention as a cell: features, the chunk form, the normaliser; forwards and backwards.
//!
//! With features `p_i = phi(q_i)`, `r_j = phi(k_j)`, values with a one behind them `v'_j = [v_j, 1]` (so that the last column of
//! every sum is the sum of weights), and the state `S' = sum_j r_j v'_j^T` before the piece:
//!
//! ```text
//! A_ij = p_i . r_j for j <= i      N' = P S' + A V'      o_i = N_i / den(D_i),  N' = [N, D]      S' <- S' + R^T V'
//! ```
//!
//! and backwards, with `dN_i = do_i / den_i`, `dD_i = -(do_i . o_i) / den_i`, `G` the gradient by the state after the piece:
//!
//! ```text
//! dA = dN' V'^T below the diagonal      dP = dA R + dN' S'^T      dR = dA^T P + V' G^T      dV' = A^T dN' + R G
//! G <- G + P^T dN'
//! ```
//!
//! Without `causal` keys are absorbed first ([`Part::Absorb`]), and all queries read the same state ([`Part::Read`]).
//!
//! Source: Katharopoulos et al. 2020.

use super::Normaliser;
use super::maps::{Map, Place, Side};
use crate::elementwise::front_panels as panels;
use crate::scan::cell::{Cell, Panel, PanelMut, Piece, PieceGrads};
use attn_core::simd::{Simd, SimdBase};
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, TileMut, all_finite, product, transpose};
use attn_core::view::Rows;

/// What a cell does with tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Reads `q, k, v`: a query sees the keys up to its own.
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
    pub(crate) key_dim: usize,
    pub(crate) value_dim: usize,
    /// What keys' exponents are lowered by: `[batch, heads of keys][one or one a feature, padded]`, or empty.
    pub(crate) shifts: Vec<Vec<f32>>,
    /// Heads of the output, and of the keys among them.
    pub(crate) heads: (usize, usize),
}

/// Most tokens of a piece.
const PIECE: usize = 64;

fn pad(width: usize) -> usize {
    width.next_multiple_of(MAX_LANES)
}

impl FeatureCell {
    pub(crate) fn features(&self) -> usize {
        self.keys.width(self.key_dim)
    }

    /// Columns of the state.
    pub(crate) fn columns(&self) -> usize {
        self.value_dim + usize::from(self.normaliser.divides())
    }

    fn place<'a>(&'a self, piece: Piece<'_>, side: Side) -> Place<'a> {
        let shift = if side == Side::Query || self.shifts.is_empty() {
            &[]
        } else {
            let group = self.heads.0 / self.heads.1.max(1);
            // Absorbing runs over the heads of keys.
            let head = if self.part == Part::Absorb { piece.head } else { piece.head / group };
            &self.shifts[piece.batch * self.heads.1 + head][..]
        };
        Place { side, head: piece.head, first: piece.first, len: piece.len, shift }
    }

    fn map_scratch(&self, len: usize) -> usize {
        self.queries.scratch(self.key_dim, len).max(self.keys.scratch(self.key_dim, len))
    }

    /// Queries' features, scaled.
    #[inline(always)]
    fn read_features<S: Simd>(&self, simd: S, piece: Piece<'_>, mut out: PanelMut<'_>, scratch: &mut [f32]) {
        let (stride, at) = (out.stride, self.place(piece, Side::Query));
        let again = PanelMut { data: &mut *out.data, stride };
        self.queries.apply(simd, at, (piece.inputs[0], self.key_dim), again, scratch);
        if self.scale != 1.0 {
            (0..piece.len).for_each(|t| out.row(t).iter_mut().for_each(|x| *x *= self.scale));
        }
    }

    /// Values with their ones.
    #[inline(always)]
    fn values(&self, piece: Piece<'_>, v: Panel<'_>, out: &mut PanelMut<'_>) {
        for t in 0..piece.len {
            let row = out.row(t);
            row[..self.value_dim].copy_from_slice(&v.row(t)[..self.value_dim]);
            row[self.value_dim..].fill(1.0);
        }
    }

    /// `A`, `[len, len]` in rows of `stride`, zero above the diagonal.
    #[inline(always)]
    fn weights<S: Simd>(
        &self,
        simd: S,
        len: usize,
        (p, r): (Panel<'_>, Panel<'_>),
        turned: &mut [f32],
        out: &mut PanelMut<'_>,
    ) {
        let n = self.features();
        let rows = Rows::new(r.data, len, n, r.stride);
        transpose(simd, rows, 1.0, turned, pad(len));
        product(
            simd,
            [len, len, n],
            Lhs { data: p.data, row_stride: p.stride, col_stride: 1 },
            Rhs { data: turned, stride: pad(len) },
            TileMut { data: &mut *out.data, stride: out.stride },
            Start::Zero,
        );
        (0..len).for_each(|t| out.row(t)[t + 1..].fill(0.0));
    }

    /// `N' (+)= A V'`.
    #[inline(always)]
    fn mix<S: Simd>(&self, simd: S, len: usize, (a, v): (Panel<'_>, Panel<'_>), out: &mut PanelMut<'_>) {
        // A weight of 0 times a value of NaN or infinity would leak what an earlier row must not see.
        let finite = (0..len).all(|t| all_finite(&v.row(t)[..self.value_dim]));
        let step = if finite { len } else { 1 };
        for first in (0..len).step_by(step) {
            let keys = if finite { len } else { first + 1 };
            product(
                simd,
                [step, self.columns(), keys],
                Lhs { data: &a.data[first * a.stride..], row_stride: a.stride, col_stride: 1 },
                Rhs { data: v.data, stride: v.stride },
                TileMut { data: &mut out.data[first * out.stride..], stride: out.stride },
                Start::Keep,
            );
        }
    }

    /// `C (+)= X^T Y`, `C [m, n]`, over `len` rows.
    #[inline(always)]
    fn outer<S: Simd>(
        simd: S,
        [m, n, len]: [usize; 3],
        (x, y): (Panel<'_>, Panel<'_>),
        c: &mut [f32],
        stride: usize,
        start: Start,
    ) {
        product(
            simd,
            [m, n, len],
            Lhs { data: x.data, row_stride: 1, col_stride: x.stride },
            Rhs { data: y.data, stride: y.stride },
            TileMut { data: c, stride },
            start,
        );
    }

    /// `C (+)= X B`, `X [len, k]`, `B [k, n]`.
    #[inline(always)]
    fn rows<S: Simd>(
        simd: S,
        [len, n, k]: [usize; 3],
        x: Panel<'_>,
        (b, b_stride): (&[f32], usize),
        c: &mut PanelMut<'_>,
        start: Start,
    ) {
        product(
            simd,
            [len, n, k],
            Lhs { data: x.data, row_stride: x.stride, col_stride: 1 },
            Rhs { data: b, stride: b_stride },
            TileMut { data: &mut *c.data, stride: c.stride },
            start,
        );
    }

    /// The divisor of a row and its slope by `D`.
    #[inline(always)]
    fn divisor(&self, d: f32, p: &[f32]) -> (f32, f32) {
        match self.normaliser {
            Normaliser::None | Normaliser::Rows => (1.0, 0.0),
            Normaliser::Plus(eps) => (d + eps, 1.0),
            Normaliser::AtLeast(eps) => (if d < eps { eps } else { d }, f32::from(d > eps)),
            Normaliser::EachPlus(eps) => (d + eps * p.iter().sum::<f32>(), 1.0),
        }
    }
}

impl Cell for FeatureCell {
    fn inputs(&self) -> Vec<usize> {
        match self.part {
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
        len * (4 * pad(f) + 4 * pad(c) + 2 * pad(len))
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
        let (weights, turned) = scratch.split_at_mut(len * pad(len));
        let [mut p, r] = panels(features, len, pad(f));
        let [mut n, mut v] = panels(sums, len, pad(c));
        let [mut a] = panels(weights, len, pad(len));
        if self.part != Part::Read {
            let (k, value) = self.key_value(piece);
            let at = self.place(piece, Side::Key);
            self.keys.apply(
                simd,
                at,
                (k, self.key_dim),
                PanelMut { data: &mut *r.data, stride: r.stride },
                map,
            );
            self.values(piece, value, &mut v);
        }
        if self.part != Part::Absorb {
            self.read_features(simd, piece, PanelMut { data: &mut *p.data, stride: p.stride }, map);
            Self::rows(simd, [len, c, f], p.as_panel(), (state[0], pad(c)), &mut n, Start::Zero);
        }
        if self.part == Part::Causal {
            self.weights(simd, len, (p.as_panel(), r.as_panel()), turned, &mut a);
            self.mix(simd, len, (a.as_panel(), v.as_panel()), &mut n);
        }
        if self.part != Part::Read {
            Self::outer(simd, [f, c, len], (r.as_panel(), v.as_panel()), state[0], pad(c), Start::Keep);
        }
        if self.part != Part::Absorb {
            for t in 0..len {
                let (n, p) = (n.row(t), &p.row(t)[..f]);
                let (den, _) = self.divisor(n[self.value_dim.min(n.len() - 1)], p);
                // Nothing seen, or seen with no weight at all: zeros.
                let rows = out.row(t)[..self.value_dim].iter_mut().zip(&*n);
                rows.for_each(|(o, n)| *o = if den == 0.0 { 0.0 } else { n / den });
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
        let (sums, scratch) = scratch.split_at_mut(4 * len * pad(c));
        let (weights, scratch) = scratch.split_at_mut(2 * len * pad(len));
        let (turned, state_turned) = scratch.split_at_mut(pad(len) * f.max(c));
        let [mut p, mut r, mut dp, mut dr] = panels(features, len, pad(f));
        let [mut n, mut v, mut dn, mut dv] = panels(sums, len, pad(c));
        let [mut a, mut da] = panels(weights, len, pad(len));
        let PieceGrads { out, state: grad_state, inputs, params } = grads;
        let grad_state = &mut *grad_state[0];
        let (query_params, key_params) = params.split_at_mut(self.queries.params(self.key_dim));
        fn again<'a>(panel: &'a mut PanelMut<'_>) -> PanelMut<'a> {
            PanelMut { data: &mut *panel.data, stride: panel.stride }
        }

        // Forwards again.
        if self.part != Part::Read {
            let (k, value) = self.key_value(piece);
            let at = self.place(piece, Side::Key);
            self.keys.apply(simd, at, (k, self.key_dim), again(&mut r), map);
            self.values(piece, value, &mut v);
        }
        if self.part != Part::Absorb {
            self.read_features(simd, piece, again(&mut p), map);
            Self::rows(simd, [len, c, f], p.as_panel(), (state[0], pad(c)), &mut n, Start::Zero);
        }
        if self.part == Part::Causal {
            self.weights(simd, len, (p.as_panel(), r.as_panel()), turned, &mut a);
            self.mix(simd, len, (a.as_panel(), v.as_panel()), &mut n);
        }

        if self.part != Part::Absorb {
            // By N' and, through the divisor, by features.
            for t in 0..len {
                let (n, p, dout) = (n.row(t), &p.row(t)[..f], out.row(t));
                let (den, slope) = self.divisor(n[self.value_dim.min(n.len() - 1)], p);
                let inverse = if den == 0.0 { 0.0 } else { 1.0 / den };
                let row = dn.row(t);
                row[..self.value_dim].iter_mut().zip(dout).for_each(|(d, x)| *d = x * inverse);
                let by_den = -along::<S>(&row[..self.value_dim], n, den);
                row[self.value_dim..].fill(by_den * slope);
                let each = if let Normaliser::EachPlus(eps) = self.normaliser { eps * by_den } else { 0.0 };
                dp.row(t).fill(each);
            }
            let rows = Rows::new(state[0], f, c, pad(c));
            transpose(simd, rows, 1.0, state_turned, pad(f));
            let by = (&*state_turned, pad(f));
            Self::rows(simd, [len, f, c], dn.as_panel(), by, &mut dp, Start::Keep);
        }
        if self.part == Part::Causal {
            transpose(simd, Rows::new(v.data, len, c, pad(c)), 1.0, turned, pad(len));
            Self::rows(simd, [len, len, c], dn.as_panel(), (turned, pad(len)), &mut da, Start::Zero);
            (0..len).for_each(|t| da.row(t)[t + 1..].fill(0.0));
            Self::rows(simd, [len, f, len], da.as_panel(), (r.data, r.stride), &mut dp, Start::Keep);
        }
        if self.part != Part::Read {
            let rows = Rows::new(grad_state, f, c, pad(c));
            transpose(simd, rows, 1.0, state_turned, pad(f));
            Self::rows(simd, [len, f, c], v.as_panel(), (state_turned, pad(f)), &mut dr, Start::Zero);
            Self::rows(simd, [len, c, f], r.as_panel(), (grad_state, pad(c)), &mut dv, Start::Zero);
            if self.part == Part::Causal {
                let by = (da.as_panel(), p.as_panel());
                Self::outer(simd, [len, f, len], by, dr.data, pad(f), Start::Keep);
                let by = (a.as_panel(), dn.as_panel());
                Self::outer(simd, [len, c, len], by, dv.data, pad(c), Start::Keep);
            }
            let (k, _) = self.key_value(piece);
            let [.., dk, dvalue] = inputs else { return };
            for t in 0..len {
                dvalue.row(t)[..self.value_dim].copy_from_slice(&dv.row(t)[..self.value_dim]);
            }
            let at = self.place(piece, Side::Key);
            let by = (r.as_panel(), dr.as_panel());
            self.keys.back(simd, at, (k, self.key_dim), by, again(dk), (key_params, map));
        }
        if self.part != Part::Absorb {
            let by = (p.as_panel(), dn.as_panel());
            Self::outer(simd, [f, c, len], by, grad_state, pad(c), Start::Keep);
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

impl FeatureCell {
    fn key_value<'a>(&self, piece: Piece<'a>) -> (Panel<'a>, Panel<'a>) {
        let at = usize::from(self.part == Part::Causal);
        (piece.inputs[at], piece.inputs[at + 1])
    }
}

/// `dN . o`, `o = N / den`, summed in the order and with the roundings of a product: a row that sees one key has `o = v`, and
/// its gradients by the weight, `dN . v - dN . o`, then cancel to the last bit or nearly.
#[inline(always)]
fn along<S: Simd>(dn: &[f32], n: &[f32], den: f32) -> f32 {
    let quotient = |n: &f32| if den == 0.0 { 0.0 } else { n / den };
    let fused = S::f32s::LEN > 4 || cfg!(target_arch = "aarch64");
    dn.iter().zip(n).fold(
        0.0,
        |sum, (d, n)| {
            if fused { d.mul_add(quotient(n), sum) } else { d * quotient(n) + sum }
        },
    )
}
