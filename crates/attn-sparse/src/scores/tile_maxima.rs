//! The largest score that each query has in each of some blocks of keys.

use super::{HeadRows, PANEL};
use attn_core::simd::{Simd, SimdBase, SimdOp};
use attn_core::tile::{Rhs, Start, TileMut, product};
use std::ops::Range;

/// Writes `maxima [blocks, queries]`; -inf where a query sees nothing of a block.
pub(crate) struct TileMaxima<'a, 'o> {
    pub(crate) q: HeadRows<'a>,
    pub(crate) k: HeadRows<'a>,
    /// Query rows.
    pub(crate) rows: Range<usize>,
    /// Blocks of keys, and keys of a block.
    pub(crate) blocks: (&'o [usize], usize),
    pub(crate) softmax_scale: f32,
    /// Whether a query sees no key after its position.
    pub(crate) causal: bool,
    pub(crate) maxima: &'o mut Vec<f32>,
}

impl SimdOp for TileMaxima<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { q, k, rows, blocks: (blocks, size), softmax_scale, causal, maxima } = self;
        let (width, n_rows) = (q.width(), rows.len());
        maxima.clear();
        maxima.resize(blocks.len() * n_rows, f32::NEG_INFINITY);
        let mut queries = vec![0.0; width * PANEL];
        let (mut scores, mut scratch) = (vec![0.0; size * PANEL], Vec::new());
        for first in rows.clone().step_by(PANEL) {
            let lanes = first..(first + PANEL).min(rows.end);
            q.turn(simd, lanes.clone(), softmax_scale, &mut queries, PANEL);
            let position = first as isize + k.len() as isize - q.len() as isize;
            for (at, block) in blocks.iter().enumerate() {
                let keys = block * size..((block + 1) * size).min(k.len());
                let a = k.lhs(simd, keys.clone(), &mut scratch);
                let b = Rhs { data: &queries, stride: PANEL };
                let c = TileMut { data: &mut scores, stride: PANEL };
                product(simd, [keys.len(), PANEL, width], a, b, c, Start::Zero);
                let mut highest = [f32::NEG_INFINITY; PANEL];
                for (j, row) in keys.zip(scores.chunks_exact_mut(PANEL)) {
                    if causal {
                        // Lanes before `j - position` stand before the key.
                        let hidden = (j as isize - position).clamp(0, PANEL as isize) as usize;
                        row[..hidden].fill(f32::NEG_INFINITY);
                    }
                    let step = S::f32s::LEN;
                    for (highest, row) in highest.chunks_exact_mut(step).zip(row.chunks_exact(step)) {
                        let max = S::f32s::from_slice(simd, highest).max(S::f32s::from_slice(simd, row));
                        max.store_slice(highest);
                    }
                }
                let to = &mut maxima[at * n_rows + first - rows.start..][..lanes.len()];
                to.copy_from_slice(&highest[..lanes.len()]);
            }
        }
    }
}
