//! What each row lists, cell by cell.

use attn_core::mask::{Cover, Head, Mask};
use std::ops::Range;

/// Ranges that are held at a time: a batch of rows ends when it has so many, but not ...
const RANGES: usize = 1 << 19;
/// ... before it has so many for each cell, ...
const RANGES_A_CELL: usize = 32;
/// ... nor so many rows.
const LEAST: usize = 32;

/// A row that lists some keys of a cell.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Entry {
    /// Row and head of the batch: `row * heads + head`.
    pub(in crate::engine) lane: u32,
    first: u32,
    len: u32,
}

/// The lists of a batch of rows, in the order of cells, within a cell in that of the rows.
#[derive(Default)]
pub(in crate::engine) struct Lists {
    /// Ranges of keys, each within a cell.
    ranges: Vec<(u32, u32)>,
    /// In the order of rows, each with its cell.
    unsorted: Vec<(u32, Entry)>,
    entries: Vec<Entry>,
    /// Where each cell's entries start.
    starts: Vec<u32>,
}

impl Lists {
    /// Takes the lists of the first of some rows of a sequence, of all its `heads`: as many as are held at a time. Returns which.
    pub(super) fn take(
        &mut self,
        mask: &dyn Mask,
        (sequence, heads): (usize, Range<usize>),
        rows: Range<usize>,
        n_kv: usize,
        cell: usize,
    ) -> Range<usize> {
        let most = RANGES.max(RANGES_A_CELL * n_kv.div_ceil(cell));
        self.take_up_to(most, mask, (sequence, heads), rows, n_kv, cell)
    }

    /// Takes the lists of all these rows.
    pub(in crate::engine) fn take_all(
        &mut self,
        mask: &dyn Mask,
        of: (usize, Range<usize>),
        rows: Range<usize>,
        n_kv: usize,
        cell: usize,
    ) {
        self.take_up_to(usize::MAX, mask, of, rows, n_kv, cell);
    }

    fn take_up_to(
        &mut self,
        most: usize,
        mask: &dyn Mask,
        (sequence, heads): (usize, Range<usize>),
        rows: Range<usize>,
        n_kv: usize,
        cell: usize,
    ) -> Range<usize> {
        self.ranges.clear();
        self.unsorted.clear();
        let shared = mask.is_shared_by(sequence, heads.clone());
        let n_cells = n_kv.div_ceil(cell);
        let mut end = rows.start;
        for row in rows.clone() {
            if self.ranges.len() >= most && (end - rows.start) * heads.len() >= LEAST {
                break;
            }
            for (at, head) in heads.clone().enumerate() {
                let lane = ((row - rows.start) * heads.len() + at) as u32;
                let before = self.unsorted.len();
                self.take_row(mask, Head { batch: sequence, head }, row, lane, n_kv, cell);
                if shared {
                    let own = before..self.unsorted.len();
                    for other in 1..heads.len() as u32 {
                        let of_other = |at: usize| {
                            let (cell, entry) = self.unsorted[at];
                            (cell, Entry { lane: lane + other, ..entry })
                        };
                        let copies: Vec<_> = own.clone().map(of_other).collect();
                        self.unsorted.extend(copies);
                    }
                    break;
                }
            }
            end = row + 1;
        }
        self.sort(n_cells);
        rows.start..end
    }

    fn take_row(&mut self, mask: &dyn Mask, head: Head, row: usize, lane: u32, n_kv: usize, cell: usize) {
        let mut last: Option<(u32, Entry)> = None;
        let spans = mask.spans(head, row..row + 1, n_kv);
        let exact = mask.sees_spans(head, row..row + 1);
        let mut add = |lists: &mut Self, keys: Range<usize>| {
            let mut start = keys.start;
            while start < keys.end {
                let of = start / cell;
                let end = keys.end.min((of + 1) * cell);
                lists.ranges.push((start as u32, end as u32));
                match &mut last {
                    Some((cell, entry)) if *cell == of as u32 => entry.len += 1,
                    last => {
                        lists.unsorted.extend(last.take());
                        *last =
                            Some((of as u32, Entry { lane, first: lists.ranges.len() as u32 - 1, len: 1 }));
                    }
                }
                start = end;
            }
        };
        for span in spans {
            if exact {
                add(self, span);
                continue;
            }
            match mask.cover(head, row..row + 1, span.clone()) {
                Cover::Empty => {}
                Cover::Full => add(self, span),
                Cover::Partial => {
                    let mut run = span.start..span.start;
                    for j in span {
                        if !mask.sees(head.pair(row, j)) {
                            add(self, run);
                            run = j + 1..j + 1;
                        } else {
                            run.end = j + 1;
                        }
                    }
                    add(self, run);
                }
            }
        }
        self.unsorted.extend(last);
    }

    /// Counting sort by cell.
    fn sort(&mut self, n_cells: usize) {
        self.starts.clear();
        self.starts.resize(n_cells + 2, 0);
        self.unsorted.iter().for_each(|(cell, _)| self.starts[*cell as usize + 2] += 1);
        (1..self.starts.len()).for_each(|at| self.starts[at] += self.starts[at - 1]);
        self.entries.resize(self.unsorted.len(), Entry { lane: 0, first: 0, len: 0 });
        for (cell, entry) in &self.unsorted {
            let place = &mut self.starts[*cell as usize + 1];
            self.entries[*place as usize] = *entry;
            *place += 1;
        }
    }

    /// The cells that are listed at all, ascending, each with who lists it.
    pub(super) fn cells(&self) -> impl Iterator<Item = (usize, &[Entry])> {
        let ends = self.starts.windows(2).take(self.starts.len().saturating_sub(2)).enumerate();
        let cells = ends.map(|(cell, ends)| (cell, &self.entries[ends[0] as usize..ends[1] as usize]));
        cells.filter(|(_, entries)| !entries.is_empty())
    }

    /// Where the entries of a cell begin among all of them; those of the cell before it end there.
    pub(in crate::engine) fn place_of(&self, cell: usize) -> usize {
        self.starts[cell] as usize
    }

    /// Entries by their places.
    pub(in crate::engine) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The lanes that list something, ascending, each with the place of its entry for one cell after another.
    pub(in crate::engine) fn places(&self) -> impl Iterator<Item = (usize, usize)> {
        let mut next = self.starts.clone();
        self.unsorted.iter().map(move |(cell, entry)| {
            let place = &mut next[*cell as usize];
            *place += 1;
            (entry.lane as usize, *place as usize - 1)
        })
    }

    /// What an entry lists, ascending.
    pub(in crate::engine) fn ranges(&self, entry: &Entry) -> &[(u32, u32)] {
        &self.ranges[entry.first as usize..][..entry.len as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::mask::{Band, Pair, Predicate};

    /// Every pair once, in its cell, whether the mask tells what is seen or not.
    #[test]
    fn cells_hold_every_pair_once() {
        let band = Band { offset: 3, left: Some(9), right: Some(2) };
        let some = Predicate(|p: Pair| (p.i * 7 + p.j * 3 + p.head) % 5 < 2);
        for mask in [&band as &dyn Mask, &some] {
            for cell in [1, 4, 7, 64] {
                let mut lists = Lists::default();
                assert_eq!(lists.take(mask, (0, 1..3), 5..25, 40, cell), 5..25);
                let mut pairs = Vec::new();
                for (at, entries) in lists.cells() {
                    for entry in entries {
                        for &(start, end) in lists.ranges(entry) {
                            assert!(start as usize / cell == at && (end as usize - 1) / cell == at);
                            let lane = entry.lane as usize;
                            pairs.extend((start..end).map(|j| (5 + lane / 2, 1 + lane % 2, j as usize)));
                        }
                    }
                }
                pairs.sort_unstable();
                let sees = |&(i, head, j): &(usize, usize, usize)| mask.sees(Pair { batch: 0, head, i, j });
                let all = (5..25).flat_map(|i| (1..3).flat_map(move |h| (0..40).map(move |j| (i, h, j))));
                assert_eq!(pairs, all.filter(sees).collect::<Vec<_>>());
            }
        }
    }
}
