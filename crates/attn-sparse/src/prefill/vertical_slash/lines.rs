//! Keys for all queries and distances for all queries, as a mask.

use attn_core::mask::{Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Result};
use std::ops::Range;

/// `A(i) = { j <= p : j in V or p - j in D }` with `p = i + n_kv - n_q`, and the sets of each head (or of all). Memory: two
/// bits a key and the lists themselves, for each set.
#[derive(Debug, Clone)]
pub struct Lines {
    /// Batch entries and heads with sets of their own; 1 is shared by all.
    batch: usize,
    n_heads: usize,
    sets: Vec<Sets>,
    n_q: usize,
    n_kv: usize,
}

/// The lines of one head: keys `V` and distances `D`, less the distances that are attended apart.
#[derive(Debug, Clone)]
pub(super) struct Sets {
    vertical: Bits,
    slash: Bits,
    /// Distances at which not even the keys of `V` are seen.
    apart: Bits,
    /// Runs of neighbouring distances.
    pub(super) runs: Vec<Range<usize>>,
    /// Runs of neighbouring keys.
    keys: Vec<Range<usize>>,
    /// Runs of neighbouring distances of `apart`.
    apart_runs: Vec<Range<usize>>,
}

impl Sets {
    fn new(n_kv: usize, keys: Vec<usize>, distances: Vec<usize>) -> Self {
        Self {
            vertical: Bits::new(n_kv, keys.iter().copied()),
            slash: Bits::new(n_kv, distances.iter().copied()),
            apart: Bits::default(),
            runs: runs(distances),
            keys: runs(keys),
            apart_runs: Vec::new(),
        }
    }

    /// Without the distances `apart`, runs that are some of [`Sets::runs`].
    pub(super) fn without(&self, n_kv: usize, apart: Vec<Range<usize>>) -> Self {
        let runs = self.runs.iter().filter(|run| !apart.contains(run)).cloned().collect::<Vec<_>>();
        Self {
            slash: Bits::new(n_kv, runs.iter().cloned().flatten()),
            apart: Bits::new(n_kv, apart.iter().cloned().flatten()),
            runs,
            apart_runs: apart,
            ..self.clone()
        }
    }

    /// Sorted ranges that hold all keys which queries at positions `first..=last` see.
    pub(super) fn spans(&self, first: isize, last: isize) -> Vec<Range<usize>> {
        if last < 0 {
            return Vec::new();
        }
        let keys = self.keys.iter().map(|run| run.start..run.end.min(last as usize + 1));
        let slashes = self.runs.iter().map(|run| {
            let from = (first + 1 - run.end as isize).max(0) as usize;
            from..(last + 1 - run.start as isize).max(0) as usize
        });
        joined(keys.chain(slashes).filter(|span| span.start < span.end).collect())
    }
}

impl Lines {
    /// Lines of a problem: `(keys, distances)` for each head of `batch` entries (the problem's batch, or 1 for all), in any
    /// order; the number of heads is that of the lists.
    ///
    /// # Errors
    /// [`AttnError::Shape`] if the number of lists is neither 1 an entry nor that of the query heads, or `batch` is neither 1
    /// nor the problem's; [`AttnError::Value`] for a key or distance that does not exist.
    pub fn new(shape: &AttnShape, batch: usize, heads: Vec<(Vec<usize>, Vec<usize>)>) -> Result<Self> {
        let n_heads = heads.len().checked_div(batch).unwrap_or(shape.n_heads_q);
        if batch != 1 && batch != shape.batch {
            return Err(AttnError::shape("lines", "batch", batch, format!("1 or {}", shape.batch)));
        }
        if n_heads * batch != heads.len() || (n_heads != 1 && n_heads != shape.n_heads_q) {
            let expected = format!("1 or {} an entry", shape.n_heads_q);
            return Err(AttnError::shape("lines", "heads", heads.len(), expected));
        }
        for (name, lists) in [
            ("key", heads.iter().map(|h| &h.0).collect::<Vec<_>>()),
            ("distance", heads.iter().map(|h| &h.1).collect()),
        ] {
            if let Some(far) = lists.into_iter().flatten().find(|x| **x >= shape.n_kv) {
                return Err(AttnError::value(name, *far, format!("below n_kv = {}", shape.n_kv)));
            }
        }
        let sets = heads.into_iter().map(|(keys, distances)| Sets::new(shape.n_kv, keys, distances));
        Ok(Self { batch, n_heads, sets: sets.collect(), n_q: shape.n_q, n_kv: shape.n_kv })
    }

    /// The keys `V` of a head, ascending.
    pub fn vertical(&self, head: Head) -> Vec<usize> {
        self.sets(head).keys.iter().cloned().flatten().collect()
    }

    /// The distances `D` of a head, ascending.
    pub fn slash(&self, head: Head) -> Vec<usize> {
        self.sets(head).runs.iter().cloned().flatten().collect()
    }

    #[inline]
    fn sets(&self, head: Head) -> &Sets {
        &self.sets[self.list(head)]
    }

    /// Which of the lists is that of a head.
    #[inline]
    pub(super) fn list(&self, head: Head) -> usize {
        let batch = if self.batch == 1 { 0 } else { head.batch };
        let head = if self.n_heads == 1 { 0 } else { head.head };
        batch * self.n_heads + head
    }

    /// All lists.
    pub(super) fn all(&self) -> &[Sets] {
        &self.sets
    }

    /// The same with other lists, as many.
    pub(super) fn with(&self, sets: Vec<Sets>) -> Self {
        Self { sets, ..*self }
    }

    #[inline]
    fn position(&self, i: usize) -> isize {
        i as isize + self.n_kv as isize - self.n_q as isize
    }
}

impl Mask for Lines {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        if shape.batch == 0 {
            // Nothing will be asked, and lengths are those of no sequence.
            return Ok(());
        }
        let axes = [
            ("batch", shape.batch, self.batch, self.batch == 1),
            ("n_heads_q", shape.n_heads_q, self.n_heads, self.n_heads == 1),
            ("n_q", shape.n_q, self.n_q, false),
            ("n_kv", shape.n_kv, self.n_kv, false),
        ];
        match axes.iter().find(|(_, needed, made, shared)| needed != made && !shared) {
            Some((axis, needed, made, _)) => Err(AttnError::shape("lines", axis, *made, *needed)),
            None => Ok(()),
        }
    }

    fn sees(&self, pair: Pair) -> bool {
        let sets = self.sets(Head { batch: pair.batch, head: pair.head });
        let distance = self.position(pair.i) - pair.j as isize;
        let seen =
            |distance| sets.slash.has(distance) || sets.vertical.has(pair.j) && !sets.apart.has(distance);
        distance >= 0 && seen(distance as usize)
    }

    fn spans(&self, head: Head, rows: Range<usize>, _: usize) -> Vec<Range<usize>> {
        if rows.is_empty() {
            return Vec::new();
        }
        self.sets(head).spans(self.position(rows.start), self.position(rows.end - 1))
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let (first, last) = (self.position(rows.start), self.position(rows.end - 1));
        let (nearest, farthest) = (first - keys.end as isize + 1, last - keys.start as isize);
        if farthest < 0 {
            return Cover::Empty;
        }
        let sets = self.sets(head);
        let distances = nearest.max(0) as usize..farthest as usize + 1;
        let all = |runs: &[Range<usize>], wanted: &Range<usize>| {
            let next = runs.partition_point(|run| run.end <= wanted.start);
            runs.get(next).is_some_and(|run| run.start <= wanted.start && wanted.end <= run.end)
        };
        let none = |runs: &[Range<usize>], wanted: &Range<usize>| {
            let next = runs.partition_point(|run| run.end <= wanted.start);
            runs.get(next).is_none_or(|run| run.start >= wanted.end)
        };
        if none(&sets.keys, &keys) && none(&sets.runs, &distances) {
            return Cover::Empty;
        }
        let columns = || all(&sets.keys, &keys) && none(&sets.apart_runs, &distances);
        if nearest >= 0 && (all(&sets.runs, &distances) || columns()) { Cover::Full } else { Cover::Partial }
    }

    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        let sets = self.sets(head);
        let first = self.position(rows.start) - j as isize;
        let before = (-first).clamp(0, rows.len() as isize) as usize;
        scores[..before].fill(f32::NEG_INFINITY);
        let is_vertical = sets.vertical.has(j);
        if is_vertical && sets.apart_runs.is_empty() {
            return;
        }
        // Distances of the rows are consecutive: 32 bits at a time.
        let mut distance = (first + before as isize).max(0) as usize;
        for scores in scores[before..rows.len()].chunks_mut(32) {
            let bits = if is_vertical { !sets.apart.word(distance) } else { sets.slash.word(distance) };
            if bits != u32::MAX {
                for (lane, score) in scores.iter_mut().enumerate() {
                    *score = if bits >> lane & 1 == 1 { *score } else { f32::NEG_INFINITY };
                }
            }
            distance += 32;
        }
    }
}

/// A set of numbers below a bound.
#[derive(Debug, Clone, Default)]
struct Bits(Vec<u64>);

impl Bits {
    fn new(len: usize, members: impl Iterator<Item = usize>) -> Self {
        // One word more, so that 32 bits can be read from any place.
        let mut words = vec![0; len / 64 + 2];
        members.for_each(|x| words[x / 64] |= 1 << (x % 64));
        Self(words)
    }

    #[inline(always)]
    fn has(&self, x: usize) -> bool {
        self.0.get(x / 64).is_some_and(|word| word >> (x % 64) & 1 == 1)
    }

    /// Members `first..first + 32`, one bit each.
    #[inline(always)]
    fn word(&self, first: usize) -> u32 {
        let at = |word: usize| self.0.get(word).copied().unwrap_or(0);
        let both = u128::from(at(first / 64)) | u128::from(at(first / 64 + 1)) << 64;
        (both >> (first % 64)) as u32
    }
}

/// Runs of neighbouring numbers, ascending.
fn runs(mut members: Vec<usize>) -> Vec<Range<usize>> {
    members.sort_unstable();
    joined(members.into_iter().map(|x| x..x + 1).collect())
}

/// Sorted ranges in which those that touch or overlap are one.
fn joined(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for next in ranges {
        match joined.last_mut() {
            Some(last) if next.start <= last.end => last.end = last.end.max(next.end),
            _ => joined.push(next),
        }
    }
    joined
}
