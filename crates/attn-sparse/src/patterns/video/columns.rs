//! Frames one after the other, and the same positions column by column.

use std::ops::Range;

/// `n` positions in frames of `frame` tokens; the last frame may be shorter. A column is one place in all frames.
#[derive(Debug, Clone, Copy)]
pub(super) struct Columns {
    pub(super) n: usize,
    /// At least 1.
    pub(super) frame: usize,
}

impl Columns {
    /// Frames, the last one included if it is shorter.
    pub(super) fn frames(&self) -> usize {
        self.n.div_ceil(self.frame)
    }

    /// Tokens of frame `f`.
    pub(super) fn len(&self, f: usize) -> usize {
        self.frame.min(self.n.saturating_sub(f * self.frame))
    }

    /// Columns, those of the first frame.
    pub(super) fn count(&self) -> usize {
        self.len(0)
    }

    /// Frame and place of a position.
    #[inline]
    pub(super) fn place(&self, position: usize) -> (usize, usize) {
        (position / self.frame, position % self.frame)
    }

    /// Frames of column `s`.
    pub(super) fn height(&self, s: usize) -> usize {
        self.n.saturating_sub(s).div_ceil(self.frame)
    }

    /// Positions in the columns before `s`.
    pub(super) fn start(&self, s: usize) -> usize {
        // The first columns reach into the last frame.
        let (frames, last) = (self.frames(), self.len(self.frames().saturating_sub(1)));
        s * frames - s.saturating_sub(last)
    }

    /// Frame and place of the `x`-th position, column by column.
    #[inline]
    pub(super) fn place_of(&self, x: usize) -> (usize, usize) {
        let (frames, last) = (self.frames(), self.len(self.frames().saturating_sub(1)));
        if x < last * frames {
            return (x % frames, x / frames);
        }
        let rest = x - last * frames;
        (rest % (frames - 1), last + rest / (frames - 1))
    }

    /// Calls `visit` with the frame of each run of positions, and its places.
    pub(super) fn each_frame(&self, positions: Range<usize>, mut visit: impl FnMut(usize, Range<usize>)) {
        let mut at = positions.start;
        while at < positions.end {
            let (f, first) = self.place(at);
            let end = ((f + 1) * self.frame).min(positions.end);
            visit(f, first..first + (end - at));
            at = end;
        }
    }

    /// Calls `visit` with the column of each run of sorted positions, and its frames.
    pub(super) fn each_column(&self, sorted: Range<usize>, mut visit: impl FnMut(usize, Range<usize>)) {
        let mut at = sorted.start;
        while at < sorted.end {
            let (first, s) = self.place_of(at);
            let end = self.start(s + 1).min(sorted.end);
            visit(s, first..first + (end - at));
            at = end;
        }
    }

    /// The positions column by column.
    pub(super) fn sorted(self) -> impl Iterator<Item = usize> {
        (0..self.count()).flat_map(move |s| (s..self.n).step_by(self.frame))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_hold_every_position_once() {
        for (n, frame) in [(12, 4), (14, 4), (3, 4), (1, 1), (9, 1), (0, 3), (40, 7)] {
            let columns = Columns { n, frame };
            let sorted: Vec<usize> = columns.sorted().collect();
            assert_eq!(sorted.len(), n, "{columns:?}");
            for (x, &position) in sorted.iter().enumerate() {
                let (f, s) = columns.place(position);
                assert_eq!(columns.place_of(x), (f, s), "{columns:?}: {x}");
                assert!(columns.start(s) + f == x && f < columns.height(s) && s < columns.len(f));
            }
            assert_eq!((0..columns.frames()).map(|f| columns.len(f)).sum::<usize>(), n);
            assert_eq!(columns.start(columns.count()), n);
        }
    }
}
