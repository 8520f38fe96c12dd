//! How the work is cut: which query rows a task takes, and which share of the keys.
//!
//! A task takes `block_q` rows of one query head; if a sequence has fewer rows than a panel has lanes (decoding), the
//! rows of several query heads that share a key/value head, so that their keys are read once. If the tasks are few,
//! each is split along the keys it sees, and the shares are merged in order. All of it depends on the problem alone,
//! never on the number of threads.

use super::Spec;
use super::chunks::union;
use super::finish::{HeadOut, merge};
use super::problem::Problem;
use crate::tiles::{PANEL, TileSizes};
use attn_core::OutMut;
use attn_core::mask::{Head, Mask};
use std::ops::Range;

/// Fewer tasks than this are split along the keys ...
const FEW_TASKS: usize = 16;
/// ... into this many in total, if the machine has that much to do: ...
const SPLIT_TASKS: usize = 32;
/// ... a share has at least so many keys.
const SHARE: usize = 1024;

/// Some query rows of a sequence against a share of the keys they see.
pub(super) struct Task<'a> {
    pub(super) sequence: usize,
    /// Query heads, all of one key/value head.
    pub(super) heads: Range<usize>,
    /// Rows, counted from the sequence's start.
    pub(super) rows: Range<usize>,
    /// Keys, counted along the spans that the rows see; `None` is all.
    pub(super) share: Option<Range<usize>>,
    pub(super) out: TaskOut<'a>,
    /// Heads and rows that `out` is made for; a task may be run a part at a time.
    pub(super) whole: (Range<usize>, Range<usize>),
}

impl Task<'_> {
    /// Where the result of row `i` of `head` goes: its place among the heads and rows, and their number.
    #[inline(always)]
    pub(super) fn place(&self, head: usize, i: usize) -> ((usize, usize), usize) {
        let (heads, rows) = &self.whole;
        let (head, row) = (head - heads.start, i - rows.start);
        ((head, row), head * rows.len() + row)
    }
}

/// Where a task's result goes.
pub(super) enum TaskOut<'a> {
    /// Into the output, one entry a head.
    Final(Vec<HeadOut<'a>>),
    /// Into `[heads * rows, head_dim_v + 2]`: the accumulator, its reference and its sum.
    Partial(&'a mut [f32]),
}

/// A task before its outputs are handed out.
struct Cut {
    sequence: usize,
    heads: Range<usize>,
    rows: Range<usize>,
    /// First head's place in the list of output pieces, and how far the next head's is.
    first_piece: usize,
    piece_stride: usize,
}

impl Cut {
    fn lanes(&self) -> usize {
        self.heads.len() * self.rows.len()
    }
}

/// Cuts the problem, hands the tasks to `run`, and merges what was split.
pub(super) fn for_each<M: Mask + ?Sized, C: ?Sized>(
    problem: &Problem<'_>,
    spec: &Spec<'_, M, C>,
    tiles: TileSizes,
    out: OutMut<'_>,
    lse: Option<&mut [f32]>,
    run: impl Fn(Vec<Task<'_>>),
) {
    let shape = problem.shape();
    if shape.rows() == 0 {
        return;
    }
    let packed = problem.n_sequences() != shape.batch || problem.q_range(0).len() != shape.n_q;
    let sequences_of_batch = if packed { problem.n_sequences() } else { 1 };
    let mut pieces: Vec<Range<usize>> = Vec::new();
    let mut owners: Vec<(usize, Range<usize>)> = Vec::new(); // sequence (within the batch entry) and its own rows
    for s in 0..sequences_of_batch {
        let rows = problem.q_range(s);
        for first in rows.clone().step_by(tiles.block_q()) {
            let end = first.saturating_add(tiles.block_q()).min(rows.end);
            pieces.push(first..end);
            owners.push((s, first - rows.start..end - rows.start));
        }
    }
    if pieces.is_empty() {
        return;
    }

    let group = shape.group_size();
    let mut cuts = Vec::new();
    for batch in 0..shape.batch {
        for kv_head in 0..shape.n_heads_kv {
            for (at, (s, rows)) in owners.iter().enumerate() {
                let sequence = if packed { *s } else { batch };
                let n_rows = problem.q_range(sequence).len();
                let per_task = match n_rows {
                    _ if tiles.are_rows_apart() => group,
                    PANEL.. => 1,
                    few => (tiles.block_q() / few.max(1)).clamp(1, group),
                };
                let heads = kv_head * group..(kv_head + 1) * group;
                for first in heads.clone().step_by(per_task) {
                    let first_piece = (batch * shape.n_heads_q + first) * pieces.len() + at;
                    cuts.push(Cut {
                        sequence,
                        heads: first..(first + per_task).min(heads.end),
                        rows: rows.clone(),
                        first_piece,
                        piece_stride: pieces.len(),
                    });
                }
            }
        }
    }

    let mut outputs = head_outputs(out, lse, shape.n_q, pieces);
    let mut take = |cut: &Cut| -> Vec<HeadOut<'_>> {
        let piece = |h: usize| outputs[cut.first_piece + h * cut.piece_stride].take();
        (0..cut.heads.len()).filter_map(piece).collect()
    };
    let shares: Vec<Vec<Option<Range<usize>>>> = cuts
        .iter()
        .map(|cut| {
            // Rows with lists of their own must not be cut by what other rows list.
            let others_count = tiles.are_rows_apart() && cut.rows.len() > 1;
            if cuts.len() >= FEW_TASKS || others_count {
                return vec![None];
            }
            let visible = visible_keys(problem, spec.mask, cut);
            match SPLIT_TASKS.div_ceil(cuts.len()).min(visible / SHARE).max(1) {
                1 => vec![None],
                n => (0..n).map(|x| Some(x * visible / n..(x + 1) * visible / n)).collect(),
            }
        })
        .collect();

    let width = shape.head_dim_v + 2;
    let partial_len = |(cut, shares): (&Cut, &Vec<_>)| match shares.len() {
        1 => 0,
        n => n * cut.lanes() * width,
    };
    let mut partials = vec![0.0; cuts.iter().zip(&shares).map(partial_len).sum()];
    let mut rest = partials.as_mut_slice();
    let (mut tasks, mut merges) = (Vec::with_capacity(cuts.len()), Vec::new());
    for (cut, shares) in cuts.iter().zip(&shares) {
        let out = take(cut);
        let task = |share: &Option<Range<usize>>, out| Task {
            sequence: cut.sequence,
            heads: cut.heads.clone(),
            rows: cut.rows.clone(),
            share: share.clone(),
            out,
            whole: (cut.heads.clone(), cut.rows.clone()),
        };
        if let [whole] = shares.as_slice() {
            tasks.push(task(whole, TaskOut::Final(out)));
            continue;
        }
        for share in shares {
            let (part, others) = std::mem::take(&mut rest).split_at_mut(cut.lanes() * width);
            rest = others;
            tasks.push(task(share, TaskOut::Partial(part)));
        }
        merges.push((cut, shares.len(), out));
    }
    // The last rows first: under a causal mask they are the longest.
    tasks.reverse();
    run(tasks);

    let mut rest = partials.as_slice();
    for (cut, n_shares, mut out) in merges {
        let (parts, others) = rest.split_at(n_shares * cut.lanes() * width);
        rest = others;
        for (h, out) in out.iter_mut().enumerate() {
            let sink = spec.sinks.map(|sinks| sinks[cut.heads.start + h]);
            for row in 0..cut.rows.len() {
                let lane = h * cut.rows.len() + row;
                let share = |x: usize| &parts[(x * cut.lanes() + lane) * width..][..width];
                merge((0..n_shares).map(share), sink, out, row);
            }
        }
    }
}

/// How many keys the rows of a task see at most.
fn visible_keys<M: Mask + ?Sized>(problem: &Problem<'_>, mask: &M, cut: &Cut) -> usize {
    let n_kv = problem.kv_range(cut.sequence).len();
    let spans = |head| mask.spans(Head { batch: cut.sequence, head }, cut.rows.clone(), n_kv);
    union(cut.heads.clone().flat_map(spans).collect()).iter().map(Range::len).sum()
}

/// The output cut at `pieces`, in the order batch, head, piece; each with its rows of the log-sum-exp.
fn head_outputs<'a>(
    out: OutMut<'a>,
    lse: Option<&'a mut [f32]>,
    n_q: usize,
    pieces: Vec<Range<usize>>,
) -> Vec<Option<HeadOut<'a>>> {
    let lens: Vec<usize> = pieces.iter().map(Range::len).collect();
    let mut lse_pieces = Vec::new();
    for mut head in lse.into_iter().flat_map(|lse| lse.chunks_mut(n_q)) {
        for len in &lens {
            let (piece, others) = head.split_at_mut(*len);
            lse_pieces.push(piece);
            head = others;
        }
    }
    let mut lse_pieces = lse_pieces.into_iter();
    out.into_cuts(pieces).into_iter().map(|out| Some(HeadOut { out, lse: lse_pieces.next() })).collect()
}
