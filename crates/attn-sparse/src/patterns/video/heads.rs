//! Heads of video models that look at space and heads that look at time.
//!
//! With frames of `frame` tokens, position `p` is place `s` of frame `f`. A query sees
//!
//! ```text
//! spatial head    keys of frames  f - frame_window ..= f + frame_window
//! temporal head   keys at places  s - token_window ..= s + token_window  of all frames
//! ```
//!
//! and, in both, the first frame. Which head is of which kind is found per model and head; here it is an option.
//!
//! Neighbours of a temporal head share no key in the order of the sequence: positions are sorted by place, so that a query sees
//! one run of keys ([`Parted`]). The work of temporal heads grows with the square of the number of frames.
//!
//! Source: Xi et al., "Sparse VideoGen: Accelerating Video Diffusion Transformers with Spatial-Temporal Sparsity", 2025. There
//! heads choose their kind online; the static kinds are those two masks.

use super::columns::Columns;
use crate::Pattern;
use crate::parts::{Heads, OfHeads, Order, Part, Parted};
use crate::patterns::grid::{joined, same_lengths};
use attn_core::mask::{Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Growth, Result};
use std::ops::Range;
use std::sync::Arc;

/// Which heads are of which kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VideoKinds {
    /// All heads are spatial.
    Spatial,
    /// All heads are temporal.
    Temporal,
    /// Even heads are spatial, odd ones temporal.
    Alternating,
}

impl VideoKinds {
    fn spatial(self) -> Heads {
        match self {
            Self::Spatial => Heads::All,
            Self::Temporal => Heads::None,
            Self::Alternating => Heads::Even,
        }
    }

    fn temporal(self) -> Heads {
        match self {
            Self::Spatial => Heads::None,
            Self::Temporal => Heads::All,
            Self::Alternating => Heads::Odd,
        }
    }
}

/// Spatial and temporal heads. Time `O(n * frame)` for spatial, `O(n * (token_window * frames + frame))` for temporal heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VideoHeads {
    /// Tokens of a frame; the last frame may be shorter.
    pub frame: usize,
    /// Which heads are of which kind.
    pub kinds: VideoKinds,
    /// Frames on each side that a spatial head sees.
    pub frame_window: usize,
    /// Places on each side that a temporal head sees.
    pub token_window: usize,
    /// Whether all see the first frame.
    pub first_frame: bool,
}

/// The pairs in the order of the sequence.
#[derive(Debug, Clone, Copy)]
pub struct VideoMask {
    columns: Columns,
    pattern: VideoHeads,
}

impl Mask for VideoMask {
    fn sees(&self, pair: Pair) -> bool {
        let ((f, s), (g, t)) = (self.columns.place(pair.i), self.columns.place(pair.j));
        let near = match self.pattern.kinds.spatial().contain(pair.head) {
            true => f.abs_diff(g) <= self.pattern.frame_window,
            false => s.abs_diff(t) <= self.pattern.token_window,
        };
        near || self.pattern.first_frame && g == 0
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        if rows.is_empty() {
            return Vec::new();
        }
        let ((f0, s0), (f1, s1)) = (self.columns.place(rows.start), self.columns.place(rows.end - 1));
        let frame = self.pattern.frame;
        let cut = |start: usize, end: usize| start.min(n_kv)..end.min(n_kv);
        let first = if self.pattern.first_frame { cut(0, frame) } else { 0..0 };
        let mut spans: Vec<Range<usize>> = std::iter::once(first).collect();
        if self.pattern.kinds.spatial().contain(head.head) {
            let w = self.pattern.frame_window;
            spans.push(cut(f0.saturating_sub(w) * frame, (f1 + 1).saturating_add(w).saturating_mul(frame)));
        } else if f0 == f1 {
            let w = self.pattern.token_window;
            let (start, end) = (s0.saturating_sub(w), (s1 + 1).saturating_add(w).min(frame));
            spans.extend((0..self.columns.frames()).map(|f| cut(f * frame + start, f * frame + end)));
        } else {
            spans.push(0..n_kv);
        }
        joined(spans)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let place = |position| self.columns.place(position);
        let [(f0, s0), (f1, s1)] = [rows.start, rows.end - 1].map(place);
        let [(g0, t0), (g1, t1)] = [keys.start, keys.end - 1].map(place);
        if self.pattern.first_frame && g1 == 0 {
            return Cover::Full;
        }
        let sinks = self.pattern.first_frame && g0 == 0;
        if self.pattern.kinds.spatial().contain(head.head) {
            return near((f0, f1), (g0, g1), self.pattern.frame_window, sinks);
        }
        if f0 != f1 || g0 != g1 {
            return Cover::Partial;
        }
        near((s0, s1), (t0, t1), self.pattern.token_window, sinks)
    }

    /// A frame at a time: the places that see a key are consecutive.
    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        let ((g, t), mut at) = (self.columns.place(j), 0);
        if self.pattern.first_frame && g == 0 {
            return;
        }
        let spatial = self.pattern.kinds.spatial().contain(head.head);
        self.columns.each_frame(rows, |f, own| {
            let scores = &mut scores[at..at + own.len()];
            at += own.len();
            let w = self.pattern.token_window;
            let seen = match spatial {
                true if f.abs_diff(g) <= self.pattern.frame_window => own.clone(),
                true => own.start..own.start,
                false => t.saturating_sub(w)..t.saturating_add(w).saturating_add(1),
            };
            let first = seen.start.clamp(own.start, own.end);
            scores[..first - own.start].fill(f32::NEG_INFINITY);
            scores[seen.end.clamp(first, own.end) - own.start..].fill(f32::NEG_INFINITY);
        });
    }
}

/// Cover of ranges (ends included) that see each other up to a distance; `others` are seen for another reason.
fn near(a: (usize, usize), b: (usize, usize), distance: usize, others: bool) -> Cover {
    let farthest = b.1.saturating_sub(a.0).max(a.1.saturating_sub(b.0));
    let nearest = b.0.saturating_sub(a.1).max(a.0.saturating_sub(b.1));
    if farthest <= distance {
        Cover::Full
    } else if nearest > distance && !others {
        Cover::Empty
    } else {
        Cover::Partial
    }
}

/// The pairs of temporal heads, queries sorted by column; keys are the first frame, if all see it, and then the other frames
/// sorted by column.
#[derive(Debug, Clone, Copy)]
struct ColumnMask {
    queries: Columns,
    /// Without the first frame, if that comes first.
    keys: Columns,
    sinks: usize,
    window: usize,
}

impl ColumnMask {
    fn columns_of_rows(&self, rows: &Range<usize>) -> (usize, usize) {
        (self.queries.place_of(rows.start).1, self.queries.place_of(rows.end - 1).1)
    }
}

impl Mask for ColumnMask {
    fn sees(&self, pair: Pair) -> bool {
        let column = |j: usize| self.keys.place_of(j).1;
        let seen = |j| column(j).abs_diff(self.queries.place_of(pair.i).1) <= self.window;
        pair.j.checked_sub(self.sinks).is_none_or(seen)
    }

    fn spans(&self, _: Head, rows: Range<usize>, _: usize) -> Vec<Range<usize>> {
        if rows.is_empty() {
            return Vec::new();
        }
        let (first, last) = self.columns_of_rows(&rows);
        let end = (last + 1).saturating_add(self.window).min(self.keys.count());
        let start = first.saturating_sub(self.window).min(end);
        joined(vec![0..self.sinks, self.sinks + self.keys.start(start)..self.sinks + self.keys.start(end)])
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        if keys.end <= self.sinks {
            return Cover::Full;
        }
        let Some(first) = keys.start.checked_sub(self.sinks) else { return Cover::Partial };
        let columns = (self.keys.place_of(first).1, self.keys.place_of(keys.end - 1 - self.sinks).1);
        near(self.columns_of_rows(&rows), columns, self.window, false)
    }

    /// A column at a time.
    fn hide(&self, _: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        let Some(key) = j.checked_sub(self.sinks) else { return };
        let (column, mut at) = (self.keys.place_of(key).1, 0);
        self.queries.each_column(rows, |s, frames| {
            let scores = &mut scores[at..at + frames.len()];
            at += frames.len();
            if s.abs_diff(column) > self.window {
                scores.fill(f32::NEG_INFINITY);
            }
        });
    }
}

impl Pattern for VideoHeads {
    type Mask = VideoMask;

    const NAME: &'static str = "video-heads";

    fn mask(&self, shape: &AttnShape) -> Result<VideoMask> {
        same_lengths(shape)?;
        if self.frame == 0 {
            return Err(AttnError::value("frame", 0, "at least 1"));
        }
        Ok(VideoMask { columns: Columns { n: shape.n_kv, frame: self.frame }, pattern: *self })
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let Ok(VideoMask { columns, .. }) = self.mask(shape) else { return 0 };
        let (frames, count, first) = (columns.frames(), columns.count(), columns.len(0));
        let around = |x: usize, w: usize, n: usize| x.saturating_sub(w)..x.saturating_add(w).min(n - 1) + 1;
        let spatial = |f: usize| {
            let near = around(f, self.frame_window, frames);
            let sinks = if self.first_frame && near.start > 0 { first } else { 0 };
            let keys = (near.end * self.frame).min(columns.n) - near.start * self.frame + sinks;
            (columns.len(f) * keys) as u64
        };
        let temporal = |s: usize| {
            let near = around(s, self.token_window, count);
            let sinks = if self.first_frame { first - near.len() } else { 0 };
            let keys = columns.start(near.end) - columns.start(near.start) + sinks;
            (columns.height(s) * keys) as u64
        };
        let of = |heads: Heads, sum: u64| heads.count(shape.n_heads_q) as u64 * sum;
        shape.batch as u64
            * (of(self.kinds.spatial(), (0..frames).map(spatial).sum())
                + of(self.kinds.temporal(), (0..count).map(temporal).sum()))
    }

    fn is_causal(&self) -> bool {
        false
    }

    fn cross_lengths(&self) -> bool {
        false
    }

    fn growth(&self) -> Growth {
        if self.kinds == VideoKinds::Spatial { Growth::Linear } else { Growth::Quadratic }
    }

    fn memory(&self) -> Growth {
        Growth::Linear
    }
}

impl Parted for VideoHeads {
    fn parts(&self, shape: &AttnShape) -> Result<Vec<Part>> {
        let mask = self.mask(shape)?;
        let (columns, mut parts) = (mask.columns, Vec::new());
        if self.kinds == VideoKinds::Spatial {
            return Ok(parts);
        }
        if self.kinds != VideoKinds::Temporal {
            parts.push(Part::natural(Arc::new(OfHeads(self.kinds.spatial(), mask))));
        }
        let sinks = if self.first_frame { columns.len(0) } else { 0 };
        let others = Columns { n: columns.n - sinks, ..columns };
        let keys = (0..sinks).chain(others.sorted().map(|position| position + sinks));
        let by_column = ColumnMask { queries: columns, keys: others, sinks, window: self.token_window };
        parts.push(Part {
            queries: Order::of(columns.sorted().map(|position| position as u32).collect()),
            keys: Order::of(keys.map(|position| position as u32).collect()),
            mask: Arc::new(OfHeads(self.kinds.temporal(), by_column)),
            source: 0,
        });
        Ok(parts)
    }
}
