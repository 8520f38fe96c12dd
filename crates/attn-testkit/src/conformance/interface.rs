//! Promises about the registry entry: names, options, the runner on named tensors, and the cost known beforehand.

use super::subject::{Outcome, Subject, agree, agree_lse, all, same_bits};
use crate::inputs::Problem;
use crate::tolerance;
use attn_core::registry::{NamedTensor, NamedTensors};
use attn_core::{AttnShape, DType, Growth};

/// The entry and the variant agree on who they are, and the profile is a statement that can be checked.
pub(super) fn names(v: &Subject<'_>) -> Outcome {
    let (entry, built) = (v.entry.name, v.attention.name());
    if entry != built {
        return Err(format!("the entry is called `{entry}`, the variant `{built}`"));
    }
    let kebab = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if entry.is_empty() || !entry.chars().all(kebab) {
        return Err(format!("`{entry}` is not a kebab-case name"));
    }
    if v.entry.family != v.profile.family {
        return Err(format!("the entry's family is {}, the profile's {}", v.entry.family, v.profile.family));
    }
    if v.entry.summary.trim().is_empty() {
        return Err("the entry has no summary".into());
    }
    if !v.profile.dtypes.contains(&DType::F32) {
        return Err(format!("f32 is not among the storage types {:?}", v.profile.dtypes));
    }
    if !(v.profile.max_error > 0.0 && v.profile.max_error <= 1e-2) {
        return Err(format!("max_error is {:e}, expected above 0 and at most 1e-2", v.profile.max_error));
    }
    Ok(())
}

/// Options that are unknown or cannot be read are refused by name, and the stated defaults are the defaults.
pub(super) fn options(v: &Subject<'_>) -> Outcome {
    const NONSENSE: &str = "?!";
    for option in v.entry.options {
        match v.entry.build(&v.options.clone().with(option.name, NONSENSE)) {
            Ok(_) => return Err(format!("option `{}` accepts the value `{NONSENSE}`", option.name)),
            Err(e) if !e.to_string().contains(option.name) => {
                return Err(format!(
                    "option `{}` with the value `{NONSENSE}`: the error `{e}` does not name it",
                    option.name
                ));
            }
            Err(_) => {}
        }
    }
    let unknown = v.options.clone().with("no-such-option", 1);
    let built = v.entry.build(&unknown).map(drop);
    let run = v.entry.run(&unknown, &NamedTensors::default()).map(drop);
    for (who, got) in [("build", built), ("run", run)] {
        match got {
            Err(e) if e.to_string().contains("no-such-option") => {}
            Err(e) => return Err(format!("{who}: the error `{e}` does not name the unknown option")),
            Ok(()) => return Err(format!("{who} accepts an unknown option")),
        }
    }
    let mut spelled = v.entry.defaults();
    spelled.0.extend(v.options.0.clone());
    let spelled =
        Subject::build(v.entry, &spelled).map_err(|e| format!("the stated defaults are refused: {e}"))?;
    let shape = AttnShape::square(2, 65, 16);
    let problem = Problem::normal(shape, 20);
    let (got, want) = (spelled.forward(&problem)?, v.forward(&problem)?);
    same_bits("out with the defaults spelled out, against without", &shape, &got, &want, all)
}

/// The entry runs on named tensors: the same output, and a tensor that is missing or not read is an error.
pub(super) fn runner(v: &Subject<'_>) -> Outcome {
    let shape = AttnShape { batch: 2, head_dim_v: 7, ..AttnShape::square(2, 33, 8) };
    let problem = Problem::normal(shape, 21);
    let mut tensors = NamedTensors::default();
    for (name, axes, data) in
        [("q", shape.q(), &problem.q), ("k", shape.k(), &problem.k), ("v", shape.v(), &problem.v)]
    {
        let tensor = NamedTensor::f32(name, &axes, data.clone()).map_err(|e| e.to_string())?;
        tensors.0.insert(name.into(), tensor);
    }
    let given = v.entry.run(v.options, &tensors).map_err(|e| format!("run on q, k, v gave an error: {e}"))?;
    let truth = v.definition(&problem)?;
    let read = |name: &str| given.f32(name).map_err(|e| e.to_string());
    let (axes, out) = read("o")?.ok_or("run gives no tensor `o`")?;
    if axes != shape.out() {
        return Err(format!("`o` is {axes:?}, expected {:?}", shape.out()));
    }
    agree("`o`", &shape, out, &truth.out, tolerance::output(&v.profile, DType::F32))?;
    match (read("lse")?, &truth.lse) {
        (Some((_, lse)), Some(want)) => agree_lse("`lse`", &shape, lse, want, tolerance::lse(&v.profile))?,
        (None, Some(_)) if v.attention.as_softmax().is_some() => {
            return Err("run gives no tensor `lse`".into());
        }
        _ => {}
    }

    let mut more = tensors.clone();
    more.0.insert("no-such-tensor".into(), tensors.0["q"].clone());
    match v.entry.run(v.options, &more) {
        Ok(_) => return Err("run ignores a tensor it does not read".into()),
        Err(e) if !e.to_string().contains("no-such-tensor") => {
            return Err(format!("the error `{e}` does not name the tensor that is not read"));
        }
        Err(_) => {}
    }
    tensors.0.remove("v");
    match v.entry.run(v.options, &tensors) {
        Ok(_) => Err("run without `v` gave no error".into()),
        Err(e) if !e.to_string().contains("`v`") => {
            Err(format!("the error `{e}` does not name the missing `v`"))
        }
        Err(_) => Ok(()),
    }
}

/// The cost is known beforehand and grows with the length as the profile says.
pub(super) fn cost(v: &Subject<'_>) -> Outcome {
    // Long enough that windows, tiles and landmarks are small beside it.
    let (short, long) = (AttnShape::square(2, 1 << 18, 64), AttnShape::square(2, 1 << 20, 64));
    let of = |shape: &AttnShape| v.attention.cost(shape, DType::F32);
    let (a, b) = (of(&short), of(&long));
    if a.flops == 0 || a.bytes_moved < short.io_bytes(DType::F32) {
        let io = short.io_bytes(DType::F32);
        return Err(format!(
            "{a:?} at n = 2^18: no flops, or less moved than the {io} bytes of inputs and output"
        ));
    }
    let growth = |growth: Growth| match growth {
        Growth::Constant => 1.0,
        Growth::Linear => 4.0,
        Growth::Linearithmic => 4.0 * 20.0 / 18.0,
        Growth::SubQuadratic => 8.0,
        Growth::Quadratic => 16.0,
    };
    let (want, got) = (growth(v.profile.time), b.flops as f64 / a.flops as f64);
    if !(want / 1.4..=want * 1.4).contains(&got) {
        let says = format!("expected about {want:.1} for {:?} time", v.profile.time);
        return Err(format!("flops grow {got:.2}-fold from n = 2^18 to 2^20, {says}"));
    }
    let (most, got) = (growth(v.profile.memory), b.bytes_allocated as f64 / a.bytes_allocated.max(1) as f64);
    if got > most * 1.4 {
        let says = format!("expected at most {most:.1} for {:?} memory", v.profile.memory);
        return Err(format!("memory grows {got:.2}-fold from n = 2^18 to 2^20, {says}"));
    }
    Ok(())
}
