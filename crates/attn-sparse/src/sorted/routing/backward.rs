//! Gradients: each cluster's own, summed where its tokens stand.
//!
//! The average passes `dout_i / (number of clusters + mean_eps)` on to every cluster; keys of unit length pass theirs through
//! the norm.

use super::Routing;
use super::forward::{Kept, entries, share};
use super::groups::Groups;
use super::inputs::Checked;
use crate::sorted::rows::{Places, gather, head_sums, through_the_norm, write_entries};
use attn_core::mask::Mask;
use attn_core::score::ScoreMod;
use attn_core::{AttnError, Qkv, QkvGrads, Result, TensorView, View, ViewMut};
use attn_flash::engine::{AnySpec, ForwardResult, Grads, OutputGrad, Problem, attend_backward_any};

/// Gradients to be written.
#[derive(Debug)]
pub struct RoutingGrads<'a> {
    /// Of q, k and v; that of k is zero where the keys given are not read.
    pub qkv: QkvGrads<'a>,
    /// Of the memory keys, as many elements.
    pub mem_key: Option<&'a mut [f32]>,
    /// Of the memory values, as many elements.
    pub mem_value: Option<&'a mut [f32]>,
}

impl RoutingGrads<'_> {
    pub(super) fn check(&self, x: &Qkv<'_>, inputs: &Checked<'_>) -> Result<()> {
        self.qkv.check(x)?;
        let memory = [("grad_mem_key", &self.mem_key), ("grad_mem_value", &self.mem_value)];
        for ((name, grad), of) in memory.into_iter().zip(inputs.memory) {
            if let Some(grad) = grad
                && grad.len() != of.len()
            {
                return Err(AttnError::shape(name, "elements", grad.len(), of.len()));
            }
        }
        Ok(())
    }
}

/// A backward pass.
pub(super) struct Backward<'a> {
    pub(super) config: &'a Routing,
    pub(super) x: Qkv<'a>,
    pub(super) inputs: &'a Checked<'a>,
    pub(super) grad_out: TensorView<'a>,
    pub(super) kept: &'a Vec<Kept>,
}

impl Backward<'_> {
    pub(super) fn run(self, grads: RoutingGrads<'_>) -> Result<()> {
        let Self { config, x, inputs, grad_out, kept } = self;
        let shape = x.shape();
        let (d, d_v) = (shape.head_dim, shape.head_dim_v);
        let mut sums_k = vec![0.0; shape.k().iter().product()];
        let mut sums_v = vec![0.0; shape.v().iter().product()];
        let mut memory = inputs.memory.map(|memory| vec![0.0f32; memory.len()]);
        let mut writer = write_entries(grads.qkv.q);
        if kept.is_empty() {
            writer.write(&vec![0.0; shape.q().iter().product()]);
        }
        for kept in kept {
            debug_assert!(kept.units.len() <= entries(&shape));
            let units = &kept.units;
            let groups = Groups::new(config, &x, inputs, units);
            let gathered = groups.shape();
            let (n_q, n_k) = (inputs.clusters * gathered.n_q, inputs.clusters * gathered.n_kv);
            let mut rows = vec![0.0; kept.out.len()];
            for (u, unit) in units.iter().enumerate() {
                let lse = &kept.lse[u * n_q..][..n_q];
                let rows = &mut rows[u * n_q * d_v..][..n_q * d_v];
                let token = |slot: usize| usize::try_from(unit.queries[slot]).ok();
                gather(&grad_out, [unit.batch, unit.head], rows, token);
                for (slot, row) in rows.chunks_exact_mut(d_v).enumerate() {
                    let share = token(slot).map_or(0.0, |token| share(unit, token, lse, config.mean_eps));
                    row.iter_mut().for_each(|x| *x *= share);
                }
            }
            let [mut grad_q, mut grad_k, mut grad_v] =
                [gathered.q(), gathered.k(), gathered.v()].map(|axes| vec![0.0; axes.iter().product()]);
            let slots = groups.slots();
            let spec = AnySpec::new(inputs.softmax_scale, &slots as &dyn Mask, &slots as &dyn ScoreMod);
            let out = View::contiguous("out", &kept.out, gathered.out())?.into();
            let grad =
                OutputGrad { out: View::contiguous("grad_out", &rows, gathered.out())?.into(), lse: None };
            let to = Grads::new(
                ViewMut::contiguous("grad_q", &mut grad_q, gathered.q())?.into(),
                ViewMut::contiguous("grad_k", &mut grad_k, gathered.k())?.into(),
                ViewMut::contiguous("grad_v", &mut grad_v, gathered.v())?.into(),
            );
            let forward = ForwardResult { out, lse: &kept.lse };
            attend_backward_any(Problem::batch(groups.qkv()?), forward, grad, to, &spec)?;

            let mut sums_q = vec![0.0; units.len() * shape.n_q * d];
            for (u, unit) in units.iter().enumerate() {
                let sums = head_sums(&mut sums_q, u, shape.n_q * d);
                unit.places.add(&grad_q[u * n_q * d..][..n_q * d], sums, d);
                let (grad_k, grad_v) =
                    (&grad_k[u * n_k * d..][..n_k * d], &grad_v[u * n_k * d_v..][..n_k * d_v]);
                let (places, kv) =
                    (Places::new(&unit.keys, shape.n_kv), unit.batch * shape.n_heads_kv + unit.kv_head);
                if config.shared_qk {
                    let mut of_keys = vec![0.0; sums.len()];
                    places.add(grad_k, &mut of_keys, d);
                    through_the_norm(x.q(), [unit.batch, unit.head], &of_keys, sums);
                } else {
                    places.add(grad_k, head_sums(&mut sums_k, kv, shape.n_kv * d), d);
                }
                places.add(grad_v, head_sums(&mut sums_v, kv, shape.n_kv * d_v), d_v);
                for (sums, grads, width) in
                    memory.iter_mut().zip([grad_k, grad_v]).zip([d, d_v]).map(|((m, g), w)| (m, g, w))
                {
                    let per_cluster = inputs.n_memory * width;
                    let from = unit.head * inputs.clusters * per_cluster;
                    let clusters = sums[from..].chunks_exact_mut(per_cluster.max(1)).take(inputs.clusters);
                    for (sums, grads) in clusters.zip(grads.chunks_exact(gathered.n_kv * width)) {
                        sums.iter_mut().zip(grads).for_each(|(sum, x)| *sum += x);
                    }
                }
            }
            writer.write(&sums_q);
        }
        write_entries(grads.qkv.k).write(&sums_k);
        write_entries(grads.qkv.v).write(&sums_v);
        for (grad, sums) in [grads.mem_key, grads.mem_value].into_iter().zip(&memory) {
            if let Some(grad) = grad {
                grad.copy_from_slice(sums);
            }
        }
        Ok(())
    }
}
