//! Upsampling: a coarse row's result copied to its children and merged into theirs, in one pass.
//!
//! Node `i` of a level has the parent `I = i / ratio`. Both hold softmax results over disjoint sets of keys; the
//! union is
//!
//! ```text
//! lse_i <- ln(e^lse_i + e^lse_I)      out_i <- e^(lse_i - lse) out_i + e^(lse_I - lse) out_I
//! ```
//!
//! Going from the coarsest level to the tokens, each row is touched once: `O(n width)` for all levels together.

use crate::coarsen::LevelRows;
use attn_core::merge::merge_weights;
use attn_core::parallel::for_each_task;
use attn_core::view::{BlockMut, View};
use attn_core::{Element, OutMut, Result, ViewMut};

/// Fine rows of one task.
const BLOCK: usize = 512;

/// What a level has attended: rows that merge with those of other levels.
#[derive(Debug)]
pub(crate) struct LevelResult {
    /// `[batch, heads, nodes, width]`.
    pub(crate) out: LevelRows,
    /// `[batch, heads, nodes]`.
    pub(crate) lse: Vec<f32>,
}

/// Merges `coarse` into the level below it, `out [batch, heads, n, width]` with `lse [batch, heads, n]`, in place.
///
/// # Errors
/// None for a `coarse` of `n.div_ceil(ratio)` nodes.
pub(crate) fn merge_parents(
    out: OutMut<'_>,
    lse: &mut [f32],
    coarse: &LevelResult,
    ratio: usize,
) -> Result<()> {
    match out {
        OutMut::F32(out) => merge_typed(out, lse, coarse, ratio),
        OutMut::Bf16(out) => merge_typed(out, lse, coarse, ratio),
        OutMut::F16(out) => merge_typed(out, lse, coarse, ratio),
    }
}

fn merge_typed<E: Element>(
    out: ViewMut<'_, E>,
    lse: &mut [f32],
    coarse: &LevelResult,
    ratio: usize,
) -> Result<()> {
    let [_, heads, n, _] = out.shape();
    let parents = Parents { out: coarse.out.view()?, lse: &coarse.lse, heads, n: n.div_ceil(ratio), ratio };
    // Blocks and parts of `lse` come in the same order: a head at a time, then a block at a time.
    let parts = lse.chunks_mut(n.max(1)).flat_map(|head| head.chunks_mut(BLOCK));
    let tasks: Vec<_> = out.into_blocks(BLOCK).zip(parts).collect();
    for_each_task(tasks.into_iter(), || (), |(), (block, lse)| parents.merge(block, lse));
    Ok(())
}

/// The coarse level, seen from its children.
struct Parents<'a> {
    out: View<'a, f32>,
    lse: &'a [f32],
    heads: usize,
    n: usize,
    ratio: usize,
}

impl Parents<'_> {
    fn merge<E: Element>(&self, mut block: BlockMut<'_, E>, lse: &mut [f32]) {
        let outs = self.out.head(block.batch, block.head);
        let lses = &self.lse[(block.batch * self.heads + block.head) * self.n..][..self.n];
        for ((at, i), lse) in block.rows.clone().enumerate().zip(lse) {
            let parent = i / self.ratio;
            let (keep, add, merged) = merge_weights(*lse, lses[parent]);
            *lse = merged;
            // A part of weight 0 contributes nothing, whatever its values are.
            if add == 0.0 {
                continue;
            }
            let row = block.out.row_mut(at).iter_mut().zip(outs.row(parent));
            if keep == 0.0 {
                row.for_each(|(x, y)| *x = E::store(add * y));
            } else {
                row.for_each(|(x, y)| *x = E::store(keep * x.load() + add * y));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn level(shape: [usize; 4], out: impl Fn(usize) -> f32, lse: impl Fn(usize) -> f32) -> LevelResult {
        let mut rows = LevelRows::zeros(shape);
        let mut at = 0;
        for mut block in rows.view_mut().unwrap().into_blocks(usize::MAX) {
            for i in 0..block.out.len() {
                for x in block.out.row_mut(i) {
                    *x = out(at);
                    at += 1;
                }
            }
        }
        LevelResult { out: rows, lse: (0..shape[0] * shape[1] * shape[2]).map(lse).collect() }
    }

    #[test]
    fn children_get_the_union_with_their_parent() {
        let (b, h, n, w, ratio) = (2, 2, 1200, 3, 2);
        let m = n / ratio;
        let coarse = level([b, h, m, w], |i| (i as f32).cos(), |i| (i as f32 * 0.7).sin());
        let out: Vec<f32> = (0..b * h * n * w).map(|i| (i as f32 * 0.3).sin()).collect();
        let lse: Vec<f32> = (0..b * h * n).map(|i| (i as f32 * 0.2).cos()).collect();
        let (mut got, mut got_lse) = (out.clone(), lse.clone());
        let view = ViewMut::contiguous("out", &mut got, [b, h, n, w]).unwrap();
        merge_parents(view.into(), &mut got_lse, &coarse, ratio).unwrap();
        for row in 0..b * h * n {
            let parent = row / n * m + row % n / ratio;
            let (fine, above) = (f64::from(lse[row]).exp(), f64::from(coarse.lse[parent]).exp());
            assert!((f64::from(got_lse[row]) - (fine + above).ln()).abs() < 1e-6, "row {row}");
            for c in 0..w {
                let values = [out[row * w + c], ((parent * w + c) as f32).cos()].map(f64::from);
                let want = (fine * values[0] + above * values[1]) / (fine + above);
                assert!((f64::from(got[row * w + c]) - want).abs() < 1e-6, "row {row}");
            }
        }
    }

    #[test]
    fn an_empty_part_changes_nothing() {
        let empty = level([1, 1, 1, 2], |_| f32::NAN, |_| f32::NEG_INFINITY);
        let (mut out, mut lse) = ([1.0, 2.0, 3.0, 4.0], [0.5, f32::NEG_INFINITY]);
        let view = ViewMut::contiguous("out", &mut out, [1, 1, 2, 2]).unwrap();
        merge_parents(view.into(), &mut lse, &empty, 2).unwrap();
        assert_eq!((out, lse), ([1.0, 2.0, 3.0, 4.0], [0.5, f32::NEG_INFINITY]));

        let full = level([1, 1, 1, 2], |_| 7.0, |_| 0.25);
        let (mut out, mut lse) = ([f32::NAN; 4], [f32::NEG_INFINITY; 2]);
        let view = ViewMut::contiguous("out", &mut out, [1, 1, 2, 2]).unwrap();
        merge_parents(view.into(), &mut lse, &full, 2).unwrap();
        assert_eq!((out, lse), ([7.0; 4], [0.25; 2]));
    }
}
