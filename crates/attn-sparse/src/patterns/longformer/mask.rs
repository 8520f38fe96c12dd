//! Who sees whom.

use super::GlobalTokens;
use crate::patterns::grid::joined;
use attn_core::mask::{Band, Cover, Head, Mask, Pair};
use std::ops::Range;

/// Which rows see anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rows {
    /// Local and global ones.
    All,
    /// Local ones: global rows are attended elsewhere.
    Local,
}

/// Window, global columns and, unless they are attended elsewhere, global rows.
#[derive(Debug, Clone)]
pub struct LongformerMask {
    pub(super) band: Band,
    pub(super) globals: GlobalTokens,
    pub(super) causal: bool,
    pub(super) n_kv: usize,
    pub(super) rows: Rows,
}

impl LongformerMask {
    fn position(&self, i: usize) -> Option<usize> {
        i.checked_add_signed(self.band.offset)
    }

    fn is_global(&self, batch: usize, position: usize) -> bool {
        position < self.n_kv && self.globals.of(batch).binary_search(&position).is_ok()
    }

    /// Global tokens among positions.
    fn among(&self, batch: usize, positions: Range<usize>) -> &[usize] {
        let all = self.globals.of(batch);
        let start = all.partition_point(|g| *g < positions.start);
        let end = all.partition_point(|g| *g < positions.end);
        &all[start..end.max(start)]
    }

    /// Whether some of the rows are global.
    fn global_among(&self, head: Head, rows: &Range<usize>) -> bool {
        let Some(last) = rows.end.checked_sub(1).and_then(|i| self.position(i)) else { return false };
        !self.among(head.batch, self.position(rows.start).unwrap_or(0)..(last + 1).min(self.n_kv)).is_empty()
    }

    /// The keys that the latest of `rows` may see.
    fn end(&self, rows: &Range<usize>) -> usize {
        let last = rows.end.checked_sub(1).and_then(|i| self.position(i));
        if self.causal { last.map_or(0, |last| (last + 1).min(self.n_kv)) } else { self.n_kv }
    }
}

impl Mask for LongformerMask {
    fn sees(&self, pair: Pair) -> bool {
        let position = self.position(pair.i);
        if self.causal && position.is_none_or(|p| pair.j > p) {
            return false;
        }
        if position.is_some_and(|p| self.is_global(pair.batch, p)) {
            return self.rows == Rows::All;
        }
        self.band.sees(pair) || self.is_global(pair.batch, pair.j)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let end = self.end(&rows).min(n_kv);
        if self.rows == Rows::All && self.global_among(head, &rows) {
            return joined(std::iter::once(0..end).collect());
        }
        let mut spans = self.band.spans(head, rows, n_kv);
        spans.extend(self.among(head.batch, 0..end).iter().map(|g| *g..*g + 1));
        joined(spans)
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        if self.global_among(head, &rows) {
            return Cover::Partial;
        }
        let band = self.band.cover(head, rows.clone(), keys.clone());
        if band == Cover::Full {
            return band;
        }
        // Global columns are seen by all rows at or after them.
        let globals = self.among(head.batch, keys.clone()).len();
        let later = !self.causal || self.position(rows.start).is_some_and(|p| keys.end <= p + 1);
        match (band, globals) {
            (Cover::Empty, 0) => Cover::Empty,
            (_, n) if n == keys.len() && later => Cover::Full,
            _ => Cover::Partial,
        }
    }

    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        if self.global_among(head, &rows) {
            for (i, score) in rows.zip(scores) {
                if !self.sees(head.pair(i, j)) {
                    *score = f32::NEG_INFINITY;
                }
            }
        } else if !self.is_global(head.batch, j) {
            self.band.hide(head, rows, j, scores);
        } else if self.causal {
            Band { left: None, ..self.band }.hide(head, rows, j, scores);
        }
    }
}

/// Row `i` of batch entry `b` sees the first `ends[b][i]` keys, none where there is no such row; one list may serve all
/// entries. Ends grow with the row.
#[derive(Debug, Clone)]
pub(super) struct RowEnds {
    pub(super) ends: Vec<Vec<usize>>,
}

impl RowEnds {
    fn end(&self, batch: usize, i: usize) -> usize {
        let list = self.ends.get(if self.ends.len() == 1 { 0 } else { batch });
        list.and_then(|list| list.get(i)).copied().unwrap_or(0)
    }
}

impl Mask for RowEnds {
    fn sees(&self, pair: Pair) -> bool {
        pair.j < self.end(pair.batch, pair.i)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let end = rows.map(|i| self.end(head.batch, i)).max().unwrap_or(0).min(n_kv);
        joined(std::iter::once(0..end).collect())
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let (mut all, mut none) = (true, true);
        for end in rows.map(|i| self.end(head.batch, i)) {
            all &= keys.end <= end;
            none &= keys.start >= end;
        }
        match (all, none) {
            (true, _) => Cover::Full,
            (_, true) => Cover::Empty,
            _ => Cover::Partial,
        }
    }
}
