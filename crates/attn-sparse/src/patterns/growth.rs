//! What patterns made of patterns promise.

use attn_core::Growth;
use attn_flash::stream::Kept;

/// The faster growth.
pub(super) fn larger(a: Growth, b: Growth) -> Growth {
    let rank = |growth| match growth {
        Growth::Constant => 0,
        Growth::Linear => 1,
        Growth::Linearithmic => 2,
        Growth::SubQuadratic => 3,
        Growth::Quadratic => 4,
    };
    if rank(a) >= rank(b) { a } else { b }
}

/// Rows that serve both; `None` if either cannot stream.
pub(super) fn both_kept(a: Option<Kept>, b: Option<Kept>) -> Option<Kept> {
    let (a, b) = (a?, b?);
    let last = a.last.zip(b.last).map(|(a, b)| a.max(b));
    Some(Kept { sinks: a.sinks.max(b.sinks), last })
}
