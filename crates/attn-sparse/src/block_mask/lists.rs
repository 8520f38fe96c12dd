//! Ascending lists in one allocation, which many threads fill.
//!
//! Millions of entries are written once, where they stay: fresh memory costs as much as what is computed into it.

use attn_core::parallel::for_each_task;

/// Ascending lists, one after the other: list `r` is `entries[row_ptr[r]..row_ptr[r + 1]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Lists {
    pub(super) row_ptr: Vec<usize>,
    pub(super) entries: Vec<u32>,
}

impl Lists {
    /// Copies.
    pub(crate) fn of(lists: &[Vec<u32>]) -> Self {
        let mut slots = Slots::new(lists.iter().map(Vec::len));
        for_each_task(
            slots.runs(lists.len(), 64).into_iter().zip(lists.chunks(64)),
            || (),
            |(), (mut run, lists)| {
                lists.iter().enumerate().for_each(|(at, list)| run.slot(at).append(list));
            },
        );
        slots.close()
    }

    /// How many lists.
    pub(crate) fn len(&self) -> usize {
        self.row_ptr.len() - 1
    }

    /// One of them.
    pub(crate) fn row(&self, at: usize) -> &[u32] {
        &self.entries[self.row_ptr[at]..self.row_ptr[at + 1]]
    }

    /// All of them.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &[u32]> {
        (0..self.len()).map(|at| self.row(at))
    }
}

/// Lists in the making: each has room for its largest length.
pub(crate) struct Slots {
    /// Where each slot starts, and the end of the last.
    starts: Vec<usize>,
    entries: Vec<u32>,
    lens: Vec<usize>,
}

/// Consecutive slots.
pub(crate) struct SlotRun<'a> {
    /// Number of the first one.
    pub(crate) first: usize,
    starts: &'a [usize],
    entries: &'a mut [u32],
    lens: &'a mut [usize],
}

/// Where one list goes.
pub(crate) struct Slot<'a> {
    entries: &'a mut [u32],
    len: &'a mut usize,
}

impl Slots {
    /// Empty lists, of so many entries at most.
    pub(crate) fn new(most: impl Iterator<Item = usize>) -> Self {
        let mut starts = vec![0];
        starts.extend(most.scan(0, |end, most| {
            *end += most;
            Some(*end)
        }));
        let n = starts.len() - 1;
        Self { entries: vec![0; starts[n]], starts, lens: vec![0; n] }
    }

    /// All slots, in runs of `run`; every `n` slots a new one begins.
    pub(crate) fn runs(&mut self, n: usize, run: usize) -> Vec<SlotRun<'_>> {
        let (mut first, mut entries, mut runs) = (0, self.entries.as_mut_slice(), Vec::new());
        for lens in self.lens.chunks_mut(n.max(1)).flat_map(|lens| lens.chunks_mut(run.max(1))) {
            let starts = &self.starts[first..first + lens.len() + 1];
            let (own, rest) = std::mem::take(&mut entries).split_at_mut(starts[lens.len()] - starts[0]);
            entries = rest;
            runs.push(SlotRun { first, starts, entries: own, lens });
            first += runs[runs.len() - 1].len();
        }
        runs
    }

    /// The lists as they are now.
    pub(crate) fn close(self) -> Lists {
        let Self { starts, mut entries, lens } = self;
        let mut row_ptr = Vec::with_capacity(starts.len());
        row_ptr.push(0);
        for (start, len) in starts.iter().zip(lens) {
            let end = row_ptr[row_ptr.len() - 1];
            if *start != end {
                entries.copy_within(*start..start + len, end);
            }
            row_ptr.push(end + len);
        }
        entries.truncate(row_ptr[row_ptr.len() - 1]);
        Lists { row_ptr, entries }
    }
}

impl SlotRun<'_> {
    /// How many slots.
    pub(crate) fn len(&self) -> usize {
        self.lens.len()
    }

    /// The `at`-th of the run.
    pub(crate) fn slot(&mut self, at: usize) -> Slot<'_> {
        let range = self.starts[at] - self.starts[0]..self.starts[at + 1] - self.starts[0];
        Slot { entries: &mut self.entries[range], len: &mut self.lens[at] }
    }
}

impl Slot<'_> {
    /// Appends, all above what is there.
    pub(crate) fn append(&mut self, list: &[u32]) {
        self.entries[*self.len..*self.len + list.len()].copy_from_slice(list);
        *self.len += list.len();
    }

    /// Appends consecutive numbers, all above what is there.
    pub(crate) fn append_range(&mut self, numbers: std::ops::Range<usize>) {
        let to = &mut self.entries[*self.len..*self.len + numbers.len()];
        to.iter_mut().zip(numbers.clone()).for_each(|(to, number)| *to = number as u32);
        *self.len += numbers.len();
    }
}

/// A list as [`Builder`](super::Builder) takes it.
pub(crate) fn wide(list: &[u32]) -> Vec<usize> {
    list.iter().map(|block| *block as usize).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Lists that fill their slots, that do not, and empty ones.
    #[test]
    fn lists_close_the_gaps_between_their_slots() {
        let list = |at: usize, room: usize| (at..at + room - (at * 7 % 3).min(room)).map(|x| x as u32);
        let rooms: Vec<usize> = (0..50).map(|at| at * 5 % 9).collect();
        let mut slots = Slots::new(rooms.iter().copied());
        for mut run in slots.runs(20, 8) {
            assert!(run.len() <= 8 && run.first % 20 % 8 == 0, "{} from {}", run.len(), run.first);
            for at in 0..run.len() {
                let row = run.first + at;
                let list: Vec<u32> = list(row, rooms[row]).collect();
                let (first, rest) = list.split_at(list.len() / 2);
                run.slot(at).append(first);
                run.slot(at).append_range(row + first.len()..row + first.len() + rest.len());
            }
        }
        let want: Vec<Vec<u32>> =
            rooms.iter().enumerate().map(|(at, room)| list(at, *room).collect()).collect();
        let got = slots.close();
        assert_eq!(got.iter().collect::<Vec<_>>(), want);
        assert_eq!(Lists::of(&want), got);
        assert_eq!(Lists::of(&[]).len(), 0);
    }
}
