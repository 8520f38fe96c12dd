//! The rows of a piece: features, values, gates, what the state gives.

use super::fading::Fading;
use super::{FeatureCell, Part};
use crate::features::maps::{Place, Side};
use crate::features::{Gate, Normaliser};
use crate::scan::cell::{Panel, PanelMut, Piece};
use crate::scan::gemm::rows;
use attn_core::simd::Simd;
use attn_core::tile::Start;

impl FeatureCell {
    pub(crate) fn features(&self) -> usize {
        self.keys.width(self.key_dim)
    }

    /// Columns of the state.
    pub(crate) fn columns(&self) -> usize {
        self.value_dim + usize::from(self.normaliser.divides())
    }

    /// Of all heads, the keys' heads that a piece reads.
    pub(super) fn key_head(&self, piece: Piece<'_>) -> usize {
        // Absorbing runs over the heads of keys.
        let group = if self.part == Part::Absorb { 1 } else { self.heads.0 / self.heads.1.max(1) };
        piece.batch * self.heads.1 + piece.head / group
    }

    pub(super) fn place<'a>(&'a self, piece: Piece<'_>, side: Side) -> Place<'a> {
        let shift = if side == Side::Query || self.shifts.is_empty() {
            &[]
        } else {
            &self.shifts[self.key_head(piece)][..]
        };
        Place { side, head: piece.head, first: piece.first, len: piece.len, shift }
    }

    pub(super) fn map_scratch(&self, len: usize) -> usize {
        self.queries.scratch(self.key_dim, len).max(self.keys.scratch(self.key_dim, len))
    }

    /// Queries' features, scaled.
    #[inline(always)]
    pub(super) fn read_features<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        mut out: PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        let at = self.place(piece, Side::Query);
        self.queries.apply(simd, at, (piece.inputs[0], self.key_dim), again(&mut out), scratch);
        if self.scale != 1.0 {
            (0..piece.len).for_each(|t| out.row(t).iter_mut().for_each(|x| *x *= self.scale));
        }
    }

    /// What values are taken relative to, `[value_dim]`: 0 where weights are not normalised.
    #[inline(always)]
    pub(super) fn reference(&self, piece: Piece<'_>, out: &mut [f32]) {
        match self.part {
            _ if !matches!(
                self.normaliser,
                Normaliser::Plus(_) | Normaliser::AtLeast(_) | Normaliser::EachPlus(_)
            ) =>
            {
                out.fill(0.0);
            }
            // Further on averages are of many values.
            Part::Causal if piece.first > 0 => out.fill(0.0),
            Part::Causal => {
                let first = self.key_value(piece).1.row(0);
                out.iter_mut().zip(first).for_each(|(m, v)| *m = if v.is_finite() { *v } else { 0.0 });
            }
            _ if self.references.is_empty() => out.fill(0.0),
            _ => out.copy_from_slice(&self.references[self.key_head(piece)]),
        }
    }

    /// Values less the reference, with their ones.
    #[inline(always)]
    pub(super) fn values(&self, piece: Piece<'_>, reference: Option<&[f32]>, out: &mut PanelMut<'_>) {
        let v = self.key_value(piece).1;
        for t in 0..piece.len {
            let row = out.row(t);
            row[..self.value_dim].copy_from_slice(&v.row(t)[..self.value_dim]);
            if let Some(reference) = reference {
                row[..self.value_dim].iter_mut().zip(reference).for_each(|(v, m)| *v -= m);
            }
            row[self.value_dim..].fill(1.0);
        }
    }

    /// The gates of a piece, if there are any.
    #[inline(always)]
    pub(super) fn fading<'s>(&self, piece: Piece<'_>, scratch: &'s mut [f32]) -> Option<Fading<'s>> {
        match self.gate {
            _ if self.part != Part::Causal => None,
            Gate::None => None,
            Gate::Constant(r) => Some(Fading::new(piece.len, |_| r, scratch)),
            Gate::Given => Some(Fading::new(piece.len, |t| piece.inputs[3].row(t)[0], scratch)),
        }
    }

    /// The reads of the state, `[len, columns]`, faded.
    #[inline(always)]
    pub(super) fn read_state<S: Simd>(
        &self,
        simd: S,
        len: usize,
        p: Panel<'_>,
        state: &[f32],
        fading: Option<&Fading<'_>>,
        n: &mut PanelMut<'_>,
    ) {
        let (f, c) = (self.features(), self.columns());
        rows(simd, [len, c, f], p, state, n, Start::Zero);
        if let Some(fading) = fading {
            scale_rows(n, fading.past);
        }
    }

    /// Makes the reads of the state relative to the reference.
    #[inline(always)]
    pub(super) fn centre(&self, len: usize, reference: &[f32], n: &mut PanelMut<'_>) {
        if self.part != Part::Causal || !self.normaliser.divides() {
            return;
        }
        for t in 0..len {
            let row = n.row(t);
            let d = row[self.value_dim];
            row[..self.value_dim].iter_mut().zip(reference).for_each(|(n, m)| *n -= d * m);
        }
    }

    pub(super) fn key_value<'a>(&self, piece: Piece<'a>) -> (Panel<'a>, Panel<'a>) {
        let at = usize::from(self.part == Part::Causal);
        (piece.inputs[at], piece.inputs[at + 1])
    }

    /// `D` of a row of `N'`.
    #[inline(always)]
    pub(super) fn sum_of_weights(&self, n: &[f32]) -> f32 {
        if self.normaliser.divides() { n[self.value_dim] } else { 0.0 }
    }
}

/// The same panel for a shorter time.
#[inline(always)]
pub(super) fn again<'a>(panel: &'a mut PanelMut<'_>) -> PanelMut<'a> {
    PanelMut { data: &mut *panel.data, stride: panel.stride }
}

/// Multiplies row `t` by `by[t]`.
#[inline(always)]
pub(super) fn scale_rows(panel: &mut PanelMut<'_>, by: &[f32]) {
    by.iter().enumerate().for_each(|(t, by)| panel.row(t).iter_mut().for_each(|x| *x *= by));
}

/// `sum x y`.
#[inline(always)]
pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}
