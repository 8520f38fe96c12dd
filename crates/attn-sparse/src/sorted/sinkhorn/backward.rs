//! Gradients: the softmax's own, then through the mixtures to their sources and weights, and through the network.
//!
//! ```text
//! dk_se += sum_r R_rs dk~_re        dR_rs = sum_e (dk~_re . k_se + dv~_re . v_se)        values as keys
//! ```

use super::Sinkhorn;
use super::forward::{Forward, entries, slot};
use super::groups::{Groups, Sizes, Unit};
use super::network::Network;
use super::{SinkhornInputs, SinkhornKind};
use crate::sorted::rows::{gather, head_sums, heads, write_entries};
use attn_core::mask::Mask;
use attn_core::score::ScoreMod;
use attn_core::{AttnError, Qkv, QkvGrads, Result, TensorView, View, ViewMut};
use attn_flash::engine::{AnySpec, ForwardResult, Grads, OutputGrad, Problem, attend_backward_any};
use rayon::prelude::*;

/// Gradients to be written.
#[derive(Debug)]
pub struct SinkhornGrads<'a> {
    /// Of q, k and v.
    pub qkv: QkvGrads<'a>,
    /// Of the weights given, as many elements.
    pub sort: Option<&'a mut [f32]>,
    /// Of the null keys, as many elements.
    pub null_key: Option<&'a mut [f32]>,
    /// Of the null values, as many elements.
    pub null_value: Option<&'a mut [f32]>,
}

impl SinkhornGrads<'_> {
    pub(super) fn check(&self, x: &Qkv<'_>, inputs: &SinkhornInputs<'_>) -> Result<()> {
        self.qkv.check(x)?;
        for (name, grad, of) in [
            ("grad_sort", &self.sort, inputs.sort),
            ("grad_null_key", &self.null_key, inputs.null_key),
            ("grad_null_value", &self.null_value, inputs.null_value),
        ] {
            let (found, expected) = (grad.as_ref().map(|g| g.len()), of.map(<[f32]>::len));
            if let Some(found) = found
                && Some(found) != expected
            {
                return Err(AttnError::shape(name, "elements", found, expected.unwrap_or(0)));
            }
        }
        Ok(())
    }
}

/// A backward pass.
pub(super) struct Backward<'a> {
    pub(super) config: &'a Sinkhorn,
    pub(super) x: Qkv<'a>,
    pub(super) softmax_scale: f32,
    pub(super) inputs: &'a SinkhornInputs<'a>,
    pub(super) out: TensorView<'a>,
    pub(super) grad_out: TensorView<'a>,
    pub(super) lse: &'a Vec<f32>,
}

/// Sums over all heads.
struct Sums {
    k: Vec<f32>,
    v: Vec<f32>,
    sort: Option<Vec<f32>>,
    null: [Vec<f32>; 2],
}

impl Backward<'_> {
    pub(super) fn run(self, mut grads: SinkhornGrads<'_>) -> Result<()> {
        let Self { config, x, softmax_scale, inputs, .. } = self;
        let forward = Forward { config, x, softmax_scale, inputs };
        let shape = x.shape();
        let (n, d, d_v) = (shape.n_q, shape.head_dim, shape.head_dim_v);
        let mut sums = Sums {
            k: vec![0.0; shape.k().iter().product()],
            v: vec![0.0; shape.v().iter().product()],
            sort: grads.sort.as_ref().map(|sort| vec![0.0; sort.len()]),
            null: [d, d_v].map(|width| vec![0.0; shape.n_heads_q * width]),
        };
        let mut writer = write_entries(grads.qkv.q);
        for (at, heads) in
            heads(&shape).chunks(entries(&shape)).enumerate().take(if n > 0 { usize::MAX } else { 0 })
        {
            let units: Vec<Unit> = heads.iter().map(|at| Unit::new(&forward, *at)).collect();
            let groups = Groups::new(&forward, &units);
            let of = groups.shape;
            let per_unit = of.n_heads_q * of.n_q;
            let mut out = vec![0.0; of.rows() * d_v];
            let (mut rows, mut lse) = (out.clone(), vec![f32::NEG_INFINITY; of.rows()]);
            for (u, unit) in units.iter().enumerate() {
                let token = |slot: usize| unit.buckets.token(slot / of.n_q, slot % of.n_q);
                let slots = u * per_unit * d_v..(u + 1) * per_unit * d_v;
                gather(&self.out, unit.at, &mut out[slots.clone()], token);
                gather(&self.grad_out, unit.at, &mut rows[slots], token);
            }
            let first = at * entries(&shape) * n;
            (0..units.len() * n).for_each(|row| lse[slot(&units, &of, row)] = self.lse[first + row]);
            let [mut grad_q, mut grad_k, mut grad_v] =
                [of.q(), of.k(), of.v()].map(|axes| vec![0.0; axes.iter().product()]);
            let slots = groups.slots();
            let spec = AnySpec::new(softmax_scale, &slots as &dyn Mask, &slots as &dyn ScoreMod);
            let result = ForwardResult { out: View::contiguous("out", &out, of.out())?.into(), lse: &lse };
            let grad = OutputGrad { out: View::contiguous("grad_out", &rows, of.out())?.into(), lse: None };
            let to = Grads::new(
                ViewMut::contiguous("grad_q", &mut grad_q, of.q())?.into(),
                ViewMut::contiguous("grad_k", &mut grad_k, of.k())?.into(),
                ViewMut::contiguous("grad_v", &mut grad_v, of.v())?.into(),
            );
            attend_backward_any(Problem::batch(groups.qkv()?), result, grad, to, &spec)?;
            drop(groups);

            let mut sums_q = vec![0.0; units.len() * n * d];
            for (row, sum) in sums_q.chunks_exact_mut(d).enumerate() {
                sum.copy_from_slice(&grad_q[slot(&units, &of, row) * d..][..d]);
            }
            let keys = of.n_heads_q * of.n_kv;
            for (u, unit) in units.iter().enumerate() {
                let grads = [&grad_k[u * keys * d..][..keys * d], &grad_v[u * keys * d_v..][..keys * d_v]];
                self.add_unit(&forward, unit, grads, head_sums(&mut sums_q, u, n * d), &mut sums);
            }
            writer.write(&sums_q);
        }
        write_entries(grads.qkv.k).write(&sums.k);
        write_entries(grads.qkv.v).write(&sums.v);
        let [null_key, null_value] = &sums.null;
        for (grad, sums) in [
            (&mut grads.sort, sums.sort.as_ref()),
            (&mut grads.null_key, Some(null_key)),
            (&mut grads.null_value, Some(null_value)),
        ] {
            if let (Some(grad), Some(sums)) = (grad, sums) {
                grad.copy_from_slice(sums);
            }
        }
        Ok(())
    }

    /// Adds the gradients of the gathered keys and values of a unit to all they came from.
    fn add_unit(
        &self,
        forward: &Forward<'_>,
        unit: &Unit,
        grads: [&[f32]; 2],
        sums_q: &mut [f32],
        sums: &mut Sums,
    ) {
        let (shape, sizes) = (self.x.shape(), Sizes::new(forward));
        let kv = unit.at[0] * shape.n_heads_kv + unit.kv_head;
        let (rows, sources) = (unit.weights.rows, unit.weights.sources);
        // Of all weights, where they are given or all matter; else of the one of each row.
        let all = self.inputs.sort.is_some() || self.config.kind == SinkhornKind::Soft;
        let mut of_weights = vec![0.0; if all { rows * sources } else { rows }];
        let widths = [shape.head_dim, shape.head_dim_v];
        for (side, (grads, width)) in grads.into_iter().zip(widths).enumerate() {
            let mixed = self.mixed_gradients(unit, &sizes, grads, width);
            if all {
                unit.weights.add_gradients(&mixed, &unit.sources[side], width, &mut of_weights);
            } else {
                unit.weights.add_entry_gradients(&mixed, &unit.sources[side], width, &mut of_weights);
            }
            let of_sources = unit.weights.source_gradients(&mixed, width);
            let source = |e: usize, source: usize| &of_sources[(e * sources + source) * width..][..width];
            let null = &mut sums.null[side][unit.at[1] * width..][..width];
            for (e, s) in (0..sizes.size).flat_map(|e| (0..unit.n_null()).map(move |s| (e, s))) {
                null.iter_mut().zip(source(e, s)).for_each(|(sum, x)| *sum += x);
            }
            let to = if side == 0 { &mut sums.k } else { &mut sums.v };
            let to = head_sums(to, kv, shape.n_kv * width);
            to.par_chunks_mut(width).enumerate().for_each(|(token, sum)| {
                let (bucket, e) = unit.buckets.place(token);
                let own = (bucket * sizes.keys() + sizes.mixtures * sizes.size + e) * width;
                sum.iter_mut().zip(&grads[own..]).for_each(|(sum, x)| *sum += x);
                if bucket < unit.buckets.count {
                    sum.iter_mut().zip(source(e, unit.n_null() + bucket)).for_each(|(sum, x)| *sum += x);
                }
            });
        }
        match &mut sums.sort {
            Some(sort) => {
                let head = unit.at[0] * shape.n_heads_q + unit.at[1];
                sort[head * rows * sources..][..rows * sources].copy_from_slice(&of_weights);
            }
            None if self.inputs.sort.is_some() => {}
            None => {
                let sums_k = head_sums(&mut sums.k, kv, shape.n_kv * shape.head_dim);
                Network::new(forward, unit.at).add_gradients(&of_weights, [sums_q, sums_k]);
            }
        }
    }

    /// Gradients of mixtures, `[size, rows, width]`, summed over the groups that attend them.
    fn mixed_gradients(&self, unit: &Unit, sizes: &Sizes, grads: &[f32], width: usize) -> Vec<f32> {
        let rows = unit.weights.rows;
        let mut mixed = vec![0.0; sizes.size * rows * width];
        mixed.par_chunks_mut((rows * width).max(1)).enumerate().for_each(|(e, mixed)| {
            for group in 0..sizes.groups {
                for r in 0..sizes.mixtures {
                    let Some(row) = sizes.row(group, r) else { continue };
                    let from = (group * sizes.keys() + r * sizes.size + e) * width;
                    let sum = mixed[row * width..][..width].iter_mut();
                    sum.zip(&grads[from..]).for_each(|(sum, x)| *sum += x);
                }
            }
        });
        mixed
    }
}
