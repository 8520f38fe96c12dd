//! Inputs whose exact attention is known: a sink, a local band and needles.
//!
//! A head's dimensions are `2 F` for positions, one for the sink and the rest for needle codes. With band width `w`
//! ([`BAND`]), `θ_f = π / (w 2^f)` for `f = 0 .. F − 1`, and `F` such that `w 2^(F−1)` reaches `n`:
//!
//! ```text
//! position code  p_j = (cos θ_f j, sin θ_f j)_f          so  p_i · p_j = Σ_f cos θ_f (i − j) =: c(i − j)
//! ordinary query q_i = √d (b p_i, 1, 0)                  k_j = (p_j, 0, needle code of j or 0)
//! needle query   q_i = √d (0, 0, s u)                    k_0 = (0, b F + ln SINK_WEIGHT, 0)
//! ```
//!
//! (`√d` undoes the softmax scale.) Three things follow.
//!
//! - *Band.* `c(0) = F`. For `w 2^m ≤ |δ| < w 2^(m+1)` with `t = |δ| / (w 2^m)` the frequencies `m` and `m + 1`
//!   contribute `cos πt + cos πt/2 ≤ 0`, so `c(δ) ≤ F − 2`: outside of the band every key weighs at most `e^(−2b)` of
//!   the query's own, and all of them together at most `n e^(−2b)`. With `b = 8` that is 0.004 for a thousand keys
//!   and 0.12 for a million. Inside, weights fall as a bell of about 30 keys.
//! - *Sink.* Key 0 weighs as much as [`SINK_WEIGHT`] own keys for every ordinary query.
//! - *Needles.* One query in [`NEEDLE_EVERY`] looks for one of 64 needle keys before it, far or near. Codes are random
//!   signs of unit length with pairwise products of at most 1/2; the needle scores `s = 16`, each other needle at most 8,
//!   everything else 0: the needle's share is at least `1 / (1 + 63 e^(−8) + n e^(−16))`, 97 % at 64 k.
//!
//! Values are independent normal numbers. A window method must find the band and misses sink and needles; sinks and
//! window misses the needles alone.

use super::{Fnv, Source, SourceKind, named};
use crate::{LabError, Result};
use attn_core::AttnShape;
use attn_core::registry::NamedTensors;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// Beyond this distance a key of the band weighs nearly nothing.
pub const BAND: usize = 256;
/// One query in this many looks for a needle.
pub const NEEDLE_EVERY: usize = 8;
/// The sink's weight, in units of the query's own key.
pub const SINK_WEIGHT: f64 = 12.0;

const SHARPNESS: f64 = 8.0;
const NEEDLE_SCORE: f64 = 16.0;
const NEEDLES: usize = 64;
/// Fewer dimensions do not hold 64 codes with pairwise products of at most 1/2.
const CODE_DIMS: usize = 16;

/// A sink, a local band and needles.
#[derive(Debug, Clone, Copy)]
pub struct Planted {
    /// Query and key/value heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Seed.
    pub seed: u64,
}

impl Planted {
    /// Refuses a head that is too narrow for length `n`.
    ///
    /// # Errors
    /// [`LabError::Argument`] with the width needed.
    pub fn check(&self, n: usize) -> Result<()> {
        let needed = 2 * frequencies(n) + 1 + CODE_DIMS;
        if self.head_dim >= needed {
            return Ok(());
        }
        let found = self.head_dim;
        Err(LabError::Argument(format!(
            "--head-dim is {found}; planted inputs of length {n} need at least {needed}"
        )))
    }

    /// The needle key that query `i` of `head` looks for, if it does.
    pub fn needle_of(&self, n: usize, head: usize, i: usize) -> Option<usize> {
        Some(self.needles(n, head).seen_by(i)?.key)
    }

    fn needles(&self, n: usize, head: usize) -> Needles {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(2 * head as u64);
        let dims = self.head_dim.saturating_sub(2 * frequencies(n) + 1).max(1);
        Needles::draw(&mut rng, n, dims)
    }

    fn head(&self, n: usize, head: usize, q: &mut [f32], k: &mut [f32], v: &mut [f32]) {
        let (d, f) = (self.head_dim, frequencies(n));
        let needles = self.needles(n, head);
        let root = (d as f64).sqrt();
        for (i, q) in q.chunks_exact_mut(d).enumerate() {
            if let Some(needle) = needles.seen_by(i) {
                fill(&mut q[2 * f + 1..], &needle.code, root * NEEDLE_SCORE);
            } else {
                fill(q, &position(i, f), root * SHARPNESS);
                q[2 * f] = root as f32;
            }
        }
        for (j, k) in k.chunks_exact_mut(d).enumerate().skip(1) {
            fill(k, &position(j, f), 1.0);
        }
        if let Some(sink) = k.get_mut(2 * f) {
            *sink = (SHARPNESS * f as f64 + SINK_WEIGHT.ln()) as f32;
        }
        for needle in &needles.0 {
            fill(&mut k[needle.key * d + 2 * f + 1..(needle.key + 1) * d], &needle.code, 1.0);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(2 * head as u64 + 1);
        v.iter_mut().for_each(|v| *v = rng.sample(StandardNormal));
    }
}

impl Source for Planted {
    fn kind(&self) -> SourceKind {
        SourceKind::Planted
    }

    fn describe(&self) -> String {
        let Self { seed, .. } = self;
        format!("sink, local band of {BAND} keys, {NEEDLES} needles a head, seed {seed}")
    }

    fn shape(&self, n: usize) -> AttnShape {
        AttnShape::square(self.heads, n, self.head_dim)
    }

    fn hash(&self, _: usize) -> Result<String> {
        let constants =
            format!("{} {SHARPNESS} {NEEDLE_SCORE} {SINK_WEIGHT} {NEEDLE_EVERY}", self.describe());
        Ok(Fnv::new().with(constants.as_bytes()).hex())
    }

    fn inputs(&self, n: usize) -> Result<NamedTensors> {
        self.check(n)?;
        let shape = self.shape(n);
        let head_len = n * self.head_dim;
        let zeros = || vec![0.0; self.heads * head_len];
        let (mut q, mut k, mut v) = (zeros(), zeros(), zeros());
        for head in 0..self.heads {
            let at = head * head_len..(head + 1) * head_len;
            self.head(n, head, &mut q[at.clone()], &mut k[at.clone()], &mut v[at]);
        }
        named(&shape, q, k, v)
    }
}

/// `F`: the slowest frequency does not come round within `n` positions.
fn frequencies(n: usize) -> usize {
    let farthest = n.saturating_sub(1);
    (farthest / BAND).checked_ilog2().map_or(1, |octave| octave as usize + 2)
}

fn position(j: usize, frequencies: usize) -> Vec<f64> {
    let angle = |f| std::f64::consts::PI * j as f64 / (BAND as f64 * 2f64.powi(f as i32));
    (0..frequencies).flat_map(|f| [angle(f).cos(), angle(f).sin()]).collect()
}

fn fill(to: &mut [f32], from: &[f64], factor: f64) {
    to.iter_mut().zip(from).for_each(|(to, from)| *to = (factor * from) as f32);
}

struct Needle {
    key: usize,
    code: Vec<f64>,
}

/// Ascending by key.
struct Needles(Vec<Needle>);

impl Needles {
    fn draw(rng: &mut ChaCha8Rng, n: usize, dims: usize) -> Self {
        // Key 0 is the sink; short sequences have room for fewer needles.
        let count = NEEDLES.min(n.saturating_sub(1) / 4);
        let mut keys = rand::seq::index::sample(rng, n.saturating_sub(1), count).into_vec();
        keys.sort_unstable();
        let unit = 1.0 / (dims as f64).sqrt();
        let mut needles: Vec<Needle> = Vec::with_capacity(count);
        for key in keys {
            let far = |code: &[f64]| needles.iter().all(|other| dot(code, &other.code).abs() <= 0.5);
            // Bounded: a head that `Planted::check` refuses has too few codes to choose from.
            let code = (0..10_000).find_map(|_| {
                let code: Vec<f64> = (0..dims).map(|_| if rng.random() { unit } else { -unit }).collect();
                far(&code).then_some(code)
            });
            needles.extend(code.map(|code| Needle { key: key + 1, code }));
        }
        Self(needles)
    }

    /// Queries that look for needles are spread evenly, and over all needles before them.
    fn seen_by(&self, i: usize) -> Option<&Needle> {
        if i % NEEDLE_EVERY != NEEDLE_EVERY - 1 {
            return None;
        }
        let before = self.0.partition_point(|needle| needle.key < i);
        // Multiplication by a large odd number scatters consecutive queries.
        let pick = (i / NEEDLE_EVERY).wrapping_mul(0x9e37_79b9) >> 8;
        self.0.get(pick.checked_rem(before)?)
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLANTED: Planted = Planted { heads: 2, head_dim: 64, seed: 5 };

    /// Softmax weights of query `i` over the keys up to it, in f64 from the stored tensors.
    fn weights(inputs: &NamedTensors, n: usize, head: usize, i: usize) -> Vec<f64> {
        let row = |name: &str, i: usize| -> Vec<f64> {
            let all = inputs.f32(name).unwrap().unwrap().1;
            all[(head * n + i) * 64..][..64].iter().map(|x| f64::from(*x)).collect()
        };
        let q = row("q", i);
        let scores: Vec<f64> = (0..=i).map(|j| dot(&q, &row("k", j)) / 8.0).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        scores.iter().map(|s| (s - max).exp() / sum).collect()
    }

    #[test]
    fn needle_queries_put_their_mass_on_their_needle() {
        let n = 4096;
        let inputs = PLANTED.inputs(n).unwrap();
        let (mut far, mut seen) = (0, 0);
        for head in 0..2 {
            for i in (7..n).step_by(8 * 13) {
                let Some(needle) = PLANTED.needle_of(n, head, i) else { continue };
                let weight = weights(&inputs, n, head, i)[needle];
                assert!(weight > 0.95, "head {head}, query {i}, needle {needle}: {weight}");
                seen += 1;
                far += usize::from(i - needle > BAND);
            }
        }
        assert!(seen > 60 && far > seen / 2, "{far} of {seen} needles are outside of the band");
    }

    #[test]
    fn ordinary_queries_share_their_mass_between_band_and_sink() {
        let n = 4096;
        let inputs = PLANTED.inputs(n).unwrap();
        for i in [600, 1500, 2100, 3000, 4090] {
            assert_eq!(PLANTED.needle_of(n, 0, i), None);
            let w = weights(&inputs, n, 0, i);
            let band: f64 = w[i + 1 - BAND..].iter().sum();
            assert!(band + w[0] > 0.995, "query {i}: band {band}, sink {}", w[0]);
            assert!((w[0] / w[i] / SINK_WEIGHT - 1.0).abs() < 1e-3, "sink {} own {}", w[0], w[i]);
            assert!((0.1..0.6).contains(&w[0]), "sink {}", w[0]);
        }
    }

    #[test]
    fn outside_of_the_band_position_codes_lose_two() {
        for n in [300, 1000, 1 << 16] {
            let f = frequencies(n);
            let own = position(0, f);
            for delta in (BAND..n).step_by(7) {
                let c = dot(&own, &position(delta, f));
                assert!(c <= f as f64 - 2.0 + 1e-9, "n {n}, distance {delta}: {c} of {f}");
            }
        }
    }

    #[test]
    fn narrow_heads_are_refused_and_short_sequences_work() {
        let narrow = Planted { head_dim: 32, ..PLANTED };
        let line = narrow.inputs(1 << 16).unwrap_err().to_string();
        assert!(line.contains("--head-dim is 32") && line.contains("at least"), "{line}");
        for n in [1, 2, 5, 17] {
            assert_eq!(PLANTED.inputs(n).unwrap().qkv().unwrap().shape().n_q, n);
        }
    }
}
