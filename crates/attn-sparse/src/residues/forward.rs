//! The forward pass, class by class.

use super::{ClassRows, InClass, Residues};
use crate::attend::Call;
use attn_core::{OutMut, Qkv, Result};
use attn_flash::engine::{AnySpec, Problem, attend_any};

/// Attends class by class; inputs, output and the score mod have been checked.
pub(crate) fn forward(
    call: &Call<'_>,
    residues: &Residues,
    x: Qkv<'_>,
    mut out: OutMut<'_>,
    mut lse: Option<&mut [f32]>,
) -> Result<()> {
    let shape = x.shape();
    residues.check(&shape)?;
    if residues.kept.is_some() {
        out.fill_zero();
        if let Some(lse) = lse.as_deref_mut() {
            lse.fill(f32::NEG_INFINITY);
        }
    }
    for part in residues.parts(&shape) {
        let (heads, kv_heads) = (part.heads.clone(), part.kv_heads.clone());
        let (q, k) = (x.q().heads(heads.clone()), x.k().heads(kv_heads.clone()));
        let v = x.v().heads(kv_heads);
        let sinks = call.sinks.map(|sinks| &sinks[heads.clone()]);
        for class in part.classes(&shape) {
            let (first, step) = (class.first_kv, class.step);
            let rows = Qkv::new(q.every(class.first_q, step), k.every(first, step), v.every(first, step))?;
            let mask = (residues.local)(class);
            let scores = InClass { class, first_head: heads.start, whole: call.score_mod };
            let spec = AnySpec { sinks, ..AnySpec::new(call.softmax_scale, &*mask, &scores) };
            let out = out.reborrow().heads(heads.clone()).every(class.first_q, step);
            let mut class_lse = lse.as_ref().map(|_| vec![0.0; rows.shape().rows()]);
            attend_any(Problem::batch(rows), out, class_lse.as_deref_mut(), &spec)?;
            if let (Some(lse), Some(class_lse)) = (lse.as_deref_mut(), class_lse) {
                let places = ClassRows { shape: &shape, heads: heads.clone(), class };
                places.places().zip(class_lse).for_each(|(place, value)| lse[place] = value);
            }
        }
    }
    Ok(())
}
