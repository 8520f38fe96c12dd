//! Radial attention: the farther two frames are apart, the fewer tokens see each other.
//!
//! With frames of `s` tokens, places `k` of frame `f` and `l` of frame `g`, and the octave `P = 2^floor(log2 max(|f - g|, 1))`
//! of their distance, the pair is seen if
//!
//! ```text
//! P <= s  and  |k - l| + 1 <= s / P            a window that halves whenever the distance doubles
//! |f - g| mod ceil(P / s) = 0  and  k = l      beyond, the same place of ever fewer frames
//! ```
//!
//! and all see the first frame. An octave costs about `4 s` keys a query, so the whole `O(n log n)` for frames of one size.
//!
//! Near frames are attended in the order of the sequence. Of far ones a query sees few tokens in each of many frames: these
//! octaves run in an order sorted by place ([`Parted`]). A tile of 32 queries then costs about twice the pairs it sees where
//! both orders are equally good, less elsewhere; where `P > s` it visits the frames between those it sees as well.
//!
//! Source: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation", 2025.

use super::columns::Columns;
use crate::parts::{Order, Part, Parted};
use crate::patterns::grid::{joined, same_lengths};
use crate::{Pattern, heads};
use attn_core::mask::{Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Growth, Result};
use std::ops::Range;
use std::sync::Arc;

/// Windows that shrink with the distance of frames. Time `O(n frame log(frames))`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Radial {
    /// Tokens of a frame; the last frame may be shorter.
    pub frame: usize,
    /// Whether all see the first frame.
    pub first_frame: bool,
}

/// The octave of a distance between frames: `2^floor(log2 max(distance, 1))`.
fn octave(distance: usize) -> usize {
    1 << distance.max(1).ilog2()
}

/// The pairs in the order of the sequence, of the octaves up to `last`.
#[derive(Debug, Clone, Copy)]
pub struct RadialMask {
    columns: Columns,
    first_frame: bool,
    last: usize,
}

impl RadialMask {
    /// How far apart places may be in frames at a distance, plus 1; 0 if nothing is seen.
    fn width(&self, distance: usize) -> usize {
        let (s, octave) = (self.columns.frame, octave(distance));
        if octave > self.last {
            0
        } else if octave <= s {
            s / octave
        } else {
            usize::from(distance.is_multiple_of(octave.div_ceil(s)))
        }
    }

    /// The places of frame `g` that places `first..=last` of frame `f` see.
    fn places(&self, f: usize, g: usize, first: usize, last: usize) -> Range<usize> {
        if self.first_frame && g == 0 {
            return 0..self.columns.len(0);
        }
        match self.width(f.abs_diff(g)) {
            0 => 0..0,
            width => {
                let end = (last + width).min(self.columns.len(g));
                first.saturating_sub(width - 1).min(end)..end
            }
        }
    }

    /// Frames at distances of these octaves.
    fn frames(&self, f: usize) -> Range<usize> {
        let reach = self.last.saturating_mul(2) - 1;
        f.saturating_sub(reach)..f.saturating_add(reach).saturating_add(1).min(self.columns.frames())
    }
}

impl Mask for RadialMask {
    fn sees(&self, pair: Pair) -> bool {
        let ((f, k), (g, l)) = (self.columns.place(pair.i), self.columns.place(pair.j));
        self.first_frame && g == 0 || k.abs_diff(l) < self.width(f.abs_diff(g))
    }

    fn spans(&self, _: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let mut spans = Vec::new();
        if n_kv == 0 {
            return spans;
        }
        self.columns.each_frame(rows, |f, own| {
            let sinks = (self.first_frame && self.frames(f).start > 0).then_some(0);
            for g in sinks.into_iter().chain(self.frames(f)) {
                let places = self.places(f, g, own.start, own.end - 1);
                spans.push(g * self.columns.frame + places.start..g * self.columns.frame + places.end);
            }
        });
        joined(spans)
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let [(f, k0), (f1, k1)] = [rows.start, rows.end - 1].map(|i| self.columns.place(i));
        let [(g, l0), (g1, l1)] = [keys.start, keys.end - 1].map(|j| self.columns.place(j));
        if f != f1 || g != g1 {
            return Cover::Partial;
        }
        let (far, near) =
            (l1.abs_diff(k0).max(k1.abs_diff(l0)), l0.saturating_sub(k1).max(k0.saturating_sub(l1)));
        let width = self.width(f.abs_diff(g));
        if self.first_frame && g == 0 || far < width {
            Cover::Full
        } else if near >= width {
            Cover::Empty
        } else {
            Cover::Partial
        }
    }

    /// A frame at a time: the places that see a key are consecutive.
    fn hide(&self, _: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        let ((g, l), mut at) = (self.columns.place(j), 0);
        if self.first_frame && g == 0 {
            return;
        }
        self.columns.each_frame(rows, |f, own| {
            let scores = &mut scores[at..at + own.len()];
            at += own.len();
            let width = self.width(f.abs_diff(g));
            let first = (l + 1).saturating_sub(width).clamp(own.start, own.end);
            let end = (l + width).clamp(first, own.end);
            scores[..first - own.start].fill(f32::NEG_INFINITY);
            scores[end - own.start..].fill(f32::NEG_INFINITY);
        });
    }
}

/// The pairs of octaves from `first` on, without the first frame's keys if all see them; rows and keys sorted by place.
#[derive(Debug, Clone, Copy)]
struct FarMask {
    all: RadialMask,
    first: usize,
}

impl FarMask {
    /// The largest distance of frames of octaves at which places this far apart see each other; `None` if not at `first`.
    fn reach(&self, apart: usize) -> Option<usize> {
        let s = self.all.columns.frame;
        if apart == 0 {
            return Some(usize::MAX / 4);
        }
        // The largest octave with apart + 1 <= s / octave.
        let last = 1usize << (s / (apart + 1)).checked_ilog2()?;
        (last >= self.first).then(|| 2 * last - 1)
    }

    fn runs(&self, place: usize, frames: Range<usize>, spans: &mut Vec<Range<usize>>) {
        let columns = &self.all.columns;
        let widest = self.all.width(self.first).max(1);
        let first_frame = usize::from(self.all.first_frame);
        for other in place.saturating_sub(widest - 1)..(place + widest).min(columns.count()) {
            let Some(reach) = self.reach(place.abs_diff(other)) else { continue };
            let (start, height) = (columns.start(other), columns.height(other));
            let last = frames.end - 1;
            let before =
                frames.start.saturating_sub(reach).max(first_frame)..(last + 1).saturating_sub(self.first);
            let after =
                (frames.start + self.first).max(first_frame)..last.saturating_add(reach).saturating_add(1);
            for run in [before, after] {
                let (first, end) = (run.start.min(height), run.end.min(height));
                if first < end {
                    spans.push(start + first..start + end);
                }
            }
        }
    }
}

impl Mask for FarMask {
    fn sees(&self, pair: Pair) -> bool {
        let ((f, k), (g, l)) = (self.all.columns.place_of(pair.i), self.all.columns.place_of(pair.j));
        f.abs_diff(g) >= self.first
            && !(self.all.first_frame && g == 0)
            && k.abs_diff(l) < self.all.width(f.abs_diff(g))
    }

    fn spans(&self, _: Head, rows: Range<usize>, _: usize) -> Vec<Range<usize>> {
        let mut spans = Vec::new();
        self.all.columns.each_column(rows, |place, frames| self.runs(place, frames, &mut spans));
        joined(spans)
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let columns = &self.all.columns;
        let [(f0, k), (f1, k1)] = [rows.start, rows.end - 1].map(|x| columns.place_of(x));
        let [(g0, l), (g1, l1)] = [keys.start, keys.end - 1].map(|x| columns.place_of(x));
        if k != k1 || l != l1 || self.all.first_frame && g0 == 0 {
            return Cover::Partial;
        }
        let nearest = g0.saturating_sub(f1).max(f0.saturating_sub(g1));
        let farthest = g1.abs_diff(f0).max(f1.abs_diff(g0));
        let Some(reach) = self.reach(k.abs_diff(l)) else { return Cover::Empty };
        if farthest < self.first || nearest > reach {
            return Cover::Empty;
        }
        // Beyond octaves of `frame`, distances are picked one by one.
        let all = octave(farthest) <= columns.frame;
        if nearest >= self.first && farthest <= reach && all { Cover::Full } else { Cover::Partial }
    }

    /// A column at a time: only frames are asked row by row.
    fn hide(&self, _: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        let columns = &self.all.columns;
        let ((g, l), mut at) = (columns.place_of(j), 0);
        let is_sink = self.all.first_frame && g == 0;
        // Below this distance, frames are not picked one by one.
        let all_below = 2 * octave(columns.frame);
        columns.each_column(rows, |k, frames| {
            let scores = &mut scores[at..at + frames.len()];
            at += frames.len();
            let Some(reach) = self.reach(k.abs_diff(l)).filter(|_| !is_sink) else {
                return scores.fill(f32::NEG_INFINITY);
            };
            for (f, score) in frames.zip(scores) {
                let distance = f.abs_diff(g);
                let picked = distance < all_below || self.all.width(distance) > 0;
                if distance < self.first || distance > reach || !picked {
                    *score = f32::NEG_INFINITY;
                }
            }
        });
    }
}

impl Radial {
    /// The last octave that the order of the sequence serves better: its windows are wider than it is long.
    fn last_near_octave(&self) -> usize {
        octave((2.0 * self.frame as f64).sqrt() as usize)
    }
}

impl Pattern for Radial {
    type Mask = RadialMask;

    const NAME: &'static str = "radial";

    fn mask(&self, shape: &AttnShape) -> Result<RadialMask> {
        same_lengths(shape)?;
        if self.frame == 0 {
            return Err(AttnError::value("frame", 0, "at least 1"));
        }
        let columns = Columns { n: shape.n_kv, frame: self.frame };
        Ok(RadialMask { columns, first_frame: self.first_frame, last: usize::MAX / 8 })
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let Ok(mask) = self.mask(shape) else { return 0 };
        let columns = mask.columns;
        let (frames, s) = (columns.frames(), self.frame);
        // Pairs of places less than `width` apart, of the first `a` and the first `b`.
        let within = |a: usize, b: usize, width: usize| -> u64 {
            (0..a.min(b + width))
                .map(|k| ((k + width).min(b).saturating_sub((k + 1).saturating_sub(width))) as u64)
                .sum()
        };
        let last = columns.len(frames.saturating_sub(1));
        let whole = frames - usize::from(last < s && frames > 0);
        let mut pairs = 0;
        let mut known = (usize::MAX, 0, 0);
        for distance in 0..frames {
            let width = mask.width(distance);
            if width != known.0 {
                known = (width, within(s, s, width), within(s, last, width));
            }
            let (_, of_whole, with_last) = known;
            let directions = if distance == 0 { 1 } else { 2 };
            pairs += directions * of_whole * whole.saturating_sub(distance) as u64;
            if whole < frames {
                pairs += match distance {
                    0 => within(last, last, width),
                    _ => 2 * with_last,
                };
            }
            if self.first_frame {
                let seen = if distance == frames - 1 && whole < frames {
                    within(columns.len(distance), columns.len(0), width)
                } else {
                    of_whole
                };
                pairs += (columns.len(distance) * columns.len(0)) as u64 - seen;
            }
        }
        heads(shape) * pairs
    }

    fn is_causal(&self) -> bool {
        false
    }

    fn cross_lengths(&self) -> bool {
        false
    }

    fn growth(&self) -> Growth {
        Growth::Linearithmic
    }

    fn memory(&self) -> Growth {
        Growth::Linear
    }
}

impl Parted for Radial {
    fn parts(&self, shape: &AttnShape) -> Result<Vec<Part>> {
        let all = self.mask(shape)?;
        let near = self.last_near_octave();
        if all.columns.frames() <= 2 * near {
            return Ok(Vec::new());
        }
        let order = Order::of(all.columns.sorted().map(|position| position as u32).collect());
        let far = FarMask { all, first: 2 * near };
        let far = Part { queries: order.clone(), keys: order, mask: Arc::new(far), source: 0 };
        Ok(vec![Part::natural(Arc::new(RadialMask { last: near, ..all })), far])
    }
}
