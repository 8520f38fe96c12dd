//! What a piece's tokens are to one another and to the state: both passes start with it.

use super::fading::Fading;
use super::matrices::Chunk;
use super::rows::again;
use super::{FeatureCell, Part};
use crate::features::maps::Side;
use crate::scan::cell::{PanelMut, Piece};
use attn_core::simd::Simd;

/// Where it goes.
pub(super) struct Sums<'p, 'd> {
    /// Features of queries and keys `[len, features]`.
    pub(super) p: &'p mut PanelMut<'d>,
    pub(super) r: &'p mut PanelMut<'d>,
    /// `N'`, and values less the reference, with their ones, `[len, columns]`.
    pub(super) n: &'p mut PanelMut<'d>,
    pub(super) v: &'p mut PanelMut<'d>,
    /// What the state gives, before it is made relative to the reference, if that is asked for.
    pub(super) held: Option<&'p mut PanelMut<'d>>,
    /// `A`, and what the gates make of it, `[len, len]`.
    pub(super) a: &'p mut PanelMut<'d>,
    pub(super) w: &'p mut PanelMut<'d>,
    pub(super) reference: &'p mut [f32],
}

impl FeatureCell {
    /// Fills `to` from the state before the piece; `turned` and `map` are scratch.
    #[inline(always)]
    pub(super) fn sums<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &[f32],
        fading: Option<&Fading<'_>>,
        to: Sums<'_, '_>,
        [turned, map]: [&mut [f32]; 2],
    ) {
        let len = piece.len;
        let chunk = self.chunk(len);
        let Sums { p, r, n, v, held, a, w, reference } = to;
        self.reference(piece, reference);
        if self.part != Part::Read {
            let k = self.key_value(piece).0;
            self.keys.apply(simd, self.place(piece, Side::Key), (k, self.key_dim), again(r), map);
            self.values(piece, Some(reference), v);
        }
        if self.part != Part::Absorb {
            self.read_features(simd, piece, again(p), map);
            self.read_state(simd, len, p.as_panel(), state, fading, n);
            if let Some(held) = held {
                held.data.copy_from_slice(n.data);
            }
            self.centre(len, reference, n);
        }
        if self.part == Part::Causal {
            chunk.weights(simd, (p.as_panel(), r.as_panel()), turned, a);
            if let Some(fading) = fading {
                fading.weights(w);
                a.data.iter_mut().zip(&*w.data).for_each(|(a, w)| *a *= w);
            }
            chunk.mix(simd, (a.as_panel(), v.as_panel()), n);
        }
    }

    pub(super) fn chunk(&self, len: usize) -> Chunk {
        Chunk { len, features: self.features(), columns: self.columns(), value_dim: self.value_dim }
    }
}
