//! Positions of a grid: images are two-dimensional, videos three-dimensional, the last axis running fastest.

use attn_core::{AttnError, AttnShape, Result};
use std::ops::Range;

/// Lengths of the axes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Grid<const D: usize>(pub(super) [usize; D]);

impl<const D: usize> Grid<D> {
    /// A grid of `n` positions: the given one, or the one closest to a cube.
    ///
    /// # Errors
    /// [`AttnError::Value`] if the given one has another number of positions; an empty sequence fits every grid.
    pub(super) fn of(given: Option<[usize; D]>, n: usize) -> Result<Self> {
        let Some(sizes) = given.filter(|_| n > 0) else { return Ok(Self::closest(n)) };
        let positions = sizes.iter().try_fold(1usize, |all, size| all.checked_mul(*size));
        if positions == Some(n) {
            return Ok(Self(sizes));
        }
        Err(AttnError::value("grid", format!("{sizes:?}"), format!("sizes whose product is n_kv = {n}")))
    }

    /// The first axis is the largest divisor of `n` that is at most its root of degree `D`, and so on for the rest.
    fn closest(n: usize) -> Self {
        let mut rest = n;
        Self(std::array::from_fn(|a| {
            let axes = (D - a) as u32;
            if axes == 1 || rest == 0 {
                return rest;
            }
            let fits = |d: &usize| rest.is_multiple_of(*d) && d.checked_pow(axes).is_some_and(|p| p <= rest);
            let most = (rest as f64).powf(1.0 / f64::from(axes)) as usize + 1;
            let size = (1..=most).rev().find(fits).unwrap_or(1);
            rest /= size;
            size
        }))
    }

    #[inline]
    pub(super) fn coordinates(&self, mut position: usize) -> [usize; D] {
        let mut at = [0; D];
        for a in (1..D).rev() {
            (position, at[a]) = (position / self.0[a], position % self.0[a]);
        }
        at[0] = position;
        at
    }

    pub(super) fn position(&self, at: [usize; D]) -> usize {
        (0..D).fold(0, |position, a| position * self.0[a] + at[a])
    }

    /// All coordinates, in the order of their positions.
    pub(super) fn all(self) -> impl Iterator<Item = [usize; D]> {
        (0..self.0.iter().product()).map(move |position| self.coordinates(position))
    }
}

/// Patterns on a grid serve self-attention alone.
pub(super) fn same_lengths(shape: &AttnShape) -> Result<()> {
    if shape.n_q == shape.n_kv {
        return Ok(());
    }
    Err(AttnError::shape("k", "n_kv", shape.n_kv, format!("{}, as n_q", shape.n_q)))
}

/// The union of ranges: sorted, disjoint, not empty.
pub(super) fn joined(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.retain(|range| !range.is_empty());
    ranges.sort_unstable_by_key(|range| range.start);
    let mut merged: Vec<Range<usize>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match merged.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => merged.push(range),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_closest_grid_has_all_positions_and_no_position_twice() {
        for (n, wanted) in
            [(0, [0, 0, 0]), (1, [1, 1, 1]), (17, [1, 1, 17]), (64, [4, 4, 4]), (600, [8, 5, 15])]
        {
            assert_eq!(Grid::<3>::of(None, n), Ok(Grid(wanted)), "{n}");
        }
        assert_eq!(Grid::<2>::of(None, 1 << 20), Ok(Grid([1024, 1024])));
        let grid = Grid([3, 4, 5]);
        for (position, at) in grid.all().enumerate() {
            assert_eq!((grid.position(at), grid.coordinates(position)), (position, at));
        }
        assert!(Grid::of(Some([3, 4]), 13).is_err_and(|e| e.to_string().contains("13")));
    }
}
