//! The backward pass, class by class.
//!
//! Each key belongs to one class, so that the classes of a part write disjoint rows. Where query heads that share a
//! key/value head have different steps, their shares are summed in f32 and rounded once.

use super::{ClassRows, InClass, Part, Residues};
use crate::attend::Call;
use crate::store::store;
use attn_core::{AttnShape, OutMut, Qkv, Result, TensorView, ViewMut};
use attn_flash::engine::{AnySpec, ForwardResult, Grads, OutputGrad, Problem, attend_backward_any};

/// Writes the gradients; shapes and the score mod have been checked. `grads.sinks` and `grads.bias` are summed over classes.
pub(crate) fn backward(
    call: &Call<'_>,
    residues: &Residues,
    x: Qkv<'_>,
    forward: ForwardResult<'_>,
    grad_out: TensorView<'_>,
    mut grads: Grads<'_>,
) -> Result<()> {
    let shape = x.shape();
    residues.check(&shape)?;
    if let Some(sinks) = grads.sinks.as_deref_mut() {
        sinks.fill(0.0);
    }
    if let Some((_, bias)) = grads.bias.as_mut() {
        bias.fill(0.0);
    }
    let pass = Pass { call, residues, x, shape, forward, grad_out };
    let parts = residues.parts(&shape);
    if parts.windows(2).any(|two| two[0].kv_heads.end > two[1].kv_heads.start) {
        return pass.summed(&parts, grads);
    }
    for part in &parts {
        let kv = part.kv_heads.clone();
        let k = grads.k.reborrow().heads(kv.clone());
        let v = grads.v.reborrow().heads(kv);
        let rest = grads.bias.as_mut().map(|(index, grad)| (*index, &mut **grad));
        let own =
            Grads { sinks: grads.sinks.as_deref_mut(), bias: rest, ..Grads::new(grads.q.reborrow(), k, v) };
        pass.part(part, own)?;
    }
    Ok(())
}

/// What all parts read.
struct Pass<'a> {
    call: &'a Call<'a>,
    residues: &'a Residues,
    x: Qkv<'a>,
    shape: AttnShape,
    forward: ForwardResult<'a>,
    grad_out: TensorView<'a>,
}

impl Pass<'_> {
    /// Parts that share key/value heads.
    fn summed(&self, parts: &[Part], mut grads: Grads<'_>) -> Result<()> {
        let (k_axes, v_axes) = (self.shape.k(), self.shape.v());
        let mut k_sum = vec![0.0; k_axes.iter().product()];
        let mut v_sum = vec![0.0; v_axes.iter().product()];
        for part in parts {
            let axes = |[batch, _, n, width]: [usize; 4]| [batch, part.kv_heads.len(), n, width];
            let len = |all| axes(all).iter().product();
            let (mut k, mut v) = (vec![0.0; len(k_axes)], vec![0.0; len(v_axes)]);
            let k_view = ViewMut::contiguous("grad_k", &mut k, axes(k_axes))?;
            let v_view = ViewMut::contiguous("grad_v", &mut v, axes(v_axes))?;
            let own = Grads {
                sinks: grads.sinks.as_deref_mut(),
                bias: grads.bias.as_mut().map(|(index, grad)| (*index, &mut **grad)),
                ..Grads::new(grads.q.reborrow(), k_view.into(), v_view.into())
            };
            self.part(part, own)?;
            add(&mut k_sum, &k, part, k_axes);
            add(&mut v_sum, &v, part, v_axes);
        }
        store(grads.k, &k_sum)?;
        store(grads.v, &v_sum)
    }

    /// One part; `grads.k` and `grads.v` have its heads alone.
    fn part(&self, part: &Part, mut grads: Grads<'_>) -> Result<()> {
        let (heads, kv_heads) = (part.heads.clone(), part.kv_heads.clone());
        let mut grad_q = grads.q.heads(heads.clone());
        if part.leaves_rows(&self.shape) {
            [&mut grad_q, &mut grads.k, &mut grads.v].into_iter().for_each(OutMut::fill_zero);
        }
        let (q, k) = (self.x.q().heads(heads.clone()), self.x.k().heads(kv_heads.clone()));
        let (v, out) = (self.x.v().heads(kv_heads), self.forward.out.heads(heads.clone()));
        let grad_out = self.grad_out.heads(heads.clone());
        let sinks = self.call.sinks.map(|sinks| &sinks[heads.clone()]);
        for class in part.classes(&self.shape) {
            let (first_q, first, step) = (class.first_q, class.first_kv, class.step);
            let rows = Qkv::new(q.every(first_q, step), k.every(first, step), v.every(first, step))?;
            let mask = (self.residues.local)(class);
            let scores = InClass { class, first_head: heads.start, whole: self.call.score_mod };
            let spec = AnySpec { sinks, ..AnySpec::new(self.call.softmax_scale, &*mask, &scores) };
            let places = ClassRows { shape: &self.shape, heads: heads.clone(), class };
            let lse: Vec<f32> = places.places().map(|place| self.forward.lse[place]).collect();
            let whole = grads.bias.as_ref().map(|(index, _)| *index);
            let index = whole.map(|whole| InClass { class, first_head: heads.start, whole });
            let mut sinks_share = grads.sinks.as_ref().map(|_| vec![0.0; heads.len()]);
            let mut bias_share = whole.map(|index| vec![0.0; index.len()]);
            let own = Grads {
                sinks: sinks_share.as_deref_mut(),
                bias: index.as_ref().zip(bias_share.as_deref_mut()).map(|(index, grad)| (index as _, grad)),
                ..Grads::new(
                    grad_q.reborrow().every(first_q, step),
                    grads.k.reborrow().every(first, step),
                    grads.v.reborrow().every(first, step),
                )
            };
            let forward = ForwardResult { out: out.every(first_q, step), lse: &lse };
            let grad = OutputGrad { out: grad_out.every(first_q, step), lse: None };
            attend_backward_any(Problem::batch(rows), forward, grad, own, &spec)?;
            if let (Some(sum), Some(share)) = (grads.sinks.as_deref_mut(), sinks_share) {
                sum[heads.clone()].iter_mut().zip(share).for_each(|(sum, share)| *sum += share);
            }
            if let (Some((_, sum)), Some(share)) = (grads.bias.as_mut(), bias_share) {
                sum.iter_mut().zip(share).for_each(|(sum, share)| *sum += share);
            }
        }
        Ok(())
    }
}

/// Adds `[batch, part heads, n, width]` to the heads of the part in `[batch, n_heads_kv, n, width]`.
fn add(sum: &mut [f32], share: &[f32], part: &Part, [batch, heads, n, width]: [usize; 4]) {
    let (head, own) = (n * width, part.kv_heads.len() * n * width);
    for b in 0..batch {
        let to = &mut sum[(b * heads + part.kv_heads.start) * head..][..own];
        to.iter_mut().zip(&share[b * own..]).for_each(|(to, from)| *to += from);
    }
}
