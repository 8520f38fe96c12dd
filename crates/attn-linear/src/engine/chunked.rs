//! A chunk of tokens at a time: inside the chunk by the quadratic form, before it through the state.
//!
//! With `gamma = e^g`, `C` tokens `i, j = 0..C` in the chunk and `S`, `z` the state before it:
//!
//! ```text
//! A_ij = gamma^(i-j) q_i . k_j   for j <= i, else 0                                  [C, C]
//! N_i  = gamma^(i+1) S^T q_i + sum_j A_ij v_j      D_i = gamma^(i+1) q_i . z + sum_j A_ij
//! S   <- gamma^C S + sum_j gamma^(C-1-j) k_j v_j^T     z <- gamma^C z + sum_j gamma^(C-1-j) k_j
//! ```
//!
//! All powers are at most 1. The four products are [`product`] with `value_dim` (or keys) in the vector lanes; `K` is
//! transposed once, the triangle is done in blocks of [`BLOCK`] rows, so that little of its empty half is computed.
//!
//! Source: the chunkwise form of Sun et al. 2023 (RetNet), equation 7.

use super::lanes::{across, dot, sum};
use super::powers::Powers;
use super::state::HeadState;
use attn_core::simd::{Simd, SimdOp};
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, TileMut, all_finite, product, transpose};
use attn_core::view::Rows;

/// Rows of the triangle done together.
const BLOCK: usize = MAX_LANES;

/// A thread's buffers for one chunk.
pub(super) struct Scratch {
    value_dim: usize,
    /// `K^T [key_dim, len]`, `len` rounded up to whole vectors.
    keys: Vec<f32>,
    /// `A [BLOCK, len]`.
    scores: Vec<f32>,
    /// `[len]`: the weights of keys that do not fade.
    ones: Vec<f32>,
    /// `N [len, value_dim]`, and `D [len]`.
    pub(super) numerators: Vec<f32>,
    pub(super) denominators: Vec<f32>,
}

impl Scratch {
    pub(super) fn new(len: usize, key_dim: usize, value_dim: usize) -> Self {
        let lanes = len.next_multiple_of(MAX_LANES);
        Self {
            value_dim,
            keys: vec![0.0; key_dim * lanes],
            scores: vec![0.0; BLOCK * lanes],
            ones: vec![1.0; len],
            numerators: vec![0.0; len * value_dim],
            denominators: vec![0.0; len],
        }
    }

    /// Floats of [`Scratch::new`].
    pub(super) fn floats(len: usize, key_dim: usize, value_dim: usize) -> usize {
        (key_dim + BLOCK) * len.next_multiple_of(MAX_LANES) + len * (value_dim + 2)
    }

    /// `(N_i, D_i)` of the rows last computed.
    #[inline(always)]
    pub(super) fn reads(&self) -> impl Iterator<Item = (&[f32], f32)> {
        self.numerators.chunks_exact(self.value_dim).zip(self.denominators.iter().copied())
    }
}

/// A causal chunk: reads, and writes the state.
pub(super) struct Attend<'a> {
    /// `[len, key_dim]`, `[len, key_dim]`, `[len, value_dim]`.
    pub(super) q: Rows<'a, f32>,
    pub(super) k: Rows<'a, f32>,
    pub(super) v: Rows<'a, f32>,
    pub(super) decay: Option<&'a Powers>,
    pub(super) state: HeadState<'a>,
    pub(super) scratch: &'a mut Scratch,
}

impl SimdOp for Attend<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { q, k, v, decay, mut state, scratch } = self;
        read(simd, q, decay, state.s, scratch);
        transpose_keys(simd, k, scratch);
        within(simd, q, v, decay, state.z, scratch);
        absorb(simd, k, v, decay, &mut state, scratch);
    }
}

/// A chunk of keys that no query of its own reads.
pub(super) struct Absorb<'a> {
    pub(super) k: Rows<'a, f32>,
    pub(super) v: Rows<'a, f32>,
    pub(super) decay: Option<&'a Powers>,
    pub(super) state: HeadState<'a>,
    pub(super) scratch: &'a mut Scratch,
}

impl SimdOp for Absorb<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(mut self, simd: S) {
        transpose_keys(simd, self.k, self.scratch);
        absorb(simd, self.k, self.v, self.decay, &mut self.state, self.scratch);
    }
}

/// Queries that read the same state.
pub(super) struct Read<'a> {
    pub(super) q: Rows<'a, f32>,
    pub(super) state: HeadState<'a>,
    pub(super) scratch: &'a mut Scratch,
}

impl SimdOp for Read<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        read(simd, self.q, None, self.state.s, self.scratch);
        if !self.state.z.is_empty() {
            let denominators = self.q.iter().zip(&mut self.scratch.denominators);
            denominators.for_each(|(q, d)| *d = across(simd, dot(simd, q, self.state.z)));
        }
    }
}

#[inline(always)]
fn transpose_keys<S: Simd>(simd: S, k: Rows<'_, f32>, scratch: &mut Scratch) {
    transpose(simd, k, 1.0, &mut scratch.keys, k.len().next_multiple_of(MAX_LANES));
}

/// What the state gives: `N_i = gamma^(i+1) S^T q_i`.
#[inline(always)]
fn read<S: Simd>(simd: S, q: Rows<'_, f32>, decay: Option<&Powers>, s: &[f32], scratch: &mut Scratch) {
    let (len, width) = (q.len(), scratch.value_dim);
    product(
        simd,
        [len, width, q.width()],
        Lhs { data: q.data(), row_stride: q.stride(), col_stride: 1 },
        Rhs { data: s, stride: width },
        TileMut { data: &mut scratch.numerators, stride: width },
        Start::Zero,
    );
    if let Some(powers) = decay {
        for (row, &past) in scratch.numerators.chunks_exact_mut(width).zip(&powers.rising()[1..=len]) {
            row.iter_mut().for_each(|x| *x *= past);
        }
    }
}

/// What the chunk itself gives: `N_i += sum_j A_ij v_j`; and, with a normaliser, all of `D_i`.
#[inline(always)]
fn within<S: Simd>(
    simd: S,
    q: Rows<'_, f32>,
    v: Rows<'_, f32>,
    decay: Option<&Powers>,
    z: &[f32],
    scratch: &mut Scratch,
) {
    let (len, width) = (q.len(), scratch.value_dim);
    let stride = len.next_multiple_of(MAX_LANES);
    // A weight of 0 times a value of NaN or infinity would leak what an earlier row must not see.
    let finite = v.iter().all(all_finite);
    let scores = &mut scratch.scores;
    for first in (0..len).step_by(BLOCK) {
        let (rows, columns) = (BLOCK.min(len - first), first + BLOCK);
        product(
            simd,
            [rows, columns, q.width()],
            Lhs { data: q.slice(first..first + rows).data(), row_stride: q.stride(), col_stride: 1 },
            Rhs { data: &scratch.keys, stride },
            TileMut { data: scores, stride },
            Start::Zero,
        );
        for (i, row) in (first..).zip(scores.chunks_exact_mut(stride).take(rows)) {
            let row = &mut row[..columns];
            if let Some(powers) = decay {
                row.iter_mut().zip(powers.falling(i)).for_each(|(a, power)| *a *= power);
            }
            // Not left to a power of 0: it would keep a NaN.
            row[i + 1..].fill(0.0);
            if !z.is_empty() {
                let past = decay.map_or(1.0, |powers| powers.rising()[i + 1]);
                let before = dot(simd, q.row(i), z);
                scratch.denominators[i] = across(simd, sum(simd, row) + before * past);
            }
        }
        let mut add = |rows: std::ops::Range<usize>, keys: usize| {
            product(
                simd,
                [rows.len(), width, keys],
                Lhs { data: &scores[(rows.start - first) * stride..], row_stride: stride, col_stride: 1 },
                Rhs { data: v.data(), stride: v.stride() },
                TileMut { data: &mut scratch.numerators[rows.start * width..], stride: width },
                Start::Keep,
            );
        };
        if finite {
            add(first..first + rows, columns.min(len));
        } else {
            (first..first + rows).for_each(|i| add(i..i + 1, i + 1));
        }
    }
}

/// `S <- gamma^C S + sum_j gamma^(C-1-j) k_j v_j^T`, and `z` likewise; `scratch.keys` is `K^T`.
#[inline(always)]
fn absorb<S: Simd>(
    simd: S,
    k: Rows<'_, f32>,
    v: Rows<'_, f32>,
    decay: Option<&Powers>,
    state: &mut HeadState<'_>,
    scratch: &mut Scratch,
) {
    let (len, width) = (k.len(), scratch.value_dim);
    let stride = len.next_multiple_of(MAX_LANES);
    if let Some(powers) = decay {
        let loss = powers.loss(len);
        state.s.iter_mut().for_each(|s| *s += loss * *s);
        state.z.iter_mut().for_each(|z| *z += loss * *z);
        for row in scratch.keys.chunks_exact_mut(stride).take(k.width()) {
            row.iter_mut().zip(powers.falling(len - 1)).for_each(|(x, power)| *x *= power);
        }
    }
    if !state.z.is_empty() {
        product(
            simd,
            [1, k.width(), len],
            Lhs {
                data: decay.map_or(&scratch.ones, |powers| powers.falling(len - 1)),
                row_stride: 0,
                col_stride: 1,
            },
            Rhs { data: k.data(), stride: k.stride() },
            TileMut { data: state.z, stride: k.width() },
            Start::Keep,
        );
    }
    product(
        simd,
        [k.width(), width, len],
        Lhs { data: &scratch.keys, row_stride: stride, col_stride: 1 },
        Rhs { data: v.data(), stride: v.stride() },
        TileMut { data: state.s, stride: width },
        Start::Keep,
    );
}
