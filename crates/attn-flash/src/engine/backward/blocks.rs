//! How the backward pass is cut: blocks of keys and blocks of queries, and which of them meet.
//!
//! One grid for each sequence and key/value head: its key blocks against the query blocks of all heads that share it. The
//! cut depends on the problem alone, never on the number of threads.

use super::schedule::Schedule;
use super::sums::Sums;
use super::{Pass, Tiles};
use crate::engine::problem::Problem;
use attn_core::mask::{Cover, Head, Mask};
use attn_core::{OutMut, OutRows};
use std::ops::Range;

/// Some keys of a sequence and their gradients.
pub(super) struct KeyBlock<'a> {
    pub(super) sequence: usize,
    pub(super) kv_head: usize,
    /// Keys, counted from the sequence's start.
    pub(super) keys: Range<usize>,
    /// Added to scores, `[keys of the sequence]`.
    pub(super) bias: Option<&'a [f32]>,
    pub(super) grad_k: Sums<'a>,
    pub(super) grad_v: Sums<'a>,
    /// Sums of the gradients of scores, `[keys]`; empty if nobody asks.
    pub(super) key_sums: &'a mut [f32],
    /// Meetings still to come.
    pub(super) left: usize,
    /// Gradient of the norm's weights; empty if there are none.
    pub(super) grad_gamma: Vec<f32>,
}

/// Some queries of a head and their gradients.
pub(super) struct RowBlock<'a> {
    /// Sequence and query head.
    pub(super) head: Head,
    /// Rows, counted from the sequence's start.
    pub(super) rows: Range<usize>,
    /// `[rows]`.
    pub(super) lse: &'a [f32],
    pub(super) delta: &'a [f32],
    pub(super) grad_q: Sums<'a>,
    /// As in [`KeyBlock`].
    pub(super) left: usize,
    pub(super) grad_gamma: Vec<f32>,
}

/// What is cut.
pub(super) struct Whole<'a> {
    pub(super) q: OutMut<'a>,
    pub(super) k: OutMut<'a>,
    pub(super) v: OutMut<'a>,
    /// `[batch, n_heads_q, n_q]`.
    pub(super) lse: &'a [f32],
    pub(super) delta: &'a [f32],
    /// `[batch, n_heads_kv, n_kv]` or empty.
    pub(super) key_sums: &'a mut [f32],
}

/// Blocks and the order in which they meet.
pub(super) struct Cut<'a> {
    pub(super) keys: Vec<KeyBlock<'a>>,
    pub(super) rows: Vec<RowBlock<'a>>,
    pub(super) schedule: Schedule,
}

/// Pieces of the length axis: `owners[p]` is the sequence (within the batch entry) of piece `p` and its own rows.
struct Pieces {
    ranges: Vec<Range<usize>>,
    owners: Vec<(usize, Range<usize>)>,
}

impl Pieces {
    fn new(sequences: impl Iterator<Item = Range<usize>>, tiles: Tiles) -> Self {
        let (mut ranges, mut owners) = (Vec::new(), Vec::new());
        for (s, rows) in sequences.enumerate() {
            let size = tiles.block(rows.len());
            for first in rows.clone().step_by(size) {
                let end = (first + size).min(rows.end);
                ranges.push(first..end);
                owners.push((s, first - rows.start..end - rows.start));
            }
        }
        Self { ranges, owners }
    }

    /// The pieces of sequence `s`.
    fn of(&self, s: usize) -> Range<usize> {
        let first = self.owners.partition_point(|owner| owner.0 < s);
        first..self.owners.partition_point(|owner| owner.0 <= s)
    }
}

/// Cuts numbers `[.., n]` like the length axis.
fn cut_rows<'a>(numbers: &'a [f32], n: usize, pieces: &[Range<usize>]) -> Vec<&'a [f32]> {
    let heads = numbers.chunks(n.max(1));
    heads.flat_map(|head| pieces.iter().map(move |piece| &head[piece.clone()])).collect()
}

fn cut_rows_mut<'a>(numbers: &'a mut [f32], n: usize, pieces: &[Range<usize>]) -> Vec<&'a mut [f32]> {
    let mut cut = Vec::new();
    for mut head in numbers.chunks_mut(n.max(1)) {
        for piece in pieces {
            let (first, rest) = head.split_at_mut(piece.len());
            cut.push(first);
            head = rest;
        }
    }
    cut
}

impl<'a, M: Mask + ?Sized, C: ?Sized> Pass<'a, M, C> {
    pub(super) fn cut(&self, whole: Whole<'a>) -> Cut<'a> {
        let (problem, shape) = (self.problem, self.problem.shape());
        let packed = problem.is_packed();
        let of_entry = if packed { problem.n_sequences() } else { shape.batch.min(1) };
        let q_pieces = Pieces::new((0..of_entry).map(|s| problem.q_range(s)), self.tiles);
        let kv_pieces = Pieces::new((0..of_entry).map(|s| problem.kv_range(s)), self.tiles);

        let keys = self.key_blocks(&kv_pieces, whole.k, whole.v, whole.key_sums);
        let rows = self.row_blocks(&q_pieces, whole.q, [whole.lse, whole.delta]);
        let mut cut = Cut { keys, rows, schedule: Schedule::default() };
        for batch in 0..shape.batch {
            for s in 0..of_entry {
                for kv_head in 0..shape.n_heads_kv {
                    let first = (batch * shape.n_heads_kv + kv_head) * kv_pieces.ranges.len();
                    let of_sequence = kv_pieces.of(s);
                    let keys = first + of_sequence.start..first + of_sequence.end;
                    self.add_grid(&mut cut, keys, batch, q_pieces.of(s), q_pieces.ranges.len());
                }
            }
        }
        let (of_keys, of_rows) = cut.schedule.counts(cut.keys.len(), cut.rows.len());
        cut.keys.iter_mut().zip(of_keys).for_each(|(block, n)| block.left = n);
        cut.rows.iter_mut().zip(of_rows).for_each(|(block, n)| block.left = n);
        cut
    }

    fn key_blocks(
        &self,
        pieces: &Pieces,
        grad_k: OutMut<'a>,
        grad_v: OutMut<'a>,
        key_sums: &'a mut [f32],
    ) -> Vec<KeyBlock<'a>> {
        let shape = self.problem.shape();
        let mut key_sums = cut_rows_mut(key_sums, shape.n_kv, &pieces.ranges).into_iter();
        let grads = grad_k.into_cuts(pieces.ranges.clone()).into_iter();
        let grads = grads.zip(grad_v.into_cuts(pieces.ranges.clone())).enumerate();
        let block = |(at, (grad_k, grad_v)): (usize, (OutRows<'a>, OutRows<'a>))| {
            let (head, piece) = (at / pieces.ranges.len(), at % pieces.ranges.len());
            let (s, keys) = pieces.owners[piece].clone();
            let (batch, kv_head) = (head / shape.n_heads_kv, head % shape.n_heads_kv);
            let sequence = batch + s;
            let bias = self.key_bias(sequence, kv_head);
            let [grad_k, grad_v] = [grad_k, grad_v].map(Sums::new);
            let key_sums = key_sums.next().unwrap_or_default();
            KeyBlock {
                sequence,
                kv_head,
                keys,
                bias,
                grad_k,
                grad_v,
                key_sums,
                left: 0,
                grad_gamma: Vec::new(),
            }
        };
        grads.map(block).collect()
    }

    fn row_blocks(&self, pieces: &Pieces, grad_q: OutMut<'a>, state: [&'a [f32]; 2]) -> Vec<RowBlock<'a>> {
        let shape = self.problem.shape();
        let [lse, delta] = state.map(|numbers| cut_rows(numbers, shape.n_q, &pieces.ranges));
        let grads = grad_q.into_cuts(pieces.ranges.clone()).into_iter().enumerate();
        let block = |(at, grad_q): (usize, OutRows<'a>)| {
            let (head, piece) = (at / pieces.ranges.len(), at % pieces.ranges.len());
            let (s, rows) = pieces.owners[piece].clone();
            let (batch, head) = (head / shape.n_heads_q, head % shape.n_heads_q);
            let head = Head { batch: batch + s, head };
            let (lse, delta, grad_q) = (lse[at], delta[at], Sums::new(grad_q));
            RowBlock { head, rows, lse, delta, grad_q, left: 0, grad_gamma: Vec::new() }
        };
        grads.map(block).collect()
    }

    /// Key blocks `keys` against the query blocks of their heads: pieces `pieces` of `n_pieces` of each head.
    fn add_grid(
        &self,
        cut: &mut Cut<'a>,
        keys: Range<usize>,
        batch: usize,
        pieces: Range<usize>,
        n_pieces: usize,
    ) {
        let shape = self.problem.shape();
        let Some(first) = cut.keys.get(keys.start).filter(|_| !keys.is_empty()) else { return };
        let heads = first.kv_head * shape.group_size()..(first.kv_head + 1) * shape.group_size();
        let n_kv = self.problem.kv_range(first.sequence).len();
        let mut rows = Vec::new();
        for head in heads {
            let first = (batch * shape.n_heads_q + head) * n_pieces;
            rows.extend(first + pieces.start..first + pieces.end);
        }
        let spans = |i: usize| self.spec.mask.spans(cut.rows[i].head, cut.rows[i].rows.clone(), n_kv);
        let spans: Vec<_> = rows.iter().map(|i| spans(*i)).collect();
        let (key_blocks, row_blocks) = (&cut.keys, &cut.rows);
        let meet = |w: usize, i: usize| {
            let (keys, rows) = (key_blocks[keys.start + w].keys.clone(), &row_blocks[rows[i]]);
            let near = spans[i].partition_point(|span| span.end <= keys.start);
            spans[i].get(near).is_some_and(|span| span.start < keys.end)
                && self.spec.mask.cover(rows.head, rows.rows.clone(), keys) != Cover::Empty
        };
        cut.schedule.add_grid(keys.clone(), &rows, meet);
    }
}

impl<'a> Problem<'a> {
    /// Whether sequences lie one after another in a batch of 1.
    pub(super) fn is_packed(&self) -> bool {
        let shape = self.shape();
        self.n_sequences() != shape.batch || shape.batch > 0 && self.q_range(0).len() != shape.n_q
    }
}
