//! Gradients of rows with lists of their own, cell of keys by cell of keys.
//!
//! As in the forward pass (`engine::cells`), each cell of keys meets those rows, side by side, that list some of it. With the keys
//! and values of cell `c` and 64 such rows (`Q` scaled):
//!
//! ```text
//! S^T = K_c Q^T    dP^T = V_c dO^T    P = e^(S - lse)    dS = P (dP - delta)    (0 for what a row does not list)
//! dV_c += P^T dO   dK_c += dS^T Q     dQ_rc = dS K_c     and when all cells have met their rows   dQ_r = softmax_scale sum_c dQ_rc
//! ```
//!
//! Rows come in batches. First their lists are taken, piece of rows by piece; then shares of the cells, each by one thread, meet
//! their rows in ascending order; then the pieces sum what the cells gave to their queries, in the order of the cells. A sum over
//! rows runs row after row, whatever rows stand side by side; a sum over keys runs through a row's own keys, as others have
//! weight 0. So no bit depends on the batches or the number of threads.
//!
//! Five products a pair that lies in a cell with one that is listed: lists of tokens must be dense enough, else each row is better
//! off alone (`apart`).
//!
//! Memory: f32 sums of the keys of one head, the lists of a batch, and one row of `head_dim` for each cell that a row of the batch
//! lists.

mod meeting;
mod panel;

use super::apart::{cut, store};
use super::{Pass, RowState};
use crate::engine::cells::{Lists, are_tokens, block_served, cell_of};
use attn_core::mask::{Head, Mask};
use attn_core::parallel::for_each_task;
use attn_core::score::ScoreMod;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::{OutMut, OutRows};
use meeting::{BatchRows, MeetShare, Part};
use panel::Panel;
use std::ops::Range;

/// Rows of a piece, of each head.
const PIECE: usize = 32;
/// Keys of a cell of lists of tokens, ...
const TOKENS: usize = 256;
/// ... of which a row that lists some lists at least so many, on average.
const TOKENS_LISTED: usize = 16;
/// Rows of a batch, over the heads that share keys, at least and at most, ...
const ROWS: [usize; 2] = [512, 1 << 16];
/// ... for each cell at least, ...
const ROWS_A_CELL: usize = 2;
/// ... and with at most about so many numbers of gradients that cells give to queries.
const PARTS: usize = 1 << 23;
/// Shares of the cells of a sequence.
const SHARES: usize = 64;
/// Rows that are looked at beforehand, of a sequence, and sequences.
const LOOK: usize = 32;

/// How a pass is executed by cells.
pub(super) struct Cells {
    /// Keys of a cell.
    cell: usize,
    /// Cells that a row lists, on average, about.
    listed: usize,
}

/// Gradients of some cells of a head.
struct CellShare<'a> {
    cells: Range<usize>,
    keys: Range<usize>,
    /// `[keys, head_dim]` and `[keys, head_dim_v]`.
    grad_k: Vec<f32>,
    grad_v: Vec<f32>,
    /// `[keys]`, or empty if nobody asks.
    sums: Vec<f32>,
    out_k: OutRows<'a>,
    out_v: OutRows<'a>,
}

/// Some rows of a batch, of all heads that share keys.
#[derive(Default)]
struct Piece {
    rows: Range<usize>,
    lists: Lists,
    /// What cells give to queries, `[entries, head_dim]`.
    parts: Vec<f32>,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> Pass<'_, M, C> {
    /// How, if cells serve what is asked for and it pays.
    pub(super) fn by_cells(&self) -> Option<Cells> {
        let shape = self.problem.shape();
        let block = block_served(&shape, self.spec, self.spec.tiles?)?;
        let cell = if are_tokens(block) { TOKENS } else { cell_of(block) };
        let [rows, entries, pairs] = self.look(cell);
        let pays = !are_tokens(block) || pairs >= TOKENS_LISTED * entries;
        pays.then(|| Cells { cell, listed: entries.div_ceil(rows.max(1)).max(1) })
    }

    /// Some rows, the cells that they list, and the pairs.
    fn look(&self, cell: usize) -> [usize; 3] {
        let (problem, mut counts) = (self.problem, [0; 3]);
        let every = |n: usize| n.div_ceil(LOOK).max(1);
        for sequence in (0..problem.n_sequences()).step_by(every(problem.n_sequences())) {
            let (n_q, n_kv) = (problem.q_range(sequence).len(), problem.kv_range(sequence).len());
            for row in (0..n_q).step_by(every(n_q)) {
                let head = Head { batch: sequence, head: row / every(n_q) % problem.shape().n_heads_q };
                let mut last = None;
                counts[0] += 1;
                for span in self.spec.mask.spans(head, row..row + 1, n_kv) {
                    let cells = span.start / cell..span.end.div_ceil(cell);
                    counts[1] += cells.len() - usize::from(last == Some(cells.start));
                    counts[2] += span.len();
                    last = cells.last();
                }
            }
        }
        counts
    }

    /// Writes the gradients of q, k and v; `key_sums [batch, n_heads_kv, n_kv]` those of the key bias, or empty.
    pub(super) fn run_by_cells(
        &self,
        how: &Cells,
        state: RowState<'_>,
        [q, k, v]: [OutMut<'_>; 3],
        key_sums: &mut [f32],
    ) {
        let (problem, shape, cell) = (self.problem, self.problem.shape(), how.cell);
        let (d, d_v, group) = (shape.head_dim, shape.head_dim_v, shape.group_size());
        let packed = problem.is_packed();
        let of_entry = if packed { problem.n_sequences() } else { shape.batch.min(1) };
        let pieces = cut((0..of_entry).map(|s| problem.q_range(s)), |_| PIECE);
        let share = |n: usize| n.div_ceil(cell).div_ceil(SHARES).max(1) * cell;
        let shares = cut((0..of_entry).map(|s| problem.kv_range(s)), share);
        let (n_pieces, n_shares): (usize, usize) =
            (pieces.iter().map(Vec::len).sum(), shares.iter().map(Vec::len).sum());
        let mut out_q: Vec<Option<OutRows<'_>>> =
            q.into_cuts(pieces.concat()).into_iter().map(Some).collect();
        let mut out_kv: Vec<Option<(OutRows<'_>, OutRows<'_>)>> = {
            let both = k.into_cuts(shares.concat()).into_iter().zip(v.into_cuts(shares.concat()));
            both.map(Some).collect()
        };
        let (isa, mut kept) = (Isa::current(), Vec::<Piece>::new());
        for batch in 0..shape.batch {
            let (mut first_piece, mut first_share): (usize, usize) = (0, 0);
            for (s, (pieces, shares)) in pieces.iter().zip(&shares).enumerate() {
                let sequence = if packed { s } else { batch };
                let (q_range, kv_range) = (problem.q_range(sequence), problem.kv_range(sequence));
                let lanes = (how.listed * d.max(1)).max(1);
                let lanes = (ROWS_A_CELL * kv_range.len() / cell).clamp(ROWS[0], ROWS[1]).min(PARTS / lanes);
                let pieces_a_batch = (lanes / PIECE / group.max(1)).max(1);
                for kv_head in 0..shape.n_heads_kv {
                    let head = batch * shape.n_heads_kv + kv_head;
                    let mut take = |(at, keys): (usize, &Range<usize>)| -> Option<CellShare<'_>> {
                        let (out_k, out_v) = out_kv.get_mut(head * n_shares + first_share + at)?.take()?;
                        let keys = keys.start - kv_range.start..keys.end - kv_range.start;
                        let widths = [d, d_v, usize::from(self.sum_keys)];
                        let [grad_k, grad_v, sums] = widths.map(|width| vec![0.0; keys.len() * width]);
                        let cells = keys.start / cell..keys.end.div_ceil(cell);
                        Some(CellShare { cells, keys, grad_k, grad_v, sums, out_k, out_v })
                    };
                    let mut of_keys: Vec<CellShare<'_>> =
                        shares.iter().enumerate().filter_map(&mut take).collect();
                    let heads = kv_head * group..(kv_head + 1) * group;
                    for (b, some) in pieces.chunks(pieces_a_batch).enumerate() {
                        kept.resize_with(kept.len().max(some.len()), Piece::default);
                        let kept = &mut kept[..some.len()];
                        for_each_task(
                            kept.iter_mut().zip(some),
                            || (),
                            |(), (piece, rows)| {
                                piece.rows = rows.start - q_range.start..rows.end - q_range.start;
                                let (of, rows) = ((sequence, heads.clone()), piece.rows.clone());
                                piece.lists.take_all(&self.spec.mask, of, rows, kv_range.len(), cell);
                                piece.parts.resize(piece.lists.entries().len() * d, 0.0);
                            },
                        );
                        let rows = BatchRows::new(self, state, (sequence, heads.clone()));
                        self.meet_shares(isa, how, &rows, kept, &mut of_keys);
                        let mut outs = Vec::with_capacity(kept.len());
                        for (at, piece) in kept.iter().enumerate() {
                            let at = first_piece + b * pieces_a_batch + at;
                            let place = |head: usize| (batch * shape.n_heads_q + head) * n_pieces + at;
                            let out: Vec<_> = heads
                                .clone()
                                .map(|h| out_q.get_mut(place(h)).and_then(Option::take))
                                .collect();
                            outs.push((piece, out));
                        }
                        for_each_task(outs.into_iter(), Vec::new, |sums, (piece, outs)| {
                            isa.run(SumParts {
                                piece,
                                outs,
                                width: d,
                                softmax_scale: self.spec.softmax_scale,
                                sums,
                            })
                        });
                    }
                    for share in &of_keys {
                        let first = head * shape.n_kv + kv_range.start + share.keys.start;
                        if let Some(sums) = key_sums.get_mut(first..first + share.sums.len()) {
                            sums.copy_from_slice(&share.sums);
                        }
                    }
                    for_each_task(
                        of_keys.into_iter(),
                        || (),
                        |(), mut share| {
                            store(&mut share.out_k, &share.grad_k, d);
                            store(&mut share.out_v, &share.grad_v, d_v);
                        },
                    );
                }
                (first_piece, first_share) = (first_piece + pieces.len(), first_share + shares.len());
            }
        }
    }

    /// Each share of the cells meets the rows of a batch that list some of it.
    fn meet_shares(
        &self,
        isa: Isa,
        how: &Cells,
        rows: &BatchRows<'_>,
        pieces: &mut [Piece],
        shares: &mut [CellShare<'_>],
    ) {
        let d = self.problem.shape().head_dim;
        let mut tasks: Vec<_> =
            shares.iter_mut().map(|share| (share, Vec::with_capacity(pieces.len()))).collect();
        for Piece { rows, lists, parts } in pieces {
            let mut rest = parts.as_mut_slice();
            for (share, parts) in &mut tasks {
                let n = lists.place_of(share.cells.end) - lists.place_of(share.cells.start);
                let (part, tail) = std::mem::take(&mut rest).split_at_mut(n * d);
                rest = tail;
                parts.push(Part { rows: rows.clone(), lists, parts: part });
            }
        }
        let shape = self.problem.shape();
        for_each_task(
            tasks.into_iter(),
            || (Panel::new([d, shape.head_dim_v], how.cell), Vec::new()),
            |(panel, listed), (share, parts)| {
                isa.run(MeetShare { pass: self, cell: how.cell, rows, share, parts, panel, listed });
            },
        );
    }
}

/// The gradients of the queries of a piece, from what the cells gave.
struct SumParts<'a, 'b> {
    piece: &'a Piece,
    /// One a head.
    outs: Vec<Option<OutRows<'b>>>,
    width: usize,
    softmax_scale: f32,
    sums: &'a mut Vec<f32>,
}

impl SimdOp for SumParts<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { piece, outs, width, softmax_scale, sums } = self;
        let n_heads = outs.len();
        sums.clear();
        sums.resize(piece.rows.len() * n_heads * width, 0.0);
        simd.vectorize(
            #[inline(always)]
            || {
                for (lane, place) in piece.lists.places() {
                    let part = &piece.parts[place * width..][..width];
                    sums[lane * width..][..width].iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                }
                sums.iter_mut().for_each(|sum| *sum *= softmax_scale);
            },
        );
        for (head, out) in outs.into_iter().enumerate() {
            let Some(mut out) = out else { continue };
            for row in 0..piece.rows.len() {
                out.store(row, sums[(row * n_heads + head) * width..][..width].iter().copied());
            }
        }
    }
}
