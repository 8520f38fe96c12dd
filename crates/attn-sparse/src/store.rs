//! Rows of f32 into an output of any storage type.

use attn_core::parallel::for_each_task;
use attn_core::{OutMut, Result, View};

/// Rounds `rows`, row-major and of the shape of `out`, to its dtype.
///
/// # Errors
/// [`attn_core::AttnError`] if `rows` has another number of elements.
pub(crate) fn store(out: OutMut<'_>, rows: &[f32]) -> Result<()> {
    let shape = out.shape();
    let [_, heads, n, _] = shape;
    let rows = View::contiguous("rows", rows, shape)?;
    if shape.contains(&0) {
        return Ok(());
    }
    for_each_task(
        out.into_cuts(std::iter::once(0..n).collect()).into_iter().enumerate(),
        || (),
        |(), (at, mut out)| {
            let head = rows.head(at / heads, at % heads);
            (0..n).for_each(|i| out.store(i, head.row(i).iter().copied()));
        },
    );
    Ok(())
}
