//! Attention along single diagonals: each query at its own distances, and at no others.
//!
//! Query `i` at position `p` attends keys `p - d` for the distances `d` of a list, which is the same for all queries. Where the
//! list has gaps, a tile of queries would meet mostly keys that only some of them see. Here a query stays in registers, keys
//! and values are read row by row, and the vectors run along the rows:
//!
//! ```text
//! s_d = softmax_scale * sum_c q_c k_{p-d, c}        16 distances at a time, whose sums end in the lanes of one vector
//! acc_c <- acc_c + e^(s_d - m) v_{p-d, c}
//! ```
//!
//! Every multiply-add counts, and each reads its own numbers: a core computes as fast as it reads from its nearest caches, some
//! 45 % of the speed of a product. So distances come in segments, few enough that the rows of neighbouring distances are still
//! near when the next query wants them, and so close together that all keys of a block of queries stay in the second-level
//! cache.
//!
//! A row starts from the state that other keys left: accumulator, maximum, sum. Rows do not depend on each other.

mod kernels;
#[cfg(test)]
mod tests;

use super::rows::Aligned;
use attn_core::simd::{Simd, SimdBase, SimdOp};
use attn_core::tile::MAX_LANES;
use attn_core::view::RowsMut;
use kernels::{Along, dots, values, weigh};

/// Most distances of a segment: their rows and those of the next query fit into the first-level cache.
const DISTANCES: usize = 32;
/// Most numbers of a key between the nearest and the farthest key of a query's segment.
const SPAN: usize = 1 << 16;

/// Distances that a query attends together.
#[derive(Debug)]
pub(super) struct Segment {
    nearest: usize,
    farthest: usize,
    /// How many keys behind the farthest one each lies; nearest first.
    behind: Vec<u32>,
}

impl Segment {
    /// Distances, ascending, in segments for rows of `W` numbers.
    pub(super) fn cut<const W: usize>(mut distances: &[u32]) -> Vec<Self> {
        let mut segments = Vec::new();
        while let Some(nearest) = distances.first() {
            let is_near = |d: &&u32| (**d - nearest) as usize <= SPAN / W;
            let (own, rest) =
                distances.split_at(distances.iter().take(DISTANCES).take_while(is_near).count());
            let farthest = own[own.len() - 1];
            let behind = own.iter().map(|d| farthest - d).collect();
            segments.push(Self { nearest: *nearest as usize, farthest: farthest as usize, behind });
            distances = rest;
        }
        segments
    }
}

/// A thread's scratch.
#[derive(Default)]
pub(super) struct Workspace {
    acc: Option<Aligned>,
    /// `[rows]`.
    max: Vec<f32>,
    /// `[rows, MAX_LANES]`.
    sum: Vec<f32>,
}

/// Some queries of a head, one behind the other.
pub(super) struct Diagonals<'a, const W: usize> {
    /// `[rows, W]`.
    pub(super) q: &'a [[f32; W]],
    /// Of the whole head, `[n_kv, W]`.
    pub(super) k: &'a [[f32; W]],
    pub(super) v: &'a [[f32; W]],
    /// Of the first query.
    pub(super) position: isize,
    pub(super) segments: &'a [Segment],
    pub(super) softmax_scale: f32,
    pub(super) workspace: &'a mut Workspace,
    /// What the rows got from other keys, and then from all: `[rows, head_dim_v]`, and the log-sum-exps.
    pub(super) out: RowsMut<'a, f32>,
    pub(super) lse: &'a mut [f32],
}

impl<const W: usize> SimdOp for Diagonals<'_, W> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { q, k, v, position, segments, softmax_scale, workspace, mut out, lse } = self;
        let Workspace { acc, max, sum } = workspace;
        let n = q.len();
        let acc = match acc {
            Some(acc) if acc.numbers().len() >= n * W => acc,
            acc => acc.insert(Aligned::zeroed(n * W)),
        };
        let acc = &mut acc.numbers_mut().as_chunks_mut::<W>().0[..n];
        max.clear();
        max.extend_from_slice(lse);
        sum.clear();
        sum.resize(n * MAX_LANES, 0.0);
        let sum = sum.as_chunks_mut::<MAX_LANES>().0;
        for (r, acc) in acc.iter_mut().enumerate() {
            acc.fill(0.0);
            if lse[r] != f32::NEG_INFINITY {
                let row = out.row_mut(r);
                acc[..row.len()].copy_from_slice(row);
                sum[r][0] = 1.0;
            }
        }
        let mut weights = [0.0; DISTANCES];
        for segment in segments {
            simd.vectorize(
                #[inline(always)]
                || {
                    for r in 0..n {
                        let Some((along, seen)) = Along::of(segment, position + r as isize) else { continue };
                        let (k, v) = (&k[seen.clone()], &v[seen]);
                        dots(simd, &q[r], k, along, softmax_scale, &mut weights);
                        let weights = &mut weights[..along.len().next_multiple_of(S::f32s::LEN)];
                        weigh(simd, weights, &mut max[r], &mut sum[r], &mut acc[r]);
                        values(simd, v, along, weights, &mut acc[r]);
                    }
                },
            );
        }
        for (r, acc) in acc.iter().enumerate() {
            let total: f32 = sum[r][..S::f32s::LEN].iter().sum();
            let row = out.row_mut(r);
            if total == 0.0 {
                row.fill(0.0);
                lse[r] = f32::NEG_INFINITY;
            } else {
                row.iter_mut().zip(acc).for_each(|(out, acc)| *out = acc / total);
                lse[r] = max[r] + total.ln();
            }
        }
    }
}
