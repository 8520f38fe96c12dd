//! A panel of rows against the keys of a cell.

use super::lists::{Entry, Lists};
use super::states::{Part, States};
use crate::engine::online_softmax::{OnlineSoftmax, Sought};
use crate::engine::rows::{HeadRows, KeyRows, Wide};
use crate::engine::tile::accumulate_poisoned;
use crate::tiles::PANEL;
use attn_core::simd::{Simd, SimdBase};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, all_finite, prefetch, product, transpose};
use attn_core::view::Rows;
use std::ops::Range;

/// Cells up to so many keys are never gathered.
const SMALL: usize = 256;
/// Gathered keys between the one that is copied and the one that is asked for.
const AHEAD: usize = 8;

/// The keys of one cell.
pub(super) struct Cell<'a> {
    pub(super) range: Range<usize>,
    pub(super) k: KeyRows<'a>,
    pub(super) v: KeyRows<'a>,
    /// Of all keys of the sequence.
    pub(super) bias: Option<&'a [f32]>,
}

/// Keys and values of a cell that are not read in place: widened once for all panels.
#[derive(Default)]
pub(super) struct WideCell {
    made: bool,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl WideCell {
    /// For the next cell.
    pub(super) fn clear(&mut self) {
        self.made = false;
    }

    /// All keys and values of the cell.
    fn of<'s>(&'s mut self, cell: &Cell<'s>) -> (Wide<'s>, Wide<'s>) {
        let made = std::mem::replace(&mut self.made, true);
        (wide(&cell.k, &cell.range, &mut self.k, made), wide(&cell.v, &cell.range, &mut self.v, made))
    }
}

fn wide<'s>(rows: &KeyRows<'s>, range: &Range<usize>, copy: &'s mut Vec<f32>, made: bool) -> Wide<'s> {
    let ranges = std::slice::from_ref(range);
    if rows.is_in_place() {
        return rows.wide(ranges, copy);
    }
    if !made {
        copy.resize(range.len() * rows.width(), 0.0);
        rows.copy_to(ranges, copy);
    }
    Wide { data: copy, stride: rows.width() }
}

/// Scratch, and up to [`PANEL`] queries.
#[derive(Default)]
pub(super) struct Panel {
    widths: [usize; 2],
    /// `[PANEL, head_dim]`.
    rows: Vec<f32>,
    /// `[head_dim, PANEL]`, scaled.
    q: Vec<f32>,
    /// `[head_dim_v, PANEL]`.
    acc: Vec<f32>,
    /// `[PANEL, head_dim_v]`.
    out: Vec<f32>,
    /// `[keys, PANEL]`.
    scores: Vec<f32>,
    /// Which lanes see each key, `[keys]`.
    seen: Vec<u32>,
    /// Keys of the cell that some lane lists, where they are gathered.
    keys: Vec<u32>,
    gathered: Gathered,
    finite_v: Vec<f32>,
}

/// Keys and values that lie apart, side by side.
#[derive(Default)]
struct Gathered {
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Panel {
    /// For heads of these widths and cells of `cell` keys.
    pub(super) fn size(&mut self, [head_dim, head_dim_v]: [usize; 2], cell: usize) {
        self.widths = [head_dim, head_dim_v];
        self.rows.resize(PANEL * head_dim, 0.0);
        self.q.resize(PANEL * head_dim, 0.0);
        self.acc.resize(PANEL * head_dim_v, 0.0);
        self.out.resize(PANEL * head_dim_v, 0.0);
        self.scores.resize(PANEL * cell, 0.0);
    }

    /// Takes its queries.
    #[inline(always)]
    pub(super) fn take<'q, S: Simd>(
        &mut self,
        simd: S,
        queries: impl Iterator<Item = &'q [f32]>,
        softmax_scale: f32,
    ) {
        let width = self.widths[0];
        let mut n = 0;
        for (row, q) in self.rows.chunks_exact_mut(width.max(1)).zip(queries) {
            row.copy_from_slice(q);
            n += 1;
        }
        transpose(simd, Rows::new(&self.rows, n, width, width), softmax_scale, &mut self.q, PANEL);
    }

    /// Attends what its rows list of a cell, and merges it into their states.
    #[inline(always)]
    pub(super) fn visit<S: Simd>(
        &mut self,
        simd: S,
        (cell, whole): (&Cell<'_>, &mut WideCell),
        lists: &Lists,
        entries: &[Entry],
        states: &mut States,
    ) {
        let [width, width_v] = self.widths;
        let lanes = entries.len().next_multiple_of(S::f32s::LEN);
        let is_full = |entry: &Entry| match lists.ranges(entry) {
            [(start, end)] => (end - start) as usize == cell.range.len(),
            _ => false,
        };
        let all_seen = entries.iter().all(is_full);
        let is_gathered = !all_seen && self.mark(cell, lists, entries);
        let (k, v) = if is_gathered { self.gathered.rows(cell, &self.keys) } else { whole.of(cell) };
        let n_keys = if is_gathered { self.keys.len() } else { cell.range.len() };

        let scores = &mut self.scores[..n_keys * PANEL];
        product(
            simd,
            [n_keys, lanes, width],
            Lhs { data: k.data, row_stride: k.stride, col_stride: 1 },
            Rhs { data: &self.q, stride: PANEL },
            TileMut { data: scores, stride: PANEL },
            Start::Zero,
        );
        let key = |at: usize| if is_gathered { self.keys[at] as usize } else { cell.range.start + at };
        if let Some(bias) = cell.bias {
            for (at, row) in scores.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
                row.iter_mut().for_each(|score| *score += bias[key(at)]);
            }
        }
        if !all_seen {
            for (row, seen) in scores.as_chunks_mut::<PANEL>().0.iter_mut().zip(&self.seen) {
                if *seen != u32::MAX {
                    hide(row, *seen);
                }
            }
        }
        // A cell starts anew: then a lane's arithmetic does not depend on the others.
        let mut softmax = OnlineSoftmax::new();
        let _ = softmax.absorb(simd, scores, &mut [], lanes, Sought::InTile);

        let size = [width_v, lanes, n_keys];
        let suspects = if all_seen && cell.bias.is_none() { 0 } else { n_keys };
        // A weight of 0 times a value of NaN or infinity would leak what the row must not see.
        if (0..suspects).any(|at| !all_finite(v.row(at, width_v))) {
            self.acc.fill(0.0);
            accumulate_poisoned(simd, size, v, scores, &mut self.acc, &mut self.finite_v);
        } else {
            product(
                simd,
                size,
                Lhs { data: v.data, row_stride: 1, col_stride: v.stride },
                Rhs { data: scores, stride: PANEL },
                TileMut { data: &mut self.acc, stride: PANEL },
                Start::Zero,
            );
        }
        transpose(simd, Rows::new(&self.acc, width_v, lanes, PANEL), 1.0, &mut self.out, width_v);
        let mut part = Part { acc: &self.out, max: [f32::NEG_INFINITY; PANEL], sum: [0.0; PANEL] };
        for lane in 0..entries.len() {
            (part.max[lane], part.sum[lane]) = softmax.state(lane);
        }
        states.merge(simd, &part, entries.iter().map(|entry| entry.lane as usize));
    }

    /// Notes which lanes see which keys, of the whole cell or, if they are few, of those that some lane sees: returns whether
    /// they are gathered.
    #[inline(always)]
    fn mark(&mut self, cell: &Cell<'_>, lists: &Lists, entries: &[Entry]) -> bool {
        self.seen.clear();
        self.seen.resize(cell.range.len(), 0);
        for (lane, entry) in entries.iter().enumerate() {
            for &(start, end) in lists.ranges(entry) {
                let keys = start as usize - cell.range.start..end as usize - cell.range.start;
                self.seen[keys].iter_mut().for_each(|seen| *seen |= 1 << lane);
            }
        }
        if cell.range.len() <= SMALL {
            return false;
        }
        let listed = self.seen.iter().filter(|seen| **seen != 0).count();
        if 4 * listed > 3 * cell.range.len() {
            return false;
        }
        let keys = &mut self.keys;
        keys.clear();
        for at in 0..self.seen.len() {
            let seen = self.seen[at];
            if seen != 0 {
                self.seen[keys.len()] = seen;
                keys.push((cell.range.start + at) as u32);
            }
        }
        true
    }
}

/// The scores of lanes that do not see the key become -inf.
#[inline(always)]
fn hide(row: &mut [f32; PANEL], seen: u32) {
    // On a copy: only so does the compiler use vectors.
    let mut hidden = *row;
    for (lane, score) in hidden.iter_mut().enumerate() {
        *score = if seen >> lane & 1 == 1 { *score } else { f32::NEG_INFINITY };
    }
    *row = hidden;
}

impl Gathered {
    #[inline(always)]
    fn rows<'s>(&'s mut self, cell: &Cell<'_>, keys: &[u32]) -> (Wide<'s>, Wide<'s>) {
        (gather(&cell.k, keys, &mut self.k), gather(&cell.v, keys, &mut self.v))
    }
}

#[inline(always)]
fn gather<'s>(rows: &KeyRows<'_>, keys: &[u32], copy: &'s mut Vec<f32>) -> Wide<'s> {
    let width = rows.width();
    if copy.len() < keys.len() * width {
        copy.resize(keys.len() * width, 0.0);
    }
    if let KeyRows::Strided(HeadRows::F32(rows)) = rows {
        for (at, (key, to)) in keys.iter().zip(copy.chunks_exact_mut(width.max(1))).enumerate() {
            if let Some(next) = keys.get(at + AHEAD) {
                prefetch(rows.row(*next as usize));
            }
            to.copy_from_slice(rows.row(*key as usize));
        }
    } else {
        let ranges: Vec<Range<usize>> = keys.iter().map(|key| *key as usize..*key as usize + 1).collect();
        rows.copy_to(&ranges, copy);
    }
    Wide { data: copy, stride: width }
}
