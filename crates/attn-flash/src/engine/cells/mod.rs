//! Rows with lists of their own, executed cell of keys by cell of keys.
//!
//! Rows that choose their keys by content see different keys, but many rows see each of them. The keys are cut into cells,
//! and each cell meets, side by side in the lanes, those rows that list some of it, wherever they stand:
//!
//! ```text
//! for each cell c:    for 32 of the rows that list keys of c:
//!     S^T = K_c Q^T       P^T = e^(S^T - m_c)  (0 for what a row does not list)      O_c = V_c^T P^T
//!     m' = max(m, m_c)    l <- e^(m - m') l + e^(m_c - m') l_c    acc <- e^(m - m') acc + e^(m_c - m') O_c
//! ```
//!
//! Of a cell of which a panel of rows lists little (lists of tokens), only the keys that one of them lists are gathered.
//!
//! A lane's arithmetic depends on nothing but its own keys: what others list has weight 0, which adds nothing to a sum, and
//! cells are merged in ascending order. So a row's bits depend neither on its company nor on how rows are cut into tasks, which
//! may therefore follow the number of threads and the lists themselves.
//!
//! Cost of a visit beside its products: a panel of queries is gathered and turned, and its outputs are turned back and merged.
//! With 32 rows that is a seventh of the products with 64 keys, at head_dim 64.

mod lists;
mod states;
mod tile;

use super::Spec;
use super::finish::emit;
use super::problem::Problem;
use super::rows::HeadRows;
use super::tasks::Task;
use crate::tiles::{PANEL, TileSizes};
use attn_core::AttnShape;
use attn_core::mask::Mask;
use attn_core::score::ScoreMod;
use attn_core::simd::{Simd, SimdOp};
pub(super) use lists::{Entry, Lists};
use states::States;
use tile::{Cell, Panel, WideCell};

/// Fewer rows than this, over the heads that share keys, are attended one by one.
const MANY: usize = 16;
/// Keys of a cell of lists of tokens.
const TOKENS: usize = 2048;
/// Most keys of a cell of lists of blocks.
const BLOCK: usize = 128;
/// Tasks for each thread.
const TASKS: usize = 4;
/// Rows of a task, over the heads that share keys, at least and at most, ...
const ROWS: [usize; 2] = [512, 1 << 16];
/// ... and for each cell at least: with lists of 16 blocks, 32 of them then meet a cell.
const ROWS_A_CELL: usize = 2;

/// How a problem is executed by cells.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// Keys of a cell.
    cell: usize,
    /// The sizes of tasks.
    pub(super) tiles: TileSizes,
}

impl Plan {
    /// The plan of a problem whose rows stand apart, if they are many enough and nothing but products, key bias and sinks
    /// make their scores.
    pub(super) fn new<M: ?Sized, C: ScoreMod + ?Sized>(
        shape: &AttnShape,
        spec: &Spec<'_, M, C>,
        tiles: TileSizes,
    ) -> Option<Self> {
        let group = shape.group_size().max(1);
        let cell = cell_of(block_served(shape, spec, tiles)?);
        let rows =
            (shape.rows() / (TASKS * rayon::current_num_threads())).max(ROWS_A_CELL * shape.n_kv / cell);
        Some(Self { cell, tiles: tiles.with_block_q((rows.clamp(ROWS[0], ROWS[1]) / group).max(1)) })
    }
}

/// The block of the lists of a problem that is executed by cells.
pub(super) fn block_served<M: ?Sized, C: ScoreMod + ?Sized>(
    shape: &AttnShape,
    spec: &Spec<'_, M, C>,
    tiles: TileSizes,
) -> Option<usize> {
    let is_plain = spec.score_mod.is_identity() && spec.dropout.is_none() && spec.qk_norm.is_none();
    tiles.block_of_lists().filter(|_| is_plain && !are_few(shape))
}

/// Whether the rows that share keys are so few that they are attended one by one.
pub(super) fn are_few(shape: &AttnShape) -> bool {
    shape.n_q * shape.group_size() < MANY
}

/// Whether lists of blocks of `block` keys are lists of tokens: those of a cell lie apart.
pub(super) fn are_tokens(block: usize) -> bool {
    block < 8
}

/// Keys of a cell for lists of blocks of `block` keys: a whole part of the block, so that cells are listed as a whole.
pub(super) fn cell_of(block: usize) -> usize {
    match block {
        _ if are_tokens(block) => TOKENS,
        ..=BLOCK => block,
        _ => {
            let parts = block.div_ceil(BLOCK)..=block / 32;
            parts.into_iter().find(|n| block.is_multiple_of(*n)).map_or(BLOCK, |n| block / n)
        }
    }
}

/// A thread's scratch.
#[derive(Default)]
pub(super) struct Workspace {
    lists: Lists,
    states: States,
    panel: Panel,
    wide: WideCell,
    /// `[rows of a batch, head_dim]`, for queries that are not f32.
    queries: Vec<f32>,
}

/// The rows of one task.
pub(super) struct RowsByCells<'a, 'p> {
    pub(super) problem: &'a Problem<'p>,
    pub(super) mask: &'a (dyn Mask + 'a),
    pub(super) softmax_scale: f32,
    /// `[keys of the sequence]`.
    pub(super) key_bias: Option<&'a [f32]>,
    /// `[n_heads_q]`.
    pub(super) sinks: Option<&'a [f32]>,
    pub(super) plan: Plan,
    pub(super) workspace: &'a mut Workspace,
    pub(super) task: Task<'a>,
}

impl SimdOp for RowsByCells<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { problem, mask, softmax_scale, key_bias, sinks, plan, workspace, mut task } = self;
        let Workspace { lists, states, panel, wide, queries } = workspace;
        let (shape, cell, heads) = (problem.shape(), plan.cell, task.heads.clone());
        let (k, v) = problem.kv_rows(task.sequence, shape.kv_head(heads.start));
        let n_kv = problem.kv_range(task.sequence).len();
        let q_rows: Vec<HeadRows<'_>> =
            heads.clone().map(|head| problem.q_rows(task.sequence, head)).collect();
        panel.size([shape.head_dim, shape.head_dim_v], cell.min(n_kv));
        let mut rest = task.rows.clone();
        while !rest.is_empty() {
            let rows = lists.take(mask, (task.sequence, heads.clone()), rest.clone(), n_kv, cell);
            rest.start = rows.end;
            let n_lanes = rows.len() * heads.len();
            states.start(n_lanes, shape.head_dim_v);
            // Row and head of a lane.
            let place = |lane: usize| (rows.start + lane / heads.len(), lane % heads.len());
            queries.clear();
            if !q_rows.iter().all(|rows| matches!(rows, HeadRows::F32(_))) {
                queries.resize(n_lanes * shape.head_dim, 0.0);
                for (lane, q) in queries.chunks_exact_mut(shape.head_dim.max(1)).enumerate() {
                    let (row, head) = place(lane);
                    q_rows[head].slice(row..row + 1).copy_to(q);
                }
            }
            let query = |lane: usize| {
                let (row, head) = place(lane);
                match &q_rows[head] {
                    HeadRows::F32(rows) => rows.row(row),
                    _ => &queries[lane * shape.head_dim..][..shape.head_dim],
                }
            };
            for (at, entries) in lists.cells() {
                let range = at * cell..((at + 1) * cell).min(n_kv);
                let of_cell = Cell { range, k, v, bias: key_bias };
                wide.clear();
                for entries in entries.chunks(PANEL) {
                    simd.vectorize(
                        #[inline(always)]
                        || {
                            let queries = entries.iter().map(|entry| query(entry.lane as usize));
                            panel.take(simd, queries, softmax_scale);
                            panel.visit(simd, (&of_cell, wide), lists, entries, states);
                        },
                    );
                }
            }
            for lane in 0..n_lanes {
                let (row, head) = place(lane);
                let sink = sinks.map(|sinks| sinks[heads.start + head]);
                let (place, number) = task.place(heads.start + head, row);
                let (acc, state) = states.row(lane);
                emit(&mut task.out, place, number, acc, state, sink);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_are_parts_of_blocks() {
        for (block, cell) in [(1, TOKENS), (16, 16), (64, 64), (128, 128), (512, 128), (200, 100), (129, 43)]
        {
            assert_eq!(cell_of(block), cell, "{block}");
        }
        // Nothing divides it.
        assert_eq!(cell_of(131), BLOCK);
    }
}
