//! Both products of the forward pass on bf16 pairs, with the CPU's dot product (`vdpbf16ps`): twice the multiply-adds of f32.
//!
//! As in `block`, queries stand in the vector lanes. Two numbers that follow each other along the contracted axis make a
//! pair: two channels for the scores, two keys for the outputs.
//!
//! ```text
//! S^T = scale K Q^T             K [keys, head_dim / 2]         Q^T [head_dim / 2, 32]      pairs of channels
//! P^T = bf16(e^(S^T - m))       [keys / 2, 32]                                             pairs of keys
//! O^T = O^T + V^T P^T           V^T [head_dim_v, keys / 2]                                 pairs of keys
//! ```
//!
//! Scores are f32 and go through the same norm-free score mods, masks and running maximum as widened ones. The weights are
//! rounded to bf16, and the normaliser is the sum of the *rounded* weights: the outputs are then exact averages with weights
//! that are off by up to 2^-8 each. With the sum of the unrounded ones a row's weights would no longer add up to 1, and its
//! output would be off by their common error times the mean of the values.
//!
//! A last odd channel is paired with zero. Panels that start or end in the middle of a pair of keys take the whole pair, the
//! key they do not see with a score of -inf. A weight of 0 times a value of NaN or infinity would leak; a chunk with such a
//! value is widened instead.

use super::panel::Panel;
use super::problem::Problem;
use super::rows::{HeadRows, KeyRows};
use super::{HalfProducts, Spec};
use crate::tiles::PANEL;
use attn_core::simd::{Isa, Simd};
use attn_core::tile::{Bf16Dot, Finish, PairLhs, PairRhs, TileMut};
use attn_core::view::Rows;
use attn_core::{AttnError, AttnShape, Result};
use half::bf16;
use half::slice::HalfFloatSliceExt;
use std::ops::Range;

/// Of the bits of a bf16, all but the sign.
const MAGNITUDE: u16 = 0x7fff;
/// The bits of infinity: a larger magnitude is NaN.
const INFINITY: u16 = 0x7f80;

/// The instruction, if `spec` asks for it on `problem`.
///
/// # Errors
/// [`AttnError::Unsupported`] if it must be native and cannot.
pub(super) fn choose<M: ?Sized, C: ?Sized>(
    problem: &Problem<'_>,
    spec: &Spec<'_, M, C>,
    isa: Isa,
) -> Result<Option<Bf16Dot>> {
    if spec.half_products == HalfProducts::Widen {
        return Ok(None);
    }
    let dot = Bf16Dot::detect().filter(|_| isa == Isa::Avx512);
    let obstacle = if !problem.is_bf16() {
        "queries, keys and values that are not all bf16".into()
    } else if spec.dropout.is_some() {
        "dropout".into()
    } else if spec.qk_norm.is_some() {
        "a norm of queries and keys".into()
    } else if dot.is_none() {
        format!("{isa} on this CPU: it takes AVX-512 with avx512bf16")
    } else {
        return Ok(dot);
    };
    match spec.half_products {
        HalfProducts::Native => Err(AttnError::unsupported("half_products = native", obstacle)),
        _ => Ok(None),
    }
}

/// A thread's scratch: the pairs of the queries of a block, and of one chunk of keys.
pub(super) struct NativeBf16 {
    dot: Bf16Dot,
    head_dim_v: usize,
    /// Pairs of channels.
    n_pairs: usize,
    /// `[panels, n_pairs, PANEL]`.
    q: Vec<u32>,
    /// `[keys, n_pairs]`, of an even number of keys.
    k: Vec<u32>,
    /// `[keys / 2, head_dim_v]`.
    v: Vec<u32>,
    /// `[keys / 2, PANEL]`.
    weights: Vec<u32>,
}

impl NativeBf16 {
    pub(super) fn new(dot: Bf16Dot, shape: &AttnShape) -> Self {
        let (head_dim_v, n_pairs) = (shape.head_dim_v, shape.head_dim.div_ceil(2));
        Self { dot, head_dim_v, n_pairs, q: vec![], k: vec![], v: vec![], weights: vec![] }
    }

    /// Takes the queries of all panels of a block.
    pub(super) fn start(&mut self, panels: &[Panel], problem: &Problem<'_>, sequence: usize) {
        let panel_len = self.n_pairs * PANEL;
        self.q.clear();
        self.q.resize(panels.len() * panel_len, 0);
        for (p, panel) in panels.iter().enumerate() {
            let pairs = &mut self.q[p * panel_len..][..panel_len];
            for segment in &panel.segments {
                let rows = bf16_rows(problem.q_rows(sequence, segment.head.head));
                for (lane, i) in segment.lanes() {
                    let row = bits(rows.row(i));
                    for (pair, two) in pairs.chunks_exact_mut(PANEL).zip(row.chunks(2)) {
                        let second = two.get(1).copied().unwrap_or(0);
                        pair[lane] = u32::from(two[0]) | u32::from(second) << 16;
                    }
                }
            }
        }
    }

    /// Takes the keys and values of all `ranges`; false if some value is NaN or infinite.
    #[inline(always)]
    pub(super) fn pack<S: Simd>(
        &mut self,
        simd: S,
        (k, v): (&KeyRows<'_>, &KeyRows<'_>),
        ranges: &[Range<usize>],
    ) -> bool {
        let n_keys = ranges.iter().map(Range::len).sum::<usize>().next_multiple_of(2);
        self.v.resize(n_keys / 2 * self.head_dim_v, 0);
        let (mut next, mut largest) = (0, 0);
        each_piece(v, ranges, |piece| {
            let pairs = &mut self.v[next / 2 * self.head_dim_v..];
            largest = largest.max(simd.vectorize(
                #[inline(always)]
                || pair_rows(piece, next % 2 == 1, pairs),
            ));
            next += piece.len();
        });
        if largest >= INFINITY {
            return false;
        }
        self.k.resize(n_keys * self.n_pairs, 0);
        // The first of a pair is the low half: as two numbers lie in memory.
        let mut rest: &mut [u16] = bytemuck::must_cast_slice_mut(&mut self.k);
        let padded = 2 * self.n_pairs;
        each_piece(k, ranges, |piece| {
            let (rows, others) = std::mem::take(&mut rest).split_at_mut(piece.len() * padded);
            rest = others;
            if piece.stride() == padded && piece.width() == padded {
                rows.copy_from_slice(&bits(piece.data())[..rows.len()]);
            } else {
                for (row, from) in rows.chunks_exact_mut(padded.max(1)).zip(piece.iter()) {
                    row[..piece.width()].copy_from_slice(bits(from));
                    row[piece.width()..].fill(0);
                }
            }
        });
        rest.fill(0);
        true
    }

    /// Scores of panel `p` with `keys` of the chunk, in whole pairs of keys: `[keys, PANEL]`, and where those of `keys`
    /// are in it. The others are -inf.
    #[inline(always)]
    pub(super) fn scores<'s>(
        &self,
        p: usize,
        keys: Range<usize>,
        lanes: usize,
        softmax_scale: f32,
        scores: &'s mut [f32],
    ) -> (&'s mut [f32], Range<usize>) {
        let (whole, n_pairs) = (whole_pairs(&keys), self.n_pairs);
        let scores = &mut scores[..whole.len() * PANEL];
        self.dot.product(
            [whole.len(), lanes, n_pairs],
            PairLhs { data: &self.k[whole.start * n_pairs..], row_stride: n_pairs, col_stride: 1 },
            PairRhs { data: &self.q[p * n_pairs * PANEL..][..n_pairs * PANEL], stride: PANEL },
            TileMut { data: scores, stride: PANEL },
            Finish::Scale(softmax_scale),
        );
        let seen = (keys.start - whole.start) * PANEL..(keys.end - whole.start) * PANEL;
        scores[..seen.start].fill(f32::NEG_INFINITY);
        scores[seen.end..].fill(f32::NEG_INFINITY);
        (scores, seen)
    }

    /// Adds what `keys` of the chunk contribute to `panel`, given what [`NativeBf16::scores`] gave for them.
    #[inline(always)]
    pub(super) fn absorb<S: Simd>(
        &mut self,
        simd: S,
        panel: &mut Panel,
        keys: Range<usize>,
        lanes: usize,
        scores: &[f32],
    ) {
        let whole = whole_pairs(&keys);
        let n_pairs = whole.len() / 2;
        self.weights.resize(self.weights.len().max(n_pairs * PANEL), 0);
        let weights = &mut self.weights[..n_pairs * PANEL];
        panel.softmax.absorb_rounded(simd, self.dot, scores, weights, &mut panel.acc, lanes);
        let width = self.head_dim_v;
        self.dot.product(
            [width, lanes, n_pairs],
            PairLhs { data: &self.v[whole.start / 2 * width..], row_stride: 1, col_stride: width },
            PairRhs { data: weights, stride: PANEL },
            TileMut { data: &mut panel.acc, stride: PANEL },
            Finish::Add,
        );
    }
}

/// `keys` with the neighbours that share a pair with the first and the last.
fn whole_pairs(keys: &Range<usize>) -> Range<usize> {
    keys.start & !1..keys.end.next_multiple_of(2)
}

/// Calls `visit` with the rows of all `ranges`, piece by piece.
#[inline(always)]
fn each_piece<'a>(rows: &KeyRows<'a>, ranges: &[Range<usize>], mut visit: impl FnMut(Rows<'a, bf16>)) {
    for range in ranges {
        let mut keys = range.clone();
        while !keys.is_empty() {
            let piece = rows.piece(keys.clone());
            keys.start += piece.len();
            visit(bf16_rows(piece));
        }
    }
}

fn bf16_rows(rows: HeadRows<'_>) -> Rows<'_, bf16> {
    match rows {
        HeadRows::Bf16(rows) => rows,
        _ => unreachable!("native products are chosen for bf16 alone"),
    }
}

#[inline(always)]
fn bits(numbers: &[bf16]) -> &[u16] {
    numbers.reinterpret_cast()
}

/// Writes pairs of rows, the last one alone if need be; `second`: the first row belongs to the pair that `pairs` starts
/// with. Gives the largest magnitude, as bits.
#[inline(always)]
fn pair_rows(rows: Rows<'_, bf16>, second: bool, pairs: &mut [u32]) -> u16 {
    let mut largest = 0;
    let width = rows.width();
    let mut pairs = pairs.chunks_exact_mut(width);
    let mut next = 0;
    if second && let (false, Some(pairs)) = (rows.is_empty(), pairs.next()) {
        let row = bits(rows.row(0));
        pairs.iter_mut().zip(row).for_each(|(pair, x)| *pair |= u32::from(*x) << 16);
        largest = row.iter().fold(largest, |max, x| max.max(x & MAGNITUDE));
        next = 1;
    }
    for pairs in pairs {
        match rows.len() - next {
            0 => break,
            1 => {
                let row = bits(rows.row(next));
                pairs.iter_mut().zip(row).for_each(|(pair, x)| *pair = u32::from(*x));
                largest = row.iter().fold(largest, |max, x| max.max(x & MAGNITUDE));
                next += 1;
            }
            _ => {
                let (low, high) = (bits(rows.row(next)), bits(rows.row(next + 1)));
                for ((pair, low), high) in pairs.iter_mut().zip(low).zip(high) {
                    *pair = u32::from(*low) | u32::from(*high) << 16;
                    largest = largest.max(low & MAGNITUDE).max(high & MAGNITUDE);
                }
                next += 2;
            }
        }
    }
    largest
}
