//! Gradients through all rounds.
//!
//! With the merged output `out_i` and the weight `w_ri = e^(lse_ri - lse_i)` of round `r`, the softmax over all rounds has
//!
//! ```text
//! ds_rij = w_ri p_rij (dout_i . v_j - dout_i . out_i)
//! ```
//!
//! which is the backward pass of round `r` alone, given `w_ri dout_i` as the gradient and `out_i` as the output. A key of unit
//! length `y = x / |x|` passes `(dy - y (y . dy)) / |x|` on to `x`.

use super::chunks::{Chunks, Unit};
use super::forward::{entries, rows_of};
use super::{Reformer, Rounds};
use crate::sorted::rows::{BLOCK, gather, head_sums, through_the_norm, write_entries};
use attn_core::mask::Mask;
use attn_core::score::ScoreMod;
use attn_core::{Qkv, QkvGrads, Result, TensorView, ViewMut};
use attn_flash::engine::{AnySpec, ForwardResult, Grads, OutputGrad, Problem, attend_backward_any};
use rayon::prelude::*;

/// A backward pass.
pub(super) struct Backward<'a> {
    pub(super) config: &'a Reformer,
    pub(super) x: Qkv<'a>,
    pub(super) softmax_scale: f32,
    pub(super) out: TensorView<'a>,
    pub(super) grad_out: TensorView<'a>,
    pub(super) rounds: &'a Rounds,
}

impl Backward<'_> {
    pub(super) fn run(self, grads: QkvGrads<'_>) -> Result<()> {
        let (shape, config) = (self.x.shape(), self.config);
        let (n, d, d_v) = (shape.n_q, shape.head_dim, shape.head_dim_v);
        let mut sums_k = vec![0.0; shape.k().iter().product()];
        let mut sums_v = vec![0.0; shape.v().iter().product()];
        let mut writer = write_entries(grads.q);
        let entries = entries(&shape);
        let weights = self.weights();
        for (at, units) in self.rounds.units.chunks(entries).enumerate() {
            let mut sums_q = vec![0.0; units.len() * n * d];
            // Gradients of keys that are queries.
            let mut sums_x = vec![0.0; if config.shared_qk { sums_q.len() } else { 0 }];
            let mut chunks =
                Chunks::new(config, self.x, (self.rounds.n_buckets, self.rounds.self_score.used), units);
            let [n_q, n_k] = chunks.rows();
            let gathered = chunks.shape();
            let mut rows = vec![0.0; units.len() * n_q * d_v];
            let (mut out, mut lse) = (rows.clone(), vec![f32::NEG_INFINITY; units.len() * n_q]);
            let mut grad_q = vec![0.0; gathered.q().iter().product()];
            let mut grad_k = vec![0.0; gathered.k().iter().product()];
            let mut grad_v = vec![0.0; gathered.v().iter().product()];
            for round in 0..config.n_hashes {
                chunks.load(round);
                for (u, unit) in units.iter().enumerate() {
                    let first = ((at * entries + u) * config.n_hashes + round) * n;
                    let slots = u * n_q * d_v..(u + 1) * n_q * d_v;
                    let (source, from) = (|slot| unit.q.token(round, slot), [unit.batch, unit.head]);
                    gather(&self.out, from, &mut out[slots.clone()], source);
                    gather(&self.grad_out, from, &mut rows[slots.clone()], source);
                    for (slot, row) in rows[slots].chunks_exact_mut(d_v).enumerate().take(n) {
                        let token = first + unit.q.tokens[round * n + slot] as usize;
                        row.iter_mut().for_each(|x| *x *= weights[token]);
                        lse[u * n_q + slot] = self.rounds.lse[token];
                    }
                }
                let slots = chunks.slots();
                let spec = AnySpec::new(self.softmax_scale, &slots as &dyn Mask, &slots as &dyn ScoreMod);
                let forward = ForwardResult { out: rows_of("out", &out, gathered.out())?.into(), lse: &lse };
                let grad = OutputGrad { out: rows_of("grad_out", &rows, gathered.out())?.into(), lse: None };
                let grads = Grads::new(
                    ViewMut::contiguous("grad_q", &mut grad_q, gathered.q())?.into(),
                    ViewMut::contiguous("grad_k", &mut grad_k, gathered.k())?.into(),
                    ViewMut::contiguous("grad_v", &mut grad_v, gathered.v())?.into(),
                );
                attend_backward_any(Problem::batch(chunks.qkv()?), forward, grad, grads, &spec)?;
                for (u, unit) in units.iter().enumerate() {
                    let sums = &mut sums_q[u * n * d..][..n * d];
                    add_queries(unit, round, &grad_q[u * n_q * d..], sums, d);
                    // Two windows of each chunk's rows but the outer ones.
                    let windows = 2 * (n_k - config.bucket_size);
                    let window = u * windows;
                    let kv = unit.batch * shape.n_heads_kv + unit.kv_head;
                    let sums = match config.shared_qk {
                        true => &mut sums_x[u * n * d..][..n * d],
                        false => head_sums(&mut sums_k, kv, n * d),
                    };
                    add_keys(unit, round, &grad_k[window * d..][..windows * d], sums, d);
                    let sums = head_sums(&mut sums_v, kv, n * d_v);
                    add_keys(unit, round, &grad_v[window * d_v..][..windows * d_v], sums, d_v);
                }
            }
            if config.shared_qk {
                for (u, unit) in units.iter().enumerate() {
                    let of_unit = &sums_x[u * n * d..][..n * d];
                    through_the_norm(
                        self.x.q(),
                        [unit.batch, unit.head],
                        of_unit,
                        &mut sums_q[u * n * d..][..n * d],
                    );
                }
            }
            writer.write(&sums_q);
        }
        write_entries(grads.k).write(&sums_k);
        write_entries(grads.v).write(&sums_v);
        Ok(())
    }

    /// `w_ri`, laid out as the log-sum-exps.
    fn weights(&self) -> Vec<f32> {
        let (n, n_hashes) = (self.x.shape().n_q, self.config.n_hashes);
        let mut weights = vec![0.0; self.rounds.lse.len()];
        let units = weights.par_chunks_mut((n * n_hashes).max(1));
        units.zip(self.rounds.lse.par_chunks((n * n_hashes).max(1))).for_each(|(weights, lse)| {
            for token in 0..n {
                let all = || (0..n_hashes).map(|round| f64::from(lse[round * n + token]));
                let most = all().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = all().map(|lse| (lse - most).exp()).sum();
                for (round, lse) in all().enumerate() {
                    let weight = if lse == f64::NEG_INFINITY { 0.0 } else { (lse - most).exp() / sum };
                    weights[round * n + token] = weight as f32;
                }
            }
        });
        weights
    }
}

/// Adds the gradients of a round's queries to those of their tokens.
fn add_queries(unit: &Unit, round: usize, slots: &[f32], tokens: &mut [f32], width: usize) {
    tokens.par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, rows)| {
        for (i, sum) in rows.chunks_exact_mut(width).enumerate() {
            let slot = unit.q.rank(round, block * BLOCK + i);
            sum.iter_mut().zip(&slots[slot * width..]).for_each(|(sum, x)| *sum += x);
        }
    });
}

/// Adds the gradients of a round's keys, in windows `[n_chunks, 2 chunk, width]` of the chunk before and the own one.
fn add_keys(unit: &Unit, round: usize, windows: &[f32], tokens: &mut [f32], width: usize) {
    let (chunk, n_chunks) = (unit.k.chunk, unit.k.n_chunks());
    let row = |window: usize, row: usize| &windows[(window * 2 * chunk + row) * width..][..width];
    let add = |sum: &mut [f32], row: &[f32]| sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
    tokens.par_chunks_mut(BLOCK * width).enumerate().for_each(|(block, rows)| {
        for (i, sum) in rows.chunks_exact_mut(width).enumerate() {
            let rank = unit.k.rank(round, block * BLOCK + i);
            let (own, at) = (rank / chunk, rank % chunk);
            add(sum, row(own, chunk + at));
            if own + 1 < n_chunks {
                add(sum, row(own + 1, at));
            }
        }
    });
    // The chunk before the first one is of another round, or the last of this one.
    for at in 0..chunk {
        if let Some((_, token)) = unit.k.key(round, at) {
            add(&mut tokens[token * width..][..width], row(0, at));
        }
    }
}
