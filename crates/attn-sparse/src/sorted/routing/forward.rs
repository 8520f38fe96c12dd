//! All clusters of some heads at a time, averaged token by token.

use super::Routing;
use super::groups::{Groups, Unit};
use super::inputs::Checked;
use crate::sorted::rows::{BLOCK, heads, write_entries};
use attn_core::mask::Mask;
use attn_core::score::ScoreMod;
use attn_core::{AttnShape, OutMut, Qkv, Result, ViewMut};
use attn_flash::engine::{AnySpec, Problem, attend_any};
use rayon::prelude::*;

/// Rows of a call: heads are taken together up to here.
const ROWS: usize = 1 << 17;

/// Heads that a call takes at a time.
pub(super) fn entries(shape: &AttnShape) -> usize {
    (ROWS / shape.n_q.max(1)).clamp(1, (shape.batch * shape.n_heads_q).max(1))
}

/// What the backward pass needs of some heads.
pub(super) struct Kept {
    pub(super) units: Vec<Unit>,
    /// `[units, clusters, window, head_dim_v]`.
    pub(super) out: Vec<f32>,
    /// `[units, clusters, window]`.
    pub(super) lse: Vec<f32>,
}

/// Writes `out`; keeps what the backward pass needs, if asked to.
pub(super) fn run(
    config: &Routing,
    x: Qkv<'_>,
    inputs: &Checked<'_>,
    mut out: OutMut<'_>,
    keep: bool,
) -> Result<Vec<Kept>> {
    let shape = x.shape();
    if shape.rows() == 0 || (shape.n_kv == 0 && inputs.n_memory == 0) {
        out.fill_zero();
        return Ok(Vec::new());
    }
    let (n, d_v, entries) = (shape.n_q, shape.head_dim_v, entries(&shape));
    let heads = heads(&shape);
    let mut writer = write_entries(out);
    let mut kept = Vec::new();
    let mut means = vec![0.0; entries * n * d_v];
    for heads in heads.chunks(entries) {
        let units: Vec<Unit> = heads.iter().map(|at| Unit::new(config, &x, inputs, *at)).collect();
        let groups = Groups::new(config, &x, inputs, &units);
        let gathered = groups.shape();
        let (mut out, mut lse) = (vec![0.0; gathered.rows() * d_v], vec![0.0; gathered.rows()]);
        let slots = groups.slots();
        let spec = AnySpec::new(inputs.softmax_scale, &slots as &dyn Mask, &slots as &dyn ScoreMod);
        let view = ViewMut::contiguous("out", &mut out, gathered.out())?;
        attend_any(Problem::batch(groups.qkv()?), view.into(), Some(&mut lse), &spec)?;
        drop(groups);
        let n_slots = inputs.clusters * inputs.windows[0];
        for (u, unit) in units.iter().enumerate() {
            let (out, lse) = (&out[u * n_slots * d_v..], &lse[u * n_slots..]);
            means[u * n * d_v..][..n * d_v].par_chunks_mut(BLOCK * d_v).enumerate().for_each(
                |(block, rows)| {
                    for (i, mean) in rows.chunks_exact_mut(d_v).enumerate() {
                        mean.fill(0.0);
                        let token = block * BLOCK + i;
                        for slot in seeing(unit, token, lse) {
                            mean.iter_mut().zip(&out[slot * d_v..]).for_each(|(mean, x)| *mean += x);
                        }
                        let share = share(unit, token, lse, config.mean_eps);
                        mean.iter_mut().for_each(|x| *x *= share);
                    }
                },
            );
        }
        writer.write(&means[..units.len() * n * d_v]);
        if keep {
            kept.push(Kept { units, out, lse });
        }
    }
    Ok(kept)
}

/// The slots of a token in which it sees a key.
fn seeing<'a>(unit: &'a Unit, token: usize, lse: &'a [f32]) -> impl Iterator<Item = usize> + 'a {
    unit.places.of(token).filter(|slot| lse[*slot] != f32::NEG_INFINITY)
}

/// What the outputs of each slot of a token are multiplied with.
pub(super) fn share(unit: &Unit, token: usize, lse: &[f32], eps: f32) -> f32 {
    match seeing(unit, token, lse).count() {
        0 => 0.0,
        count => 1.0 / (count as f32 + eps),
    }
}
