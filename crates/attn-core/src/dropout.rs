//! Dropout of attention weights, with random numbers that depend on the pair alone.
//!
//! Weights are dropped after normalisation: `out_i = sum_j f_ij p_ij v_j` with `f_ij = 0` with probability `p`, else
//! `1 / (1 - p)`; the log-sum-exp is without dropout. Whether a pair is kept follows from `(seed, batch, head, i, j)`
//! through a counter-based generator, so that tile sizes, threads and the backward pass need no stored mask:
//!
//! ```text
//! words   = philox4x32-10(key = seed, counter = [i / 4, j, head, batch])
//! kept    = words[i mod 4] >= round(p 2^32)
//! ```
//!
//! Source: Srivastava et al. 2014 (dropout); Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011
//! (Philox).

use crate::mask::{Head, Pair, broadcast_strides, check_fits};
use crate::{AttnError, AttnShape, Result};
use std::ops::Range;

/// Which weights are dropped, and what the others are multiplied with.
///
/// ```
/// use attn_core::dropout::Dropout;
/// use attn_core::mask::Pair;
///
/// let dropout = Dropout::new(0.25, 42)?;
/// let kept = (0..1000).filter(|&j| dropout.factor(Pair { batch: 0, head: 0, i: 3, j }) != 0.0).count();
/// assert!((700..800).contains(&kept));
/// assert!(Dropout::new(1.5, 42).is_err());
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Dropout<'a> {
    probability: f32,
    /// `1 / (1 - p)`, or 0 if everything is dropped.
    scale: f32,
    kept: Kept<'a>,
}

#[derive(Debug, Clone, Copy)]
enum Kept<'a> {
    Random { key: [u32; 2], threshold: u64 },
    Given { keep: &'a [bool], strides: [usize; 4] },
}

impl Dropout<'static> {
    /// Drops each weight with probability `p`; the same `seed` drops the same pairs on every machine.
    ///
    /// # Errors
    /// [`AttnError::Value`] unless `0 <= p <= 1`.
    pub fn new(p: f32, seed: u64) -> Result<Self> {
        let scale = scale(p)?;
        let threshold = (f64::from(p) * 2f64.powi(32)).round() as u64;
        let kept = Kept::Random { key: [seed as u32, (seed >> 32) as u32], threshold };
        Ok(Self { probability: p, scale, kept })
    }
}

impl<'a> Dropout<'a> {
    /// Keeps the pairs where `keep` is true, and multiplies them with `1 / (1 - p)`. `keep`, row-major, of `keep_shape` with 1
    /// to 4 axes, is right-aligned to `(batch, n_heads_q, n_q, n_kv)` and broadcast.
    ///
    /// # Errors
    /// [`AttnError::Value`] unless `0 <= p <= 1`; [`AttnError::Shape`] or [`AttnError::Layout`] if `keep` does not
    /// broadcast to the problem.
    pub fn keep_mask(p: f32, keep: &'a [bool], keep_shape: &[usize], shape: &AttnShape) -> Result<Self> {
        let scale = scale(p)?;
        let strides = broadcast_strides("keep", keep.len(), keep_shape, shape)?;
        Ok(Self { probability: p, scale, kept: Kept::Given { keep, strides } })
    }

    /// Checks that a given keep mask serves a problem of this shape.
    ///
    /// # Errors
    /// [`AttnError::Value`] if it was made for another one.
    pub fn check(&self, shape: &AttnShape) -> Result<()> {
        match &self.kept {
            Kept::Random { .. } => Ok(()),
            Kept::Given { keep, strides } => check_fits("keep", keep.len(), strides, shape),
        }
    }

    /// The probability with which a weight is dropped.
    pub fn probability(&self) -> f32 {
        self.probability
    }

    /// What the pair's weight is multiplied with: 0 or `1 / (1 - p)`.
    #[inline(always)]
    pub fn factor(&self, at: Pair) -> f32 {
        let kept = match &self.kept {
            Kept::Random { key, threshold } => {
                let words = philox(*key, counter::<1>(at.i as u32 / 4, at));
                u64::from(words[at.i % 4][0]) >= *threshold
            }
            Kept::Given { keep, strides: s } => {
                keep[at.batch * s[0] + at.head * s[1] + at.i * s[2] + at.j * s[3]]
            }
        };
        if kept { self.scale } else { 0.0 }
    }

    /// [`Dropout::factor`] of query `rows` with key `j`: `factors[lane]` for row `rows.start + lane`. Much faster than one by
    /// one, as one call of the generator serves four rows, and eight calls run side by side.
    ///
    /// # Panics
    /// If `factors` is shorter than `rows`.
    #[inline(always)]
    pub fn factors(&self, head: Head, rows: Range<usize>, j: usize, factors: &mut [f32]) {
        let factors = &mut factors[..rows.len()];
        let Kept::Random { key, threshold } = self.kept else {
            rows.zip(factors).for_each(|(i, factor)| *factor = self.factor(head.pair(i, j)));
            return;
        };
        const CALLS: usize = 8;
        // Rows before the first multiple of four that one call serves.
        let (mut done, mut skip) = (0, rows.start % 4);
        while done < factors.len() {
            let at = head.pair(rows.start + done, j);
            let words = philox(key, counter::<CALLS>((at.i / 4) as u32, at));
            let mut block = [0.0; 4 * CALLS];
            for (call, four) in block.as_chunks_mut::<4>().0.iter_mut().enumerate() {
                for (word, factor) in four.iter_mut().enumerate() {
                    *factor = if u64::from(words[word][call]) >= threshold { self.scale } else { 0.0 };
                }
            }
            let n = (4 * CALLS - skip).min(factors.len() - done);
            factors[done..done + n].copy_from_slice(&block[skip..skip + n]);
            (done, skip) = (done + n, 0);
        }
    }
}

fn scale(p: f32) -> Result<f32> {
    if !(0.0..=1.0).contains(&p) {
        return Err(AttnError::value("dropout", p, "a probability from 0 to 1"));
    }
    Ok(if p == 1.0 { 0.0 } else { (1.0 / (1.0 - f64::from(p))) as f32 })
}

/// The counters of `N` groups of four rows from `group` on.
#[inline(always)]
fn counter<const N: usize>(group: u32, at: Pair) -> [[u32; N]; 4] {
    let groups = std::array::from_fn(|call| group.wrapping_add(call as u32));
    [groups, [at.j as u32; N], [at.head as u32; N], [at.batch as u32; N]]
}

/// `N` calls of Philox4x32-10 side by side.
#[inline(always)]
fn philox<const N: usize>(mut key: [u32; 2], mut counters: [[u32; N]; 4]) -> [[u32; N]; 4] {
    const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
    const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
    for _ in 0..10 {
        let [c0, c1, c2, c3] = &mut counters;
        for (((c0, c1), c2), c3) in c0.iter_mut().zip(c1).zip(c2).zip(c3) {
            let (first, second) = (widening(MULTIPLIERS[0], *c0), widening(MULTIPLIERS[1], *c2));
            (*c0, *c1) = (second.1 ^ *c1 ^ key[0], second.0);
            (*c2, *c3) = (first.1 ^ *c3 ^ key[1], first.0);
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counters
}

/// The low and the high half of a product.
#[inline(always)]
fn widening(a: u32, b: u32) -> (u32, u32) {
    let product = u64::from(a) * u64::from(b);
    (product as u32, (product >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_published_vectors() {
        let one = |key, c: [u32; 4]| philox(key, c.map(|word| [word])).map(|word| word[0]);
        let all = u32::MAX;
        assert_eq!(one([0; 2], [0; 4]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(one([all; 2], [all; 4]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        let got = one([0xa409_3822, 0x299f_31d0], pi);
        assert_eq!(got, [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn the_same_pairs_are_dropped_for_ever() {
        let dropout = Dropout::new(0.5, 0x0123_4567_89ab_cdef).unwrap();
        let kept =
            |j| (0..32).map(|i| kept(&dropout, 3, 5, i, j)).fold(0u32, |bits, kept| bits << 1 | kept as u32);
        // One bit a row, computed with another program from the formula above.
        assert_eq!([kept(0), kept(1), kept(77)], [0xf8e5_c45a, 0xe4b5_4145, 0xcbf1_3148]);
    }

    fn kept(dropout: &Dropout<'_>, batch: usize, head: usize, i: usize, j: usize) -> bool {
        dropout.factor(Pair { batch, head, i, j }) != 0.0
    }

    #[test]
    fn shares_and_neighbours_are_as_chance_would_have_them() {
        const N: usize = 128; // 4 batch entries x 4 heads x N x N pairs
        let count = |test: &dyn Fn(usize, usize, usize, usize) -> bool| {
            let pairs = (0..16 * N * N).map(|at| (at / (4 * N * N), at / (N * N) % 4, at / N % N, at % N));
            pairs.filter(|&(b, h, i, j)| test(b, h, i, j)).count() as f64
        };
        let total = (16 * N * N) as f64;
        // Within 5 standard deviations: one false alarm in a million.
        let check = |what: &str, count: f64, share: f64| {
            let deviation = (count - total * share) / (total * share * (1.0 - share)).sqrt();
            assert!(deviation.abs() < 5.0, "{what}: {deviation} standard deviations");
        };
        for p in [0.03f32, 0.3, 0.5, 0.9] {
            let (dropout, other) = (Dropout::new(p, 7).unwrap(), Dropout::new(p, 8).unwrap());
            let high = Dropout::new(p, 7 + (1 << 32)).unwrap();
            let keeps = |b, h, i, j| kept(&dropout, b, h, i, j);
            let q = 1.0 - f64::from(p);
            check("kept", count(&keeps), q);
            // Two independent coins agree with probability p^2 + q^2.
            let agree = q * q + (1.0 - q) * (1.0 - q);
            type Neighbour<'a> = &'a dyn Fn(usize, usize, usize, usize) -> bool;
            let neighbours: [(&str, Neighbour<'_>); 9] = [
                ("next key", &|b, h, i, j| keeps(b, h, i, j + 1)),
                ("next query", &|b, h, i, j| keeps(b, h, i + 1, j)),
                ("fourth query", &|b, h, i, j| keeps(b, h, i + 4, j)),
                ("next head", &|b, h, i, j| keeps(b, h + 1, i, j)),
                ("next batch entry", &|b, h, i, j| keeps(b + 1, h, i, j)),
                ("diagonal", &|b, h, i, j| keeps(b, h, i + 1, j + 1)),
                ("transposed", &|b, h, i, j| keeps(b, h, j + 1000, i)),
                ("next seed", &|b, h, i, j| kept(&other, b, h, i, j)),
                ("seed that differs in its upper half", &|b, h, i, j| kept(&high, b, h, i, j)),
            ];
            for (what, neighbour) in neighbours {
                check(what, count(&|b, h, i, j| keeps(b, h, i, j) == neighbour(b, h, i, j)), agree);
            }
        }
    }

    #[test]
    fn many_factors_are_those_of_each_pair() {
        let keep: Vec<bool> = (0..40 * 3).map(|x| x % 7 < 3).collect();
        let shape = AttnShape { n_q: 40, n_kv: 3, ..AttnShape::square(2, 1, 1) };
        let given = Dropout::keep_mask(0.4, &keep, &[40, 3], &shape).unwrap();
        for dropout in [Dropout::new(0.4, 9).unwrap(), given] {
            for rows in [0..0, 0..32, 0..40, 1..40, 3..4, 6..39, 33..34] {
                let mut got = vec![f32::NAN; 41];
                dropout.factors(Head { batch: 0, head: 1 }, rows.clone(), 2, &mut got);
                for (lane, i) in rows.clone().enumerate() {
                    let want = dropout.factor(Pair { batch: 0, head: 1, i, j: 2 });
                    assert_eq!(got[lane], want, "row {i} of {rows:?}");
                    assert!(want == 0.0 || want == (1.0 / 0.6f64) as f32, "{want}");
                }
                assert!(got[rows.len()..].iter().all(|x| x.is_nan()), "nothing beyond the rows");
            }
        }
    }

    #[test]
    fn the_ends_of_the_scale_keep_all_and_nothing() {
        let pairs = || (0..1000).map(|j| Pair { batch: 0, head: 0, i: j / 7, j });
        let (none, all) = (Dropout::new(0.0, 3).unwrap(), Dropout::new(1.0, 3).unwrap());
        assert!(pairs().all(|at| none.factor(at) == 1.0 && all.factor(at) == 0.0));
        let given = Dropout::keep_mask(1.0, &[true], &[1], &AttnShape::square(1, 4, 1)).unwrap();
        assert_eq!(given.factor(Pair { batch: 0, head: 0, i: 0, j: 0 }), 0.0);
    }

    #[test]
    fn what_is_no_probability_is_refused() {
        for p in [-0.1, 1.0001, f32::NAN, f32::INFINITY] {
            let error = Dropout::new(p, 0).unwrap_err().to_string();
            assert!(error.contains("from 0 to 1"), "{error}");
        }
        let wrong = Dropout::keep_mask(0.5, &[true; 3], &[3], &AttnShape::square(1, 4, 1)).unwrap_err();
        assert_eq!(wrong.to_string(), "keep: n_kv is 3, expected 1 or 4");
    }
}
