//! Variants on candle tensors: gradients of everything, states from call to call, packed sequences, halves.

use attn_core::candle::candle_core::{DType, Device, Result, Tensor, Var};
use attn_core::registry::{NamedTensor, NamedTensors, Options, find};
use attn_linear::recurrent::{GatedDeltaNet, Gla, Mamba2};
use attn_linear::typed::{Decayed, GatedDelta, StateSpace};
use attn_linear::{LinearAttention, TensorState, on_tensors, registry};
use attn_testkit::compare::{Tol, assert_close};

const N: usize = 40;
const D: usize = 8;

/// Numbers from -1 to 1 that look random.
fn tensor(shape: &[usize], seed: usize) -> Tensor {
    let len: usize = shape.iter().product();
    let numbers = (0..len).map(|i| ((i * 7 + seed * 131 + 1) as f32 * 0.618_034).sin()).collect::<Vec<_>>();
    Tensor::from_vec(numbers, shape, &Device::Cpu).unwrap()
}

fn rows(seed: usize) -> Tensor {
    tensor(&[1, 2, N, D], seed)
}

/// From -1 to 0.
fn decays(shape: &[usize]) -> Tensor {
    ((tensor(shape, 11) - 1.0).unwrap() * 0.5).unwrap()
}

/// From 0 to 1.
fn strengths(shape: &[usize]) -> Tensor {
    ((tensor(shape, 12) + 1.0).unwrap() * 0.5).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn close(what: &str, got: &Tensor, want: &Tensor, tol: f64) {
    assert_eq!(got.dims(), want.dims(), "{what}");
    let want: Vec<f64> = numbers(want).into_iter().map(f64::from).collect();
    assert_close(what, &numbers(got), &want, Tol::ScaledMax(tol));
}

/// What a registered variant gives by name, with gradients by the loss `sum(o * w)`.
fn by_name(name: &str, options: &Options, inputs: &[(&str, &Tensor)], w: &Tensor) -> NamedTensors {
    let mut all = NamedTensors::default();
    for (name, tensor) in inputs.iter().copied().chain([("grad_o", w)]) {
        all.0.insert(name.into(), NamedTensor::f32(name, tensor.dims(), numbers(tensor)).unwrap());
    }
    find(&registry(), name).unwrap().run(options, &all).unwrap()
}

fn named(all: &NamedTensors, name: &str) -> Tensor {
    let (shape, data) = all.f32(name).unwrap().unwrap_or_else(|| panic!("{name}"));
    Tensor::from_vec(data.to_vec(), shape, &Device::Cpu).unwrap()
}

#[test]
fn gates_strengths_and_the_initial_state_get_their_gradients() -> Result<()> {
    let var = |tensor: Tensor| Var::from_tensor(&tensor);
    let all = [
        ("q", var(rows(1))?),
        ("k", var(rows(2))?),
        ("v", var(rows(3))?),
        ("log_decay", var(decays(&[1, 2, N]))?),
        ("beta", var(strengths(&[1, 2, N]))?),
        ("initial_state", var(tensor(&[1, 2, D, D], 4))?),
    ];
    let of = |name: &str| {
        all.iter().find(|(known, _)| *known == name).map(|(_, var)| var.as_tensor().clone()).unwrap()
    };
    let attention = LinearAttention::<GatedDeltaNet>::configured([]).unwrap();
    let inputs =
        GatedDelta { q: of("q"), k: of("k"), v: of("v"), log_decay: of("log_decay"), beta: of("beta") };
    let state = TensorState::new([("initial_state", of("initial_state"))]);
    let (out, last) = attention.on_tensors(inputs).initial_state(&state).forward_with_state()?;
    let w = rows(9);
    let grads = (&out * &w)?.sum_all()?.backward()?;
    let inputs: Vec<(&str, &Tensor)> = all.iter().map(|(name, var)| (*name, var.as_tensor())).collect();
    let want = by_name("gated-deltanet", &Options::new(), &inputs, &w);
    close("o", &out, &named(&want, "o"), 1e-7);
    close("sT", last.get("initial_state").unwrap(), &named(&want, "sT"), 1e-7);
    assert_eq!(last.bytes(), 4 * 2 * D * D);
    for (name, var) in &all {
        close(name, grads.get(var).unwrap(), &named(&want, &format!("grad.{name}")), 1e-6);
    }
    Ok(())
}

#[test]
fn a_state_carries_gradients_from_call_to_call() -> Result<()> {
    let (q, k, v) = (Var::from_tensor(&rows(1))?, Var::from_tensor(&rows(2))?, Var::from_tensor(&rows(3))?);
    let g = Var::from_tensor(&decays(&[1, 2, N, D]))?;
    let attention = LinearAttention::<Gla>::configured([]).unwrap();
    let part = |start, len| -> Result<Decayed<Tensor>> {
        let of = |var: &Var| var.narrow(2, start, len);
        Ok(Decayed { q: of(&q)?, k: of(&k)?, v: of(&v)?, log_decay: of(&g)? })
    };
    let w = rows(9);
    let whole = attention.on_tensors(part(0, N)?).forward()?;
    let want = (&whole * &w)?.sum_all()?.backward()?;
    let (first, state) = attention.on_tensors(part(0, 17)?).forward_with_state()?;
    let second = attention.on_tensors(part(17, N - 17)?).initial_state(&state).forward()?;
    let both = Tensor::cat(&[&first, &second], 2)?;
    close("o", &both, &whole, 1e-6);
    let got = (&both * &w)?.sum_all()?.backward()?;
    for (name, var) in [("q", &q), ("k", &k), ("v", &v), ("log_decay", &g)] {
        close(name, got.get(var).unwrap(), want.get(var).unwrap(), 2e-6);
    }
    // Truncated: the second part alone.
    let alone = attention.on_tensors(part(17, N - 17)?).initial_state(&state.detach()).forward()?;
    let grads = alone.sum_all()?.backward()?;
    let early = grads.get(&k).unwrap().narrow(2, 0, 17)?;
    assert!(numbers(&early).iter().all(|x| *x == 0.0));
    Ok(())
}

#[test]
fn packed_sequences_do_not_see_each_other() -> Result<()> {
    let x = Var::from_tensor(&rows(1))?;
    let attention = LinearAttention::<Mamba2>::configured([]).unwrap();
    let a = Var::from_tensor(&Tensor::new(&[-0.5f32, -1.5], &Device::Cpu)?)?;
    let part = |start, len| -> Result<StateSpace<Tensor>> {
        let of = |seed| rows(seed).narrow(2, start, len);
        let dt = strengths(&[1, 2, N]).narrow(2, start, len)?;
        let (a, x) = (a.as_tensor().clone(), x.narrow(2, start, len)?);
        Ok(StateSpace { c: of(2)?, b: of(3)?, x, dt, a, d: None, dt_bias: None })
    };
    let sums = [0, 13, 13, N];
    let (packed, state) = attention.on_tensors(part(0, N)?).cu_seqlens(&sums).forward_with_state()?;
    assert_eq!(state.get("initial_state").unwrap().dims(), [3, 2, D, D]);
    let alone =
        [attention.on_tensors(part(0, 13)?).forward()?, attention.on_tensors(part(13, N - 13)?).forward()?];
    let alone = Tensor::cat(&alone, 2)?;
    close("o", &packed, &alone, 1e-6);
    let w = rows(9);
    let (got, want) = ((&packed * &w)?.sum_all()?.backward()?, (&alone * &w)?.sum_all()?.backward()?);
    close("x", got.get(&x).unwrap(), want.get(&x).unwrap(), 1e-6);
    close("a", got.get(&a).unwrap(), want.get(&a).unwrap(), 1e-6);
    let error = attention.on_tensors(part(0, N)?).cu_seqlens(&[0, 41]).forward().unwrap_err().to_string();
    assert!(error.contains("cu_seqlens"), "{error}");
    Ok(())
}

#[test]
fn every_variant_goes_by_name() -> Result<()> {
    // On q, k and v alone, all of them; with inputs of its own, one of each engine.
    let w = rows(9);
    for entry in registry() {
        let inputs = [
            ("q", Var::from_tensor(&rows(1))?),
            ("k", Var::from_tensor(&rows(2))?),
            ("v", Var::from_tensor(&rows(3))?),
        ];
        // Several keys a token, or gradients only of what is given.
        if ["deltaproduct", "gated-deltaproduct", "linformer", "agent"].contains(&entry.name) {
            continue;
        }
        let Some(_) = entry.build(&Options::new()).unwrap().as_differentiable() else { continue };
        let tensors = inputs.iter().map(|(name, var)| (*name, var.as_tensor().clone()));
        let out = on_tensors(entry, &Options::new(), tensors)?.forward()?;
        let grads = (&out * &w)?.sum_all()?.backward()?;
        let given: Vec<(&str, &Tensor)> = inputs.iter().map(|(name, var)| (*name, var.as_tensor())).collect();
        let want = by_name(entry.name, &Options::new(), &given, &w);
        close(entry.name, &out, &named(&want, "o"), 1e-6);
        for (name, var) in &inputs {
            close(entry.name, grads.get(var).unwrap(), &named(&want, &format!("grad.{name}")), 1e-6);
        }
    }
    let gate = Var::from_tensor(&strengths(&[1, 2, N]))?;
    let rfa = *find(&registry(), "rfa").unwrap();
    let gated = |proj: Option<Tensor>| {
        let all = [("q", rows(1)), ("k", rows(2)), ("v", rows(3)), ("gate", gate.as_tensor().clone())];
        on_tensors(rfa, &Options::new(), all.into_iter().chain(proj.map(|proj| ("proj", proj))))
    };
    let (out, state) = gated(None)?.forward_with_state()?;
    let grads = (&out * &w)?.sum_all()?.backward()?;
    let given = [("q", &rows(1)), ("k", &rows(2)), ("v", &rows(3)), ("gate", gate.as_tensor())];
    close(
        "gate",
        grads.get(&gate).unwrap(),
        &named(&by_name("rfa", &Options::new(), &given, &w), "grad.gate"),
        1e-6,
    );
    // It goes on from its state; gradients by that are refused, not forgotten.
    let more = gated(None)?.initial_state(&state.detach()).forward()?;
    assert_eq!(more.dims(), [1, 2, N, D]);
    assert!(state.get("s0").unwrap().sum_all()?.backward().is_err());
    // So are those by what has none.
    let proj = Var::from_tensor(&tensor(&[16, D], 6))?;
    let out = gated(Some(proj.as_tensor().clone()))?.forward()?;
    let error = out.sum_all()?.backward().unwrap_err().to_string();
    assert!(error.contains("proj"), "{error}");
    Ok(())
}

#[test]
fn halves_come_out_as_they_went_in() -> Result<()> {
    let attention = LinearAttention::<Gla>::configured([]).unwrap();
    let inputs = |dtype| -> Result<Decayed<Tensor>> {
        let log_decay = decays(&[1, 2, N, D]);
        Ok(Decayed {
            q: rows(1).to_dtype(dtype)?,
            k: rows(2).to_dtype(dtype)?,
            v: rows(3).to_dtype(dtype)?,
            log_decay,
        })
    };
    let full = attention.on_tensors(inputs(DType::F32)?).forward()?;
    let (half, state) = attention.on_tensors(inputs(DType::BF16)?).forward_with_state()?;
    assert_eq!((half.dtype(), state.get("initial_state").unwrap().dtype()), (DType::BF16, DType::F32));
    close("o", &half, &full, 2e-2);
    Ok(())
}
