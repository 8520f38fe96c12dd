//! Sparse Transformer, fixed: `A(i) = { j <= p : floor(j / l) = floor(p / l) } + { j <= p : j mod l >= l - c }` with
//! `p = i + n_kv - n_q`, blocks of `l` positions and a summary of `c` at the end of each.
//!
//! A query sees its own block and the summaries of all blocks before. The two sets may be one union, or the business of
//! different heads. Both are runs of keys that neighbouring queries share, so the order of the sequence serves.
//!
//! Source: Child, Gray, Radford, Sutskever, "Generating Long Sequences with Sparse Transformers", 2019.

use crate::parts::Heads;
use crate::patterns::root_of;
use crate::{Pattern, heads};
use attn_core::mask::{Align, Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Growth, Result};
use attn_flash::stream::Kept;
use std::ops::Range;

/// Own block and summaries. Time `O(n (stride + summary n / stride))`; a stream keeps every position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FixedAttention {
    /// Positions of a block. `None` is about `sqrt(n_kv)`, a power of two of at least `summary`; then there is no streaming,
    /// as the pattern depends on the length.
    pub stride: Option<usize>,
    /// Last positions of a block that all later queries see; at most `stride`.
    pub summary: usize,
    /// Every head sees both sets; otherwise even heads their block, odd ones the summaries.
    pub merged: bool,
}

/// The pairs.
#[derive(Debug, Clone, Copy)]
pub struct FixedMask {
    stride: usize,
    summary: usize,
    offset: isize,
    merged: bool,
}

impl FixedMask {
    fn has_block(&self, head: usize) -> bool {
        self.merged || Heads::Even.contain(head)
    }

    fn has_summaries(&self, head: usize) -> bool {
        self.merged || Heads::Odd.contain(head)
    }

    fn position(&self, i: usize) -> Option<usize> {
        i.checked_add_signed(self.offset)
    }
}

impl Mask for FixedMask {
    fn sees(&self, pair: Pair) -> bool {
        let (l, j) = (self.stride, pair.j);
        self.position(pair.i).is_some_and(|p| {
            j <= p
                && (self.has_block(pair.head) && p / l == j / l
                    || self.has_summaries(pair.head) && j % l >= l - self.summary)
        })
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let Some(last) = rows.end.checked_sub(1).and_then(|i| self.position(i)) else { return Vec::new() };
        let (l, end) = (self.stride, (last + 1).min(n_kv));
        let own = self.position(rows.start).unwrap_or(0) / l;
        let mut spans: Vec<Range<usize>> = Vec::new();
        let first = if self.has_summaries(head.head) { 0 } else { own };
        for block in first..=last / l {
            let whole = block >= own && self.has_block(head.head);
            let start = if whole { block * l } else { block * l + l - self.summary };
            let span = start.min(end)..((block + 1) * l).min(end);
            match spans.last_mut() {
                Some(before) if before.end == span.start => before.end = span.end,
                _ if span.is_empty() => {}
                _ => spans.push(span),
            }
        }
        spans
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let (l, last_key) = (self.stride, keys.end - 1);
        let Some(last) = self.position(rows.end - 1) else { return Cover::Empty };
        if keys.start > last {
            return Cover::Empty;
        }
        let Some(first) = self.position(rows.start).filter(|first| last_key <= *first) else {
            return Cover::Partial;
        };
        let block = keys.start / l;
        let one = block == last_key / l;
        let own = one && self.has_block(head.head) && block == first / l && block == last / l;
        let summary = one && self.has_summaries(head.head) && keys.start % l >= l - self.summary;
        if own || summary { Cover::Full } else { Cover::Partial }
    }
}

impl FixedAttention {
    fn stride(&self, n_kv: usize) -> usize {
        self.stride.unwrap_or_else(|| root_of(n_kv).max(self.summary)).max(1)
    }
}

impl Pattern for FixedAttention {
    type Mask = FixedMask;

    const NAME: &'static str = "sparse-transformer-fixed";

    fn mask(&self, shape: &AttnShape) -> Result<FixedMask> {
        let stride = self.stride(shape.n_kv);
        if self.summary == 0 || self.summary > stride {
            return Err(AttnError::value("summary", self.summary, format!("1 to the stride, {stride}")));
        }
        let offset = Align::BottomRight.offset(shape.n_q, shape.n_kv);
        Ok(FixedMask { stride, summary: self.summary, offset, merged: self.merged })
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let (l, c) = (self.stride(shape.n_kv) as u64, self.summary as u64);
        let triangle = |x: u64| x * (x + 1) / 2;
        // Sums over the positions before x: of the own block up to the position, ...
        let block = |x: u64| x / l * triangle(l) + triangle(x % l);
        // ... of the summaries of earlier blocks, and of the own block's summary up to the position.
        let earlier = |x: u64| c * (l * (x / l) * (x / l).saturating_sub(1) / 2 + x % l * (x / l));
        let own = |x: u64| x / l * triangle(c) + triangle((x % l).saturating_sub(l.saturating_sub(c)));
        let (first, end) = (shape.n_kv.saturating_sub(shape.n_q) as u64, shape.n_kv as u64);
        let over = |sum: &dyn Fn(u64) -> u64| sum(end) - sum(first);
        if self.merged {
            return heads(shape) * (over(&block) + over(&earlier));
        }
        let [even, odd] = [Heads::Even, Heads::Odd].map(|heads| heads.count(shape.n_heads_q) as u64);
        shape.batch as u64 * (even * over(&block) + odd * (over(&earlier) + over(&own)))
    }

    fn is_causal(&self) -> bool {
        true
    }

    fn kept(&self) -> Option<Kept> {
        self.stride.map(|_| Kept { sinks: 0, last: None })
    }

    fn growth(&self) -> Growth {
        if self.stride.is_some() { Growth::Quadratic } else { Growth::SubQuadratic }
    }
}
