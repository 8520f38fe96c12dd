//! Neighbourhood attention in one to three dimensions: each query sees a window of `kernel_size` keys along every axis,
//! centred where it can be and moved inwards at the borders, so that every row has as many keys.
//!
//! Along an axis with dilation `r`, position `x` has residue `x mod r`, index `u = floor(x / r)` in its class of `n` positions
//! (those of the same residue), and sees of that class
//!
//! ```text
//! leader = min(floor(u / s) s + floor(s / 2), n - 1)              s the stride: queries that share a window
//! centre = min(max(leader, floor(k / 2)), n - 1 - floor((k - 1) / 2))
//! keys     centre - floor(k / 2) ..= centre + floor((k - 1) / 2), cut at 0
//! ```
//!
//! and on a causal axis, where windows are cut instead, `leader - k < t <= u` with `leader = min(floor(u / s) s + s - 1, n - 1)`.
//! Rows are positions of a grid, the last axis running fastest.
//!
//! Dilated, neighbours share no key: positions are sorted by residue class, and each class is a plain neighbourhood
//! ([`Parted`]). In two and three dimensions a tile of 32 queries along the last axis costs `32 + kernel_size` keys of each
//! line that it sees.
//!
//! Sources: Hassani, Walton, Li, Li, Shi, "Neighborhood Attention Transformer", 2023; Hassani and Shi, "Dilated Neighborhood
//! Attention Transformer", 2022; stride as in Hassani et al., "Generalized Neighborhood Attention", 2025.

use crate::parts::{Classes, Heads, Order, Part, Parted};
use crate::patterns::grid::{self, Grid};
use crate::{Pattern, heads};
use attn_core::mask::{Align, Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Growth, Result};
use attn_flash::stream::Kept;
use std::ops::Range;
use std::sync::Arc;

/// The window along one axis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AxisWindow {
    /// Keys of the window; at least 1.
    pub kernel_size: usize,
    /// Distance of neighbouring keys; at least 1.
    pub dilation: usize,
    /// Queries that share a window; 1 to `kernel_size`.
    pub stride: usize,
    /// Nothing after the query.
    pub causal: bool,
}

impl AxisWindow {
    /// `kernel_size` keys around the query.
    pub fn of(kernel_size: usize) -> Self {
        Self { kernel_size, dilation: 1, stride: 1, causal: false }
    }

    fn check(&self) -> Result<()> {
        for (name, found) in
            [("kernel_size", self.kernel_size), ("dilation", self.dilation), ("stride", self.stride)]
        {
            if found == 0 {
                return Err(AttnError::value(name, 0, "at least 1"));
            }
        }
        if self.stride > self.kernel_size {
            let expected = format!("at most the kernel size, {}", self.kernel_size);
            return Err(AttnError::value("stride", self.stride, expected));
        }
        Ok(())
    }

    /// What index `u` of a class of `n` sees: both ends grow with `u`.
    #[inline]
    pub(super) fn window(&self, n: usize, u: usize) -> Range<usize> {
        let (k, s) = (self.kernel_size, self.stride);
        let group = if s == 1 { u } else { u / s * s };
        if self.causal {
            let leader = (group + s - 1).min(n - 1);
            return (leader + 1).saturating_sub(k)..u + 1;
        }
        let leader = (group + s / 2).min(n - 1);
        let (left, right) = (k / 2, (k - 1) / 2);
        let centre = leader.max(left).min((n - 1).saturating_sub(right));
        centre.saturating_sub(left)..(centre + right + 1).min(n)
    }

    /// Positions of residue `r` among `n`.
    fn class_len(&self, n: usize, r: usize) -> usize {
        n.saturating_sub(r).div_ceil(self.dilation)
    }

    /// The indices that position `x` of `n` sees, in its class.
    fn seen(&self, n: usize, x: usize) -> Range<usize> {
        let r = x % self.dilation;
        self.window(self.class_len(n, r), x / self.dilation)
    }

    #[inline]
    fn sees(&self, n: usize, x: usize, y: usize) -> bool {
        if self.dilation == 1 {
            return self.window(n, x).contains(&y);
        }
        x % self.dilation == y % self.dilation && self.seen(n, x).contains(&(y / self.dilation))
    }

    /// The positions that `x` sees.
    fn keys(&self, n: usize, x: usize) -> impl Iterator<Item = usize> + use<> {
        let (d, r) = (self.dilation, x % self.dilation);
        self.seen(n, x).map(move |t| t * d + r)
    }

    /// Which of the positions `xs` see `y`, without dilation: both ends of windows grow, so they are consecutive.
    fn seen_by(&self, n: usize, y: usize, xs: &Range<usize>) -> Range<usize> {
        let (left, right) = (self.kernel_size / 2, (self.kernel_size - 1) / 2);
        let (first, end) = if self.stride > 1 {
            let first = xs.clone().find(|x| self.window(n, *x).end > y).unwrap_or(xs.end);
            (first, (first..xs.end).find(|x| self.window(n, *x).start > y).unwrap_or(xs.end))
        } else if self.causal {
            (y, y.saturating_add(self.kernel_size))
        } else {
            // At the borders windows stay where they are.
            let first = if y <= left + right { 0 } else { y - right };
            (first, if y + left + right + 1 >= n { n } else { y + left + 1 })
        };
        let first = first.clamp(xs.start, xs.end);
        first..end.clamp(first, xs.end)
    }

    /// A range that holds what the positions `xs`, not empty, see.
    fn reach(&self, n: usize, xs: Range<usize>) -> Range<usize> {
        // Inside a class windows only move forwards: the first of each class starts first, the last ends last.
        let (d, end) = (self.dilation, xs.end);
        let ends = |x: usize| self.keys(n, x).last().map_or(0, |y| y + 1);
        let first = xs.clone().take(d).filter_map(|x| self.keys(n, x).next()).min().unwrap_or(0);
        first..(end.saturating_sub(d).max(xs.start)..end).map(ends).max().unwrap_or(0).max(first)
    }

    /// Pairs along the axis, queries at `first..n`.
    fn pairs(&self, n: usize, first: usize) -> u64 {
        (first..n).map(|x| self.seen(n, x).len() as u64).sum()
    }
}

/// Windows on a grid of `D` axes. Time `O(n * kernel sizes)`; a causal stream in one dimension with stride 1 keeps
/// `(kernel_size - 1) * dilation` positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Neighborhood<const D: usize> {
    /// One window an axis.
    pub axes: [AxisWindow; D],
    /// Lengths of the axes; `None` is the grid of `n_kv` positions that is closest to a square.
    pub grid: Option<[usize; D]>,
}

/// The pairs.
#[derive(Debug, Clone, Copy)]
pub struct NeighborhoodMask<const D: usize> {
    grid: Grid<D>,
    axes: [AxisWindow; D],
    /// Position of row 0.
    offset: isize,
}

impl<const D: usize> NeighborhoodMask<D> {
    fn position(&self, i: usize) -> Option<usize> {
        i.checked_add_signed(self.offset)
    }

    /// Whether the line of `x` sees that of `y`: all axes but the last.
    fn line_sees(&self, x: [usize; D], y: [usize; D]) -> bool {
        (0..D - 1).all(|a| self.axes[a].sees(self.grid.0[a], x[a], y[a]))
    }

    /// Calls `visit` with the coordinates of each line of consecutive positions and its range along the last axis.
    fn each_line(&self, positions: Range<usize>, mut visit: impl FnMut([usize; D], Range<usize>)) {
        let width = self.grid.0[D - 1];
        let mut at = positions.start;
        while at < positions.end {
            let x = self.grid.coordinates(at);
            let end = (at - x[D - 1] + width).min(positions.end);
            visit(x, x[D - 1]..x[D - 1] + (end - at));
            at = end;
        }
    }
}

impl<const D: usize> Mask for NeighborhoodMask<D> {
    fn sees(&self, pair: Pair) -> bool {
        let Some(p) = self.position(pair.i) else { return false };
        let (x, y) = (self.grid.coordinates(p), self.grid.coordinates(pair.j));
        (0..D).all(|a| self.axes[a].sees(self.grid.0[a], x[a], y[a]))
    }

    fn spans(&self, _: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let Some(end) = rows.end.checked_sub(1).and_then(|i| self.position(i)) else { return Vec::new() };
        let first = self.position(rows.start).unwrap_or(0);
        if n_kv == 0 {
            return Vec::new();
        }
        let mut spans = Vec::new();
        self.each_line(first..end + 1, |x, xs| {
            let last = D - 1;
            let reach = self.axes[last].reach(self.grid.0[last], xs);
            let mut lines = vec![0];
            for (a, &at) in x.iter().enumerate().take(last) {
                let n = self.grid.0[a];
                let keys: Vec<usize> = self.axes[a].keys(n, at).collect();
                lines = lines.iter().flat_map(|line| keys.iter().map(move |y| line * n + y)).collect();
            }
            let width = self.grid.0[last];
            spans.extend(lines.into_iter().map(|line| line * width + reach.start..line * width + reach.end));
        });
        grid::joined(spans)
    }

    fn cover(&self, _: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let Some(last_row) = self.position(rows.end - 1) else { return Cover::Empty };
        let Some(first_row) = self.position(rows.start) else { return Cover::Partial };
        let [x0, x1, y0, y1] =
            [first_row, last_row, keys.start, keys.end - 1].map(|p| self.grid.coordinates(p));
        if x0[..D - 1] != x1[..D - 1] || y0[..D - 1] != y1[..D - 1] {
            return Cover::Partial;
        }
        if !self.line_sees(x0, y0) {
            return Cover::Empty;
        }
        let (axis, n) = (self.axes[D - 1], self.grid.0[D - 1]);
        if axis.dilation > 1 {
            return Cover::Partial;
        }
        let (first, last) = (axis.window(n, x0[D - 1]), axis.window(n, x1[D - 1]));
        let (y0, y1) = (y0[D - 1], y1[D - 1]);
        if y1 < first.start || y0 >= last.end {
            Cover::Empty
        } else if last.start <= y0 && y1 < first.end {
            Cover::Full
        } else {
            Cover::Partial
        }
    }

    /// A line at a time: only the last axis is asked row by row.
    fn hide(&self, _: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        let y = self.grid.coordinates(j);
        let skipped = rows.clone().take_while(|i| self.position(*i).is_none()).count();
        scores[..skipped].fill(f32::NEG_INFINITY);
        let Some(first) = self.position(rows.start + skipped).filter(|_| skipped < rows.len()) else {
            return;
        };
        let mut at = skipped;
        let (axis, n) = (self.axes[D - 1], self.grid.0[D - 1]);
        self.each_line(first..first + rows.len() - skipped, |x, xs| {
            let scores = &mut scores[at..at + xs.len()];
            at += xs.len();
            if !self.line_sees(x, y) {
                return scores.fill(f32::NEG_INFINITY);
            }
            if axis.dilation == 1 {
                let seen = axis.seen_by(n, y[D - 1], &xs);
                scores[..seen.start - xs.start].fill(f32::NEG_INFINITY);
                return scores[seen.end - xs.start..].fill(f32::NEG_INFINITY);
            }
            for (x, score) in xs.zip(scores) {
                if !axis.sees(n, x, y[D - 1]) {
                    *score = f32::NEG_INFINITY;
                }
            }
        });
    }
}

impl<const D: usize> Pattern for Neighborhood<D> {
    type Mask = NeighborhoodMask<D>;

    const NAME: &'static str = match D {
        1 => "neighborhood-1d",
        2 => "neighborhood-2d",
        _ => "neighborhood-3d",
    };

    fn mask(&self, shape: &AttnShape) -> Result<Self::Mask> {
        self.axes.iter().try_for_each(AxisWindow::check)?;
        if !self.cross_lengths() {
            grid::same_lengths(shape)?;
        }
        let grid = Grid::of(self.grid, shape.n_kv)?;
        Ok(NeighborhoodMask {
            grid,
            axes: self.axes,
            offset: Align::BottomRight.offset(shape.n_q, shape.n_kv),
        })
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let fits = self.axes.iter().try_for_each(AxisWindow::check);
        let Ok(Grid(sizes)) = fits.and_then(|()| Grid::of(self.grid, shape.n_kv)) else { return 0 };
        let first = if D == 1 { shape.n_kv.saturating_sub(shape.n_q) } else { 0 };
        let axes = self.axes.iter().zip(sizes);
        heads(shape) * axes.map(|(axis, n)| axis.pairs(n, first)).product::<u64>()
    }

    fn is_causal(&self) -> bool {
        // No coordinate of a key is beyond the query's: the key comes first.
        self.axes.iter().all(|axis| axis.causal)
    }

    fn kept(&self) -> Option<Kept> {
        // The window of a group of queries that is not complete yet depends on the length.
        let streams = D == 1 && self.grid.is_none() && self.axes[0].stride == 1;
        let last = self.axes[0].kernel_size.saturating_sub(1) * self.axes[0].dilation;
        streams.then_some(Kept { sinks: 0, last: Some(last) })
    }

    fn cross_lengths(&self) -> bool {
        D == 1 && self.is_causal()
    }

    fn memory(&self) -> Growth {
        Growth::Linear
    }
}

impl<const D: usize> Parted for Neighborhood<D> {
    fn parts(&self, shape: &AttnShape) -> Result<Vec<Part>> {
        let NeighborhoodMask { grid, axes, offset } = self.mask(shape)?;
        let dilations = axes.map(|axis| axis.dilation);
        if dilations == [1; D] {
            return Ok(Vec::new());
        }
        let first = offset.max(0) as usize;
        let plain = axes.map(|axis| AxisWindow { dilation: 1, ..axis });
        let (mut rows, mut keys, mut classes) = (Vec::new(), Vec::new(), Vec::new());
        for residues in Grid(dilations).all() {
            let class = Grid(std::array::from_fn(|a| axes[a].class_len(grid.0[a], residues[a])));
            let positions = class
                .all()
                .map(|u| grid.position(std::array::from_fn(|a| u[a] * dilations[a] + residues[a])));
            let before = (keys.len(), rows.len());
            for p in positions {
                keys.push(p as u32);
                if p >= first {
                    rows.push((p as isize - offset) as u32);
                }
            }
            let (n_keys, n_rows) = (keys.len() - before.0, rows.len() - before.1);
            // In one dimension the queries of a class are its last positions.
            let offset = n_keys as isize - n_rows as isize;
            classes.push((n_rows, n_keys, NeighborhoodMask { grid: class, axes: plain, offset }));
        }
        let mask = Arc::new(Classes::new(classes.into_iter(), Heads::All));
        Ok(vec![Part { queries: Order::of(rows), keys: Order::of(keys), mask, source: 0 }])
    }
}
