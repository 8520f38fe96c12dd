//! What the sort network compares: rows of each bucket, pooled; see the formulas of the variant.

use super::SinkhornKind;
use super::layout::Buckets;
use attn_core::TensorView;

/// Pooled queries and keys of a head, in f64.
pub(super) struct Pools {
    /// `[buckets, head_dim]`, or one row for `SortCut`.
    pub(super) q: Vec<f64>,
    /// `[buckets, head_dim]`.
    pub(super) k: Vec<f64>,
}

/// How a token enters pools: `each(token, bucket, slot, tokens so far with it)` in the order of buckets.
fn for_each_token(buckets: &Buckets, mut each: impl FnMut(usize, usize, usize, f64)) {
    for token in buckets.before..buckets.n {
        let (bucket, slot) = buckets.place(token);
        each(token, bucket, slot, (token - buckets.before + 1) as f64);
    }
}

/// Pools of one head.
pub(super) fn pools(
    kind: SinkhornKind,
    buckets: &Buckets,
    (q, of_q): (&TensorView<'_>, [usize; 2]),
    (k, of_k): (&TensorView<'_>, [usize; 2]),
) -> Pools {
    let d = q.shape()[3];
    let add =
        |to: &mut [f64], row: &[f64], share: f64| to.iter_mut().zip(row).for_each(|(to, x)| *to += share * x);
    let mut pools = Pools { q: vec![0.0; rows(kind, buckets) * d], k: vec![0.0; buckets.count * d] };
    let (mut row, mut so_far) = (vec![0.0; d], [vec![0.0; d], vec![0.0; d]]);
    for_each_token(buckets, |token, bucket, slot, count| {
        let sides = [(q, of_q, &mut pools.q), (k, of_k, &mut pools.k)];
        for (side, ((from, at, pool), so_far)) in sides.into_iter().zip(&mut so_far).enumerate() {
            from.read_row(at[0], at[1], token, &mut row);
            let len = buckets.len(bucket) as f64;
            match (kind, side) {
                (SinkhornKind::SortCut, 0) => add(pool, &row, 1.0 / buckets.n as f64),
                (SinkhornKind::Causal, _) => {
                    add(so_far, &row, 1.0);
                    if side == 1 || slot == 0 {
                        add(&mut pool[bucket * d..][..d], so_far, 1.0 / count);
                    }
                }
                _ => add(&mut pool[bucket * d..][..d], &row, 1.0 / len),
            }
        }
    });
    pools
}

/// Pooled queries of a head.
fn rows(kind: SinkhornKind, buckets: &Buckets) -> usize {
    if kind == SinkhornKind::SortCut { 1 } else { buckets.count }
}

/// Adds what gradients of pools pass on to the queries and keys of a head, `[n, d]` each.
pub(super) fn add_gradients(
    kind: SinkhornKind,
    buckets: &Buckets,
    d: usize,
    grads: &Pools,
    to: [&mut [f32]; 2],
) {
    for (side, (to, grads)) in to.into_iter().zip([&grads.q, &grads.k]).enumerate() {
        // For `Causal`, what all later means say of this token and the ones before.
        let mut later = vec![0.0f64; d];
        for token in (buckets.before..buckets.n).rev() {
            let (bucket, slot) = buckets.place(token);
            let (row, share) = match (kind, side) {
                (SinkhornKind::SortCut, 0) => (&grads[..d], 1.0 / buckets.n as f64),
                (SinkhornKind::Causal, _) => {
                    if side == 1 || slot == 0 {
                        let count = (token - buckets.before + 1) as f64;
                        let of = &grads[bucket * d..][..d];
                        later.iter_mut().zip(of).for_each(|(later, g)| *later += g / count);
                    }
                    (&later[..], 1.0)
                }
                _ => (&grads[bucket * d..][..d], 1.0 / buckets.len(bucket) as f64),
            };
            let to = &mut to[token * d..][..d];
            to.iter_mut().zip(row).for_each(|(to, g)| *to += (share * g) as f32);
        }
    }
}
