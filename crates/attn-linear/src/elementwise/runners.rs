//! The variants on named tensors, in the names and layouts of their reference code.

use super::hgrn::{Hgrn, HgrnInputs};
use super::longhorn::{Longhorn, LonghornInputs};
use super::mamba1::{Mamba1, Mamba1Inputs};
use super::min_gru::{MinGru, MinGruInputs};
use super::rg_lru::{RgLru, RgLruInputs};
use super::rwkv4::{Rwkv4, Rwkv4Inputs};
use crate::named::{self, give, give_grad, output, transpose, transposed, view};
use crate::scan::sequences_of;
use attn_core::registry::{Entry, NamedTensor, NamedTensors, Options, TensorData, run_qkv};
use attn_core::{AttnError, OutMut, Result, TensorView, View};

/// `x`, `g (batch, length, width)` or with heads, `h0 (batch, width)`: gives `o`, `hT`.
pub(super) fn hgrn(tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only("hgrn", &["x", "g", "h0", "cu_seqlens", "grad_o"])?;
    let sums = named::prefix_sums(tensors)?;
    let cu_seqlens = sums.as_deref();
    let inputs = HgrnInputs { x: view(tensors, "x")?, log_decay: view(tensors, "g")?, cu_seqlens };
    let axes = inputs.x.shape();
    let rows = named::shape(tensors, "x")?;
    let memory = memory(rows, cu_seqlens);
    let mut before = Hgrn::state(&inputs);
    if let Some(h) = named::optional(tensors, "h0", &memory)? {
        before.set_part(0, "h0", h)?;
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let o = output(&inputs.x, axes, rows, |out| Hgrn::forward(&inputs, out, Some(&mut state)))?;
    all.0.insert("o".into(), o);
    give(&mut all, "hT", &memory, state.part(0))?;
    if tensors.get("grad_o").is_some() {
        let grads = Hgrn::backward(&inputs, Some(&before), &view(tensors, "grad_o")?)?;
        give_grad(&mut all, tensors, "x", grads.x)?;
        give_grad(&mut all, tensors, "g", grads.log_decay)?;
        give_grad(&mut all, tensors, "h0", grads.state)?;
    }
    Ok(all)
}

/// The axes without the length: those of a state of one number a channel.
fn memory(rows: &[usize], cu_seqlens: Option<&[usize]>) -> Vec<usize> {
    let length = rows.len().saturating_sub(2);
    let mut axes: Vec<usize> =
        rows.iter().enumerate().filter(|(a, _)| *a != length).map(|(_, n)| *n).collect();
    axes.iter_mut().take(1).for_each(|batch| *batch = sequences_of(cu_seqlens, *batch));
    axes
}

/// `update`, `candidate (batch, length, width)` or with heads, `h0 (batch, width)`: gives `o`, `hT`.
pub(super) fn min_gru(tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only("mingru", &["update", "candidate", "h0", "cu_seqlens", "grad_o"])?;
    let sums = named::prefix_sums(tensors)?;
    let cu_seqlens = sums.as_deref();
    let (update, candidate) = (view(tensors, "update")?, view(tensors, "candidate")?);
    let inputs = MinGruInputs { update, candidate, cu_seqlens };
    let rows = named::shape(tensors, "candidate")?;
    let memory = memory(rows, cu_seqlens);
    let mut before = MinGru::state(&inputs);
    if let Some(h) = named::optional(tensors, "h0", &memory)? {
        before.set_part(0, "h0", h)?;
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let run = |out: OutMut<'_>| MinGru::forward(&inputs, out, Some(&mut state));
    all.0.insert("o".into(), output(&candidate, candidate.shape(), rows, run)?);
    give(&mut all, "hT", &memory, state.part(0))?;
    if tensors.get("grad_o").is_some() {
        let grads = MinGru::backward(&inputs, Some(&before), &view(tensors, "grad_o")?)?;
        give_grad(&mut all, tensors, "update", grads.update)?;
        give_grad(&mut all, tensors, "candidate", grads.candidate)?;
        give_grad(&mut all, tensors, "h0", grads.state)?;
    }
    Ok(all)
}

/// `q`, `k (batch, heads, length, head_dim)`, `x`, `beta (.., head_dim_v)`, `s0 (batch, heads, head_dim, head_dim_v)`: gives `o`,
/// `sT`.
pub(super) fn longhorn(tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only("longhorn", &["q", "k", "x", "beta", "s0", "cu_seqlens", "grad_o"])?;
    let sums = named::prefix_sums(tensors)?;
    let cu_seqlens = sums.as_deref();
    let of = |name| view(tensors, name);
    let inputs = LonghornInputs { q: of("q")?, k: of("k")?, x: of("x")?, beta: of("beta")?, cu_seqlens };
    let [batch, heads, _, keys] = inputs.q.shape();
    let memory = [sequences_of(cu_seqlens, batch), heads, keys, inputs.x.shape()[3]];
    let mut before = Longhorn::state(&inputs);
    if let Some(s) = named::optional(tensors, "s0", &memory)? {
        before.set_part(0, "s0", s)?;
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let run = |out: OutMut<'_>| Longhorn::forward(&inputs, out, Some(&mut state));
    all.0.insert("o".into(), output(&inputs.x, inputs.x.shape(), named::shape(tensors, "x")?, run)?);
    give(&mut all, "sT", &memory, state.part(0))?;
    if tensors.get("grad_o").is_some() {
        let grads = Longhorn::backward(&inputs, Some(&before), &of("grad_o")?)?;
        let by = [("q", grads.q), ("k", grads.k), ("x", grads.x), ("beta", grads.beta), ("s0", grads.state)];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    Ok(all)
}

/// `u`, `dt`, `z (batch, width, length)`, `Bm`, `Cm (batch, state, length)`, `A (width, state)`, `D`, `dt_bias (width)`,
/// `s0 (batch, width, state)`: gives `o`, `sT`.
pub(super) fn mamba1(tensors: &NamedTensors) -> Result<NamedTensors> {
    let known = ["u", "dt", "z", "Bm", "Cm", "A", "D", "dt_bias", "s0", "cu_seqlens", "grad_o"];
    tensors.only("mamba1", &known)?;
    let sums = named::prefix_sums(tensors)?;
    let cu_seqlens = sums.as_deref();
    // To rows of tokens and back.
    let mut rows = NamedTensors::default();
    for name in ["u", "dt", "z", "Bm", "Cm", "grad_o"] {
        if tensors.get(name).is_some() || !["z", "grad_o"].contains(&name) {
            rows.0.insert(name.into(), transposed(tensors, name)?);
        }
    }
    let u = view(&rows, "u")?;
    let ([batch, _, n, width], states) = (u.shape(), view(&rows, "Bm")?.shape()[3]);
    let z = rows.get("z").map(|_| view(&rows, "z")).transpose()?;
    let inputs = Mamba1Inputs {
        u,
        dt: view(&rows, "dt")?,
        b: view(&rows, "Bm")?,
        c: view(&rows, "Cm")?,
        z,
        a: named::floats(tensors, "A", &[width, states])?,
        d: named::optional(tensors, "D", &[width])?,
        dt_bias: named::optional(tensors, "dt_bias", &[width])?,
        cu_seqlens,
    };
    let memory = [sequences_of(cu_seqlens, batch), width, states];
    let mut before = Mamba1::state(&inputs)?;
    if let Some(s) = named::optional(tensors, "s0", &memory)? {
        before.set_part(0, "s0", &transpose(s, width, states))?;
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let run = |out: OutMut<'_>| Mamba1::forward(&inputs, out, Some(&mut state));
    let o = output(&u, u.shape(), &[batch, n, width], run)?;
    all.0.insert("o".into(), named::turned(&o, "o")?);
    give(&mut all, "sT", &memory, transpose(&state.part(0), states, width))?;
    if rows.get("grad_o").is_some() {
        let grads = Mamba1::backward(&inputs, Some(&before), &view(&rows, "grad_o")?)?;
        let by = [
            ("u", transpose(&grads.u, n, width)),
            ("dt", transpose(&grads.dt, n, width)),
            ("z", transpose(&grads.z, n, width)),
            ("Bm", transpose(&grads.b, n, states)),
            ("Cm", transpose(&grads.c, n, states)),
            ("A", grads.a),
            ("D", grads.d),
            ("dt_bias", grads.dt_bias),
            ("s0", transpose(&grads.state, states, width)),
        ];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    Ok(all)
}

/// `k`, `v (batch, length, width)` or with heads, `time_decay`, `time_first (width)` or `(heads, width)`, and together `num0`,
/// `den0`, `max0 (batch, width)`: gives `o`, `numT`, `denT`, `maxT`.
pub(super) fn rwkv4(tensors: &NamedTensors) -> Result<NamedTensors> {
    const STATE: [(&str, &str); 3] = [("num0", "numT"), ("den0", "denT"), ("max0", "maxT")];
    let known = ["k", "v", "time_decay", "time_first", "num0", "den0", "max0", "cu_seqlens", "grad_o"];
    tensors.only("rwkv4", &known)?;
    let sums = named::prefix_sums(tensors)?;
    let cu_seqlens = sums.as_deref();
    let rows = named::shape(tensors, "v")?;
    let (v, memory) = (view(tensors, "v")?, memory(rows, cu_seqlens));
    let channels = &memory[1..];
    let inputs = Rwkv4Inputs {
        k: view(tensors, "k")?,
        v,
        time_decay: named::floats(tensors, "time_decay", channels)?,
        time_first: named::floats(tensors, "time_first", channels)?,
        cu_seqlens,
    };
    let mut before = Rwkv4::state(&inputs)?;
    if STATE.iter().any(|(name, _)| tensors.get(name).is_some()) {
        for (part, (name, _)) in STATE.iter().enumerate() {
            before.set_part(part, name, named::floats(tensors, name, &memory)?)?;
        }
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let o = output(&v, v.shape(), rows, |out| Rwkv4::forward(&inputs, out, Some(&mut state)))?;
    all.0.insert("o".into(), o);
    for (part, (_, name)) in STATE.iter().enumerate() {
        give(&mut all, name, &memory, state.part(part))?;
    }
    if tensors.get("grad_o").is_some() {
        let grads = Rwkv4::backward(&inputs, Some(&before), &view(tensors, "grad_o")?)?;
        let [num, den, max] = grads.state;
        let by = [
            ("k", grads.k),
            ("v", grads.v),
            ("time_decay", grads.time_decay),
            ("time_first", grads.time_first),
            ("num0", num),
            ("den0", den),
            ("max0", max),
        ];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    Ok(all)
}

/// `q`, `k`, `v (batch, length, width)` or with heads.
pub(super) fn aft_simple(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    if named::shape(tensors, "q")?.len() != 3 {
        return run_qkv(entry, options, tensors);
    }
    // One head; and its axis away again.
    let mut one = tensors.clone();
    one.0.values_mut().filter(|tensor| tensor.shape.len() == 3).for_each(|tensor| tensor.shape.insert(1, 1));
    let mut all = run_qkv(entry, options, &one)?;
    for tensor in all.0.values_mut() {
        tensor.shape.remove(1);
    }
    Ok(all)
}

/// `x (batch, length, blocks * width)`, `a_param (blocks * width)`, `wi`, `wr (blocks, width, width)`, `bi`, `br (blocks, width)`,
/// `h0 (batch, blocks * width)`: gives `o`, `hT`. The first position starts anew unless there is a state.
pub(super) fn rg_lru(tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only("rglru", &["x", "a_param", "wi", "wr", "bi", "br", "h0", "cu_seqlens", "grad_o"])?;
    let sums = named::prefix_sums(tensors)?;
    let cu_seqlens = sums.as_deref();
    let (&[batch, n, channels], &[blocks, width]) =
        (named::shape(tensors, "x")?, named::shape(tensors, "bi")?)
    else {
        let expected = "x (batch, length, channels) and bi (blocks, width)";
        return Err(AttnError::value("x's and bi's shapes", "of other axes", expected));
    };
    if blocks * width != channels {
        return Err(AttnError::shape("bi", "elements", blocks * width, channels));
    }
    let heads = |name: &str| -> Result<TensorView<'_>> {
        let (axes, strides) = ([batch, blocks, n, width], [n * channels, width, channels, 1]);
        let tensor = tensors.require(name)?;
        if tensor.shape != [batch, n, channels] {
            let (found, expected) = (format!("{:?}", tensor.shape), format!("{:?}", [batch, n, channels]));
            return Err(AttnError::value(format!("{name}'s shape"), found, expected));
        }
        match &tensor.data {
            TensorData::F32(data) => Ok(View::new(name, data, axes, strides)?.into()),
            TensorData::Bf16(data) => Ok(View::new(name, data, axes, strides)?.into()),
            TensorData::F16(data) => Ok(View::new(name, data, axes, strides)?.into()),
            _ => Err(AttnError::DType {
                tensor: name.into(),
                found: "integers".into(),
                expected: "floats".into(),
            }),
        }
    };
    let inputs = RgLruInputs {
        x: heads("x")?,
        lambda: named::floats(tensors, "a_param", &[channels])?,
        input_weight: named::floats(tensors, "wi", &[blocks, width, width])?,
        input_bias: named::floats(tensors, "bi", &[blocks, width])?,
        recurrence_weight: named::floats(tensors, "wr", &[blocks, width, width])?,
        recurrence_bias: named::floats(tensors, "br", &[blocks, width])?,
        cu_seqlens,
    };
    let sequences = sequences_of(cu_seqlens, batch);
    let mut before = RgLru::state(&inputs)?;
    if let Some(h) = named::optional(tensors, "h0", &[sequences, channels])? {
        before.set_part(0, "h0", h)?;
        // Whoever has a state is past the first token.
        before.advance(1);
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    // Heads before the length, then back.
    let run = |out: OutMut<'_>| RgLru::forward(&inputs, out, Some(&mut state));
    let o = output(&inputs.x, [batch, blocks, n, width], &[batch, blocks, n, width], run)?;
    let axes = [batch, blocks, n, width];
    let data = match &o.data {
        TensorData::Bf16(data) => TensorData::Bf16(length_first(data, axes)),
        TensorData::F16(data) => TensorData::F16(length_first(data, axes)),
        TensorData::F32(data) => TensorData::F32(length_first(data, axes)),
        other => other.clone(),
    };
    all.0.insert("o".into(), NamedTensor { shape: vec![batch, n, channels], data });
    give(&mut all, "hT", &[sequences, channels], state.part(0))?;
    if tensors.get("grad_o").is_some() {
        let grads = RgLru::backward(&inputs, Some(&before), &heads("grad_o")?)?;
        let by = [
            ("x", length_first(&grads.x, axes)),
            ("a_param", grads.lambda),
            ("wi", grads.input_weight),
            ("bi", grads.input_bias),
            ("wr", grads.recurrence_weight),
            ("br", grads.recurrence_bias),
            ("h0", grads.state),
        ];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    Ok(all)
}

/// `(batch, heads, length, width)` as `(batch, length, heads, width)`.
fn length_first<E: Copy>(data: &[E], [batch, heads, n, width]: [usize; 4]) -> Vec<E> {
    let rows = (0..batch).flat_map(|b| (0..n).flat_map(move |t| (0..heads).map(move |h| (b, t, h))));
    rows.flat_map(|(b, t, h)| &data[((b * heads + h) * n + t) * width..][..width]).copied().collect()
}
