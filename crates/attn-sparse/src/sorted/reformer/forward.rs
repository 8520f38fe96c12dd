//! The rounds of some heads at a time, merged token by token.

use super::chunks::{Chunks, Unit};
use super::hashing::Resolved;
use super::order::Orders;
use super::{Reformer, Rounds};
use crate::sorted::rows::{BLOCK, head_norms, heads, write_entries};
use crate::sorted::self_score::SelfScore;
use attn_core::mask::Mask;
use attn_core::merge::merge_into;
use attn_core::score::ScoreMod;
use attn_core::{AttnShape, OutMut, Qkv, Result, View, ViewMut};
use attn_flash::engine::{AnySpec, Problem, attend_any};
use rayon::prelude::*;
use std::sync::Arc;

/// Gathered rows of a call: heads are taken together up to here.
const ROWS: usize = 1 << 17;

/// Heads that a call takes at a time.
pub(super) fn entries(shape: &AttnShape) -> usize {
    (ROWS / shape.n_q.max(1)).clamp(1, (shape.batch * shape.n_heads_q).max(1))
}

/// A forward pass.
pub(super) struct Forward<'a> {
    pub(super) config: &'a Reformer,
    pub(super) x: Qkv<'a>,
    pub(super) softmax_scale: f32,
    pub(super) hashing: Resolved<'a>,
    pub(super) keep: bool,
}

impl Forward<'_> {
    pub(super) fn run(self, mut out: OutMut<'_>, mut lse: Option<&mut [f32]>) -> Result<Rounds> {
        let shape = self.x.shape();
        let lowest = if self.config.shared_qk {
            // Keys have unit length.
            let longest = heads(&shape).into_iter().map(|at| head_norms(self.x.q(), at)).fold(0.0, f32::max);
            -self.softmax_scale.abs() * longest
        } else {
            f32::NEG_INFINITY
        };
        let self_score = SelfScore::new(self.config.self_logit, lowest);
        let n_buckets = self.hashing.n_buckets();
        let mut rounds = Rounds { units: Vec::new(), n_buckets, self_score, lse: Vec::new() };
        if shape.rows() == 0 || shape.n_kv == 0 {
            out.fill_zero();
            lse.into_iter().for_each(|lse| lse.fill(f32::NEG_INFINITY));
            return Ok(rounds);
        }
        let (n, d_v, rounds_of_unit) = (shape.n_q, shape.head_dim_v, self.config.n_hashes * shape.n_q);
        let (heads, entries) = (heads(&shape), entries(&shape));
        let mut writer = write_entries(out);
        let (mut sums, mut merged) = (vec![0.0; entries * n * d_v], vec![0.0; entries * n]);
        for (at, heads) in heads.chunks(entries).enumerate() {
            let units = self.units(heads);
            let (sums, merged) = (&mut sums[..heads.len() * n * d_v], &mut merged[..heads.len() * n]);
            merged.fill(f32::NEG_INFINITY);
            let kept = self.keep.then(|| {
                let first = rounds.lse.len();
                rounds.lse.resize(first + heads.len() * rounds_of_unit, 0.0);
                first
            });
            let kept = kept.map(|first| &mut rounds.lse[first..]);
            self.merge_rounds(&units, self_score, sums, merged, kept)?;
            writer.write(sums);
            if let Some(lse) = &mut lse {
                let to = lse[at * entries * n..].iter_mut().zip(merged.iter());
                to.for_each(|(to, lse)| *to = self_score.of(*lse));
            }
            if self.keep {
                rounds.units.extend(units);
            }
        }
        Ok(rounds)
    }

    fn units(&self, heads: &[[usize; 2]]) -> Vec<Unit> {
        let (shape, config) = (self.x.shape(), self.config);
        let orders = |of_keys: bool, at: [usize; 2]| {
            let rows = if of_keys { self.x.k() } else { self.x.q() };
            let buckets = self.hashing.buckets(rows, at, of_keys);
            Arc::new(Orders::new(buckets, shape.n_q, self.hashing.n_buckets(), config.bucket_size))
        };
        let mut units: Vec<Unit> = Vec::with_capacity(heads.len());
        for &[batch, head] in heads {
            let (kv_head, q) = (shape.kv_head(head), orders(false, [batch, head]));
            let k = match units.last() {
                _ if config.shared_qk => q.clone(),
                Some(last) if (last.batch, last.kv_head) == (batch, kv_head) => last.k.clone(),
                _ => orders(true, [batch, kv_head]),
            };
            units.push(Unit { batch, head, kv_head, q, k });
        }
        units
    }

    /// Attends all rounds; `sums [units, n, head_dim_v]` and `merged [units, n]` hold nothing (-inf) before.
    fn merge_rounds(
        &self,
        units: &[Unit],
        self_score: SelfScore,
        sums: &mut [f32],
        merged: &mut [f32],
        mut kept: Option<&mut [f32]>,
    ) -> Result<()> {
        let (n, d_v) = (self.x.shape().n_q, self.x.shape().head_dim_v);
        let mut chunks = Chunks::new(self.config, self.x, (self.hashing.n_buckets(), self_score.used), units);
        let n_slots = chunks.rows()[0];
        let shape = chunks.shape();
        let mut out = vec![0.0; shape.rows() * d_v];
        let mut lse = vec![0.0; shape.rows()];
        for round in 0..self.config.n_hashes {
            chunks.load(round);
            let slots = chunks.slots();
            let spec = AnySpec::new(self.softmax_scale, &slots as &dyn Mask, &slots as &dyn ScoreMod);
            let view = ViewMut::contiguous("out", &mut out, shape.out())?;
            attend_any(Problem::batch(chunks.qkv()?), view.into(), Some(&mut lse), &spec)?;
            for (at, unit) in units.iter().enumerate() {
                let (out, lse) = (&out[at * n_slots * d_v..], &lse[at * n_slots..]);
                let blocks = sums[at * n * d_v..][..n * d_v].par_chunks_mut(BLOCK * d_v);
                let blocks = blocks.zip(merged[at * n..][..n].par_chunks_mut(BLOCK)).enumerate();
                blocks.try_for_each(|(block, (sums, merged))| {
                    for (i, (sum, merged)) in sums.chunks_exact_mut(d_v).zip(merged).enumerate() {
                        let slot = unit.q.rank(round, block * BLOCK + i);
                        let part = &out[slot * d_v..][..d_v];
                        merge_into(sum, std::slice::from_mut(merged), part, &lse[slot..slot + 1])?;
                    }
                    Ok(())
                })?;
                if let Some(kept) = &mut kept {
                    let first = (at * self.config.n_hashes + round) * n;
                    let tokens = kept[first..][..n].iter_mut().enumerate();
                    tokens.for_each(|(token, kept)| *kept = lse[unit.q.rank(round, token)]);
                }
            }
        }
        // A row that saw nothing was never written by the merge.
        let rows = sums.par_chunks_mut(d_v).zip(merged.par_iter());
        rows.filter(|(_, lse)| **lse == f32::NEG_INFINITY).for_each(|(row, _)| row.fill(0.0));
        Ok(())
    }
}

/// A view of all rows of the gathered problem, for what follows a forward pass.
pub(super) fn rows_of<'a>(name: &str, rows: &'a [f32], shape: [usize; 4]) -> Result<View<'a, f32>> {
    View::contiguous(name, rows, shape)
}
