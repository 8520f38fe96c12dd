//! `Attention` on tensors: the methods that every variant has.

use super::naive::{max_difference, random};
use attn_core::candle::CandleAttention;
use attn_core::candle::candle_core::{D, DType, Device, Result, Tensor, Var};
use attn_flash::Flash;
use std::sync::Arc;

/// `softmax(q k^T / sqrt(d)) v` in candle's own operations.
fn by_matmul(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let scores = (q.matmul(&k.t()?)? / (q.dim(D::Minus1)? as f64).sqrt())?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?.exp()?;
    weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?.matmul(v)
}

#[test]
fn equals_candles_own_operations() -> Result<()> {
    let (q, k, v) = (random((2, 3, 37, 24))?, random((2, 3, 50, 24))?, random((2, 3, 50, 16))?);
    let out = Flash::full().forward_t(&q, &k, &v)?;
    assert_eq!(out.dims(), [2, 3, 37, 16]);
    assert!(max_difference(&out, &by_matmul(&q, &k, &v)?)? < 2e-6);
    Ok(())
}

#[test]
fn both_storage_orders_and_offsets_are_read_in_place() -> Result<()> {
    let bnhd = |heads| random((2, 20, heads, 16));
    let (q, k, v) = (bnhd(4)?, bnhd(2)?, bnhd(2)?);
    let contiguous = |t: &Tensor| t.transpose(1, 2)?.contiguous();
    let want = Flash::causal().forward_t(&contiguous(&q)?, &contiguous(&k)?, &contiguous(&v)?)?;
    let got = Flash::causal().forward_bnhd_t(&q, &k, &v)?;
    assert!(got.is_contiguous(), "in the order of the inputs");
    assert_eq!(max_difference(&got.transpose(1, 2)?, &want)?, 0.0);
    // A slice has a storage offset.
    let last = |t: &Tensor| t.narrow(0, 1, 1);
    let got = Flash::causal().forward_bnhd_t(&last(&q)?, &last(&k)?, &last(&v)?)?;
    assert_eq!(max_difference(&got.transpose(1, 2)?, &last(&want)?)?, 0.0);
    Ok(())
}

#[test]
fn half_types_stay_what_they_are() -> Result<()> {
    let (q, k, v) = (random((1, 2, 30, 16))?, random((1, 2, 30, 16))?, random((1, 2, 30, 16))?);
    for (dtype, bound) in [(DType::BF16, 2e-2), (DType::F16, 3e-3)] {
        let cast = |t: &Tensor| t.to_dtype(dtype);
        let out = Flash::full().forward_t(&cast(&q)?, &cast(&k)?, &cast(&v)?)?;
        assert_eq!(out.dtype(), dtype);
        let error = max_difference(&out, &by_matmul(&q, &k, &v)?)?;
        assert!(error < bound, "{dtype:?}: {error}");
    }
    Ok(())
}

#[test]
fn a_stream_equals_one_causal_pass() -> Result<()> {
    let (q, k, v) = (random((1, 4, 21, 8))?, random((1, 2, 21, 8))?, random((1, 2, 21, 8))?);
    let whole = Flash::causal().forward_t(&q, &k, &v)?;
    let mut stream = Flash::causal().stream_t(&q, &k, &v)?;
    let pieces = [(0, 9), (9, 1), (10, 1), (11, 10)].map(|(start, len)| {
        let cut = |t: &Tensor| t.narrow(2, start, len);
        stream.append_t(&cut(&q)?, &cut(&k)?, &cut(&v)?)
    });
    let pieces = pieces.into_iter().collect::<Result<Vec<_>>>()?;
    assert!(max_difference(&Tensor::cat(&pieces, 2)?, &whole)? < 1e-6);
    assert_eq!(stream.state().len(), 21);
    Ok(())
}

#[test]
fn a_boxed_variant_works_like_any_other() -> Result<()> {
    let x = random((1, 1, 5, 8))?;
    let attention: Arc<dyn attn_core::Attention> = Arc::new(Flash::causal());
    let out = attention.forward_t(&x, &x, &x)?;
    assert!(max_difference(&out.narrow(2, 0, 1)?, &x.narrow(2, 0, 1)?)? < 1e-6);
    Ok(())
}

#[test]
fn what_cannot_be_done_is_an_error_that_says_so() -> Result<()> {
    let x = random((1, 2, 6, 8))?;
    let message = |r: Result<Tensor>| r.unwrap_err().to_string();
    let wrong_heads = message(Flash::full().forward_t(&x, &random((1, 3, 6, 8))?, &random((1, 3, 6, 8))?));
    assert!(wrong_heads.contains("n_heads_q") && wrong_heads.contains('3'), "{wrong_heads}");
    let wrong_rank = message(Flash::full().forward_t(&x.flatten(0, 1)?, &x, &x));
    assert!(wrong_rank.contains("q's shape"), "{wrong_rank}");
    let strided = message(Flash::full().forward_t(&x.t()?, &x.t()?, &x.t()?));
    assert!(strided.contains("contiguous"), "{strided}");
    let integers = message(Flash::full().forward_t(&x.to_dtype(DType::U32)?, &x, &x));
    assert!(integers.contains("U32"), "{integers}");
    Ok(())
}

#[test]
fn gradients_equal_those_of_candles_own_operations() -> Result<()> {
    let inputs = [random((2, 19, 3, 8))?, random((2, 23, 3, 8))?, random((2, 23, 3, 5))?];
    let weights = random((2, 3, 19, 5))?;
    for (dtype, bound) in [(DType::F32, 2e-5), (DType::BF16, 0.1), (DType::F16, 0.02)] {
        let vars = inputs.each_ref().map(|t| Var::from_tensor(&t.to_dtype(dtype)?));
        let [q, k, v] = vars;
        let (q, k, v) = (q?, k?, v?);
        // Strided: heads and length swap places.
        let bhnd = |t: &Tensor| t.transpose(1, 2);
        let wide = |t: &Tensor| bhnd(t)?.to_dtype(DType::F32)?.contiguous();
        let want = (by_matmul(&wide(&q)?, &wide(&k)?, &wide(&v)?)? * &weights)?.sum_all()?.backward()?;
        let out = Flash::full().forward_t(&bhnd(&q)?, &bhnd(&k)?, &bhnd(&v)?)?;
        let got = (out.to_dtype(DType::F32)? * &weights)?.sum_all()?.backward()?;
        for (name, var) in [("q", &q), ("k", &k), ("v", &v)] {
            let (got, want) = (got.get(var).expect(name), want.get(var).expect(name));
            assert_eq!((got.dtype(), got.dims()), (dtype, var.dims()), "{name}");
            let error = max_difference(got, want)?;
            assert!(error < bound, "{dtype:?} {name}: {error}");
        }
    }
    Ok(())
}

#[test]
fn a_gradient_that_is_one_number_everywhere_is_understood() -> Result<()> {
    let (q, v) = (random((1, 2, 9, 8))?, Var::from_tensor(&random((1, 2, 9, 8))?)?);
    let grads = Flash::full().forward_t(&q, &q, &v)?.sum_all()?.backward()?;
    // Weights of a query sum to one: all keys together receive one from every query.
    let total: f32 = grads.get(&v).expect("v").sum_all()?.to_scalar()?;
    assert!((total - 144.0).abs() < 1e-3, "{total}");
    Ok(())
}

#[test]
fn a_variant_without_gradients_says_so_by_name() {
    let x = Var::zeros((1, 1, 3, 4), DType::F32, &Device::Cpu).unwrap();
    let out = attn_flash::Naive::default().forward_t(&x, &x, &x).unwrap();
    let error = out.sum_all().unwrap().backward().unwrap_err().to_string();
    assert!(error.contains("naive"), "{error}");
}
