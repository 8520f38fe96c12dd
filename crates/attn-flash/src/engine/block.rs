//! One block of queries against every key it can see.
//!
//! Shapes, for one head: `q [rows, head_dim]`, `k [n_kv, head_dim]`, `v [n_kv, head_dim_v]`, `out [rows, head_dim_v]`.
//! Queries stand in the vector lanes, in panels of 32: `Q^T [head_dim, 32]` is made once, and each tile is
//!
//! ```text
//! S^T = K Q^T                [keys, 32]        scores; the softmax runs down the columns, without shuffles
//! O^T = O^T + V^T P^T        [head_dim_v, 32]  outputs, not yet divided
//! ```
//!
//! K and V are read where the caller keeps them (half types, pages and scattered keys through a gathered block). Where all
//! are bf16 both products may be of bf16 pairs, see `native_bf16`.

use super::Spec;
use super::ahead::Ahead;
use super::chunks::{Chunks, SHORT, share_of, union};
use super::company::companies;
use super::few::{self, FEW, FewScratch};
use super::finish::emit;
use super::native_bf16::NativeBf16;
use super::panel::Panel;
use super::problem::Problem;
use super::tasks::Task;
use super::tile::{KeyRowsOf, Keys, Tile, TileScratch, turns};
use crate::tiles::{PANEL, TileSizes};
use attn_core::mask::Mask;
use attn_core::score::ScoreMod;
use attn_core::simd::{Simd, SimdOp};
use attn_core::tile::{Bf16Dot, transpose};
use attn_core::view::Rows;
use std::ops::Range;

/// Keys and values that stay in the second-level cache from one panel to the next.
const NEAR_BYTES: usize = 1 << 19;

/// A thread's scratch, taken once.
pub(super) struct Workspace {
    panels: Vec<Panel>,
    /// `[PANEL, head_dim or head_dim_v]`: queries that are gathered or widened, then outputs.
    rows: Vec<f32>,
    /// `[block_kv, PANEL]`, one row more if `block_kv` is odd.
    scores: Vec<f32>,
    /// `[block_kv, head_dim]` and `[block_kv, head_dim_v]`, for keys that are not read in place.
    wide_k: Vec<f32>,
    wide_v: Vec<f32>,
    /// `[block_kv, head_dim_v]`, for values that are not finite; empty until one is met.
    finite_v: Vec<f32>,
    /// `[block_kv]`, what the scores of a key are multiplied with; empty without a norm.
    key_scale: Vec<f32>,
    few: FewScratch,
    /// Where both products are of bf16 pairs.
    native: Option<NativeBf16>,
}

impl Workspace {
    pub(super) fn new(problem: &Problem<'_>, tiles: TileSizes, dot: Option<Bf16Dot>) -> Self {
        let shape = problem.shape();
        let together = if tiles.are_rows_apart() { shape.group_size() } else { tiles.block_q() };
        let n_panels = together.min(shape.n_q * shape.group_size()).div_ceil(PANEL);
        let block_kv = tiles.block_kv().min(shape.n_kv);
        Self {
            panels: (0..n_panels).map(|_| Panel::new(shape.head_dim, shape.head_dim_v)).collect(),
            rows: Vec::new(),
            scores: vec![0.0; block_kv.next_multiple_of(2) * PANEL],
            // Untouched pages of these cost nothing when keys are read in place.
            wide_k: vec![0.0; block_kv * shape.head_dim],
            wide_v: vec![0.0; block_kv * shape.head_dim_v],
            finite_v: Vec::new(),
            key_scale: Vec::new(),
            few: FewScratch::default(),
            native: dot.map(|dot| NativeBf16::new(dot, &shape)),
        }
    }
}

/// The kernel: one task.
pub(super) struct QueryBlock<'a, M: ?Sized, C: ?Sized> {
    pub(super) problem: &'a Problem<'a>,
    pub(super) spec: &'a Spec<'a, M, C>,
    pub(super) tiles: TileSizes,
    pub(super) workspace: &'a mut Workspace,
    pub(super) task: Task<'a>,
}

impl<M: Mask + ?Sized, C: ScoreMod + ?Sized> SimdOp for QueryBlock<'_, M, C> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { problem, spec, tiles, workspace, mut task } = self;
        let shape = problem.shape();
        let kv_head = shape.kv_head(task.heads.start);
        let (k_rows, v_rows) = problem.kv_rows(task.sequence, kv_head);
        let rows_of_task = task.rows.clone();
        // Rows that stand apart come one by one, beside each other only the heads that share their keys.
        let n_rows = if tiles.are_rows_apart() { 1 } else { rows_of_task.len() };
        for first in rows_of_task.step_by(n_rows.max(1)) {
            task.rows = first..first + n_rows;
            let n_lanes = task.heads.len() * n_rows;
            if n_lanes <= FEW && few::serves(spec) {
                few::attend(simd, problem, spec, &mut workspace.few, &mut task);
                continue;
            }
            let Workspace { panels, rows, scores, wide_k, wide_v, finite_v, key_scale, native, .. } =
                &mut *workspace;
            let panels = &mut panels[..n_lanes.div_ceil(PANEL)];
            for (p, panel) in panels.iter_mut().enumerate() {
                let lanes = p * PANEL..((p + 1) * PANEL).min(n_lanes);
                panel.start(simd, problem, spec, &task, lanes, rows);
            }
            if let Some(native) = native {
                native.start(panels, problem, task.sequence);
            }
            let key_bias = spec.key_bias_of(problem, &task);
            let tile = Tile { spec, key_bias, shape };
            // Where every panel would make the same keys ready again, they stay together while that is possible.
            let ready = native.is_none()
                && spec.qk_norm.is_none()
                && task.share.is_none()
                && k_rows.is_in_place()
                && v_rows.is_in_place();
            let alone = if ready { NEAR_BYTES / (4 * (shape.head_dim + shape.head_dim_v)).max(1) } else { 0 };
            for company in companies(panels, alone) {
                let mut spans = match &panels[company.clone()] {
                    [one] => one.spans.clone(),
                    many => union(many.iter().flat_map(|panel| panel.spans.iter().cloned()).collect()),
                };
                let alike = panels[company.clone()].iter().all(|panel| panel.spans == spans);
                if let Some(share) = &task.share {
                    spans = share_of(&spans, share.clone());
                }
                let chunks = Chunks::new(&spans, tiles.block_kv(), SHORT);
                for (c, ranges) in chunks.iter().enumerate() {
                    let next = chunks.get(c + 1).filter(|_| ready);
                    let n_keys = ranges.iter().map(Range::len).sum();
                    let n_turns = company.len() * turns(n_keys, shape.head_dim_v);
                    let mut ahead = Ahead::new(next, [&k_rows, &v_rows], n_turns);
                    key_scale.clear();
                    let packed = native
                        .as_mut()
                        .and_then(|native| native.pack(simd, (&k_rows, &v_rows), ranges).then_some(native));
                    let mut rows = match packed {
                        Some(native) => KeyRowsOf::Pairs(native),
                        None => {
                            KeyRowsOf::Wide { k: k_rows.wide(ranges, wide_k), v: v_rows.wide(ranges, wide_v) }
                        }
                    };
                    if let (Some(norm), KeyRowsOf::Wide { k, .. }) = (&spec.qk_norm, &rows) {
                        key_scale.extend((0..n_keys).map(|key| norm.k().factor(k.row(key, shape.head_dim))));
                    }
                    for p in company.clone() {
                        let panel = &mut panels[p];
                        let [keys] = ranges else {
                            let keys = Keys { ranges, skip: 0, scale: key_scale, all_seen: alike };
                            let scratch = TileScratch { scores, finite_v, ahead: &mut ahead };
                            tile.attend(simd, (p, panel), keys, &mut rows, scratch);
                            continue;
                        };
                        for at in panel.spans.partition_point(|span| span.end <= keys.start).. {
                            let Some(span) = panel.spans.get(at).filter(|span| span.start < keys.end) else {
                                break;
                            };
                            let seen = span.start.max(keys.start)..span.end.min(keys.end);
                            let skip = seen.start - keys.start;
                            let scale = &key_scale[skip.min(key_scale.len())..];
                            let keys = Keys { ranges: &[seen], skip, scale, all_seen: true };
                            let scratch = TileScratch { scores, finite_v, ahead: &mut ahead };
                            tile.attend(simd, (p, panel), keys, &mut rows, scratch);
                        }
                    }
                }
            }
            write(simd, panels, spec.sinks, &mut task, rows);
        }
    }
}

/// Divides, rounds and stores the rows with their log-sum-exps; or stores them as they are, to be merged. `rows` is
/// scratch, `[PANEL, head_dim_v]`.
#[inline(always)]
fn write<S: Simd>(
    simd: S,
    panels: &[Panel],
    sinks: Option<&[f32]>,
    task: &mut Task<'_>,
    rows: &mut Vec<f32>,
) {
    for panel in panels {
        let width = panel.acc.len() / PANEL;
        rows.resize(PANEL * width, 0.0);
        transpose(simd, Rows::new(&panel.acc, width, PANEL, PANEL), 1.0, rows, width);
        for segment in &panel.segments {
            let sink = sinks.map(|sinks| sinks[segment.head.head]);
            for (lane, i) in segment.lanes() {
                let acc = &rows[lane * width..][..width];
                let (place, number) = task.place(segment.head.head, i);
                emit(&mut task.out, place, number, acc, panel.softmax.state(lane), sink);
            }
        }
    }
}
