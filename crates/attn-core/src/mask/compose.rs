//! Masks made of masks.

use super::{Cover, Head, Mask, Pair, joined};
use crate::{AttnShape, Result};
use std::ops::Range;

/// Seen by both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct And<A, B>(pub A, pub B);

impl<A: Mask, B: Mask> Mask for And<A, B> {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.0.check(shape)?;
        self.1.check(shape)
    }

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

    #[inline(always)]
    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        self.0.hide(head, rows.clone(), j, scores);
        self.1.hide(head, rows, j, scores);
    }

    fn is_shared_by(&self, batch: usize, heads: Range<usize>) -> bool {
        self.0.is_shared_by(batch, heads.clone()) && self.1.is_shared_by(batch, heads)
    }
}

/// Seen by either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Or<A, B>(pub A, pub B);

impl<A: Mask, B: Mask> Mask for Or<A, B> {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        self.0.check(shape)?;
        self.1.check(shape)
    }

    #[inline(always)]
    fn sees(&self, pair: Pair) -> bool {
        self.0.sees(pair) || self.1.sees(pair)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let mut all = self.0.spans(head, rows.clone(), n_kv);
        all.extend(self.1.spans(head, rows, n_kv));
        joined(all, 0)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        match (self.0.cover(head, rows.clone(), keys.clone()), self.1.cover(head, rows, keys)) {
            (Cover::Full, _) | (_, Cover::Full) => Cover::Full,
            (Cover::Empty, Cover::Empty) => Cover::Empty,
            _ => Cover::Partial,
        }
    }

    fn is_shared_by(&self, batch: usize, heads: Range<usize>) -> bool {
        self.0.is_shared_by(batch, heads.clone()) && self.1.is_shared_by(batch, heads)
    }
}
