//! All buckets of some heads at a time.

use super::groups::{Groups, Unit};
use super::mixture::Weights;
use super::network::Network;
use super::{Sinkhorn, SinkhornInputs};
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

/// A forward pass.
pub(super) struct Forward<'a> {
    pub(super) config: &'a Sinkhorn,
    pub(super) x: Qkv<'a>,
    pub(super) softmax_scale: f32,
    pub(super) inputs: &'a SinkhornInputs<'a>,
}

impl Forward<'_> {
    /// Writes `out`; gives the log-sum-exps `[batch, n_heads_q, n]` if asked to.
    pub(super) fn run(&self, mut out: OutMut<'_>, keep: bool) -> Result<Vec<f32>> {
        let shape = self.x.shape();
        let mut kept = Vec::new();
        if shape.rows() == 0 {
            out.fill_zero();
            return Ok(kept);
        }
        let (n, d_v) = (shape.n_q, shape.head_dim_v);
        let mut writer = write_entries(out);
        for heads in heads(&shape).chunks(entries(&shape)) {
            let units: Vec<Unit> = heads.iter().map(|at| Unit::new(self, *at)).collect();
            let groups = Groups::new(self, &units);
            let of = groups.shape;
            let (mut out, mut lse) = (vec![0.0; of.rows() * d_v], vec![0.0; of.rows()]);
            let slots = groups.slots();
            let spec = AnySpec::new(self.softmax_scale, &slots as &dyn Mask, &slots as &dyn ScoreMod);
            let view = ViewMut::contiguous("out", &mut out, of.out())?;
            attend_any(Problem::batch(groups.qkv()?), view.into(), Some(&mut lse), &spec)?;
            let mut rows = vec![0.0; units.len() * n * d_v];
            rows.par_chunks_mut(BLOCK * d_v).enumerate().for_each(|(block, rows)| {
                for (i, row) in rows.chunks_exact_mut(d_v).enumerate() {
                    let slot = slot(&units, &of, block * BLOCK + i);
                    row.copy_from_slice(&out[slot * d_v..][..d_v]);
                }
            });
            writer.write(&rows);
            if keep {
                kept.extend((0..units.len() * n).map(|row| lse[slot(&units, &of, row)]));
            }
        }
        Ok(kept)
    }

    /// The weights of a head: those given, or the network's.
    pub(super) fn weights(&self, at: [usize; 2]) -> Weights {
        let shape = self.x.shape();
        let [rows, sources] = self.config.sort_shape(&shape);
        match self.inputs.sort {
            Some(sort) => {
                let head = at[0] * shape.n_heads_q + at[1];
                let sort = sort[head * rows * sources..][..rows * sources].to_vec();
                Weights::from_dense(rows, sources, sort)
            }
            None => Network::new(self, at).weights(),
        }
    }
}

/// The slot of row `row [units, n]` among the gathered queries.
pub(super) fn slot(units: &[Unit], of: &AttnShape, row: usize) -> usize {
    let n = units[0].buckets.n;
    let (bucket, e) = units[row / n].buckets.place(row % n);
    (row / n * of.n_heads_q + bucket) * of.n_q + e
}
