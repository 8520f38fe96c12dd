//! Which panels of a task meet the same chunks of keys.
//!
//! Panels that see the same keys take each chunk together: it is made ready, and brought to the caches, once. Panels that see
//! others do better by themselves: their chunks then begin and end where their own keys do.

use super::chunks::union;
use super::panel::Panel;
use std::ops::Range;

fn n_keys(spans: &[Range<usize>]) -> usize {
    spans.iter().map(Range::len).sum()
}

/// Consecutive panels that stay together. If all of them see at most `alone` different keys, nothing is gained by that.
pub(super) fn companies(panels: &[Panel], alone: usize) -> Vec<Range<usize>> {
    let spans: Vec<&[Range<usize>]> = panels.iter().map(|panel| panel.spans.as_slice()).collect();
    cut(&spans, alone)
}

fn cut(panels: &[&[Range<usize>]], alone: usize) -> Vec<Range<usize>> {
    let mut companies: Vec<Range<usize>> = Vec::new();
    // What the last company sees, if its panels do not all see the same.
    let mut seen: Vec<Range<usize>> = Vec::new();
    for (p, &spans) in panels.iter().enumerate() {
        let Some(last) = companies.last_mut() else {
            companies.push(p..p + 1);
            seen = spans.to_vec();
            continue;
        };
        if spans == seen {
            last.end += 1;
            continue;
        }
        let both = union([seen.as_slice(), spans].concat());
        // A panel that shares less than half of its keys would mostly wait.
        if n_keys(&both) <= n_keys(&seen) + n_keys(spans) / 2 {
            last.end += 1;
            seen = both;
        } else {
            companies.push(p..p + 1);
            seen = spans.to_vec();
        }
    }
    let splits = |company: &Range<usize>| {
        let first = panels[company.start];
        let differ = panels[company.clone()].iter().any(|spans| *spans != first);
        let all = panels[company.clone()].iter().flat_map(|spans| spans.iter().cloned());
        differ && n_keys(&union(all.collect())) <= alone
    };
    let each = companies.into_iter().flat_map(|company| match splits(&company) {
        true => company.map(|p| p..p + 1).collect(),
        false => vec![company],
    });
    each.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(panels: &[&[Range<usize>]], alone: usize) -> Vec<Range<usize>> {
        super::cut(panels, alone)
    }

    fn one(range: Range<usize>) -> Vec<Range<usize>> {
        vec![range]
    }

    #[test]
    fn panels_that_see_the_same_stay_together() {
        let (a, b) = (one(0..640), [0..32, 6400..6496]);
        assert_eq!(cut(&[&a, &a, &a], 10_000), one(0..3));
        assert_eq!(cut(&[&a, &a, &b, &b], 0), [0..2, 2..4]);
        assert_eq!(cut(&[], 0), [] as [Range<usize>; 0]);
    }

    #[test]
    fn growing_prefixes_stay_together_and_near_windows_part() {
        let prefixes = [one(0..10_032), one(0..10_064), one(0..10_096)];
        let prefixes: Vec<&[Range<usize>]> = prefixes.iter().map(Vec::as_slice).collect();
        assert_eq!(cut(&prefixes, 1000), one(0..3));
        let windows = [one(0..543), one(32..575), one(64..607)];
        let windows: Vec<&[Range<usize>]> = windows.iter().map(Vec::as_slice).collect();
        assert_eq!(cut(&windows, 1000), [0..1, 1..2, 2..3]);
        assert_eq!(cut(&windows, 500), one(0..3));
    }
}
