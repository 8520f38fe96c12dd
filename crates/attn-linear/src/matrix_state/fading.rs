//! A chunk's decays as factors of its rows.
//!
//! With `G_j` the cumulative decay up to and with write `j` of a chunk of `W` writes, counted from its start:
//!
//! | factor | of | bounded by |
//! |---|---|---|
//! | `down_j = 2^(G_j)` | a reader of the state before the chunk | 1 |
//! | `end_j = 2^(G_(W-1) - G_j)` | a write, in the state after the chunk | 1 |
//! | `up_j = 2^(-G_j)` | a write, for readers inside the chunk: `down_i up_j` is the weight between them | `2^40` |
//!
//! `up` exists for the first [`Fading::near`] writes only, those above [`LIMIT`]; readers that have faded further take
//! their weights `2^(G_i - G_j)` pair by pair. A reader's way depends on the decays before it alone, so a later input
//! changes no bit of an earlier output.

use super::weights::{LIMIT, cumulate, losses, powers};
use super::{Decay, Options, Piece};
use attn_core::simd::Simd;
use attn_core::tile::MAX_LANES;

/// The factors of a chunk; see the module.
pub(super) struct Fading {
    /// Numbers of a write's decay; 0 without decay.
    pub(super) width: usize,
    /// The same, where it is the keys that decay; 0 where it is the values.
    pub(super) key_width: usize,
    /// `G [writes, width]`, in units of `ln 2`.
    pub(super) sums: Vec<f64>,
    pub(super) down: Vec<f32>,
    pub(super) up: Vec<f32>,
    pub(super) end: Vec<f32>,
    /// `2^(G_(W-1)) - 1 [width]`.
    pub(super) loss: Vec<f32>,
    /// Writes that have an `up`.
    pub(super) near: usize,
    /// A difference of sums, on its way to a power.
    exponents: Vec<f64>,
    /// `G^T [width, lanes]`, for pairs of writes that have no `up`.
    pub(super) transposed: Vec<f64>,
    pub(super) lanes: usize,
}

impl Fading {
    pub(super) fn new(options: &Options, writes: usize) -> Self {
        let width = options.decay_width();
        let all = writes * width;
        let lanes = writes.next_multiple_of(MAX_LANES);
        let floats = || vec![0.0; all];
        Self {
            width,
            key_width: if options.decay == Decay::Value { 0 } else { width },
            sums: vec![0.0; all],
            down: floats(),
            up: floats(),
            end: floats(),
            loss: vec![0.0; width],
            near: 0,
            exponents: vec![0.0; all.max(width)],
            transposed: vec![0.0; width * lanes],
            lanes,
        }
    }

    /// Bytes of [`Fading::new`].
    pub(super) fn bytes(options: &Options, writes: usize) -> usize {
        let width = options.decay_width();
        writes * width * (2 * 8 + 3 * 4) + width * (4 + 8 * writes.next_multiple_of(MAX_LANES))
    }

    /// Computes the factors of `chunk`.
    #[inline(always)]
    pub(super) fn set<S: Simd>(&mut self, simd: S, chunk: &Piece<'_>) {
        let (all, width) = (chunk.log_decay.len(), self.width);
        if all == 0 {
            self.near = usize::MAX;
            return;
        }
        cumulate(chunk.log_decay, width, &mut self.sums);
        let sums = &self.sums[..all];
        let near = |row: &[f64]| row.iter().fold(true, |near, g| near & (g.abs() <= LIMIT));
        self.near = sums.chunks_exact(width).take_while(|row| near(row)).count();
        powers(simd, sums, &mut self.down);
        let exponents = &mut self.exponents[..all];
        let last = &sums[all - width..];
        for (out, row) in exponents.chunks_exact_mut(width).zip(sums.chunks_exact(width)) {
            out.iter_mut().zip(last).zip(row).for_each(|((out, last), g)| *out = last - g);
        }
        powers(simd, exponents, &mut self.end);
        losses(simd, last, &mut self.loss);
        let close = self.near * width;
        exponents[..close].iter_mut().zip(sums).for_each(|(out, g)| *out = -g);
        powers(simd, &exponents[..close], &mut self.up);
        self.up[close..all].fill(0.0);
        if close < all && width > 1 {
            let writes = all / width;
            for (c, column) in self.transposed.chunks_exact_mut(self.lanes).enumerate() {
                for (j, g) in column[..writes].iter_mut().enumerate() {
                    *g = sums[j * width + c];
                }
            }
        }
    }

    /// `row o down`, for a reader that stands after write `at` (`None`: before the first), where keys decay.
    #[inline(always)]
    pub(super) fn fade(&self, row: &[f32], at: Option<usize>, out: &mut [f32]) {
        let width = self.key_width;
        let down = at.map_or(&[][..], |at| &self.down[at * width..][..width]);
        weigh(row, row.len(), down, down.len(), out);
    }

    /// Whether the reader after write `at` (`None`: before the first) has not faded beyond the writes' `up`.
    #[inline(always)]
    pub(super) fn is_near(&self, at: Option<usize>) -> bool {
        self.key_width == 0 || at.is_none_or(|at| at < self.near)
    }

    /// `row_j *= 2^(G_at - G_j)` for the first writes `j`, with one decay a token; nothing without decay of keys.
    #[inline(always)]
    pub(super) fn weigh_scores<S: Simd>(&self, simd: S, at: Option<usize>, row: &mut [f32]) {
        if self.key_width != 1 {
        } else if self.is_near(at) {
            let down = at.map_or(1.0, |at| self.down[at]);
            row.iter_mut().zip(&self.up).for_each(|(score, up)| *score *= down * up);
        } else {
            let mut weights = [0.0; MAX_LANES];
            for (from, piece) in row.chunks_mut(MAX_LANES).enumerate() {
                let weights = &mut weights[..piece.len()];
                self.scalar_weights(simd, at, from * MAX_LANES, weights);
                piece.iter_mut().zip(&*weights).for_each(|(score, w)| *score *= w);
            }
        }
    }

    /// `weights[j] = 2^(G_at - G_(from + j))`, with one decay a token.
    #[inline(always)]
    fn scalar_weights<S: Simd>(&self, simd: S, at: Option<usize>, from: usize, weights: &mut [f32]) {
        let reader = at.map_or(0.0, |at| self.sums[at]);
        let mut exponents = [0.0; MAX_LANES];
        exponents.iter_mut().zip(&self.sums[from..]).for_each(|(out, g)| *out = reader - g);
        powers(simd, &exponents[..weights.len()], weights);
    }

    /// `weights[c] = 2^(G_at,c - G_j,c)`.
    #[inline(always)]
    pub(super) fn pair_weights<S: Simd>(&self, simd: S, at: Option<usize>, j: usize, weights: &mut [f32]) {
        let width = self.width;
        let write = &self.sums[j * width..][..width];
        let reader = at.map(|at| &self.sums[at * width..][..width]);
        for (piece, weights) in weights[..width].chunks_mut(MAX_LANES).enumerate() {
            let (first, mut exponents) = (piece * MAX_LANES, [0.0; MAX_LANES]);
            if let Some(reader) = reader {
                exponents.iter_mut().zip(&reader[first..]).for_each(|(out, g)| *out = *g);
            }
            exponents.iter_mut().zip(&write[first..]).for_each(|(out, g)| *out -= g);
            powers(simd, &exponents[..weights.len()], weights);
        }
    }
}

/// `out = rows o factors` with `factors [rows, factor_width]` and a factor width of 0 (none), 1 or that of the rows.
#[inline(always)]
pub(super) fn weigh(rows: &[f32], width: usize, factors: &[f32], factor_width: usize, out: &mut [f32]) {
    let out = &mut out[..rows.len()];
    if factor_width == 0 {
        out.copy_from_slice(rows);
    } else if factor_width == width {
        out.iter_mut().zip(rows).zip(factors).for_each(|((out, x), f)| *out = x * f);
    } else {
        let rows = out.chunks_exact_mut(width).zip(rows.chunks_exact(width)).zip(factors);
        rows.for_each(|((out, row), f)| out.iter_mut().zip(row).for_each(|(out, x)| *out = x * f));
    }
}
