//! Block sums of probabilities estimated on antidiagonals.
//!
//! With `s` the stride, query group `a` are the rows `a s .. a s + s`, key group `b` likewise, and
//!
//! ```text
//! S_ab = softmax_scale / (s * norm) * sum_{t < s} q_{a s + s - 1 - t} . k_{b s + t}
//! P_a. = softmax of S_a. over the visible b (causal: the group's positions reach b, i.e. b <= a when n_q = n_kv)
//! B_uv = sum of P_ab over the groups a of query block u and b of key block v
//! ```
//!
//! so that every `s`-th antidiagonal of each `s x s` square is summed: it crosses all vertical and slash lines. Rows beyond
//! the end count as zeros. Time is `1/s` of the full scores; a row's probabilities are kept as sums over blocks.
//!
//! Source: Xu, Xiao, Huang, Guo, Han, "XAttention: Block Sparse Attention with Antidiagonal Scoring", 2025.

use super::query_sums::absorb;
use super::{HeadRows, PANEL};
use attn_core::simd::{Simd, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, product};
use std::f32::consts::LOG2_E;

/// Groups of one head and how they are scored.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub(crate) q: HeadRows<'a>,
    pub(crate) k: HeadRows<'a>,
    /// Rows of a group.
    pub(crate) stride: usize,
    /// Groups of a block of keys.
    pub(crate) block: usize,
    /// Multiplies the sum of dot products.
    pub(crate) scale: f32,
    /// Whether a group sees no later one.
    pub(crate) causal: bool,
}

/// A panel of at most [`PANEL`] groups of queries; `sums [blocks of keys]` of each group are added to `sums[group]`.
pub(crate) struct AntidiagonalSums<'a, 'o> {
    groups: Strided<'a>,
    first: usize,
    count: usize,
    /// `[count, blocks of keys]`.
    sums: &'o mut [f32],
}

/// The kernel that writes `sums [count, blocks of keys]` for the groups of queries `first .. first + count`.
pub(crate) fn antidiagonal_sums<'a, 'o>(
    groups: Strided<'a>,
    first: usize,
    count: usize,
    sums: &'o mut [f32],
) -> AntidiagonalSums<'a, 'o> {
    debug_assert!(count <= PANEL);
    AntidiagonalSums { groups, first, count, sums }
}

impl SimdOp for AntidiagonalSums<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { groups: Strided { q, k, stride, block, scale, causal }, first, count, sums } = self;
        let (width, n_groups) = (q.width(), k.len().div_ceil(stride));
        let n_blocks = n_groups.div_ceil(block);
        let queries = self.groups.queries(simd, first, count);
        let last_of = |lane: usize| {
            let last_row = ((first + lane + 1) * stride).min(q.len()) as isize - 1;
            let position = last_row + k.len() as isize - q.len() as isize;
            if !causal {
                n_groups
            } else if position < 0 {
                0
            } else {
                position as usize / stride + 1
            }
        };
        let mut visible = [0; PANEL];
        (0..count).for_each(|lane| visible[lane] = last_of(lane).min(n_groups));
        let most = visible.iter().copied().max().unwrap_or(0);

        let mut scores = vec![0.0; block * PANEL];
        let mut scratch = Vec::new();
        // Maximum and sum of each block and lane.
        let mut parts = vec![([f32::NEG_INFINITY; PANEL], [0.0f32; PANEL]); most.div_ceil(block)];
        for (at, (block_max, block_sum)) in parts.iter_mut().enumerate() {
            let groups = at * block..((at + 1) * block).min(n_groups);
            let scores = &mut scores[..groups.len() * PANEL];
            // Groups of which every row exists; at most the last one is cut.
            let whole = groups.len().min((k.len() / stride).saturating_sub(groups.start));
            let rows = groups.start * stride..((groups.end) * stride).min(k.len());
            let cut = rows.len() - whole * stride;
            let keys = k.lhs(simd, rows, &mut scratch);
            for t in 0..stride {
                let b = Rhs { data: &queries[t * width * PANEL..], stride: PANEL };
                let start = if t == 0 { Start::Zero } else { Start::Keep };
                let present = whole + usize::from(t < cut);
                let a = Lhs {
                    data: keys.data.get(t * keys.row_stride..).unwrap_or(&[]),
                    row_stride: stride * keys.row_stride,
                    col_stride: 1,
                };
                product(simd, [present, PANEL, width], a, b, TileMut { data: scores, stride: PANEL }, start);
            }
            scores.iter_mut().for_each(|score| *score *= scale * LOG2_E);
            if groups.end > visible[..count].iter().copied().min().unwrap_or(0) {
                for (group, row) in groups.zip(scores.chunks_exact_mut(PANEL)) {
                    for (score, visible) in row.iter_mut().zip(&visible) {
                        *score = if group < *visible { *score } else { f32::NEG_INFINITY };
                    }
                }
            }
            absorb(simd, scores, block_max, block_sum);
        }
        for (lane, sums) in sums.chunks_exact_mut(n_blocks.max(1)).take(count).enumerate() {
            sums.fill(0.0);
            let max = parts.iter().map(|(max, _)| max[lane]).fold(f32::NEG_INFINITY, f32::max);
            if max == f32::NEG_INFINITY {
                continue;
            }
            let sum: f32 = parts.iter().map(|(part, sum)| sum[lane] * (part[lane] - max).exp2()).sum();
            let lse = max + sum.log2();
            for (to, (block_max, block_sum)) in sums.iter_mut().zip(&parts) {
                *to = block_sum[lane] * (block_max[lane] - lse).exp2();
            }
        }
    }
}

impl Strided<'_> {
    /// Groups of queries, turned, the rows of a group backwards: `[stride, width, PANEL]`.
    #[inline(always)]
    fn queries<S: Simd>(&self, simd: S, first: usize, count: usize) -> Vec<f32> {
        let (stride, width) = (self.stride, self.q.width());
        let rows = first * stride..((first + count) * stride).min(self.q.len());
        let mut row_major = vec![0.0; rows.len() * width];
        self.q.read(simd, rows, &mut row_major);
        let mut turned = vec![0.0; stride * width * PANEL];
        for (at, row) in row_major.chunks_exact(width.max(1)).enumerate() {
            let (lane, t) = (at / stride, stride - 1 - at % stride);
            let to = &mut turned[t * width * PANEL..][..width * PANEL];
            row.iter().enumerate().for_each(|(c, x)| to[c * PANEL + lane] = *x);
        }
        turned
    }
}
