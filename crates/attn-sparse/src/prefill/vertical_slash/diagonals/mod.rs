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
//! Every multiply-add counts, and most read numbers of their own: a core computes as fast as it reads from its nearest caches,
//! about half as fast as in a product. So distances come in segments, few enough that the rows of neighbouring distances are
//! still near when the next queries want them, and so close together that all keys of a block of queries stay in the
//! second-level cache. Two queries go along together: a key at distances `d` and `d + 1` from them, both in the list, is read
//! once.
//!
//! A row starts from the state that other keys left: accumulator, maximum, sum. Rows do not depend on each other.

mod kernels;
mod segments;
#[cfg(test)]
mod tests;

use super::rows::Aligned;
use attn_core::simd::{Simd, SimdBase, SimdOp};
use attn_core::tile::MAX_LANES;
use attn_core::view::RowsMut;
use kernels::{dots, values, weigh};
use segments::Group;
pub(super) use segments::Segment;
use std::ops::Range;

/// Most distances of a segment: their rows and those of the next query fit into the first-level cache.
const DISTANCES: usize = 32;

/// A thread's scratch.
#[derive(Default)]
pub(super) struct Workspace {
    acc: Option<Aligned>,
    /// `[rows]`.
    max: Vec<f32>,
    /// `[rows, MAX_LANES]`.
    sum: Vec<f32>,
    /// Rows of a query that is attended alone.
    fours: Vec<[u32; 4]>,
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
        let Workspace { acc, max, sum, fours } = workspace;
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
        for segment in segments {
            simd.vectorize(
                #[inline(always)]
                || {
                    let mut r = 0;
                    while r < n {
                        let p = position + r as isize;
                        if let (Some((group, seen)), true) = (segment.two(p), r + 1 < n) {
                            let rows = Rows { q, acc, max, sum, first: r };
                            rows.attend::<S, 2>(simd, (k, v), seen, group, softmax_scale);
                            r += 2;
                            continue;
                        }
                        if let Some((group, seen)) = segment.one(p, fours) {
                            let rows = Rows { q, acc, max, sum, first: r };
                            rows.attend::<S, 1>(simd, (k, v), seen, group, softmax_scale);
                        }
                        r += 1;
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

/// Rows of a block, and which of them are attended.
struct Rows<'a, const W: usize> {
    q: &'a [[f32; W]],
    acc: &'a mut [[f32; W]],
    max: &'a mut [f32],
    sum: &'a mut [[f32; MAX_LANES]],
    first: usize,
}

impl<const W: usize> Rows<'_, W> {
    /// `Q` rows from the first on, along one segment.
    #[inline(always)]
    fn attend<S: Simd, const Q: usize>(
        self,
        simd: S,
        (k, v): (&[[f32; W]], &[[f32; W]]),
        seen: Range<usize>,
        group: Group<'_, Q>,
        softmax_scale: f32,
    ) {
        let Self { q, acc, max, sum, first } = self;
        let (Some(q), Some(acc)) = (q[first..].first_chunk(), acc[first..].first_chunk_mut()) else { return };
        let (k, v) = (&k[seen.clone()], &v[seen]);
        let mut weights = [[0.0; DISTANCES]; Q];
        dots(simd, q, k, group, softmax_scale, &mut weights);
        for (query, weights) in weights.iter_mut().enumerate() {
            let weights = &mut weights[..group.len.next_multiple_of(S::f32s::LEN)];
            weigh(simd, weights, &mut max[first + query], &mut sum[first + query], &mut acc[query]);
        }
        values(simd, v, group, &weights, acc);
    }
}
