//! The variants on named tensors, in the names and layouts of their reference code.

use super::aft_simple::AftSimple;
use super::hgrn::{Hgrn, HgrnInputs};
use super::longhorn::{Longhorn, LonghornInputs};
use super::mamba1::{Mamba1, Mamba1Inputs};
use super::min_gru::{MinGru, MinGruInputs};
use super::rg_lru::{RgLru, RgLruInputs};
use super::rwkv4::{Rwkv4, Rwkv4Inputs};
use crate::named::{self, give, give_grad, output, transpose, transposed, view};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, Options, run_qkv};
use attn_core::{AttnError, Differentiable, Qkv, QkvGrads, Result, View, ViewMut};

/// `x`, `g (batch, length, width)` or with heads, `h0 (batch, width)`: gives `o`, `hT`.
pub(super) fn hgrn(tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only("hgrn", &["x", "g", "h0", "grad_o"])?;
    let inputs = HgrnInputs { x: view(tensors, "x")?, log_decay: view(tensors, "g")? };
    let axes = inputs.x.shape();
    let (rows, memory) = (named::shape(tensors, "x")?, memory(named::shape(tensors, "x")?));
    let mut before = Hgrn::state(&inputs);
    if let Some(h) = named::optional(tensors, "h0", &memory)? {
        before.set_part(0, "h0", h)?;
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let o = output(axes, |out| Hgrn::forward(&inputs, out, Some(&mut state)))?;
    give(&mut all, "o", rows, o)?;
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
fn memory(rows: &[usize]) -> Vec<usize> {
    let length = rows.len().saturating_sub(2);
    rows.iter().enumerate().filter(|(a, _)| *a != length).map(|(_, n)| *n).collect()
}

/// `update`, `candidate (batch, length, width)` or with heads, `h0 (batch, width)`: gives `o`, `hT`.
pub(super) fn min_gru(tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only("mingru", &["update", "candidate", "h0", "grad_o"])?;
    let inputs = MinGruInputs { update: view(tensors, "update")?, candidate: view(tensors, "candidate")? };
    let rows = named::shape(tensors, "candidate")?;
    let memory = memory(rows);
    let mut before = MinGru::state(&inputs);
    if let Some(h) = named::optional(tensors, "h0", &memory)? {
        before.set_part(0, "h0", h)?;
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let o = output(inputs.candidate.shape(), |out| MinGru::forward(&inputs, out, Some(&mut state)))?;
    give(&mut all, "o", rows, o)?;
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
    tensors.only("longhorn", &["q", "k", "x", "beta", "s0", "grad_o"])?;
    let of = |name| view(tensors, name);
    let inputs = LonghornInputs { q: of("q")?, k: of("k")?, x: of("x")?, beta: of("beta")? };
    let [batch, heads, _, keys] = inputs.q.shape();
    let memory = [batch, heads, keys, inputs.x.shape()[3]];
    let mut before = Longhorn::state(&inputs);
    if let Some(s) = named::optional(tensors, "s0", &memory)? {
        before.set_part(0, "s0", s)?;
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let o = output(inputs.x.shape(), |out| Longhorn::forward(&inputs, out, Some(&mut state)))?;
    give(&mut all, "o", named::shape(tensors, "x")?, o)?;
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
    tensors.only("mamba1", &["u", "dt", "z", "Bm", "Cm", "A", "D", "dt_bias", "s0", "grad_o"])?;
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
    };
    let memory = [batch, width, states];
    let mut before = Mamba1::state(&inputs)?;
    if let Some(s) = named::optional(tensors, "s0", &memory)? {
        before.set_part(0, "s0", &transpose(s, width, states))?;
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let o = output(u.shape(), |out| Mamba1::forward(&inputs, out, Some(&mut state)))?;
    give(&mut all, "o", named::shape(tensors, "u")?, transpose(&o, n, width))?;
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
    let known = ["k", "v", "time_decay", "time_first", "num0", "den0", "max0", "grad_o"];
    tensors.only("rwkv4", &known)?;
    let rows = named::shape(tensors, "v")?;
    let (v, memory) = (view(tensors, "v")?, memory(rows));
    let channels = &memory[1..];
    let inputs = Rwkv4Inputs {
        k: view(tensors, "k")?,
        v,
        time_decay: named::floats(tensors, "time_decay", channels)?,
        time_first: named::floats(tensors, "time_first", channels)?,
    };
    let mut before = Rwkv4::state(&inputs)?;
    if STATE.iter().any(|(name, _)| tensors.get(name).is_some()) {
        for (part, (name, _)) in STATE.iter().enumerate() {
            before.set_part(part, name, named::floats(tensors, name, &memory)?)?;
        }
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let o = output(v.shape(), |out| Rwkv4::forward(&inputs, out, Some(&mut state)))?;
    give(&mut all, "o", rows, o)?;
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
pub(super) fn aft_simple(
    aft: &AftSimple,
    entry: &Entry,
    options: &Options,
    tensors: &NamedTensors,
) -> Result<NamedTensors> {
    let rank = named::shape(tensors, "q").map_or(4, <[usize]>::len);
    if rank == 4 && tensors.get("grad_o").is_none() {
        return run_qkv(entry, options, tensors);
    }
    tensors.only(entry.name, &["q", "k", "v", "grad_o"])?;
    qkv_with_grads(aft, tensors)
}

/// Attention over `q`, `k`, `v` of three or four axes, with gradients if there is `grad_o`.
fn qkv_with_grads(attention: &dyn Differentiable, tensors: &NamedTensors) -> Result<NamedTensors> {
    let x = Qkv::new(view(tensors, "q")?, view(tensors, "k")?, view(tensors, "v")?)?;
    let s = x.shape();
    let mut all = NamedTensors::default();
    let mut out = vec![f32::NAN; s.out().iter().product()];
    let saved = attention.forward_saving(x, ViewMut::contiguous("out", &mut out, s.out())?.into())?;
    let mut axes = named::shape(tensors, "q")?.to_vec();
    if let Some(width) = axes.last_mut() {
        *width = s.head_dim_v;
    }
    if tensors.get("grad_o").is_some() {
        let zeros = |axes: [usize; 4]| vec![0.0f32; axes.iter().product()];
        let (mut dq, mut dk, mut dv) = (zeros(s.q()), zeros(s.k()), zeros(s.v()));
        let grads = QkvGrads {
            q: ViewMut::contiguous("grad.q", &mut dq, s.q())?.into(),
            k: ViewMut::contiguous("grad.k", &mut dk, s.k())?.into(),
            v: ViewMut::contiguous("grad.v", &mut dv, s.v())?.into(),
        };
        let o = attn_core::View::contiguous("out", &out, s.out())?;
        attention.backward(x, o.into(), &saved, view(tensors, "grad_o")?, grads)?;
        let by = [("q", dq), ("k", dk), ("v", dv)];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    all.0.insert("o".into(), NamedTensor::f32("o", &axes, out)?);
    Ok(all)
}

/// `x (batch, length, blocks * width)`, `a_param (blocks * width)`, `wi`, `wr (blocks, width, width)`, `bi`, `br (blocks, width)`,
/// `h0 (batch, blocks * width)`: gives `o`, `hT`. The first position starts anew unless there is a state.
pub(super) fn rg_lru(tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only("rglru", &["x", "a_param", "wi", "wr", "bi", "br", "h0", "grad_o"])?;
    let (&[batch, n, channels], &[blocks, width]) =
        (named::shape(tensors, "x")?, named::shape(tensors, "bi")?)
    else {
        let expected = "x (batch, length, channels) and bi (blocks, width)";
        return Err(AttnError::value("x's and bi's shapes", "of other axes", expected));
    };
    if blocks * width != channels {
        return Err(AttnError::shape("bi", "elements", blocks * width, channels));
    }
    let heads = |name: &str| -> Result<View<'_, f32>> {
        let data = named::floats(tensors, name, &[batch, n, channels])?;
        View::new(name, data, [batch, blocks, n, width], [n * channels, width, channels, 1])
    };
    let inputs = RgLruInputs {
        x: heads("x")?.into(),
        lambda: named::floats(tensors, "a_param", &[channels])?,
        input_weight: named::floats(tensors, "wi", &[blocks, width, width])?,
        input_bias: named::floats(tensors, "bi", &[blocks, width])?,
        recurrence_weight: named::floats(tensors, "wr", &[blocks, width, width])?,
        recurrence_bias: named::floats(tensors, "br", &[blocks, width])?,
    };
    let mut before = RgLru::state(&inputs)?;
    if let Some(h) = named::optional(tensors, "h0", &[batch, channels])? {
        before.set_part(0, "h0", h)?;
        // Whoever has a state is past the first token.
        before.advance(1);
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let mut o = vec![f32::NAN; batch * n * channels];
    let out = ViewMut::new("out", &mut o, [batch, blocks, n, width], [n * channels, width, channels, 1])?;
    RgLru::forward(&inputs, out.into(), Some(&mut state))?;
    give(&mut all, "o", &[batch, n, channels], o)?;
    give(&mut all, "hT", &[batch, channels], state.part(0))?;
    if tensors.get("grad_o").is_some() {
        let grads = RgLru::backward(&inputs, Some(&before), &heads("grad_o")?.into())?;
        // (batch, blocks, length, width) back to (batch, length, blocks, width).
        let mut x = Vec::with_capacity(grads.x.len());
        for b in 0..batch {
            for t in 0..n {
                let row = |block: usize| &grads.x[((b * blocks + block) * n + t) * width..][..width];
                (0..blocks).for_each(|block| x.extend_from_slice(row(block)));
            }
        }
        let by = [
            ("x", x),
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
