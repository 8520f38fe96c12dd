//! Promises about values: the output is what the definition says, on every path through the code.

use super::subject::{Outcome, Subject, agree, agree_lse, at};
use crate::inputs::{Layout, Problem, edge_shapes};
use crate::tolerance;
use attn_core::exact::Exact;
use attn_core::mask::{Align, Band, Mask, SeeAll};
use attn_core::simd::{Isa, with_isa};
use attn_core::{AttnShape, DType, Element};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Forward agrees with the definition within `max_error`, on edge shapes and on random ones.
pub(super) fn definition(v: &Subject<'_>) -> Outcome {
    // The last one goes beyond the usual default windows and tiles.
    let long = AttnShape::square(1, 600, 8);
    let shapes = edge_shapes(&v.profile).into_iter().chain(random_shapes(v)).chain([long]);
    for (seed, shape) in shapes.enumerate() {
        let problem = Problem::normal(shape, seed as u64);
        let want = v.definition(&problem)?.out;
        let tol = tolerance::output(&v.profile, DType::F32);
        agree(&format!("out (seed {seed})"), &shape, &v.forward(&problem)?, &want, tol)?;
    }
    Ok(())
}

fn random_shapes(v: &Subject<'_>) -> impl Iterator<Item = AttnShape> {
    let mut rng = ChaCha8Rng::seed_from_u64(0);
    let profile = v.profile;
    (0..6).map(move |_| {
        let (n_heads_kv, group) = (rng.random_range(1..4), rng.random_range(1..4));
        let n_q = rng.random_range(1..200);
        AttnShape {
            batch: rng.random_range(1..3),
            n_heads_q: if profile.grouped_heads { n_heads_kv * group } else { n_heads_kv },
            n_heads_kv,
            n_q,
            n_kv: if profile.cross_lengths { rng.random_range(1..200) } else { n_q },
            head_dim: rng.random_range(1..40),
            head_dim_v: rng.random_range(1..40),
        }
    })
}

/// The definition of a softmax variant is exact attention over everything it may see.
pub(super) fn softmax(v: &Subject<'_>) -> Outcome {
    let scale = v.options.get::<f64>("scale").map_err(|e| e.to_string())?;
    for (seed, shape) in edge_shapes(&v.profile).into_iter().enumerate() {
        let problem = Problem::normal(shape, seed as u64);
        let causal = Band::causal(&shape, Align::BottomRight);
        let mask: &dyn Mask = if v.profile.causality.is_causal() { &causal } else { &SeeAll };
        let exact = Exact { softmax_scale: scale, mask, ..Exact::default() };
        let want = exact.all(&problem.qkv().map_err(|e| e.to_string())?).map_err(|e| e.to_string())?;
        let tol = tolerance::output(&v.profile, DType::F32);
        let got = v.definition(&problem)?;
        let narrow = |x: &[f64]| x.iter().map(|x| *x as f32).collect::<Vec<f32>>();
        agree("the definition, against exact softmax attention", &shape, &narrow(&got.out), &want.out, tol)?;
        if let (Some(got), Some(want)) = (got.lse, want.lse) {
            let tol = tolerance::lse(&v.profile);
            agree_lse("the definition's lse, against exact attention", &shape, &narrow(&got), &want, tol)?;
        }
    }
    Ok(())
}

/// The log-sum-exp agrees with the definition's, and comes with the same output.
pub(super) fn log_sum_exp(v: &Subject<'_>) -> Outcome {
    for (seed, shape) in edge_shapes(&v.profile).into_iter().enumerate() {
        let problem = Problem::normal(shape, seed as u64);
        let want = v.definition(&problem)?;
        let Some(want_lse) = want.lse else {
            return Err("as_softmax gives a variant whose definition has no lse".into());
        };
        let (out, lse) = v.forward_with_lse(&problem)?;
        agree_lse("lse", &shape, &lse, &want_lse, tolerance::lse(&v.profile))?;
        let tol = tolerance::output(&v.profile, DType::F32);
        agree("out beside lse", &shape, &out, &want.out, tol)?;
    }
    Ok(())
}

/// Adding `c` to every score adds `c` to the log-sum-exp and changes no output.
pub(super) fn score_shift(v: &Subject<'_>) -> Outcome {
    // Queries have 1 in their first coordinate, and every key's first coordinate grows by `by`.
    let (shape, by) = (AttnShape::square(2, 65, 16), 3.0f32);
    let mut problem = Problem::normal(shape, 5);
    problem.q.chunks_exact_mut(16).for_each(|q| q[0] = 1.0);
    let (out, lse) = v.forward_with_lse(&problem)?;
    problem.k.chunks_exact_mut(16).for_each(|k| k[0] += by);
    let (moved_out, moved_lse) = v.forward_with_lse(&problem)?;
    let scale = v.options.get::<f64>("scale").map_err(|e| e.to_string())?.unwrap_or(0.25);
    let want_lse: Vec<f64> = lse.iter().map(|l| f64::from(*l) + scale * f64::from(by)).collect();
    agree_lse("lse, after a shift of all scores", &shape, &moved_lse, &want_lse, tolerance::lse(&v.profile))?;
    let want = super::subject::widen(&out);
    agree("out, after a shift of all scores", &shape, &moved_out, &want, tolerance::same(&v.profile))
}

/// Inputs and outputs in half types: only the inputs and the output are rounded.
pub(super) fn half_storage(v: &Subject<'_>) -> Outcome {
    fn check<E: Element>(v: &Subject<'_>) -> Outcome {
        let grouped = AttnShape { n_heads_kv: 1, ..AttnShape::square(2, 65, 24) };
        let shapes = [
            AttnShape { batch: 2, head_dim_v: 7, ..AttnShape::square(2, 33, 5) },
            AttnShape::square(2, 130, 16),
            if v.profile.grouped_heads { grouped } else { AttnShape::square(1, 1, 64) },
        ];
        for (seed, shape) in shapes.into_iter().enumerate() {
            let problem = Problem::normal(shape, seed as u64);
            let want = v.definition_stored::<E>(&problem)?.out;
            for layout in Layout::ALL {
                let got = v.forward_stored::<E>(&problem, layout, f32::NAN)?;
                let what = format!("out in {} ({layout:?})", E::DTYPE);
                agree(&what, &shape, &got, &want, tolerance::output(&v.profile, E::DTYPE))?;
            }
        }
        Ok(())
    }
    for dtype in v.profile.dtypes {
        match dtype {
            DType::F32 => {}
            DType::Bf16 => check::<bf16>(v)?,
            DType::F16 => check::<f16>(v)?,
        }
    }
    Ok(())
}

/// Every instruction set of this CPU agrees with the definition.
pub(super) fn instruction_sets(v: &Subject<'_>) -> Outcome {
    let shapes = [
        AttnShape { batch: 2, head_dim_v: 7, ..AttnShape::square(2, 33, 5) },
        AttnShape::square(1, 130, 64),
        AttnShape { head_dim_v: 17, ..AttnShape::square(1, 65, 31) },
    ];
    for (seed, shape) in shapes.into_iter().enumerate() {
        let problem = Problem::normal(shape, seed as u64);
        let want = v.definition(&problem)?.out;
        for isa in Isa::available() {
            let got = with_isa(isa, || v.forward(&problem)).map_err(|e| e.to_string())??;
            let tol = tolerance::output(&v.profile, DType::F32);
            agree(&format!("out with {isa}"), &shape, &got, &want, tol)?;
        }
    }
    Ok(())
}

/// Scores a thousand times the usual ones, and large values, give finite outputs that agree.
pub(super) fn extreme_scores(v: &Subject<'_>) -> Outcome {
    for (seed, shape) in [AttnShape::square(2, 65, 16), AttnShape::square(1, 130, 8)].into_iter().enumerate()
    {
        let normal = Problem::normal(shape, seed as u64);
        let cases = [
            ("queries times 1000", normal.clone().scale_queries(1e3), tolerance::extreme(&v.profile)),
            ("queries times -1000", normal.clone().scale_queries(-1e3), tolerance::extreme(&v.profile)),
            ("values times 1e6", normal.scale_values(1e6), tolerance::output(&v.profile, DType::F32)),
        ];
        for (what, problem, tol) in cases {
            let got = v.forward(&problem)?;
            if let Some(e) = got.iter().position(|x| !x.is_finite()) {
                return Err(format!("out[{e}] with {what} is {}; {}", got[e], at(&shape)));
            }
            agree(&format!("out with {what}"), &shape, &got, &v.definition(&problem)?.out, tol)?;
        }
    }
    Ok(())
}
