//! Who sees whom, and which tiles are empty, partial or full.
//!
//! A mask answers three questions about query row `i` and key row `j` (indices in the given tensors):
//! [`Mask::sees`] defines it, pair by pair; [`Mask::spans`] bounds the keys that a block of queries can see, so
//! that an engine never visits the rest; [`Mask::cover`] tells tiles that are seen completely, which pay
//! nothing. The last two are optimisations and must agree with the first: `attn-testkit` checks it.
//!
//! Masks compose: [`And`], [`Or`], and an `Option` that hides nothing when it is `None`. A user's closure is a mask too: [`Predicate`].

use crate::{AttnError, AttnShape, Result};
use std::ops::Range;

/// A query row and a key row of one query head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// Batch entry.
    pub batch: usize,
    /// Query head.
    pub head: usize,
    /// Query row.
    pub i: usize,
    /// Key row.
    pub j: usize,
}

/// Which head a question is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Batch entry.
    pub batch: usize,
    /// Query head.
    pub head: usize,
}

impl Head {
    /// The pair `(i, j)` of this head.
    #[inline(always)]
    pub fn pair(self, i: usize, j: usize) -> Pair {
        Pair { batch: self.batch, head: self.head, i, j }
    }
}

/// How much of a tile (query rows x key rows) is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cover {
    /// No pair: the tile is skipped.
    Empty,
    /// Some pairs, or not known: each pair is asked.
    Partial,
    /// Every pair: the tile runs without any mask.
    Full,
}

/// Visibility of keys to queries.
pub trait Mask: Sync {
    /// Whether the query sees the key: the definition.
    fn sees(&self, pair: Pair) -> bool;

    /// Sorted, disjoint, non-empty ranges that contain every key any of the query `rows` sees.
    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let _ = (head, rows);
        non_empty(0..n_kv)
    }

    /// What part of `rows` x `keys` is seen; `Partial` is always a correct answer. Both ranges are non-empty.
    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let _ = (head, rows, keys);
        Cover::Partial
    }
}

impl<M: Mask + ?Sized> Mask for &M {
    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        (**self).sees(pair)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        (**self).spans(head, rows, n_kv)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        (**self).cover(head, rows, keys)
    }
}

/// `None` hides nothing.
impl<M: Mask> Mask for Option<M> {
    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        self.as_ref().is_none_or(|mask| mask.sees(pair))
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        match self {
            Some(mask) => mask.spans(head, rows, n_kv),
            None => non_empty(0..n_kv),
        }
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        self.as_ref().map_or(Cover::Full, |mask| mask.cover(head, rows, keys))
    }
}

fn non_empty(range: Range<usize>) -> Vec<Range<usize>> {
    if range.is_empty() { Vec::new() } else { vec![range] }
}

/// Every query sees every key.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SeeAll;

impl Mask for SeeAll {
    #[inline(always)]
    fn sees(&self, _: Pair) -> bool {
        true
    }

    fn cover(&self, _: Head, _: Range<usize>, _: Range<usize>) -> Cover {
        Cover::Full
    }
}

/// How causal rows and windows align when `n_q != n_kv`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Align {
    /// The last query stands at the last key, as in decoding and chunked prefill (the default).
    #[default]
    BottomRight,
    /// The first query stands at the first key.
    TopLeft,
    /// Query `i` stands at key `i + offset`.
    Offset(isize),
}

impl Align {
    /// The position of query 0 on the key axis.
    pub fn offset(self, n_q: usize, n_kv: usize) -> isize {
        match self {
            Self::BottomRight => n_kv as isize - n_q as isize,
            Self::TopLeft => 0,
            Self::Offset(offset) => offset,
        }
    }
}

/// A diagonal band: query `i` stands at `p = i + offset` and sees `p - left <= j <= p + right`, both ends
/// included; `None` is unbounded. Causal attention is `right = Some(0)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Band {
    /// Position of query 0 on the key axis.
    pub offset: isize,
    /// Keys seen before the query's position.
    pub left: Option<usize>,
    /// Keys seen after the query's position.
    pub right: Option<usize>,
}

impl Band {
    /// Keys up to the query's own position.
    pub fn causal(shape: &AttnShape, align: Align) -> Self {
        Self { offset: align.offset(shape.n_q, shape.n_kv), left: None, right: Some(0) }
    }

    /// First key that query `i` may see, clamped to the key axis' start.
    #[inline(always)]
    fn first(&self, i: usize) -> isize {
        self.left.map_or(isize::MIN, |left| (i as isize + self.offset).saturating_sub_unsigned(left))
    }

    /// One past the last key that query `i` may see.
    #[inline(always)]
    fn end(&self, i: usize) -> isize {
        self.right.map_or(isize::MAX, |right| {
            (i as isize + self.offset).saturating_add_unsigned(right).saturating_add(1)
        })
    }
}

impl Mask for Band {
    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        let j = p.j as isize;
        self.first(p.i) <= j && j < self.end(p.i)
    }

    fn spans(&self, _: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        if rows.is_empty() {
            return Vec::new();
        }
        let clamp = |x: isize| x.clamp(0, n_kv as isize) as usize;
        non_empty(clamp(self.first(rows.start))..clamp(self.end(rows.end - 1)))
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let (first_row, last_row) = (rows.start, rows.end - 1);
        let (first_key, last_key) = (keys.start as isize, keys.end as isize - 1);
        if last_key < self.first(first_row) || first_key >= self.end(last_row) {
            Cover::Empty
        } else if first_key >= self.first(last_row) && last_key < self.end(first_row) {
            Cover::Full
        } else {
            Cover::Partial
        }
    }
}

/// Keys `j < len` are seen by everybody: attention sinks in front, or padding at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeysBelow(pub usize);

impl Mask for KeysBelow {
    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        p.j < self.0
    }

    fn spans(&self, _: Head, _: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        non_empty(0..self.0.min(n_kv))
    }

    fn cover(&self, _: Head, _: Range<usize>, keys: Range<usize>) -> Cover {
        if keys.end <= self.0 {
            Cover::Full
        } else if keys.start >= self.0 {
            Cover::Empty
        } else {
            Cover::Partial
        }
    }
}

/// A dense boolean mask, broadcast over the axes on which it has length 1.
#[derive(Debug, Clone, Copy)]
pub struct DenseMask<'a> {
    seen: &'a [bool],
    strides: [usize; 4],
}

impl<'a> DenseMask<'a> {
    /// `seen`, row-major, of `mask_shape` with 1 to 4 axes, right-aligned to `(batch, n_heads_q, n_q, n_kv)`
    /// as in numpy; `true` = attend.
    ///
    /// # Errors
    /// [`AttnError::Shape`] or [`AttnError::Layout`] if it does not broadcast to the problem.
    pub fn new(seen: &'a [bool], mask_shape: &[usize], shape: &AttnShape) -> Result<Self> {
        Ok(Self { seen, strides: broadcast_strides("mask", seen.len(), mask_shape, shape)? })
    }
}

impl Mask for DenseMask<'_> {
    #[inline(always)]
    fn sees(&self, p: Pair) -> bool {
        let s = &self.strides;
        self.seen[p.batch * s[0] + p.head * s[1] + p.i * s[2] + p.j * s[3]]
    }
}

/// Strides with which a right-aligned row-major tensor is read as `(batch, n_heads_q, n_q, n_kv)`.
pub(crate) fn broadcast_strides(
    tensor: &str,
    len: usize,
    from: &[usize],
    shape: &AttnShape,
) -> Result<[usize; 4]> {
    let to = [shape.batch, shape.n_heads_q, shape.n_q, shape.n_kv];
    let elements: usize = from.iter().product();
    if from.len() > 4 || elements != len {
        let reason =
            format!("shape {from:?} with {len} elements, expected at most 4 axes and {elements} elements");
        return Err(AttnError::Layout { tensor: tensor.into(), reason });
    }
    let (mut strides, mut step) = ([0; 4], 1);
    for (back, &n) in from.iter().rev().enumerate() {
        let axis = 3 - back;
        if n != 1 && n != to[axis] {
            let name = ["batch", "n_heads_q", "n_q", "n_kv"][axis];
            return Err(AttnError::shape(tensor, name, n, format!("1 or {}", to[axis])));
        }
        strides[axis] = if n == 1 { 0 } else { step };
        step *= n;
    }
    Ok(strides)
}

/// A closure `pair -> visible`, compiled into the kernel.
#[derive(Debug, Clone, Copy)]
pub struct Predicate<F>(pub F);

impl<F: Fn(Pair) -> bool + Sync> Mask for Predicate<F> {
    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        (self.0)(pair)
    }
}

/// Seen by both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct And<A, B>(pub A, pub B);

impl<A: Mask, B: Mask> Mask for And<A, B> {
    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        self.0.sees(pair) && self.1.sees(pair)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let b = self.1.spans(head, rows.clone(), n_kv);
        let a = self.0.spans(head, rows, n_kv);
        let (mut both, mut at) = (Vec::new(), 0);
        for x in a {
            while at < b.len() && b[at].end <= x.start {
                at += 1;
            }
            let meets = b[at..].iter().take_while(|y| y.start < x.end);
            both.extend(meets.map(|y| x.start.max(y.start)..x.end.min(y.end)));
        }
        both
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        match (self.0.cover(head, rows.clone(), keys.clone()), self.1.cover(head, rows, keys)) {
            (Cover::Empty, _) | (_, Cover::Empty) => Cover::Empty,
            (Cover::Full, Cover::Full) => Cover::Full,
            _ => Cover::Partial,
        }
    }
}

/// Seen by either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Or<A, B>(pub A, pub B);

impl<A: Mask, B: Mask> Mask for Or<A, B> {
    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        self.0.sees(pair) || self.1.sees(pair)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let mut all = self.0.spans(head, rows.clone(), n_kv);
        all.extend(self.1.spans(head, rows, n_kv));
        all.sort_by_key(|r| r.start);
        let mut merged: Vec<Range<usize>> = Vec::with_capacity(all.len());
        for next in all {
            match merged.last_mut() {
                Some(last) if next.start <= last.end => last.end = last.end.max(next.end),
                _ => merged.push(next),
            }
        }
        merged
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        match (self.0.cover(head, rows.clone(), keys.clone()), self.1.cover(head, rows, keys)) {
            (Cover::Full, _) | (_, Cover::Full) => Cover::Full,
            (Cover::Empty, Cover::Empty) => Cover::Empty,
            _ => Cover::Partial,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: Head = Head { batch: 0, head: 0 };

    /// `spans` and `cover` may only leave out or wave through what `sees` says.
    fn check_consistent(mask: &impl Mask, n_q: usize, n_kv: usize, what: &str) {
        for rows in [0..1, 0..n_q, n_q / 3..n_q / 2 + 1, n_q - 1..n_q] {
            let spans = mask.spans(HEAD, rows.clone(), n_kv);
            assert!(spans.iter().all(|s| s.start < s.end && s.end <= n_kv), "{what}: {spans:?}");
            assert!(spans.windows(2).all(|w| w[0].end <= w[1].start), "{what}: {spans:?}");
            for j in 0..n_kv {
                let seen = rows.clone().any(|i| mask.sees(HEAD.pair(i, j)));
                let inside = spans.iter().any(|s| s.contains(&j));
                assert!(inside || !seen, "{what}: rows {rows:?} see key {j} outside {spans:?}");
            }
            for keys in [0..1, 0..n_kv, n_kv / 4..n_kv / 2 + 1, n_kv - 1..n_kv] {
                let seen: Vec<bool> = rows
                    .clone()
                    .flat_map(|i| keys.clone().map(move |j| (i, j)))
                    .map(|(i, j)| mask.sees(HEAD.pair(i, j)))
                    .collect();
                match mask.cover(HEAD, rows.clone(), keys.clone()) {
                    Cover::Empty => {
                        assert!(seen.iter().all(|s| !s), "{what}: {rows:?} x {keys:?} is not empty")
                    }
                    Cover::Full => {
                        assert!(seen.iter().all(|s| *s), "{what}: {rows:?} x {keys:?} is not full")
                    }
                    Cover::Partial => {}
                }
            }
        }
    }

    #[test]
    fn spans_and_cover_agree_with_sees() {
        for (n_q, n_kv) in [(1, 1), (5, 9), (9, 5), (16, 16), (17, 40)] {
            for offset in [-20, -3, 0, 4, n_kv as isize - n_q as isize, 60] {
                for left in [None, Some(0), Some(2), Some(usize::MAX)] {
                    for right in [None, Some(0), Some(3), Some(usize::MAX)] {
                        let band = Band { offset, left, right };
                        let what = format!("{band:?} on {n_q} x {n_kv}");
                        check_consistent(&band, n_q, n_kv, &what);
                        check_consistent(&And(band, KeysBelow(n_kv / 2)), n_q, n_kv, &what);
                        check_consistent(&Or(band, KeysBelow(2)), n_q, n_kv, &what);
                        let causal = Band { offset, left: None, right: Some(0) };
                        check_consistent(&And(causal, Or(KeysBelow(3), band)), n_q, n_kv, &what);
                    }
                }
            }
        }
    }

    #[test]
    fn causal_aligns_the_last_query_with_the_last_key() {
        let shape = AttnShape { n_q: 2, n_kv: 5, ..AttnShape::square(1, 1, 1) };
        let seen = |align, i| {
            let band = Band::causal(&shape, align);
            (0..5).filter(|&j| band.sees(HEAD.pair(i, j))).collect::<Vec<_>>()
        };
        assert_eq!(seen(Align::BottomRight, 0), [0, 1, 2, 3]);
        assert_eq!(seen(Align::BottomRight, 1), [0, 1, 2, 3, 4]);
        assert_eq!(seen(Align::TopLeft, 0), [0]);
        assert_eq!(seen(Align::Offset(-1), 0), [] as [usize; 0]);
    }

    #[test]
    fn dense_masks_broadcast_from_the_right() {
        let shape = AttnShape { batch: 2, n_q: 2, n_kv: 3, ..AttnShape::square(2, 1, 1) };
        let per_head = [true, false]; // (heads, 1, 1)
        let mask = DenseMask::new(&per_head, &[2, 1, 1], &shape).unwrap();
        assert!(mask.sees(Pair { batch: 1, head: 0, i: 1, j: 2 }));
        assert!(!mask.sees(Pair { batch: 1, head: 1, i: 0, j: 0 }));
        let wrong = DenseMask::new(&per_head, &[2], &shape).unwrap_err().to_string();
        assert!(wrong.contains("n_kv is 2") && wrong.contains("1 or 3"), "{wrong}");
    }
}
