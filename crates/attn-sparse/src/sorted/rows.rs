//! Rows gathered from strided tensors into contiguous f32 ones, and tokens found back from their slots.

use attn_core::view::Rows;
use attn_core::{AttnShape, Element, OutMut, OutRows, TensorView};
use rayon::prelude::*;
use std::ops::Range;

/// Rows that one thread handles at a time.
pub(super) const BLOCK: usize = 64;

/// Copies row `source(i)` of a head to row `i` of `to`, widened to f32; where there is no source, zeros.
pub(super) fn gather(
    from: &TensorView<'_>,
    [batch, head]: [usize; 2],
    to: &mut [f32],
    source: impl Fn(usize) -> Option<usize> + Sync,
) {
    fn typed<E: Element>(from: Rows<'_, E>, to: &mut [f32], source: impl Fn(usize) -> Option<usize> + Sync) {
        let width = from.width();
        to.par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, rows)| {
            for (i, row) in rows.chunks_exact_mut(width).enumerate() {
                match source(block * BLOCK + i) {
                    Some(at) => row.iter_mut().zip(from.row(at)).for_each(|(to, x)| *to = x.load()),
                    None => row.fill(0.0),
                }
            }
        });
    }
    match from {
        TensorView::F32(view) => typed(view.head(batch, head), to, source),
        TensorView::Bf16(view) => typed(view.head(batch, head), to, source),
        TensorView::F16(view) => typed(view.head(batch, head), to, source),
    }
}

/// Scales every row of `width` to unit length; rows shorter than `1e-12` are divided by that.
pub(super) fn normalize(rows: &mut [f32], width: usize) {
    rows.par_chunks_mut(BLOCK * width).for_each(|rows| {
        for row in rows.chunks_exact_mut(width) {
            let factor = 1.0 / length(row);
            row.iter_mut().for_each(|x| *x *= factor);
        }
    });
}

/// The length of a row, at least `1e-12`.
pub(super) fn length(row: &[f32]) -> f32 {
    let squares: f64 = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    squares.sqrt().max(1e-12) as f32
}

/// Writes an output head after head, rounded once.
pub(super) struct Writer<'a> {
    pieces: Vec<OutRows<'a>>,
    /// Number of pieces of a head, rows of a head, width.
    head: [usize; 3],
}

/// A writer of `out`, starting at its first head.
pub(super) fn write_entries(out: OutMut<'_>) -> Writer<'_> {
    let [_, _, n, width] = out.shape();
    let blocks: Vec<Range<usize>> =
        (0..n).step_by(BLOCK).map(|first| first..(first + BLOCK).min(n)).collect();
    let head = [blocks.len(), n, width];
    let mut pieces = out.into_cuts(blocks);
    pieces.reverse();
    Writer { pieces, head }
}

impl Writer<'_> {
    /// Writes the next heads, `[heads, length, width]`.
    pub(super) fn write(&mut self, rows: &[f32]) {
        let [per_head, n, width] = self.head;
        if rows.is_empty() || per_head == 0 {
            return;
        }
        let n_pieces = rows.len() / (n * width) * per_head;
        let pieces = self.pieces.split_off(self.pieces.len().saturating_sub(n_pieces));
        pieces.into_par_iter().rev().enumerate().for_each(|(at, mut piece)| {
            let (head, first) = (at / per_head, at % per_head * BLOCK);
            let rows = &rows[head * n * width..][..n * width];
            let rows = rows.chunks_exact(width).skip(first).take(BLOCK).enumerate();
            rows.for_each(|(i, row)| piece.store(i, row.iter().copied()));
        });
    }
}

/// The slots in which each token stands, in ascending order: those of token `t` are
/// `slots[starts[t]..starts[t + 1]]`.
#[derive(Debug, Clone)]
pub(super) struct Places {
    starts: Vec<u32>,
    slots: Vec<u32>,
}

impl Places {
    /// Finds `n` tokens back in `tokens`, one a slot; slots of no token below `n` are left out.
    pub(super) fn new(tokens: &[i32], n: usize) -> Self {
        let token = |slot: usize| usize::try_from(tokens[slot]).ok().filter(|t| *t < n);
        let mut starts = vec![0u32; n + 1];
        (0..tokens.len()).filter_map(token).for_each(|t| starts[t + 1] += 1);
        (0..n).for_each(|t| starts[t + 1] += starts[t]);
        let mut next = starts.clone();
        let mut slots = vec![0; starts[n] as usize];
        for slot in 0..tokens.len() {
            if let Some(t) = token(slot) {
                slots[next[t] as usize] = slot as u32;
                next[t] += 1;
            }
        }
        Self { starts, slots }
    }

    /// The slots of token `t`.
    pub(super) fn of(&self, t: usize) -> impl Iterator<Item = usize> + '_ {
        self.slots[self.starts[t] as usize..self.starts[t + 1] as usize].iter().map(|slot| *slot as usize)
    }

    /// Adds, for each token, the rows of its slots to its row of `to [n, width]`.
    pub(super) fn add(&self, rows: &[f32], to: &mut [f32], width: usize) {
        to.par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, tokens)| {
            for (i, sum) in tokens.chunks_exact_mut(width).enumerate() {
                for slot in self.of(block * BLOCK + i) {
                    sum.iter_mut().zip(&rows[slot * width..]).for_each(|(sum, x)| *sum += x);
                }
            }
        });
    }
}

/// The sums of one head.
pub(super) fn head_sums(sums: &mut [f32], head: usize, len: usize) -> &mut [f32] {
    &mut sums[head * len..][..len]
}

/// Adds what the gradients of rows of unit length, `[n, width]`, pass on to the rows of a head that they were made from:
/// `(dy - y (y . dy)) / |x|` with `y = x / |x|`.
pub(super) fn through_the_norm(rows: &TensorView<'_>, at: [usize; 2], of_unit: &[f32], to: &mut [f32]) {
    let width = rows.shape()[3];
    let mut from = vec![0.0; to.len()];
    gather(rows, at, &mut from, Some);
    let blocks = to.par_chunks_mut(BLOCK * width).zip(of_unit.par_chunks(BLOCK * width));
    blocks.zip(from.par_chunks(BLOCK * width)).for_each(|((to, grads), rows)| {
        let rows = to.chunks_exact_mut(width).zip(grads.chunks_exact(width)).zip(rows.chunks_exact(width));
        for ((to, grad), x) in rows {
            let length = length(x);
            let along: f32 = x.iter().zip(grad).map(|(x, g)| x * g).sum::<f32>() / (length * length);
            to.iter_mut().zip(grad.iter().zip(x)).for_each(|(to, (g, x))| *to += (g - along * x) / length);
        }
    });
}

/// Batch entry and query head of every head of a problem, in the order of its outputs.
pub(super) fn heads(shape: &AttnShape) -> Vec<[usize; 2]> {
    (0..shape.batch).flat_map(|batch| (0..shape.n_heads_q).map(move |head| [batch, head])).collect()
}

/// The length of the longest row of a head; NaN if one is.
pub(super) fn head_norms(rows: &TensorView<'_>, at: [usize; 2]) -> f32 {
    let [_, _, n, width] = rows.shape();
    let longest = |block: usize| {
        let mut row = vec![0.0; width];
        (block * BLOCK..n.min((block + 1) * BLOCK)).fold(0.0, |longest: f64, i| {
            rows.read_row(at[0], at[1], i, &mut row);
            let squares: f64 = row.iter().map(|x| x * x).sum();
            if squares > longest || squares.is_nan() { squares } else { longest }
        })
    };
    let blocks = (0..n.div_ceil(BLOCK)).into_par_iter().map(longest);
    blocks.reduce(|| 0.0, |a, b| if b > a || b.is_nan() { b } else { a }).sqrt() as f32
}
