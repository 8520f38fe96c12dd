//! The largest exponent of all keys of a head: what stabilised features lower theirs by.

use super::maps::{Map, Place, Side};
use crate::scan::cell::{Cell, PanelMut, Piece, PieceGrads};
use crate::scan::log_sum::NO_MAX;
use crate::scan::{ScanState, Tokens, absorb};
use attn_core::simd::Simd;
use attn_core::tile::MAX_LANES;
use attn_core::{Result, TensorView};

/// For each head of `k` what its keys' exponents are lowered by, `[sequences * heads]`: one number for random features, one a
/// channel for exponentials; nothing for other maps.
pub(super) fn shifts(map: &Map, k: TensorView<'_>, cu_seqlens: Option<&[usize]>) -> Result<Vec<Vec<f32>>> {
    let [_, heads, _, width] = k.shape();
    let one = match map {
        Map::Favor(_) => true,
        Map::Exp => false,
        _ => return Ok(Vec::new()),
    };
    let cell = Largest { map: map.clone(), width, one };
    let tokens = Tokens::new(&cell, &[("k", k)])?.packed(cu_seqlens)?;
    let mut state = ScanState::new(&cell, tokens.sequences(), heads);
    absorb(&cell, &tokens, &mut state)?;
    let columns = if one { 1 } else { width };
    let found = state.part(0);
    let rows = found.chunks_exact(columns).map(|row| {
        // Without keys nothing is lowered.
        let mut row: Vec<f32> = row.iter().map(|x| if *x == NO_MAX { 0.0 } else { *x }).collect();
        if !one {
            row.resize(width.next_multiple_of(MAX_LANES), 0.0);
        }
        row
    });
    Ok(rows.collect())
}

struct Largest {
    map: Map,
    width: usize,
    one: bool,
}

impl Cell for Largest {
    fn inputs(&self) -> Vec<usize> {
        vec![self.width]
    }

    fn out_width(&self) -> usize {
        1
    }

    fn state(&self) -> Vec<[usize; 2]> {
        vec![[1, if self.one { 1 } else { self.width }]]
    }

    fn initial(&self, _: usize) -> f32 {
        NO_MAX
    }

    fn scratch(&self, len: usize) -> usize {
        self.map.scratch(self.width, len)
    }

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        _: PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        if let Map::Favor(random) = &self.map {
            let at = Place { side: Side::Key, head: piece.head, first: 0, len: piece.len, shift: &[] };
            let largest = random.largest(simd, at, piece.inputs[0], scratch);
            state[0][0] = state[0][0].max(largest);
            return;
        }
        for t in 0..piece.len {
            let rows = state[0].iter_mut().zip(piece.inputs[0].row(t));
            rows.for_each(|(max, x)| *max = max.max(*x));
        }
    }

    /// Stabilisers have no gradient.
    #[inline(always)]
    fn backward<S: Simd>(&self, _: S, _: Piece<'_>, _: &[&[f32]], _: PieceGrads<'_, '_>, _: &mut [f32]) {}
}
