//! Score mods of every kind, also of sizes that do not fit.

use super::bytes::Bytes;
use super::masks::{broadcast, offset};
use super::numbers::{all_finite, largest, numbers};
use attn_core::mask::Pair;
use attn_core::score::{Alibi, Bias, RelativeBias, ScoreFn, ScoreMod, SoftCap, T5Bias, T5Buckets};
use attn_core::{AttnShape, Result};

/// What a score mod is built from.
#[derive(Debug, Clone)]
pub enum ScoreCase {
    Bias { bias: Vec<f32>, shape: Vec<usize> },
    Alibi { slopes: Vec<f32>, offset: isize },
    Relative { table: Vec<f32>, max: usize, offset: isize },
    T5 { table: Vec<f32>, buckets: (usize, usize, bool), offset: isize },
    SoftCap(f32),
    Closure,
}

impl ScoreCase {
    pub fn draw(bytes: &mut Bytes<'_>, shape: &AttnShape) -> Self {
        let small = |bytes: &mut Bytes<'_>| {
            if bytes.one_in(6) { offset(bytes) } else { bytes.within(0..=20) as isize }
        };
        match bytes.within(0..=5) {
            0 => Self::Closure,
            1 => {
                let mut axes = vec![shape.batch, shape.n_heads_q, shape.n_q, shape.n_kv];
                broadcast(bytes, &mut axes);
                let len = axes.iter().product();
                let len = bytes.about(len);
                Self::Bias { bias: numbers(bytes, len), shape: axes }
            }
            2 => {
                let len = if bytes.one_in(2) { shape.batch * shape.n_heads_q } else { shape.n_heads_q };
                let len = bytes.about(len);
                Self::Alibi { slopes: numbers(bytes, len), offset: small(bytes) }
            }
            3 => {
                let max = bytes.within(0..=12);
                let len = bytes.about(shape.n_heads_q * (2 * max + 1));
                let max =
                    if bytes.one_in(16) { bytes.pick(&[usize::MAX, usize::MAX / 2, max + 1]) } else { max };
                Self::Relative { table: numbers(bytes, len), max, offset: small(bytes) }
            }
            4 => {
                let buckets = (2 * bytes.within(1..=6), bytes.within(3..=40), bytes.one_in(2));
                let len = bytes.about(buckets.0 * shape.n_heads_q);
                Self::T5 { table: numbers(bytes, len), buckets, offset: small(bytes) }
            }
            _ => Self::SoftCap(bytes.pick(&[5.0, 30.0, 1e-3, 1e30, 0.0, -1.0, f32::NAN, f32::INFINITY])),
        }
    }

    pub fn build<'a>(&'a self, shape: &AttnShape) -> Result<Box<dyn ScoreMod + 'a>> {
        Ok(match self {
            Self::Bias { bias, shape: axes } => Box::new(Bias::new(bias, axes, shape)?),
            Self::Alibi { slopes, offset } => Box::new(Alibi::new(slopes.clone(), shape, *offset)?),
            Self::Relative { table, max, offset } => {
                Box::new(RelativeBias::new(table, *max, shape, *offset)?)
            }
            Self::T5 { table, buckets: (n, max, bidirectional), offset } => {
                Box::new(T5Bias::new(table, T5Buckets::new(*n, *max, *bidirectional)?, shape, *offset)?)
            }
            Self::SoftCap(cap) => Box::new(SoftCap::new(*cap)?),
            Self::Closure => Box::new(ScoreFn(|s: f32, p: Pair| s + ((p.i + 3 * p.j) % 7) as f32 / 8.0)),
        })
    }

    /// The most that a finite part of it adds to a score of a problem with rows and keys up to `longest`.
    pub fn reach(&self, longest: usize) -> f64 {
        match self {
            Self::Bias { bias: numbers, .. }
            | Self::Relative { table: numbers, .. }
            | Self::T5 { table: numbers, .. } => largest(numbers),
            Self::Alibi { slopes, offset } => {
                largest(slopes) * (longest as f64 + offset.unsigned_abs() as f64)
            }
            // What an infinite score becomes.
            Self::SoftCap(cap) => f64::from(cap.abs()),
            Self::Closure => 1.0,
        }
    }

    pub fn all_finite(&self) -> bool {
        match self {
            Self::Bias { bias: numbers, .. }
            | Self::Relative { table: numbers, .. }
            | Self::T5 { table: numbers, .. }
            | Self::Alibi { slopes: numbers, .. } => all_finite(numbers),
            Self::SoftCap(_) | Self::Closure => true,
        }
    }
}
