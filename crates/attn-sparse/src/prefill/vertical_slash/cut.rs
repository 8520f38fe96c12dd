//! Which distances are attended by tiles and which one by one.
//!
//! A tile of 32 queries costs the keys that any of them sees: for distances `a..b`, all of which may be chosen or few, these are
//! `b - a + 31`. One by one, a distance costs what it is, but a pair takes longer. With `c` the time of such a pair, in pairs of
//! a tile, bands `B` of distances are chosen that make
//!
//! ```text
//! sum_{[a, b) in B} (b - a + 31) + c |D outside of B|
//! ```
//!
//! least, run of neighbouring distances by run. The keys `V` for all queries are columns, which tiles serve well.

use super::lines::{Lines, Sets};
use attn_core::AttnShape;
use std::ops::Range;

/// Queries of a tile.
const PANEL: usize = 32;
/// Panels whose costs are compared.
const SAMPLE: usize = 16;
/// Keys of a tile that cost as much as the second pass over a row.
const SECOND_PASS: f64 = 32.0;

/// Lines in two parts without a common pair.
pub(super) struct Cut {
    /// What tiles attend.
    pub(super) tiles: Lines,
    /// What is attended distance by distance, for each list of the lines: distances, ascending.
    pub(super) apart: Vec<Vec<u32>>,
}

impl Cut {
    /// The cheapest cut if a pair that is attended apart takes the time of `pair_cost` pairs of a tile; `None` if tiles are
    /// best for all.
    pub(super) fn cheapest(lines: &Lines, shape: &AttnShape, pair_cost: f64) -> Option<Self> {
        if shape.n_q < PANEL {
            return None;
        }
        Self::of(lines, |sets| {
            let apart = outside_bands(&sets.runs, pair_cost);
            let rest = sets.without(shape.n_kv, apart.clone());
            let (mut together, mut cut) = (0.0, 0.0);
            for first in sample(shape) {
                let last = first + PANEL as isize - 1;
                let seen =
                    apart.iter().map(|run| run.end.min((last + 1).max(0) as usize).saturating_sub(run.start));
                together += keys(sets.spans(first, last));
                cut += keys(rest.spans(first, last)) + pair_cost * seen.sum::<usize>() as f64 + SECOND_PASS;
            }
            if cut < together { (rest, apart) } else { (sets.clone(), Vec::new()) }
        })
    }

    /// Cut as `cut` says: what remains of the lines of a list, and the runs of distances that are taken from them.
    pub(super) fn of(lines: &Lines, cut: impl Fn(&Sets) -> (Sets, Vec<Range<usize>>)) -> Option<Self> {
        let (tiles, apart): (Vec<_>, Vec<_>) = lines.all().iter().map(cut).unzip();
        let apart: Vec<Vec<u32>> =
            apart.into_iter().map(|runs| runs.into_iter().flatten().map(|d| d as u32).collect()).collect();
        apart.iter().any(|distances| !distances.is_empty()).then(|| Self { tiles: lines.with(tiles), apart })
    }
}

/// Positions of the first queries of some panels.
fn sample(shape: &AttnShape) -> impl Iterator<Item = isize> {
    let (n, offset) = (shape.n_q - PANEL, shape.n_kv as isize - shape.n_q as isize);
    (0..SAMPLE).map(move |at| (n * at / (SAMPLE - 1)) as isize + offset)
}

fn keys(spans: Vec<Range<usize>>) -> f64 {
    spans.iter().map(Range::len).sum::<usize>() as f64
}

/// The runs of distances that no band of the best choice holds.
fn outside_bands(runs: &[Range<usize>], pair_cost: f64) -> Vec<Range<usize>> {
    // Least costs of all runs so far, the last of them inside of a band or not; and whether the one before was inside.
    let (mut inside, mut outside) = (f64::INFINITY, 0.0f64);
    let mut before = Vec::with_capacity(runs.len());
    let mut end = 0;
    for run in runs {
        let (len, gap) = (run.len() as f64, run.start - end);
        let (longer, new) = (inside + gap as f64 + len, outside + (PANEL - 1) as f64 + len);
        before.push([longer <= new, inside <= outside]);
        (inside, outside) = (longer.min(new), inside.min(outside) + pair_cost * len);
        end = run.end;
    }
    let mut is_inside = inside <= outside;
    let mut apart: Vec<Range<usize>> = Vec::new();
    for (run, before) in runs.iter().zip(before).rev() {
        if !is_inside {
            apart.push(run.clone());
        }
        is_inside = before[usize::from(!is_inside)];
    }
    apart.reverse();
    apart
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cost(runs: &[Range<usize>], apart: &[bool], pair_cost: f64) -> f64 {
        let (mut cost, mut band_end) = (0.0, None);
        for (run, apart) in runs.iter().zip(apart) {
            if *apart {
                cost += pair_cost * run.len() as f64;
                band_end = None;
            } else {
                let new = (PANEL - 1) + run.len();
                cost += band_end.map_or(new, |end: usize| run.end - end) as f64;
                band_end = Some(run.end);
            }
        }
        cost
    }

    #[test]
    fn bands_are_the_cheapest_of_all_choices() {
        // Runs and gaps of many lengths, by a small generator of numbers.
        let mut state = 7u64;
        let mut number = |below: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) as usize % below as usize
        };
        for case in 0..60 {
            let (mut runs, mut end) = (Vec::new(), 0);
            for _ in 0..9 {
                let start = end + 1 + number(if case % 2 == 0 { 12 } else { 50 });
                end = start + 1 + number(25);
                runs.push(start..end);
            }
            let apart = outside_bands(&runs, 2.0);
            let chosen: Vec<bool> = runs.iter().map(|run| apart.contains(run)).collect();
            let best = (0..1 << runs.len())
                .map(|set: usize| (0..runs.len()).map(|r| set >> r & 1 == 1).collect::<Vec<_>>())
                .map(|apart| cost(&runs, &apart, 2.0))
                .fold(f64::INFINITY, f64::min);
            assert_eq!(cost(&runs, &chosen, 2.0), best, "{runs:?}");
        }
    }

    #[test]
    fn what_is_dense_stays_together_and_what_is_lonely_does_not() {
        assert_eq!(outside_bands(&[0..100, 500..501, 700..702, 900..1100], 2.0), [500..501, 700..702]);
        assert!(outside_bands(std::slice::from_ref(&(0..10_000)), 2.0).is_empty());
        assert!(outside_bands(&[], 2.0).is_empty());
    }
}
