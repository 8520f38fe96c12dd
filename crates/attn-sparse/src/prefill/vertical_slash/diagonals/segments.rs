//! Distances that are attended together, and the rows of keys that one query or two neighbours meet at them.

use super::DISTANCES;
use std::ops::Range;

/// Most numbers from the nearest to the farthest key of a query's segment.
const SPAN: usize = 1 << 16;

/// Neighbouring distances of a list, [`DISTANCES`] at most.
#[derive(Debug)]
pub(in super::super) struct Segment {
    nearest: usize,
    farthest: usize,
    /// How many keys behind the farthest one each lies; nearest first.
    behind: Vec<u32>,
    /// The same for two neighbouring queries, each counted from the first one's farthest, the last repeated up to whole fours.
    of_two: [Vec<[u32; 4]>; 2],
    /// Fours of keys that both meet: theirs come first in both lists.
    shared: usize,
}

impl Segment {
    /// Distances, ascending, in segments for rows of `W` numbers.
    pub(in super::super) fn cut<const W: usize>(mut distances: &[u32]) -> Vec<Self> {
        let mut segments = Vec::new();
        while let Some(nearest) = distances.first() {
            let is_near = |d: &&u32| (**d - nearest) as usize <= SPAN / W;
            let (own, rest) =
                distances.split_at(distances.iter().take(DISTANCES).take_while(is_near).count());
            segments.push(Self::of(own));
            distances = rest;
        }
        segments
    }

    fn of(distances: &[u32]) -> Self {
        let (nearest, farthest) = (distances[0], distances[distances.len() - 1]);
        // A key at distance `d` from a query is at `d + 1` from the next one.
        let meet = distances.windows(2).filter(|two| two[0] + 1 == two[1]).map(|two| farthest - two[0]);
        let mut both: Vec<u32> = meet.collect();
        both.truncate(both.len() / 4 * 4);
        let of_two = [0, 1].map(|query| {
            let own = distances.iter().map(|d| farthest - d + query).filter(|row| !both.contains(row));
            let rows: Vec<u32> = both.iter().copied().chain(own).collect();
            fours(&rows, 0).collect()
        });
        Self {
            nearest: nearest as usize,
            farthest: farthest as usize,
            behind: distances.iter().map(|d| farthest - d).collect(),
            of_two,
            shared: both.len() / 4,
        }
    }

    /// Two neighbouring queries, the first at `position`, with the range of the keys between the farthest and the nearest of
    /// both; `None` if they do not see as much.
    #[inline(always)]
    pub(super) fn two(&self, position: isize) -> Option<(Group<'_, 2>, Range<usize>)> {
        let first = usize::try_from(position).ok()?.checked_sub(self.farthest)?;
        let rows = [&self.of_two[0][..], &self.of_two[1][..]];
        let group = Group { rows, shared: self.shared, len: self.behind.len() };
        Some((group, first..first + self.farthest + 2 - self.nearest))
    }

    /// One query at `position` and its keys; `None` if it sees none of them. The rows are put into `fours`.
    #[inline(always)]
    pub(super) fn one<'s>(
        &self,
        position: isize,
        fours: &'s mut Vec<[u32; 4]>,
    ) -> Option<(Group<'s, 1>, Range<usize>)> {
        let position = usize::try_from(position).ok()?;
        let end = (position + 1).checked_sub(self.nearest).filter(|end| *end > 0)?;
        // Rows before the first key of all.
        let lost = self.farthest.saturating_sub(position) as u32;
        let len = self.behind.partition_point(|row| *row >= lost);
        fours.clear();
        fours.extend(self::fours(&self.behind[..len], lost));
        let first = position.saturating_sub(self.farthest);
        Some((Group { rows: [&fours[..]], shared: fours.len(), len }, first..end))
    }

    /// Distances.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.behind.len()
    }
}

/// The rows less `lost`, in fours, the last one repeated.
fn fours(rows: &[u32], lost: u32) -> impl Iterator<Item = [u32; 4]> + '_ {
    rows.chunks(4).map(move |rows| std::array::from_fn(|at| rows[at.min(rows.len() - 1)] - lost))
}

/// The rows of keys that each of `Q` queries meets.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group<'a, const Q: usize> {
    pub(super) rows: [&'a [[u32; 4]]; Q],
    /// Fours from the first on that are the same for all.
    pub(super) shared: usize,
    /// Rows of each, without repeated ones.
    pub(super) len: usize,
}
