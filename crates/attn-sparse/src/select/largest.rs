//! The largest scores of a row that comes stretch by stretch, filtered a vector at a time.

use super::rank::{ordered, score_of_key};
use attn_core::simd::{Simd, SimdBase, SimdMask, SimdOp};
use std::ops::RangeInclusive;

/// The `k` largest scores offered so far and some more, in ascending order of their indices: what is not above the floor is
/// dropped a vector at a time, the rest is cut to `k` when there is too much of it.
///
/// A caller that knows a likely lower bound of the `k`-th largest score starts with it as the floor: then hardly more than `k`
/// scores are ever looked at one by one. If the bound was too high, [`Largest::finish`] says so.
#[derive(Debug, Default)]
pub(crate) struct Largest {
    k: usize,
    scores: Vec<f32>,
    indices: Vec<u32>,
    len: usize,
    floor: f32,
    /// Whether the floor is a guess.
    guessed: bool,
    keys: Vec<u32>,
}

impl Largest {
    /// As new: at most `k`; `guess` is what the `k`-th largest score is hoped not to be below.
    pub(crate) fn start(&mut self, k: usize, guess: Option<f32>) {
        (self.k, self.len, self.guessed) = (k, 0, guess.is_some());
        // What equals the guess passes, -inf never does.
        self.floor = guess.map_or(f32::NEG_INFINITY, f32::next_down);
    }

    /// Offers scores of consecutive indices from `first` on, all above those offered before.
    #[inline(always)]
    pub(crate) fn take<S: Simd>(&mut self, simd: S, first: usize, scores: &[f32]) {
        let lanes = S::f32s::LEN;
        let room = self.len + scores.len() + lanes;
        if self.scores.len() < room {
            let room = room.max(self.full() + lanes);
            self.scores.resize(room, 0.0);
            self.indices.resize(room, 0);
        }
        let (floor, mut len) = (S::f32s::splat(simd, self.floor), self.len);
        let vectors = scores.chunks_exact(lanes);
        let (mut index, rest) = (first as u32, vectors.remainder());
        let mut steps = [0u32; 16];
        steps.iter_mut().enumerate().for_each(|(lane, step)| *step = lane as u32);
        let steps = S::u32s::from_slice(simd, &steps[..lanes]);
        for vector in vectors {
            let vector = S::f32s::from_slice(simd, vector);
            // NaN is not below anything.
            let passed = !vector.simd_le(floor);
            let bits = passed.to_bitmask();
            if bits != 0 {
                vector.compress(passed).store_slice(&mut self.scores[len..len + lanes]);
                (steps + index).compress(passed).store_slice(&mut self.indices[len..len + lanes]);
                len += bits.count_ones() as usize;
            }
            index += lanes as u32;
        }
        for score in rest {
            if above(*score, self.floor) {
                (self.scores[len], self.indices[len]) = (*score, index);
                len += 1;
            }
            index += 1;
        }
        self.len = len;
        if len >= self.full() {
            self.cut(simd);
        }
    }

    /// Offers one score, of an index above all those offered before.
    pub(crate) fn offer(&mut self, score: f32, index: usize) {
        if above(score, self.floor) {
            self.scores.truncate(self.len);
            self.indices.truncate(self.len);
            self.scores.push(score);
            self.indices.push(index as u32);
            self.len += 1;
        }
    }

    /// Takes over what another one was offered, of higher indices; both with the same guess or none.
    pub(crate) fn append(&mut self, other: &Self) {
        self.scores.truncate(self.len);
        self.indices.truncate(self.len);
        self.scores.extend_from_slice(&other.scores[..other.len]);
        self.indices.extend_from_slice(&other.indices[..other.len]);
        self.len = self.scores.len();
    }

    /// So many are cut to `k`.
    fn full(&self) -> usize {
        3 * self.k + 64
    }

    /// Drops all but the `k` largest, of equal ones the later.
    #[inline(always)]
    fn cut<S: Simd>(&mut self, simd: S) {
        if self.len <= self.k {
            return;
        }
        self.guessed = false;
        if self.k == 0 {
            (self.len, self.floor) = (0, f32::INFINITY);
            return;
        }
        self.keys.clear();
        self.keys.extend(self.scores[..self.len].iter().map(|score| ordered(*score)));
        let (least, n_reach) = reached_by(simd, &self.keys, self.k..=self.k);
        let lanes = S::f32s::LEN;
        let (mut at, mut kept) = (0, 0);
        if n_reach == self.k {
            let bound = S::u32s::splat(simd, least);
            while at + lanes <= self.len {
                let passed = S::u32s::from_slice(simd, &self.keys[at..at + lanes]).simd_ge(bound);
                let scores = S::f32s::from_slice(simd, &self.scores[at..at + lanes]).compress(passed);
                let indices = S::u32s::from_slice(simd, &self.indices[at..at + lanes]).compress(passed);
                // What is overwritten has been read.
                scores.store_slice(&mut self.scores[kept..kept + lanes]);
                indices.store_slice(&mut self.indices[kept..kept + lanes]);
                kept += passed.to_bitmask().count_ones() as usize;
                at += lanes;
            }
        }
        // More are equal than there are slots for: the first of them.
        let mut ties = match n_reach - self.k {
            0 => usize::MAX,
            _ => self.k - self.keys.iter().filter(|key| **key > least).count(),
        };
        for at in at..self.len {
            let key = self.keys[at];
            if key > least || key == least && ties > 0 {
                ties -= usize::from(key == least);
                (self.scores[kept], self.indices[kept]) = (self.scores[at], self.indices[at]);
                kept += 1;
            }
        }
        // All slots are taken: what equals the least comes too late.
        self.floor = score_reached(least);
        self.len = kept;
    }

    /// The indices, ascending; nothing if fewer than `k` reached a guessed floor.
    #[inline(always)]
    pub(crate) fn finish<S: Simd>(&mut self, simd: S) -> Option<&[u32]> {
        if self.guessed && self.len < self.k {
            return None;
        }
        self.cut(simd);
        Some(&self.indices[..self.len])
    }
}

#[inline(always)]
fn above(score: f32, floor: f32) -> bool {
    score > floor || score.is_nan()
}

/// A key that as many of `keys` reach as `wanted` says, and how many; if there is none for ties, the largest that more reach.
/// At least as many as wanted are given.
#[inline(always)]
pub(crate) fn reached_by<S: Simd>(simd: S, keys: &[u32], wanted: RangeInclusive<usize>) -> (u32, usize) {
    let (mut low, mut high) = (u32::MAX, 0);
    for key in keys {
        (low, high) = (low.min(*key), high.max(*key));
    }
    // `n` reach `low`; only `above`, fewer than wanted, reach what lies above `high`.
    let (mut n, mut above, target) = (keys.len(), 0, *wanted.start());
    let mut evenly = true;
    while low < high && !wanted.contains(&n) {
        // By turns: where it would be if keys were spread evenly, and the middle.
        let step = match evenly {
            true => (f64::from(high - low) * (n - target) as f64 / (n - above) as f64) as u32,
            false => (high - low) / 2,
        };
        evenly = !evenly;
        let key = low + 1 + step.min(high - low - 1);
        match n_reaching(simd, keys, key) {
            enough if enough >= target => (low, n) = (key, enough),
            fewer => (high, above) = (key - 1, fewer),
        }
    }
    (low, n)
}

/// How many keys are `least` or more.
#[inline(always)]
fn n_reaching<S: Simd>(simd: S, keys: &[u32], least: u32) -> usize {
    // With the compiler's own vectors.
    simd.vectorize(
        #[inline(always)]
        || keys.iter().map(|key| u32::from(*key >= least)).sum::<u32>() as usize,
    )
}

/// A score that about `rank` of `scores` reach, at least; nothing if they are fewer. `keys` is scratch.
#[inline(always)]
pub(crate) fn nth_largest<S: Simd>(simd: S, scores: &[f32], rank: usize, keys: &mut Vec<u32>) -> Option<f32> {
    if rank == 0 || rank > scores.len() {
        return None;
    }
    keys.clear();
    keys.extend(scores.iter().map(|score| ordered(*score)));
    let (key, _) = reached_by(simd, keys, rank..=rank + rank / 16);
    Some(score_reached(key))
}

/// [`nth_largest`] of all these scores.
pub(crate) struct NthLargest<'a> {
    pub(crate) scores: &'a [f32],
    pub(crate) rank: usize,
}

impl SimdOp for NthLargest<'_> {
    type Output = Option<f32>;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> Option<f32> {
        simd.vectorize(
            #[inline(always)]
            || nth_largest(simd, self.scores, self.rank, &mut Vec::new()),
        )
    }
}

/// The score of a key; infinity for that of NaN.
#[inline(always)]
fn score_reached(key: u32) -> f32 {
    if key >= ordered(f32::INFINITY) { f32::INFINITY } else { score_of_key(key) }
}

/// The `k` largest of `scores`, ascending; `largest` is scratch.
pub(crate) struct LargestOf<'a> {
    pub(crate) scores: &'a [f32],
    pub(crate) k: usize,
    pub(crate) largest: &'a mut Largest,
}

impl SimdOp for LargestOf<'_> {
    type Output = Vec<u32>;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> Vec<u32> {
        let Self { scores, k, largest } = self;
        largest.start(k, None);
        simd.vectorize(
            #[inline(always)]
            || {
                largest.take(simd, 0, scores);
                largest.finish(simd).unwrap_or_default().to_vec()
            },
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::select::top_k;
    use attn_core::simd::Isa;

    fn largest(k: usize, guess: Option<f32>) -> Largest {
        let mut largest = Largest::default();
        largest.start(k, guess);
        largest
    }

    struct Take<'a>(&'a mut Largest, &'a [f32], usize);

    impl SimdOp for Take<'_> {
        type Output = Option<Vec<u32>>;

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) -> Option<Vec<u32>> {
            let (mut first, middle) = (0, self.1.len() / 2);
            let mut second = largest(self.0.k, None);
            // A guess is about all scores together.
            let middle = if self.0.guessed { self.1.len() } else { middle };
            for (at, scores) in self.1.chunks(self.2).enumerate() {
                match first > middle {
                    false if at % 5 == 2 => {
                        let each = scores.iter().enumerate();
                        each.for_each(|(at, score)| self.0.offer(*score, first + at));
                    }
                    false => self.0.take(simd, first, scores),
                    true => second.take(simd, first, scores),
                }
                first += scores.len();
            }
            self.0.append(&second);
            self.0.finish(simd).map(<[u32]>::to_vec)
        }
    }

    /// Scores with many ties, hidden ones and NaN; by stretches; with guesses that hold, that do not, and none.
    #[test]
    fn it_takes_what_top_k_takes() {
        let score = |x: usize| match x * 7919 % 31 {
            0 => f32::NEG_INFINITY,
            1 if x % 50 == 1 => f32::NAN,
            2 => -0.0,
            y => (y * 37 % 11) as f32 - 4.0,
        };
        for isa in Isa::available() {
            for n in [0, 1, 15, 16, 17, 300, 5000] {
                let scores: Vec<f32> = (0..n).map(score).collect();
                for k in [0, 1, 5, 16, 200, 6000] {
                    let want: Vec<u32> = top_k(&scores, k).into_iter().map(|x| x as u32).collect();
                    for step in [7, 16, 64, 1000] {
                        for guess in [None, Some(-100.0), Some(3.0), Some(100.0)] {
                            let mut largest = largest(k, guess);
                            match isa.run(Take(&mut largest, &scores, step)) {
                                Some(got) => assert_eq!(got, want, "{isa} {n} {k} {step} {guess:?}"),
                                None => assert!(guess.is_some()),
                            }
                        }
                    }
                }
            }
        }
    }

    struct Nth<'a>(&'a [f32], usize);

    impl SimdOp for Nth<'_> {
        type Output = Option<f32>;

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) -> Option<f32> {
            nth_largest(simd, self.0, self.1, &mut Vec::new())
        }
    }

    #[test]
    fn as_many_scores_as_asked_for_reach_the_bound() {
        let scores: Vec<f32> = (0..500).map(|x| ((x * 7919 % 1009) as f32 - 500.0) * 0.1).collect();
        for isa in Isa::available() {
            for rank in [1, 2, 17, 100, 500] {
                let bound = isa.run(Nth(&scores, rank)).unwrap();
                let reached = scores.iter().filter(|score| **score >= bound).count();
                assert!((rank..=rank + rank / 16 + 1).contains(&reached), "{isa} {rank}: {reached}");
            }
            assert_eq!(isa.run(Nth(&[1.0], 2)), None);
        }
    }
}
