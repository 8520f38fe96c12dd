//! Rows of tensors of any storage type, as f32.

use attn_core::view::View;
use attn_core::{Element, TensorView};
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
