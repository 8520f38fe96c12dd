//! A share of the cells and the rows of a batch that list some of it.

use super::CellShare;
use super::panel::Panel;
use crate::engine::backward::weights::LANES;
use crate::engine::backward::{Pass, RowState};
use crate::engine::cells::{Entry, Lists};
use crate::engine::rows::HeadRows;
use attn_core::mask::{Head, Mask};
use attn_core::score::ScoreMod;
use attn_core::simd::{Simd, SimdOp};
use std::ops::Range;

/// What one share of the cells has to do with one piece of rows.
pub(super) struct Part<'a> {
    pub(super) rows: Range<usize>,
    pub(super) lists: &'a Lists,
    /// `[entries of the share, head_dim]`.
    pub(super) parts: &'a mut [f32],
}

/// An entry of a cell: whose, which, and where its part is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Listed {
    piece: usize,
    entry: Entry,
    place: usize,
}

/// The rows of the heads that share keys, in one sequence.
pub(super) struct BatchRows<'a> {
    sequence: usize,
    heads: Range<usize>,
    q: Vec<HeadRows<'a>>,
    grad_out: Vec<HeadRows<'a>>,
    /// Of each head, one a row.
    lse: Vec<&'a [f32]>,
    delta: Vec<&'a [f32]>,
}

impl<'a> BatchRows<'a> {
    pub(super) fn new<M: ?Sized, C: ?Sized>(
        pass: &Pass<'a, M, C>,
        state: RowState<'a>,
        (sequence, heads): (usize, Range<usize>),
    ) -> Self {
        let (shape, range) = (pass.problem.shape(), pass.problem.q_range(sequence));
        let first =
            |head| (pass.problem.batch_of(sequence) * shape.n_heads_q + head) * shape.n_q + range.start;
        let of_all =
            |numbers: &'a [f32]| heads.clone().map(|head| &numbers[first(head)..][..range.len()]).collect();
        Self {
            sequence,
            q: heads.clone().map(|head| pass.problem.q_rows(sequence, head)).collect(),
            grad_out: heads.clone().map(|head| pass.grad_out_rows(Head { batch: sequence, head })).collect(),
            lse: of_all(state.lse),
            delta: of_all(state.delta),
            heads,
        }
    }
}

/// The cells of a share, one after another, with all rows of a batch that list some of them.
pub(super) struct MeetShare<'a, 'b, M: ?Sized, C: ?Sized> {
    pub(super) pass: &'a Pass<'a, M, C>,
    pub(super) cell: usize,
    pub(super) rows: &'a BatchRows<'a>,
    pub(super) share: &'a mut CellShare<'b>,
    pub(super) parts: Vec<Part<'a>>,
    pub(super) panel: &'a mut Panel,
    pub(super) listed: &'a mut Vec<Listed>,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> SimdOp for MeetShare<'_, '_, M, C> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { pass, cell, rows, share, mut parts, panel, listed } = self;
        let (shape, n_heads) = (pass.problem.shape(), rows.heads.len());
        let kv_head = shape.kv_head(rows.heads.start);
        let (k, v) = pass.problem.kv_rows(rows.sequence, kv_head);
        let bias = pass.key_bias(rows.sequence, kv_head);
        for at in share.cells.clone() {
            listed.clear();
            for (piece, part) in parts.iter().enumerate() {
                let (first, places) = (part.lists.place_of(share.cells.start), part.lists.place_of(at)..);
                let entries = &part.lists.entries()[places.start..part.lists.place_of(at + 1)];
                let entry =
                    |(entry, place): (&Entry, usize)| Listed { piece, entry: *entry, place: place - first };
                listed.extend(entries.iter().zip(places).map(entry));
            }
            if listed.is_empty() {
                continue;
            }
            let keys = at * cell..((at + 1) * cell).min(share.keys.end);
            let own = keys.start - share.keys.start..keys.end - share.keys.start;
            let CellShare { grad_k, grad_v, sums, .. } = &mut *share;
            let grad_k = &mut grad_k[own.start * shape.head_dim..own.end * shape.head_dim];
            let grad_v = &mut grad_v[own.start * shape.head_dim_v..own.end * shape.head_dim_v];
            let sums = sums.get_mut(own).unwrap_or_default();
            simd.vectorize(
                #[inline(always)]
                || panel.take_cell(keys, [&k, &v], bias),
            );
            for some in listed.chunks(LANES) {
                simd.vectorize(
                    #[inline(always)]
                    || {
                        for (lane, listed) in some.iter().enumerate() {
                            let part = &parts[listed.piece];
                            let of_piece = listed.entry.lane as usize;
                            let (row, head) = (part.rows.start + of_piece / n_heads, of_piece % n_heads);
                            let state = (rows.lse[head][row], rows.delta[head][row]);
                            let of_row = [&rows.q[head], &rows.grad_out[head]];
                            panel.take_row(lane, of_row, row, state, pass.spec.softmax_scale);
                        }
                        let ranges = |lane: usize| parts[some[lane].piece].lists.ranges(&some[lane].entry);
                        panel.meet(simd, some.len(), ranges, [&mut *grad_k, &mut *grad_v, &mut *sums]);
                        for (lane, listed) in some.iter().enumerate() {
                            let to = &mut parts[listed.piece].parts[listed.place * shape.head_dim..];
                            to[..shape.head_dim].copy_from_slice(panel.grad_q(lane));
                        }
                    },
                );
            }
        }
    }
}
