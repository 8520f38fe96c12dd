//! Sparse Transformer, strided: `A(i) = { p - l < j <= p } + { j <= p : (p - j) mod l = 0 }` with `p = i + n_kv - n_q` and
//! stride `l`.
//!
//! Any key is two steps away; with `l` about `sqrt(n)` a query sees about `2 sqrt(n)` keys. The two sets may be one union, or
//! the business of different heads.
//!
//! In the order of the sequence, 32 neighbouring queries share no strided key. Sorted by residue modulo `l`, each class is
//! plain causal attention, so the strided set runs in that order and the window in its own ([`Parted`]).
//!
//! Source: Child, Gray, Radford, Sutskever, "Generating Long Sequences with Sparse Transformers", 2019.

use crate::parts::{Classes, Heads, OfHeads, Order, Part, Parted};
use crate::patterns::root_of;
use crate::{Pattern, heads};
use attn_core::mask::{Align, Band, Cover, Head, Mask, Pair};
use attn_core::{AttnShape, Growth, Result, band_pairs};
use attn_flash::stream::Kept;
use std::ops::Range;
use std::sync::Arc;

/// A window and every `stride`-th key before. Time `O(n (stride + n / stride))`; a stream keeps every position.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StridedAttention {
    /// `None` is about `sqrt(n_kv)`, a power of two; then there is no streaming, as the pattern depends on the length.
    pub stride: Option<usize>,
    /// Every head sees both sets; otherwise even heads the window, odd ones the strided keys.
    pub merged: bool,
}

/// The pairs in the order of the sequence.
#[derive(Debug, Clone, Copy)]
pub struct StridedMask {
    stride: usize,
    window: Band,
    merged: bool,
}

impl StridedMask {
    fn has_window(&self, head: usize) -> bool {
        self.merged || Heads::Even.contain(head)
    }

    fn has_strides(&self, head: usize) -> bool {
        self.merged || Heads::Odd.contain(head)
    }

    fn position(&self, i: usize) -> isize {
        i as isize + self.window.offset
    }
}

impl Mask for StridedMask {
    fn sees(&self, pair: Pair) -> bool {
        let back = self.position(pair.i) - pair.j as isize;
        back >= 0
            && (self.has_window(pair.head) && (back as usize) < self.stride
                || self.has_strides(pair.head) && (back as usize).is_multiple_of(self.stride))
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        if rows.is_empty() {
            return Vec::new();
        }
        let last = self.position(rows.end - 1);
        if !self.has_strides(head.head) || rows.len() >= self.stride || last < 0 {
            let causal =
                if self.has_strides(head.head) { Band { left: None, ..self.window } } else { self.window };
            return causal.spans(head, rows, n_kv);
        }
        let (first, last) = (self.position(rows.start).max(0) as usize, last as usize);
        // The residues of the rows, in every period up to theirs.
        let mut spans: Vec<Range<usize>> = Vec::new();
        let window = self.window.spans(head, rows, n_kv).into_iter().next().unwrap_or(0..0);
        for back in (0..=last / self.stride).rev().map(|period| period * self.stride) {
            let mut span = first.saturating_sub(back)..(last + 1 - back).min(n_kv);
            if self.has_window(head.head) && span.end > window.start {
                span = span.start.min(window.start)..window.end.max(span.end);
            }
            match spans.last_mut() {
                Some(before) if span.start <= before.end => before.end = before.end.max(span.end),
                _ if span.is_empty() => {}
                _ => spans.push(span),
            }
        }
        spans
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let window = self.window.cover(head, rows, keys);
        match (self.has_window(head.head), self.has_strides(head.head)) {
            (true, false) => window,
            (true, true) if window == Cover::Full => Cover::Full,
            _ => Cover::Partial,
        }
    }
}

impl StridedAttention {
    fn stride(&self, n_kv: usize) -> usize {
        self.stride.unwrap_or_else(|| root_of(n_kv)).max(1)
    }

    fn window(&self, shape: &AttnShape) -> Band {
        Band { left: Some(self.stride(shape.n_kv) - 1), ..Band::causal(shape, Align::BottomRight) }
    }

    /// Which heads see the window, and which the strided keys.
    fn heads(&self) -> [Heads; 2] {
        if self.merged { [Heads::All; 2] } else { [Heads::Even, Heads::Odd] }
    }
}

impl Pattern for StridedAttention {
    type Mask = StridedMask;

    const NAME: &'static str = "sparse-transformer-strided";

    fn mask(&self, shape: &AttnShape) -> Result<StridedMask> {
        Ok(StridedMask { stride: self.stride(shape.n_kv), window: self.window(shape), merged: self.merged })
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let l = self.stride(shape.n_kv) as u64;
        // Position p sees p / l strided keys besides itself: sum over the positions before x.
        let before = |x: u64| l * (x / l) * (x / l).saturating_sub(1) / 2 + x % l * (x / l);
        let (first, end) = (shape.n_kv.saturating_sub(shape.n_q) as u64, shape.n_kv as u64);
        let strided = before(end) - before(first);
        let window = band_pairs(shape, &self.window(shape));
        if self.merged {
            return heads(shape) * (window + strided);
        }
        let [even, odd] = [Heads::Even, Heads::Odd].map(|heads| heads.count(shape.n_heads_q) as u64);
        shape.batch as u64 * (even * window + odd * (strided + end - first))
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

    fn memory(&self) -> Growth {
        Growth::Linear
    }
}

impl Parted for StridedAttention {
    fn parts(&self, shape: &AttnShape) -> Result<Vec<Part>> {
        let (l, [window_heads, strided_heads]) = (self.stride(shape.n_kv), self.heads());
        let first = shape.n_kv.saturating_sub(shape.n_q);
        let offset = shape.n_kv as isize - shape.n_q as isize;
        let residues = || 0..l.min(shape.n_kv);
        let positions = |from: usize| {
            residues()
                .flat_map(move |r| ((from.saturating_sub(r).div_ceil(l) * l + r)..shape.n_kv).step_by(l))
        };
        let class = |r: usize| {
            let before = first.saturating_sub(r).div_ceil(l);
            let keys = (shape.n_kv - r).div_ceil(l);
            // Merged, the query's own key is the window's.
            let offset = before as isize - isize::from(self.merged);
            (keys - before.min(keys), keys, Band { offset, left: None, right: Some(0) })
        };
        let rows = positions(first).map(|p| (p as isize - offset) as u32).collect();
        let strided = Part {
            queries: Order::of(rows),
            keys: Order::of(positions(0).map(|p| p as u32).collect()),
            mask: Arc::new(Classes::new(residues().map(class), strided_heads)),
            source: 0,
        };
        Ok(vec![Part::natural(Arc::new(OfHeads(window_heads, self.window(shape)))), strided])
    }
}
