//! Axial attention: a position of a grid sees the positions that differ from it along one axis.
//!
//! ```text
//! A(x) = { y : y_b = x_b for all b other than a }         causal along the axis: y_a <= x_a as well
//! ```
//!
//! for one axis `a`, or the union over all axes (each key once). On a grid of `D` axes of equal lengths a query sees about
//! `n^(1/D)` keys an axis.
//!
//! Along any axis but the last, neighbours share no key: positions are sorted line by line, and each line is dense attention
//! ([`Parted`]).
//!
//! Source: Ho, Kalchbrenner, Weissenborn, Salimans, "Axial Attention in Multidimensional Transformers", 2019; the union of two
//! axes as in Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation", 2019.

use crate::parts::{Classes, Heads, Order, Part, Parted};
use crate::patterns::grid::{self, Grid};
use crate::{Pattern, heads};
use attn_core::mask::{Band, Cover, Head, Mask, Pair};
use attn_core::{AttnError, AttnShape, Growth, Result};
use attn_flash::stream::Kept;
use std::ops::Range;
use std::sync::Arc;

/// Lines of a grid of `D` axes, the last running fastest. Time `O(n * lengths of the axes)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Axial<const D: usize> {
    /// Lengths of the axes; `None` is the grid of `n_kv` positions that is closest to a cube.
    pub grid: Option<[usize; D]>,
    /// The axis; `None` is all of them.
    pub axis: Option<usize>,
    /// No later position of the line.
    pub causal: bool,
}

/// The pairs in the order of the sequence.
#[derive(Debug, Clone, Copy)]
pub struct AxialMask<const D: usize> {
    grid: Grid<D>,
    axis: Option<usize>,
    causal: bool,
}

impl<const D: usize> Mask for AxialMask<D> {
    fn sees(&self, pair: Pair) -> bool {
        let (x, y) = (self.grid.coordinates(pair.i), self.grid.coordinates(pair.j));
        let mut other = (0..D).filter(|a| x[*a] != y[*a]);
        let (first, second) = (other.next(), other.next());
        second.is_none()
            && (!self.causal || pair.j <= pair.i)
            && first.is_none_or(|a| self.axis.is_none_or(|axis| axis == a))
    }
}

/// Who sees whom on a line.
#[derive(Debug, Clone, Copy)]
enum Line {
    All,
    ButSelf,
    Before(Band),
}

impl Mask for Line {
    fn sees(&self, pair: Pair) -> bool {
        match self {
            Self::All => true,
            Self::ButSelf => pair.i != pair.j,
            Self::Before(band) => band.sees(pair),
        }
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        match self {
            Self::Before(band) => band.spans(head, rows, n_kv),
            _ => grid::joined(std::iter::once(0..n_kv).collect()),
        }
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        match self {
            Self::All => Cover::Full,
            Self::ButSelf if rows.end <= keys.start || keys.end <= rows.start => Cover::Full,
            Self::ButSelf if rows.len() == 1 && keys.len() == 1 => Cover::Empty,
            Self::ButSelf => Cover::Partial,
            Self::Before(band) => band.cover(head, rows, keys),
        }
    }
}

impl<const D: usize> Axial<D> {
    fn axes(&self) -> impl Iterator<Item = usize> + use<D> {
        let axis = self.axis;
        (0..D).filter(move |a| axis.is_none_or(|axis| axis == *a))
    }
}

impl<const D: usize> Pattern for Axial<D> {
    type Mask = AxialMask<D>;

    const NAME: &'static str = "axial";

    fn mask(&self, shape: &AttnShape) -> Result<AxialMask<D>> {
        grid::same_lengths(shape)?;
        if let Some(axis) = self.axis.filter(|axis| *axis >= D) {
            return Err(AttnError::value("axis", axis, format!("below {D} axes")));
        }
        Ok(AxialMask { grid: Grid::of(self.grid, shape.n_kv)?, axis: self.axis, causal: self.causal })
    }

    fn pairs(&self, shape: &AttnShape) -> u64 {
        let Ok(AxialMask { grid, .. }) = self.mask(shape) else { return 0 };
        let n = shape.n_kv as u64;
        let of_axis = |a: usize| {
            let len = grid.0[a] as u64;
            if self.causal { n * (len + 1) / 2 } else { n * len }
        };
        // Every axis has the query's own key.
        let all: u64 = self.axes().map(of_axis).sum();
        heads(shape) * (all - n * (self.axes().count() as u64).saturating_sub(1))
    }

    fn is_causal(&self) -> bool {
        self.causal
    }

    /// The grid depends on the length.
    fn kept(&self) -> Option<Kept> {
        None
    }

    fn cross_lengths(&self) -> bool {
        false
    }

    fn growth(&self) -> Growth {
        Growth::SubQuadratic
    }

    fn memory(&self) -> Growth {
        Growth::Linear
    }
}

impl<const D: usize> Parted for Axial<D> {
    fn parts(&self, shape: &AttnShape) -> Result<Vec<Part>> {
        let AxialMask { grid, .. } = self.mask(shape)?;
        let part = |(at, axis): (usize, usize)| {
            let line = match (self.causal, at) {
                (false, 0) => Line::All,
                (false, _) => Line::ButSelf,
                (true, at) => Line::Before(Band { offset: -isize::from(at > 0), left: None, right: Some(0) }),
            };
            let len = grid.0[axis];
            let lines = (0..shape.n_kv.checked_div(len).unwrap_or(0)).map(|_| (len, len, line));
            let order = if axis == D - 1 {
                Order::natural()
            } else {
                // The axis runs fastest: all others, in their order, before it.
                let mut sizes = grid.0;
                sizes[axis..].rotate_left(1);
                let sorted = Grid(sizes).all().map(|mut at| {
                    at[axis..].rotate_right(1);
                    grid.position(at) as u32
                });
                Order::of(sorted.collect())
            };
            let mask = Arc::new(Classes::new(lines, Heads::All));
            Part { queries: order.clone(), keys: order, mask, source: 0 }
        };
        Ok(self.axes().enumerate().map(part).collect())
    }
}
