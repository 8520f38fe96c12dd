//! The parts' results, merged.

use super::order::Gathered;
use super::{Order, Part};
use attn_core::merge::merge_weights;
use attn_core::parallel::for_each_task;
use attn_core::score::Unchanged;
use attn_core::view::ViewMut;
use attn_core::{AttnError, Qkv, Result};
use attn_flash::engine::{AnySpec, Problem, attend_any};

/// Merged rows.
pub(crate) struct Merged {
    /// `[batch, n_heads_q, n_q, head_dim_v]`.
    pub(crate) out: Vec<f32>,
    /// `[batch, n_heads_q, n_q]`.
    pub(crate) lse: Vec<f32>,
}

/// Attends every part of `sources[part.source]` and merges. All sources have one shape.
pub(crate) fn forward(sources: &[Qkv<'_>], parts: &[Part], softmax_scale: f32) -> Result<Merged> {
    let shape = sources[0].shape();
    let mut merged: Option<Merged> = None;
    for part in parts {
        let [q, k, v] = gathered(sources, part)?;
        let x = Qkv::new(q.view()?, k.view()?, v.view()?)?;
        let rows = x.shape();
        if rows.rows() == 0 {
            continue;
        }
        let mut result = Merged {
            out: vec![0.0; rows.rows() * rows.head_dim_v],
            lse: vec![f32::NEG_INFINITY; rows.rows()],
        };
        let out = ViewMut::contiguous("out", &mut result.out, rows.out())?;
        let spec = AnySpec::new(softmax_scale, &*part.mask, &Unchanged);
        attend_any(Problem::batch(x), out.into(), Some(&mut result.lse), &spec)?;
        match &mut merged {
            None if part.queries.is_natural() => merged = Some(result),
            merged => {
                let merged = merged.get_or_insert_with(|| nothing(shape.rows(), shape.head_dim_v));
                let sizes = [shape.n_heads_q, shape.n_q, rows.n_q, shape.head_dim_v];
                merge(merged, &result, &part.queries, sizes);
            }
        }
    }
    Ok(merged.unwrap_or_else(|| nothing(shape.rows(), shape.head_dim_v)))
}

/// Rows that see nothing.
fn nothing(rows: usize, width: usize) -> Merged {
    Merged { out: vec![0.0; rows * width], lse: vec![f32::NEG_INFINITY; rows] }
}

/// q, k and v of the part's source in the part's orders.
pub(super) fn gathered<'a>(sources: &[Qkv<'a>], part: &Part) -> Result<[Gathered<'a>; 3]> {
    let Some(x) = sources.get(part.source) else {
        return Err(AttnError::value("source of a part", part.source, format!("below {}", sources.len())));
    };
    let shape = x.shape();
    part.queries.check("order of queries", shape.batch, shape.n_q)?;
    part.keys.check("order of keys", shape.batch, shape.n_kv)?;
    Ok([
        Gathered::new(*x.q(), &part.queries),
        Gathered::new(*x.k(), &part.keys),
        Gathered::new(*x.v(), &part.keys),
    ])
}

/// Merges a part's rows into the rows they stand for.
fn merge(merged: &mut Merged, part: &Merged, order: &Order, [heads, n, len, width]: [usize; 4]) {
    let wholes = merged.out.chunks_exact_mut(n * width).zip(merged.lse.chunks_exact_mut(n));
    let parts = part.out.chunks_exact(len * width).zip(part.lse.chunks_exact(len));
    for_each_task(
        wholes.zip(parts).enumerate(),
        || (),
        |(), (head, ((out, lse), (part_out, part_lse)))| {
            for (place, row) in order.places(head / heads, n) {
                let (keep, add, both) = merge_weights(lse[row], part_lse[place]);
                lse[row] = both;
                // A part of weight 0 contributes nothing, whatever it holds.
                if add != 0.0 {
                    let part = &part_out[place * width..][..width];
                    for (out, part) in out[row * width..][..width].iter_mut().zip(part) {
                        let kept = if keep == 0.0 { 0.0 } else { keep * *out };
                        *out = kept + add * part;
                    }
                }
            }
        },
    );
}
