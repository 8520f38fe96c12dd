//! The first stage: every score of a query within a known error.
//!
//! A common shift of all keys moves all scores of a query alike and leaves their order. With `m` the mean of the keys,
//! `x = ±q` and hats for numbers rounded to bf16,
//!
//! ```text
//! x . (k - m)  =  x^ . k^  +  x . (k - m - k^)  +  (x - x^) . k^
//! |x . (k - m) - x^ . k^|  <=  |x| max|k - m - k^|  +  |x - x^| max|k^|  +  d 2^-23 |x| max|k^|  +  ...
//! ```
//!
//! by Cauchy and Schwarz; the third part is the rounding of the sums in f32, the rest that of f64 and of numbers too small to
//! be normal. Norms are measured, not estimated. In f32 the first two parts are 0 and nothing is shifted.
//!
//! Keys that are not finite, or so large that a product could be infinite, have no bound: they are *wild*, score -inf here,
//! and are always scored again.

use crate::scores::{HeadRows, PANEL};
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::{Bf16Dot, Finish, Lhs, PairLhs, PairRhs, Rhs, Start, TileMut, product};
use half::bf16;
use std::ops::Range;

/// Norms from here on are wild.
const WILD: f32 = 1e18;
/// Above the rounding of the norms themselves.
const SLACK: f64 = 1.001;

/// How the first stage multiplies.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stage {
    F32,
    Bf16(Bf16Dot),
}

impl Stage {
    /// bf16 where this instruction set has products of it.
    pub(super) fn fastest(isa: Isa) -> Self {
        match Bf16Dot::detect() {
            Some(dot) if isa == Isa::Avx512 => Self::Bf16(dot),
            _ => Self::F32,
        }
    }
}

/// The keys of one head, made ready.
pub(super) struct Keys<'a> {
    pub(super) rows: HeadRows<'a>,
    stage: Stage,
    /// For bf16: `[n_kv, pairs]`, shifted by the mean; zeros for wild keys.
    pairs: Vec<u32>,
    /// Ascending.
    wild: Vec<u32>,
    /// Largest norms over the keys that are not wild: as scored, of what rounding took away, as given.
    scored: f32,
    lost: f32,
    given: f32,
}

/// What a chunk of keys adds to [`Keys`].
#[derive(Default, Clone)]
struct ChunkNorms {
    wild: Vec<u32>,
    scored: f32,
    lost: f32,
    given: f32,
}

/// Keys of a task of the preparation.
const CHUNK: usize = 512;

impl<'a> Keys<'a> {
    pub(super) fn new(isa: Isa, rows: HeadRows<'a>, stage: Stage) -> Self {
        let (n, width) = (rows.len(), rows.width());
        let n_pairs = if matches!(stage, Stage::Bf16(_)) { width.div_ceil(2) } else { 0 };
        let n_chunks = n.div_ceil(CHUNK);
        let mean = if n_pairs > 0 { mean(isa, rows) } else { vec![0.0; width] };
        let mut pairs = vec![0; n * n_pairs];
        let mut chunks = vec![ChunkNorms::default(); n_chunks];
        let mut rest = pairs.as_mut_slice();
        let tasks: Vec<_> = chunks
            .iter_mut()
            .enumerate()
            .map(|(at, norms)| {
                let range = at * CHUNK..((at + 1) * CHUNK).min(n);
                let (pairs, tail) = std::mem::take(&mut rest).split_at_mut(range.len() * n_pairs);
                rest = tail;
                (range, pairs, norms)
            })
            .collect();
        for_each_task(
            tasks.into_iter(),
            || (),
            |(), (range, pairs, norms)| {
                isa.run(Chunk { rows, range, mean: &mean, pairs, n_pairs, norms });
            },
        );
        let largest = |norm: fn(&ChunkNorms) -> f32| chunks.iter().map(norm).fold(0.0, f32::max);
        let (scored, lost, given) = (largest(|c| c.scored), largest(|c| c.lost), largest(|c| c.given));
        let wild = chunks.into_iter().flat_map(|chunk| chunk.wild).collect();
        Self { rows, stage, pairs, wild, scored, lost, given }
    }

    /// Wild keys below `end`.
    pub(super) fn wild(&self, end: usize) -> &[u32] {
        &self.wild[..self.wild.partition_point(|key| (*key as usize) < end)]
    }
}

/// The mean of the rows that are not wild.
fn mean(isa: Isa, rows: HeadRows<'_>) -> Vec<f32> {
    let n_chunks = rows.len().div_ceil(CHUNK);
    let mut sums = vec![(vec![0.0f64; rows.width()], 0usize); n_chunks];
    for_each_task(
        sums.iter_mut().enumerate(),
        || (),
        |(), (at, (sum, count))| {
            *count = isa.run(ChunkSum { rows, range: at * CHUNK..((at + 1) * CHUNK).min(rows.len()), sum });
        },
    );
    let count = sums.iter().map(|(_, count)| *count).sum::<usize>().max(1) as f64;
    let of = |c: usize| (sums.iter().map(|(sum, _)| sum[c]).sum::<f64>() / count) as f32;
    (0..rows.width()).map(of).collect()
}

struct ChunkSum<'a, 'o> {
    rows: HeadRows<'a>,
    range: Range<usize>,
    sum: &'o mut [f64],
}

impl SimdOp for ChunkSum<'_, '_> {
    /// Rows in the sum.
    type Output = usize;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> usize {
        let mut row = vec![0.0; self.rows.width()];
        let mut count = 0;
        for i in self.range {
            self.rows.read(simd, i..i + 1, &mut row);
            if is_tame(norm(&row)) {
                self.sum.iter_mut().zip(&row).for_each(|(sum, x)| *sum += f64::from(*x));
                count += 1;
            }
        }
        count
    }
}

/// The Euclidean norm, to about 1e-5.
#[inline(always)]
fn norm(row: &[f32]) -> f32 {
    let mut sums = [0.0f32; 16];
    let chunks = row.chunks_exact(16);
    let rest = chunks.remainder();
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, x)| *sum += x * x);
    }
    sums.iter_mut().zip(rest).for_each(|(sum, x)| *sum += x * x);
    sums.iter().sum::<f32>().sqrt()
}

/// Neither wild nor NaN.
#[inline(always)]
fn is_tame(norm: f32) -> bool {
    norm < WILD
}

/// Rounds a row to pairs of bf16 in `pairs`, `to[p * step]` each; returns the norm of what the rounding took away.
#[inline(always)]
fn round(row: &[f32], pairs: &mut [u32], step: usize) -> f32 {
    let mut sum = 0.0;
    for (pair, to) in row.chunks(2).zip(pairs.iter_mut().step_by(step)) {
        let low = bf16::from_f32(pair[0]);
        let high = bf16::from_f32(pair.get(1).copied().unwrap_or(0.0));
        *to = u32::from(low.to_bits()) | u32::from(high.to_bits()) << 16;
        let lost = [pair[0] - low.to_f32(), pair.get(1).copied().unwrap_or(0.0) - high.to_f32()];
        sum += lost[0] * lost[0] + lost[1] * lost[1];
    }
    sum.sqrt()
}

/// Some keys.
struct Chunk<'a, 'o> {
    rows: HeadRows<'a>,
    range: Range<usize>,
    mean: &'o [f32],
    pairs: &'o mut [u32],
    n_pairs: usize,
    norms: &'o mut ChunkNorms,
}

impl SimdOp for Chunk<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { rows, range, mean, pairs, n_pairs, norms } = self;
        let mut row = vec![0.0; rows.width()];
        let first = range.start;
        for i in range {
            rows.read(simd, i..i + 1, &mut row);
            let given = norm(&row);
            if !is_tame(given) {
                norms.wild.push(i as u32);
                continue;
            }
            row.iter_mut().zip(mean).for_each(|(x, mean)| *x -= mean);
            let shifted = norm(&row);
            if n_pairs > 0 {
                let lost = round(&row, &mut pairs[(i - first) * n_pairs..][..n_pairs], 1);
                // The shift itself was rounded, too.
                norms.lost = norms.lost.max(lost + shifted * f32::EPSILON);
            }
            norms.scored = norms.scored.max(shifted);
            norms.given = norms.given.max(given);
        }
    }
}

/// Up to [`PANEL`] queries, made ready.
pub(super) struct Queries {
    /// `[width, PANEL]`, or pairs `[pairs, PANEL]`.
    turned: Vec<f32>,
    pairs: Vec<u32>,
    /// No score is further from the truth (up to the common shift); infinite for wild queries.
    pub(super) error: [f32; PANEL],
}

impl Default for Queries {
    fn default() -> Self {
        Self { turned: Vec::new(), pairs: Vec::new(), error: [0.0; PANEL] }
    }
}

impl Queries {
    /// Makes `rows [at most PANEL, width]` ready.
    #[inline(always)]
    pub(super) fn set(&mut self, rows: &[f32], width: usize, keys: &Keys<'_>) {
        let n_pairs = width.div_ceil(2);
        self.turned.clear();
        self.pairs.clear();
        match keys.stage {
            Stage::F32 => self.turned.resize(width * PANEL, 0.0),
            Stage::Bf16(_) => self.pairs.resize(n_pairs * PANEL, 0),
        }
        self.error = [0.0; PANEL];
        for (lane, row) in rows.chunks_exact(width).enumerate() {
            let x = norm(row);
            if !is_tame(x) {
                self.error[lane] = f32::INFINITY;
                continue;
            }
            let lost = match keys.stage {
                Stage::F32 => {
                    row.iter().enumerate().for_each(|(c, x)| self.turned[c * PANEL + lane] = *x);
                    0.0
                }
                Stage::Bf16(_) => round(row, &mut self.pairs[lane..], PANEL),
            };
            let [x, lost] = [x, lost].map(f64::from);
            let [scored, lost_k, given] = [keys.scored, keys.lost, keys.given].map(f64::from);
            // |k^| exceeds |k - m| by the rounding at most.
            let scored = scored * (1.0 + 1.0 / 256.0);
            let width = width as f64;
            let sums = 2.0 * width * 2f64.powi(-24) * x * scored * (1.0 + 1.0 / 256.0);
            let wide_sums = width * 2f64.powi(-51) * x * given;
            let tiny = width * 1e-37 * (2.0 + x + scored);
            let error = SLACK * (x * lost_k + lost * scored + sums + wide_sums + tiny);
            self.error[lane] = (error as f32).next_up();
        }
    }
}

impl Keys<'_> {
    /// Scores of `range` in `scores [range.len(), PANEL]`, -inf for wild keys.
    #[inline(always)]
    pub(super) fn score<S: Simd>(
        &self,
        simd: S,
        range: Range<usize>,
        lhs: Lhs<'_>,
        queries: &Queries,
        scores: &mut [f32],
    ) {
        let (len, width) = (range.len(), self.rows.width());
        let c = TileMut { data: scores, stride: PANEL };
        match self.stage {
            Stage::F32 => {
                let b = Rhs { data: &queries.turned, stride: PANEL };
                product(simd, [len, PANEL, width], lhs, b, c, Start::Zero);
            }
            Stage::Bf16(dot) => {
                let n_pairs = width.div_ceil(2);
                let a = PairLhs {
                    data: &self.pairs[range.start * n_pairs..],
                    row_stride: n_pairs,
                    col_stride: 1,
                };
                let b = PairRhs { data: &queries.pairs, stride: PANEL };
                dot.product([len, PANEL, n_pairs], a, b, c, Finish::Scale(1.0));
            }
        }
        let from = self.wild.partition_point(|key| (*key as usize) < range.start);
        for key in self.wild[from..].iter().take_while(|key| (**key as usize) < range.end) {
            scores[(*key as usize - range.start) * PANEL..][..PANEL].fill(f32::NEG_INFINITY);
        }
    }

    /// The keys `range` as the left factor of a product in f32; nothing where that is not needed.
    #[inline(always)]
    pub(super) fn lhs<'s, S: Simd>(
        &'s self,
        simd: S,
        range: Range<usize>,
        scratch: &'s mut Vec<f32>,
    ) -> Lhs<'s> {
        match self.stage {
            Stage::F32 => self.rows.lhs(simd, range, scratch),
            Stage::Bf16(_) => Lhs { data: &[], row_stride: 0, col_stride: 1 },
        }
    }
}
