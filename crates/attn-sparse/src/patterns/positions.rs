//! Numbers that key positions carry, as queries see them.

use attn_core::{AttnError, AttnShape, Result};

/// Of `ids [n_kv]` or `[batch, n_kv]`, those of the queries, which stand at `i + n_kv - n_q`: `[n_q]` or `[batch, n_q]`. A
/// query before the first key has -1.
pub(super) fn of_queries(name: &str, ids: &[i32], shape: &AttnShape) -> Result<Vec<i32>> {
    let AttnShape { batch, n_q, n_kv, .. } = *shape;
    if ids.len() != n_kv && ids.len() != batch * n_kv {
        let expected = format!("{n_kv}, or {n_kv} for each of {batch} batch entries");
        return Err(AttnError::shape(name, "n_kv", ids.len(), expected));
    }
    let (skip, before) = (n_kv.saturating_sub(n_q), n_q.saturating_sub(n_kv));
    let entries = ids.len().checked_div(n_kv).unwrap_or(1);
    let of_entry = |entry: usize| {
        let ids = &ids[entry * n_kv..(entry + 1) * n_kv];
        std::iter::repeat_n(-1, before).chain(ids[skip..].iter().copied())
    };
    Ok((0..entries).flat_map(of_entry).collect())
}
