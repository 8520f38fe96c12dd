//! Promises about the edges: nothing to do, and what is not promised.

use super::subject::{Outcome, Subject, at};
use crate::inputs::{Layout, Problem, StoredTensor};
use attn_core::{AttnError, AttnShape, DType, Element};
use half::{bf16, f16};

/// Length 0 and batch 0 are valid and empty; no keys give zeros.
pub(super) fn empty_input(v: &Subject<'_>) -> Outcome {
    let n0 = AttnShape::square(2, 0, 8);
    let mut shapes = vec![n0, AttnShape { batch: 0, ..AttnShape::square(2, 5, 8) }];
    if v.profile.cross_lengths {
        shapes.extend([AttnShape { n_kv: 5, ..n0 }, AttnShape { n_q: 5, head_dim_v: 3, ..n0 }]);
    }
    for shape in shapes {
        let problem = Problem::normal(shape, 17);
        let out = v.forward(&problem)?;
        if let Some(e) = out.iter().position(|x| *x != 0.0) {
            return Err(format!("out[{e}] without keys is {}, expected 0; {}", out[e], at(&shape)));
        }
        let truth = v.definition(&problem)?.out;
        if truth.len() != out.len() {
            return Err(format!(
                "the definition gives {} elements of {}; {}",
                truth.len(),
                out.len(),
                at(&shape)
            ));
        }
        if v.attention.as_softmax().is_some() {
            let (_, lse) = v.forward_with_lse(&problem)?;
            if let Some(row) = lse.iter().position(|l| *l != f32::NEG_INFINITY) {
                return Err(format!(
                    "lse[{row}] without keys is {}, expected -inf; {}",
                    lse[row],
                    at(&shape)
                ));
            }
        }
    }
    Ok(())
}

/// What the profile does not promise is refused with an error, not computed somehow.
pub(super) fn refusals(v: &Subject<'_>) -> Outcome {
    let shape = AttnShape::square(2, 6, 8);
    let refused = |what: &str, got: Result<Vec<f32>, String>| match got {
        Ok(_) => Err(format!("{what}, which the profile does not promise, gave no error")),
        Err(_) => Ok(()),
    };
    if !v.profile.cross_lengths {
        let cross = Problem::normal(AttnShape { n_kv: 9, ..shape }, 18);
        refused("n_q other than n_kv", v.forward(&cross))?;
    }
    if !v.profile.grouped_heads {
        let grouped = Problem::normal(AttnShape { n_heads_kv: 1, ..shape }, 18);
        refused("n_heads_q above n_heads_kv", v.forward(&grouped))?;
    }
    let problem = Problem::normal(shape, 18);
    for dtype in DType::ALL.into_iter().filter(|d| !v.profile.dtypes.contains(d)) {
        let layout = Layout::HeadsFirst;
        let got = match dtype {
            DType::F32 => v.forward_stored::<f32>(&problem, layout, f32::NAN),
            DType::Bf16 => v.forward_stored::<bf16>(&problem, layout, f32::NAN),
            DType::F16 => v.forward_stored::<f16>(&problem, layout, f32::NAN),
        };
        refused(&format!("storage type {dtype}"), got)?;
    }
    Ok(())
}

/// A bad argument is an error that names it with what was found and what is expected, and nothing is written.
pub(super) fn argument_errors(v: &Subject<'_>) -> Outcome {
    let shape = AttnShape { batch: 2, head_dim_v: 5, ..AttnShape::square(3, 6, 8) };
    let problem = Problem::normal(shape, 19);
    for axis in 0..4 {
        for wrong in [shape.out()[axis] + 1, shape.out()[axis] - 1] {
            let mut axes = shape.out();
            axes[axis] = wrong;
            let words = ["out".to_string(), wrong.to_string(), shape.out()[axis].to_string()];
            expect_refusal::<f32>(v, &problem, axes, &words)?;
        }
    }
    expect_refusal::<bf16>(v, &problem, shape.out(), &["out", "bf16", "f32"].map(str::to_string))?;
    if let Some(softmax) = v.attention.as_softmax() {
        let rows = shape.rows();
        let mut out = StoredTensor::<f32>::filled(shape.out(), Layout::HeadsFirst, f32::NAN);
        let (x, view) = (problem.qkv(), out.view_mut("out"));
        let (Ok(x), Ok(view)) = (x, view) else { return Err("the suite's own inputs are wrong".into()) };
        let got = softmax.forward_with_lse(x, view.into(), &mut vec![f32::NAN; rows + 1]);
        let words = ["lse".to_string(), (rows + 1).to_string(), rows.to_string()];
        explains(&format!("an lse of {} elements", rows + 1), got, &words)?;
        untouched(&out, "a wrong lse")?;
    }
    Ok(())
}

fn expect_refusal<E: Element>(
    v: &Subject<'_>,
    problem: &Problem,
    axes: [usize; 4],
    words: &[String],
) -> Outcome {
    let what = format!("an output {axes:?} of {} for {}", E::DTYPE, at(&problem.shape));
    let mut out = StoredTensor::<E>::filled(axes, Layout::HeadsFirst, f32::NAN);
    let (Ok(x), Ok(view)) = (problem.qkv(), out.view_mut("out")) else {
        return Err("the suite's own inputs are wrong".into());
    };
    explains(&what, v.attention.forward(x, view.into()), words)?;
    untouched(&out, &what)
}

fn explains(what: &str, got: Result<(), AttnError>, words: &[String]) -> Outcome {
    let Err(error) = got else { return Err(format!("{what} gave no error")) };
    let message = error.to_string();
    match words.iter().find(|w| !message.contains(w.as_str())) {
        Some(word) => Err(format!("{what}: the error `{message}` does not say `{word}`")),
        None => Ok(()),
    }
}

fn untouched<E: Element>(out: &StoredTensor<E>, what: &str) -> Outcome {
    if out.to_rows().iter().all(|x| x.is_nan()) {
        return Ok(());
    }
    Err(format!("{what} gave an error, but the output was written"))
}
