//! A bias, sinks, the log-sum-exp and the user's closures on tensors: values and gradients against candle's own operations,
//! and the gradients against finite differences of the loss.

use super::naive::{Naive, max_difference, random};
use attn_core::candle::candle_core::{DType, Device, Result, Tensor, Var};
use attn_core::score::ScoreFnWithDerivative;
use attn_flash::Flash;
use attn_flash::candle::FlashTensors;

fn var(shape: &[usize]) -> Result<Var> {
    Var::from_tensor(&Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?)
}

/// `(q, k, v)` with grouped heads and more keys than queries.
fn qkv() -> Result<[Var; 3]> {
    Ok([var(&[2, 4, 9, 8])?, var(&[2, 2, 14, 8])?, var(&[2, 2, 14, 6])?])
}

/// The loss's gradient along a random direction equals its difference quotient, for each variable by itself.
fn check_by_differences(vars: &[(&str, &Var)], loss: impl Fn() -> Result<Tensor>) -> Result<()> {
    let grads = loss()?.backward()?;
    let value = || loss()?.to_dtype(DType::F64)?.to_scalar::<f64>();
    for (name, var) in vars {
        let (start, step) = (var.as_tensor().copy()?, 1e-2);
        let direction = Tensor::randn(0f32, 1.0, var.dims(), &Device::Cpu)?;
        let at = |t: f64| {
            var.set(&(&start + (&direction * t)?)?)?;
            value()
        };
        // Fourth order: the error of the quotient is far below that of f32.
        let quotient =
            (8.0 * (at(step)? - at(-step)?) - (at(2.0 * step)? - at(-2.0 * step)?)) / (12.0 * step);
        var.set(&start)?;
        let grad = grads.get(var).unwrap_or_else(|| panic!("{name} has no gradient"));
        assert_eq!(grad.dims(), var.dims(), "{name}");
        let got = f64::from((grad * &direction)?.sum_all()?.to_scalar::<f32>()?);
        assert!((got - quotient).abs() < 2e-3 * (1.0 + quotient.abs()), "{name}: {got} and {quotient}");
    }
    Ok(())
}

#[test]
fn bias_and_sinks_have_the_gradients_of_candles_own_operations() -> Result<()> {
    let [q, k, v] = qkv()?;
    let sinks = var(&[4])?;
    let shapes: [&[usize]; 6] =
        [&[2, 4, 9, 14], &[4, 9, 14], &[9, 14], &[1, 4, 1, 14], &[2, 1, 1, 14], &[4, 9, 1]];
    for shape in shapes {
        let bias = var(shape)?;
        let weights = random((2, 4, 9, 6))?;
        let ours =
            Flash { softcap: Some(3.0), ..Flash::causal() }.call().on_tensors().bias(&bias).sinks(&sinks);
        let naive = Naive {
            scale: 8f64.powf(-0.5),
            right: Some(0),
            softcap: Some(3.0),
            bias: Some(&bias),
            sinks: Some(&sinks),
            ..Naive::default()
        };
        let (got, want) = (ours.forward_t(&q, &k, &v)?, naive.forward(&q, &k, &v)?.0);
        let error = max_difference(&got, &want)?;
        assert!(error < 3e-6, "{shape:?}: {error}");
        let [got, want] = [got, want].map(|out| (out * &weights)?.sum_all()?.backward());
        let (got, want) = (got?, want?);
        for (name, var) in [("q", &q), ("k", &k), ("v", &v), ("bias", &bias), ("sinks", &sinks)] {
            let error = max_difference(got.get(var).expect(name), want.get(var).expect(name))?;
            assert!(error < 3e-5, "bias {shape:?}: gradient of {name}: {error}");
        }
    }
    Ok(())
}

#[test]
fn gradients_are_differences_of_the_loss() -> Result<()> {
    let [q, k, v] = qkv()?;
    let (bias, sinks) = (var(&[4, 9, 14])?, var(&[4])?);
    let all = [("q", &q), ("k", &k), ("v", &v), ("bias", &bias), ("sinks", &sinks)];
    let weights = random((2, 4, 9, 6))?;
    let loss = |out: Tensor| (out * &weights)?.sum_all();
    // The tensors are read when the call is made: a new one for each value.
    let both = || Flash::causal().call().on_tensors().bias(&bias).sinks(&sinks);
    check_by_differences(&all, || loss(both().forward_t(&q, &k, &v)?))?;
    // One of the two alone; the other is there without gradients.
    let (fixed_bias, fixed_sinks) = (bias.as_tensor().detach(), sinks.as_tensor().detach());
    let sinks_alone = || Flash::causal().call().on_tensors().bias(&fixed_bias).sinks(&sinks);
    check_by_differences(&all[4..], || loss(sinks_alone().forward_t(&q, &k, &v)?))?;
    let bias_alone = || Flash::causal().call().on_tensors().bias(&bias).sinks(&fixed_sinks);
    check_by_differences(&all[..4], || loss(bias_alone().forward_t(&q, &k, &v)?))?;
    let neither = || Flash::causal().call().on_tensors().bias(&fixed_bias).sinks(&fixed_sinks);
    check_by_differences(&all[..3], || loss(neither().forward_t(&q, &k, &v)?))?;
    Ok(())
}

#[test]
fn the_log_sum_exp_has_gradients_too() -> Result<()> {
    let [q, k, v] = qkv()?;
    let (weights, lse_weights) = (random((2, 4, 9, 6))?, random((1, 2, 4, 9))?.squeeze(0)?);
    let naive = Naive { scale: 8f64.powf(-0.5), right: Some(0), ..Naive::default() };
    let ours = Flash::causal().call().on_tensors();
    let ((out, lse), (want_out, want_lse)) =
        (ours.forward_with_lse_t(&q, &k, &v)?, naive.forward(&q, &k, &v)?);
    assert!(max_difference(&out, &want_out)? < 3e-6 && max_difference(&lse, &want_lse)? < 3e-6);
    let loss = |out: &Tensor, lse: &Tensor| (out * &weights)?.sum_all()? + (lse * &lse_weights)?.sum_all()?;
    let (got, want) = (loss(&out, &lse)?.backward()?, loss(&want_out, &want_lse)?.backward()?);
    for (name, var) in [("q", &q), ("k", &k), ("v", &v)] {
        let error = max_difference(got.get(var).expect(name), want.get(var).expect(name))?;
        assert!(error < 3e-5, "gradient of {name}: {error}");
    }
    Ok(())
}

#[test]
fn the_users_closures_train() -> Result<()> {
    let [q, k, v] = qkv()?;
    let weights = random((2, 4, 9, 6))?;
    // Every second key, scores s + 0.1 s^2.
    let square = ScoreFnWithDerivative(|s: f32, _| s + 0.1 * s * s, |s: f32, _| 1.0 + 0.2 * s);
    let ours = Flash::full().call().mask_fn(|p| (p.i + p.j) % 2 == 0).score_mod(square).on_tensors();
    let all = [("q", &q), ("k", &k), ("v", &v)];
    check_by_differences(&all, || (ours.forward_t(&q, &k, &v)? * &weights)?.sum_all())?;
    // A closure without a derivative computes, and says so when asked for gradients.
    let unknown = Flash::full().call().score_fn(|s, _| s * 0.5).on_tensors();
    let error = unknown.forward_t(&q, &k, &v)?.sum_all()?.backward().unwrap_err().to_string();
    assert!(error.contains("derivative") || error.contains("gradient"), "{error}");
    Ok(())
}

#[test]
fn packed_sequences_take_a_bias_and_sinks() -> Result<()> {
    let (q, k, v) = (var(&[12, 4, 8])?, var(&[19, 2, 8])?, var(&[19, 2, 8])?);
    let (bias, sinks) = (var(&[4, 1, 1])?, var(&[4])?);
    let (cu_q, cu_kv) = ([0u32, 4, 12], [0u32, 9, 19]);
    let lengths = (Tensor::new(&cu_q, &Device::Cpu)?, Tensor::new(&cu_kv, &Device::Cpu)?);
    let naive = Naive { scale: 8f64.powf(-0.5), bias: Some(&bias), sinks: Some(&sinks), ..Naive::default() };
    let ours = Flash::full().call().on_tensors().bias(&bias).sinks(&sinks);
    let got = ours.forward_packed_t(&q, &k, &v, &lengths.0, &lengths.1)?;
    let want = naive.packed([&q, &k, &v], &cu_q, &cu_kv)?;
    assert!(max_difference(&got, &want)? < 3e-6);
    let (got, want) = (got.sqr()?.sum_all()?.backward()?, want.sqr()?.sum_all()?.backward()?);
    for (name, var) in [("q", &q), ("k", &k), ("v", &v), ("bias", &bias), ("sinks", &sinks)] {
        let error = max_difference(got.get(var).expect(name), want.get(var).expect(name))?;
        assert!(error < 5e-5, "gradient of {name}: {error}");
    }
    Ok(())
}

#[test]
fn half_types_and_both_orders_give_the_same_with_learned_sinks() -> Result<()> {
    let [q, k, v] = qkv()?;
    let sinks = var(&[4])?;
    let learned: FlashTensors = Flash::causal().call().on_tensors().sinks(&sinks);
    let fixed = Flash::causal().call().on_tensors().sinks(&sinks.as_tensor().detach());
    for (dtype, bound) in [(DType::F32, 1e-6), (DType::BF16, 2e-2), (DType::F16, 3e-3)] {
        let cast = |t: &Var| t.as_tensor().to_dtype(dtype);
        let (q, k, v) = (cast(&q)?, cast(&k)?, cast(&v)?);
        let swap = |t: &Tensor| t.transpose(1, 2);
        let out = learned.forward_t(&q, &k, &v)?;
        assert_eq!(out.dtype(), dtype);
        assert!(max_difference(&out, &fixed.forward_t(&q, &k, &v)?)? < bound, "{dtype:?}");
        let bnhd = learned.forward_bnhd_t(&swap(&q)?, &swap(&k)?, &swap(&v)?)?;
        assert_eq!(max_difference(&swap(&bnhd)?, &out)?, 0.0, "{dtype:?}");
        let grads = out.to_dtype(DType::F32)?.sqr()?.sum_all()?.backward()?;
        assert!(grads.get(&sinks).expect("sinks").abs()?.sum_all()?.to_scalar::<f32>()? > 0.0);
    }
    Ok(())
}
