//! Relative position buckets: near distances have their own bias, far ones share it in steps that grow.
//!
//! With `r = j - (i + offset)` and `n` buckets for one side (half of all if bidirectional, the upper half for `r > 0`),
//! `e = n / 2` of them exact:
//!
//! ```text
//! bucket(r) = |r|                                                        |r| < e
//!           = min(n - 1, e + floor(ln(|r| / e) / ln(max_distance / e) * (n - e)))   else
//! ```
//!
//! A causal table uses all buckets for `r <= 0`, and bucket 0 for `r > 0`. The logarithm is evaluated in f32, as upstream
//! does: on the edges between buckets its rounding decides.
//!
//! Source: Raffel et al. 2020 (T5), section 2.1. T5 uses a softmax scale of 1.

use super::distance::Distance;
use super::{BiasIndex, ScoreMod};
use crate::mask::{Pair, check_fits};
use crate::{AttnError, AttnShape, Result};

/// The bucket of each distance.
///
/// ```
/// use attn_core::score::T5Buckets;
///
/// let buckets = T5Buckets::new(32, 128, true)?;
/// assert_eq!([0, -1, 1, -100, 1000].map(|r| buckets.bucket(r)), [0, 1, 17, 15, 31]);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct T5Buckets {
    n_buckets: usize,
    max_distance: usize,
    bidirectional: bool,
}

impl T5Buckets {
    /// `n_buckets` in all; distances from `max_distance` on share the last one of their side.
    ///
    /// # Errors
    /// [`AttnError::Value`] if a side has fewer than two buckets, an odd number is to be shared by two sides, or
    /// `max_distance` lies within the exact half of the buckets or beyond 2^24.
    pub fn new(n_buckets: usize, max_distance: usize, bidirectional: bool) -> Result<Self> {
        let (least, sides) = if bidirectional { ("an even number from 4", 2) } else { ("at least 2", 1) };
        if n_buckets < 2 * sides || !n_buckets.is_multiple_of(sides) || n_buckets > 1 << 24 {
            return Err(AttnError::value("n_buckets", n_buckets, format!("{least} to 2^24")));
        }
        let exact = n_buckets / sides / 2;
        if max_distance <= exact || max_distance > 1 << 24 {
            let expected = format!("more than the {exact} exact buckets of a side, at most 2^24");
            return Err(AttnError::value("max_distance", max_distance, expected));
        }
        Ok(Self { n_buckets, max_distance, bidirectional })
    }

    /// Buckets in all.
    pub fn n_buckets(&self) -> usize {
        self.n_buckets
    }

    /// The bucket of a key at distance `r = j - (i + offset)`.
    pub fn bucket(&self, r: isize) -> usize {
        let (side, first) = match (self.bidirectional, r > 0) {
            (true, after) => (self.n_buckets / 2, if after { self.n_buckets / 2 } else { 0 }),
            (false, true) => return 0,
            (false, false) => (self.n_buckets, 0),
        };
        first + self.on_side(r.unsigned_abs(), side)
    }

    fn on_side(&self, distance: usize, side: usize) -> usize {
        let exact = side / 2;
        if distance < exact {
            return distance;
        }
        if distance >= self.max_distance {
            return side - 1;
        }
        // Logarithms are rounded from f64, so that no platform's f32 logarithm decides.
        let ln = |x: f64| x.ln() as f32;
        let ratio = f64::from(distance as f32 / exact as f32);
        let share = ln(ratio) / ln(self.max_distance as f64 / exact as f64);
        (exact + (share * (side - exact) as f32) as usize).min(side - 1)
    }
}

/// `s + table[bucket(j - (i + offset)), h]`.
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::mask::Pair;
/// use attn_core::score::{ScoreMod, T5Bias, T5Buckets};
///
/// let (shape, buckets) = (AttnShape::square(1, 9, 16), T5Buckets::new(4, 8, false)?);
/// let bias = T5Bias::new(&[0.0, 1.0, 2.0, 3.0], buckets, &shape, 0)?;
/// assert_eq!(bias.apply(0.5, Pair { batch: 0, head: 0, i: 8, j: 7 }), 1.5);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct T5Bias {
    /// Biases by distance, `[n_heads_q, distances]`.
    biases: Vec<f32>,
    /// Buckets by distance, `[distances]`.
    buckets: Vec<usize>,
    /// Distances outside of these have the bias of the nearer one.
    bounds: (i32, i32),
    distance: Distance,
    n_heads: usize,
    n_buckets: usize,
}

impl T5Bias {
    /// `table [n_buckets, n_heads_q]`, row-major, as upstream stores it; `offset` is the position of query 0 on the key
    /// axis. Keeps one bias a head and distance that occurs in `shape`, at most `2 * max_distance + 1`.
    ///
    /// # Errors
    /// [`AttnError::Layout`] if the table has another size; [`AttnError::Value`] for distances beyond 2^29.
    pub fn new(table: &[f32], buckets: T5Buckets, shape: &AttnShape, offset: isize) -> Result<Self> {
        let (n_heads, n_buckets) = (shape.n_heads_q, buckets.n_buckets);
        if n_heads.checked_mul(n_buckets) != Some(table.len()) {
            let reason = format!("{} elements, expected {n_buckets} buckets of {n_heads} heads", table.len());
            return Err(AttnError::Layout { tensor: "table".into(), reason });
        }
        let distance = Distance::new(shape, offset)?;
        let max = buckets.max_distance as i32;
        let (least, greatest) = distance.bounds(shape);
        let bounds = (least.clamp(-max, max), greatest.clamp(-max, max));
        let buckets: Vec<usize> = (bounds.0..=bounds.1).map(|r| buckets.bucket(r as isize)).collect();
        let biases = (0..n_heads)
            .flat_map(|h| buckets.iter().map(move |bucket| table[bucket * n_heads + h]))
            .collect();
        Ok(Self { biases, buckets, bounds, distance, n_heads, n_buckets })
    }

    #[inline(always)]
    fn slot(&self, at: Pair) -> usize {
        (self.distance.of(at).clamp(self.bounds.0, self.bounds.1) - self.bounds.0) as usize
    }

    #[inline(always)]
    fn at(&self, at: Pair) -> f32 {
        self.biases[at.head * self.buckets.len() + self.slot(at)]
    }
}

impl BiasIndex for T5Bias {
    fn len(&self) -> usize {
        self.n_buckets * self.n_heads
    }

    #[inline(always)]
    fn index(&self, at: Pair) -> usize {
        self.buckets[self.slot(at)] * self.n_heads + at.head
    }
}

impl ScoreMod for T5Bias {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        check_fits("table", self.n_heads, &[0, 1, 0, 0], shape)
    }

    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        score + self.at(at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        score + f64::from(self.at(at))
    }

    #[inline(always)]
    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_fill_their_half() {
        let buckets = T5Buckets::new(32, 128, true).unwrap();
        for r in 0..8 {
            assert_eq!(buckets.bucket(-r), r as usize);
        }
        for r in 1..300 {
            assert_eq!(buckets.bucket(r), buckets.bucket(-r) + 16);
            assert!(buckets.bucket(-r) <= buckets.bucket(-r - 1), "{r}");
        }
        // Steps of 8 * 16^(k / 8): the last bucket starts at 8 * 2^3.5 = 90.5.
        assert_eq!([11, 12, 90, 91, 128, 129].map(|r| buckets.bucket(-r)), [8, 9, 14, 15, 15, 15]);
    }

    #[test]
    fn causal_buckets_look_back_only() {
        let buckets = T5Buckets::new(16, 32, false).unwrap();
        assert_eq!(
            [5, 1, 0, -1, -7, -8, -31, -32, -500].map(|r| buckets.bucket(r)),
            [0, 0, 0, 1, 7, 8, 15, 15, 15]
        );
    }

    #[test]
    fn what_makes_no_table_is_refused() {
        for (n, max, bidirectional) in [(0, 128, false), (1, 9, false), (7, 128, true), (2, 9, true)] {
            assert!(T5Buckets::new(n, max, bidirectional).is_err(), "{n}");
        }
        let near = T5Buckets::new(32, 8, true).unwrap_err().to_string();
        assert!(near.contains("max_distance is 8") && near.contains("8 exact"), "{near}");
        let buckets = T5Buckets::new(8, 20, true).unwrap();
        let wrong = T5Bias::new(&[0.0; 9], buckets, &AttnShape::square(2, 4, 1), 0).unwrap_err().to_string();
        assert_eq!(wrong, "table: 9 elements, expected 8 buckets of 2 heads");
    }
}
