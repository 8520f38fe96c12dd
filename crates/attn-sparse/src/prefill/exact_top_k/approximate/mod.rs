//! The first stage: every score of a query between two bounds.
//!
//! A common shift of all keys moves all scores of a query alike and leaves their order. With `m` the mean of the keys,
//! `x = ±q` and hats for numbers rounded to a signed byte times a scale, one of each query and one of each group of keys,
//!
//! ```text
//! x . (k - m)  =  x^ . k^  +  x . (k - m - k^)  +  (x - x^) . k^
//! |x . (k - m) - x^ . k^|  <=  |x| max|k - m - k^|  +  |x - x^| max|k^|  +  ...
//! ```
//!
//! by Cauchy and Schwarz, with the maxima of the group. Norms are measured, not estimated. The sums of bytes are exact; what
//! is left out above is the rounding of their scaling, of the bounds, of sums in f64, and numbers too small to be normal.
//! Without products of bytes, scores are sums in f32: nothing is shifted, the first two parts are 0 and the rounding of the
//! sums is `d 2^-23 |x| max|k|`.
//!
//! Keys that are not finite, or so large that a product could be infinite, have no bounds: they are *wild* and are always
//! scored again.

mod keys;
mod queries;
mod scored;

pub(super) use keys::{GROUP, Keys};
pub(super) use queries::Queries;
pub(super) use scored::Scored;

use attn_core::simd::Isa;
use attn_core::tile::ByteDot;

/// Norms from here on are wild.
const WILD: f32 = 1e18;
/// Above the rounding of the norms and of the sums that bounds are made of.
const SLACK: f64 = 1.001;
/// The largest byte in use.
const LARGEST: f32 = 127.0;

/// How the first stage multiplies.
#[derive(Debug, Clone, Copy)]
pub(super) enum Stage {
    F32,
    Bytes(ByteDot),
}

impl Stage {
    /// Bytes where this instruction set has products of them, and rows are no longer than those can be.
    pub(super) fn fastest(isa: Isa, width: usize) -> Self {
        match ByteDot::detect() {
            Some(dot) if isa == Isa::Avx512 && quads(width) <= ByteDot::MAX_QUADS => Self::Bytes(dot),
            _ => Self::F32,
        }
    }
}

/// Quads of a row.
fn quads(width: usize) -> usize {
    width.div_ceil(4)
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

/// What a byte stands for where the largest number is `largest`. Numbers that are too small for one round to 0.
#[inline(always)]
fn scale_of(largest: f32) -> f32 {
    if largest < 1e-30 { 1.0 } else { largest / LARGEST }
}

/// Norms of a row that became bytes.
#[derive(Debug, Clone, Copy, Default)]
struct Rounded {
    /// Of what the rounding took away.
    lost: f32,
    /// Of what the bytes stand for.
    kept: f32,
}

/// Rounds a row to signed bytes of `scale`, quads in `codes[quad * step]`.
#[inline(always)]
fn round(row: &[f32], scale: f32, codes: &mut [u32], step: usize) -> Rounded {
    let (mut lost, mut kept) = ([0.0f32; 4], [0.0f32; 4]);
    for (quad, to) in row.chunks(4).zip(codes.iter_mut().step_by(step)) {
        let mut bytes = [0; 4];
        for (c, x) in quad.iter().enumerate() {
            let code = (x / scale).round_ties_even().clamp(-LARGEST, LARGEST);
            let stands_for = code * scale;
            bytes[c] = code as i8 as u8;
            lost[c] += (x - stands_for) * (x - stands_for);
            kept[c] += stands_for * stands_for;
        }
        *to = u32::from_le_bytes(bytes);
    }
    Rounded { lost: lost.iter().sum::<f32>().sqrt(), kept: kept.iter().sum::<f32>().sqrt() }
}
