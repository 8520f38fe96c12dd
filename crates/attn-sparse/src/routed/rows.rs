//! Rows of tensors of any storage type, as f32.

use attn_core::view::View;
use attn_core::{Element, OutMut, TensorView};
use std::ops::Range;

/// Rows `range` of a head, one after another, widened.
pub(super) fn rows_f32(x: &TensorView<'_>, batch: usize, head: usize, range: Range<usize>) -> Vec<f32> {
    fn typed<E: Element>(view: &View<'_, E>, batch: usize, head: usize, range: Range<usize>) -> Vec<f32> {
        let rows = view.head(batch, head).slice(range);
        let mut wide = Vec::with_capacity(rows.len() * rows.width());
        rows.iter().for_each(|row| wide.extend(row.iter().map(|x| x.load())));
        wide
    }
    match x {
        TensorView::F32(view) => typed(view, batch, head, range),
        TensorView::Bf16(view) => typed(view, batch, head, range),
        TensorView::F16(view) => typed(view, batch, head, range),
    }
}

/// Rows `range` of all heads one after another: `[batch, heads, rows, width]`, row-major.
pub(super) fn heads_f32(x: &TensorView<'_>, range: Range<usize>) -> Vec<f32> {
    let [batch, heads, _, width] = x.shape();
    let mut wide = Vec::with_capacity(batch * heads * range.len() * width);
    for head in 0..batch * heads {
        wide.extend(rows_f32(x, head / heads, head % heads, range.clone()));
    }
    wide
}

/// Rounds `[batch, heads, length, width]`, row-major, to the dtype of `out`.
pub(super) fn store(out: OutMut<'_>, rows: &[f32]) {
    let [_, _, n, width] = out.shape();
    let mut rows = rows.chunks_exact(width.max(1));
    for mut head in out.into_cuts(std::iter::once(0..n).collect()) {
        for (i, row) in rows.by_ref().take(n).enumerate() {
            head.store(i, row.iter().copied());
        }
    }
}
