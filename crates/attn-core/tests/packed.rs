//! Packed operations against finite differences.
#![cfg(feature = "candle")]

use attn_core::candle::candle_core::{DType, Device, Result, Tensor, Var};
use attn_core::candle::{NamedView, PackedOp, PackedTensor, apply_packed};
use attn_core::{AttnError, Saved};

/// `sum = sin(a) b` and `dot = a . b`, for vectors `a`, `b`; keeps `cos(a)`. A third input is read by nobody.
struct SineAndDot;

impl PackedOp for SineAndDot {
    fn name(&self) -> &'static str {
        "sine-and-dot"
    }

    fn forward(&self, x: &[NamedView<'_>]) -> attn_core::Result<(Vec<PackedTensor>, Saved)> {
        let (a, b) = (x[0], x[1]);
        if a.data.len() != b.data.len() {
            return Err(AttnError::shape(b.name, "elements", b.data.len(), a.data.len()));
        }
        let product = a.data.iter().zip(b.data).map(|(a, b)| a.sin() * b).collect();
        let dot = a.data.iter().zip(b.data).map(|(a, b)| a * b).sum();
        let cos: Vec<f32> = a.data.iter().map(|a| a.cos()).collect();
        let outputs = vec![
            PackedTensor { data: product, shape: a.shape.to_vec() },
            PackedTensor { data: vec![dot], shape: vec![1] },
        ];
        Ok((outputs, Saved::new(cos)))
    }

    fn backward(
        &self,
        x: &[NamedView<'_>],
        _: &[NamedView<'_>],
        saved: &Saved,
        grads: &[NamedView<'_>],
    ) -> attn_core::Result<Vec<Option<Vec<f32>>>> {
        let (a, b, g, dot) = (x[0].data, x[1].data, grads[0].data, grads[1].data[0]);
        let cos = saved.get::<Vec<f32>>()?;
        let by_a = (0..a.len()).map(|i| g[i] * cos[i] * b[i] + dot * b[i]).collect();
        let by_b = (0..a.len()).map(|i| g[i] * a[i].sin() + dot * a[i]).collect();
        Ok(vec![Some(by_a), Some(by_b), None])
    }
}

/// `sum(w * product) + 3 dot`, with weights that differ from element to element.
fn loss(a: &Tensor, b: &Tensor, unread: &Tensor) -> Result<Tensor> {
    let outputs = apply_packed(SineAndDot, &[("a", a), ("b", b), ("unread", unread)])?;
    assert_eq!((outputs[0].dims(), outputs[1].dims()), (a.dims(), &[1][..]));
    let weights = Tensor::arange(1f32, 7.0, &Device::Cpu)?.reshape(a.dims())?;
    (outputs[0].mul(&weights)?.sum_all()? + (outputs[1].sum_all()? * 3.0)?)?.to_dtype(DType::F32)
}

#[test]
fn gradients_equal_finite_differences_for_every_layout_and_dtype() -> Result<()> {
    let (a, b) = ([0.3f32, -1.1, 0.7, 2.0, -0.4, 0.9], [1.2f32, 0.5, -0.8, 0.1, 1.5, -2.0]);
    let tensor = |x: &[f32; 6]| Tensor::new(x, &Device::Cpu)?.reshape((2, 3));
    let unread = Var::from_tensor(&Tensor::ones(4, DType::F32, &Device::Cpu)?)?;
    // `a` arrives transposed, `b` in f64.
    let a_var = Var::from_tensor(&tensor(&a)?.t()?.contiguous()?)?;
    let b_var = Var::from_tensor(&tensor(&b)?.to_dtype(DType::F64)?)?;
    let grads = loss(&a_var.t()?, &b_var, &unread)?.backward()?;
    let rows = |t: Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
    let by_a = rows(grads.get(&a_var).expect("a gradient of a").t()?)?;
    let by_b_tensor = grads.get(&b_var).expect("a gradient of b");
    assert_eq!(by_b_tensor.dtype(), DType::F64);
    let by_b = rows(by_b_tensor.clone())?;
    let f = |a: &[f64], b: &[f64]| -> f64 {
        (0..6).map(|i| (i + 1) as f64 * a[i].sin() * b[i] + 3.0 * a[i] * b[i]).sum()
    };
    let (a, b) = (a.map(f64::from), b.map(f64::from));
    for i in 0..6 {
        let moved = |x: &[f64; 6], h: f64| {
            let mut x = *x;
            x[i] += h;
            x
        };
        let want_a = (f(&moved(&a, 1e-5), &b) - f(&moved(&a, -1e-5), &b)) / 2e-5;
        let want_b = (f(&a, &moved(&b, 1e-5)) - f(&a, &moved(&b, -1e-5))) / 2e-5;
        assert!((f64::from(by_a[i]) - want_a).abs() < 1e-4, "a[{i}]: {} and {want_a}", by_a[i]);
        assert!((f64::from(by_b[i]) - want_b).abs() < 1e-4, "b[{i}]: {} and {want_b}", by_b[i]);
    }
    let by_unread = rows(grads.get(&unread).expect("zeros").clone())?;
    assert_eq!(by_unread, [0.0; 4]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_named() -> Result<()> {
    let (a, b) = (Tensor::ones(3, DType::F32, &Device::Cpu)?, Tensor::ones(4, DType::F32, &Device::Cpu)?);
    let error = apply_packed(SineAndDot, &[("a", &a), ("b", &b)]).expect_err("4 is not 3").to_string();
    assert!(error.contains('b') && error.contains('3') && error.contains('4'), "{error}");
    let error = apply_packed(SineAndDot, &[]).expect_err("no inputs").to_string();
    assert!(error.contains("sine-and-dot"), "{error}");
    Ok(())
}
