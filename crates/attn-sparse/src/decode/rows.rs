//! Rows of a tensor of any storage type as f32.

use attn_core::{Element, TensorView, View};

/// Copies row `i` of a head, widened.
pub(crate) fn widen_row(from: &TensorView<'_>, [batch, head, i]: [usize; 3], to: &mut [f32]) {
    fn copy<E: Element>(from: &View<'_, E>, [batch, head, i]: [usize; 3], to: &mut [f32]) {
        to.iter_mut().zip(from.head(batch, head).row(i)).for_each(|(to, x)| *to = x.load());
    }
    match from {
        TensorView::F32(view) => copy(view, [batch, head, i], to),
        TensorView::Bf16(view) => copy(view, [batch, head, i], to),
        TensorView::F16(view) => copy(view, [batch, head, i], to),
    }
}
