//! Rows that carry ids, kept as runs of equal ids: what [`super::Documents`] and [`super::Spans`] stand on.
//!
//! Packed documents are few long runs, so which keys a block of queries can see follows from the runs alone, in time
//! that grows with the runs it touches and the logarithm of all.

use super::broadcast::check_axis;
use super::{Cover, joined};
use crate::{AttnError, AttnShape, Result};
use std::ops::Range;

/// Spans at most this many keys apart are joined: a tile costs more to start than its hidden keys to compute.
const GAP: usize = 32;

/// A maximal run of rows with the same id.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    id: i32,
    rows: Range<usize>,
}

/// The ids along one axis.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ids {
    /// `[n]` or `[batch, n]`.
    ids: Vec<i32>,
    /// `n`, or 0 if all batch entries share the ids.
    stride: usize,
    /// Runs of each batch entry (one if shared), in order of position.
    runs: Vec<Vec<Run>>,
    /// The same, ordered by id, then position.
    by_id: Vec<Vec<Run>>,
}

impl Ids {
    /// `ids [n]` or `[batch, n]`; rows whose id `counts` rejects are in no run.
    pub(super) fn new(
        tensor: &str,
        axis: &'static str,
        ids: &[i32],
        n: usize,
        shape: &AttnShape,
        counts: impl Fn(i32) -> bool,
    ) -> Result<Self> {
        let shared = ids.len() == n;
        if !shared && Some(ids.len()) != shape.batch.checked_mul(n) {
            let expected = format!("{n}, or {n} for each of {} batch entries", shape.batch);
            return Err(AttnError::shape(tensor, axis, ids.len(), expected));
        }
        let entries = if shared { 1 } else { shape.batch };
        let runs: Vec<Vec<Run>> = (0..entries).map(|batch| runs(&ids[batch * n..][..n], &counts)).collect();
        let mut by_id = runs.clone();
        by_id.iter_mut().for_each(|runs| runs.sort_by_key(|run| run.id));
        Ok(Self { ids: ids.to_vec(), stride: if shared { 0 } else { n }, runs, by_id })
    }

    /// Checks that there is an id for each of `n` rows of every batch entry.
    pub(super) fn check(&self, tensor: &str, axis: &'static str, n: usize, batch: usize) -> Result<()> {
        if self.stride == 0 {
            return check_axis(tensor, axis, self.ids.len(), n);
        }
        check_axis(tensor, axis, self.stride, n)?;
        check_axis(tensor, "batch", self.runs.len(), batch)
    }

    #[inline(always)]
    pub(super) fn at(&self, batch: usize, row: usize) -> i32 {
        self.ids[batch * self.stride + row]
    }

    fn entry(&self, batch: usize) -> usize {
        if self.stride == 0 { 0 } else { batch }
    }

    /// Runs that share a row with `rows`.
    fn overlapping(&self, batch: usize, rows: &Range<usize>) -> &[Run] {
        let runs = &self.runs[self.entry(batch)];
        let first = runs.partition_point(|run| run.rows.end <= rows.start);
        let end = runs.partition_point(|run| run.rows.start < rows.end);
        &runs[first..end.max(first)]
    }
}

fn runs(ids: &[i32], counts: &impl Fn(i32) -> bool) -> Vec<Run> {
    let (mut runs, mut start) = (Vec::new(), 0);
    for same in ids.chunk_by(|a, b| a == b) {
        let rows = start..start + same.len();
        start = rows.end;
        if counts(same[0]) {
            runs.push(Run { id: same[0], rows });
        }
    }
    runs
}

/// Different ids of `runs`, in order.
fn distinct(runs: &[Run]) -> Vec<i32> {
    let mut ids: Vec<i32> = runs.iter().map(|run| run.id).collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Keys whose id occurs among the query `rows`.
pub(super) fn spans(q: &Ids, kv: &Ids, batch: usize, rows: &Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
    let by_id = &kv.by_id[kv.entry(batch)];
    let mut seen = Vec::new();
    for id in distinct(q.overlapping(batch, rows)) {
        let first = by_id.partition_point(|run| run.id < id);
        let same = by_id[first..].iter().take_while(|run| run.id == id && run.rows.start < n_kv);
        seen.extend(same.map(|run| run.rows.start..run.rows.end.min(n_kv)));
    }
    joined(seen, GAP)
}

/// What part of `rows` x `keys` has equal ids; never wrong, and exact while the tile touches few runs.
pub(super) fn cover(q: &Ids, kv: &Ids, batch: usize, rows: &Range<usize>, keys: &Range<usize>) -> Cover {
    let (of_rows, of_keys) = (q.overlapping(batch, rows), kv.overlapping(batch, keys));
    if let ([row], [key]) = (of_rows, of_keys) {
        let whole = |run: &Run, part: &Range<usize>| run.rows.start <= part.start && part.end <= run.rows.end;
        return match row.id == key.id {
            false => Cover::Empty,
            true if whole(row, rows) && whole(key, keys) => Cover::Full,
            true => Cover::Partial,
        };
    }
    let ids = distinct(of_rows);
    match of_keys.iter().any(|run| ids.binary_search(&run.id).is_ok()) {
        true => Cover::Partial,
        false => Cover::Empty,
    }
}
