use candle_core::{Device, Tensor, Var};

use super::noise_f32;
use crate::lm::masked_softmax::{Visible, masked_softmax};
use crate::lm::rms_norm::rms_norm;
use crate::lm::rotary::{Pairing, Rotary};
use crate::lm::swiglu::swiglu;

/// Compares the gradient of `Σ c · op(x)`, for fixed random `c`, with central differences.
fn check(what: &str, dims: &[usize], op: impl Fn(&Tensor) -> candle_core::Result<Tensor>) {
    let count = dims.iter().product();
    let x = noise_f32(count, 1).into_iter().map(|x| 2.0 * x).collect::<Vec<_>>();
    let value = |x: &Tensor| {
        let y = op(x).unwrap().flatten_all().unwrap();
        let c = Tensor::from_vec(noise_f32(y.elem_count(), 2), y.elem_count(), &Device::Cpu).unwrap();
        (y * c).unwrap().sum_all().unwrap()
    };
    let var = Var::from_tensor(&Tensor::from_slice(&x, dims, &Device::Cpu).unwrap()).unwrap();
    let grads = value(var.as_tensor()).backward().unwrap();
    let grad = grads.get(&var).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
    for i in 0..count {
        let moved = |by: f32| {
            let mut x = x.clone();
            x[i] += by;
            value(&Tensor::from_vec(x, dims, &Device::Cpu).unwrap()).to_scalar::<f32>().unwrap()
        };
        let want = (moved(1e-2) - moved(-1e-2)) / 2e-2;
        // f32 sums near 1 over a step of 1e-2 leave about 1e-4.
        assert!((grad[i] - want).abs() <= 2e-3, "{what}[{i}]: got {}, want {want}", grad[i]);
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let fixed =
        |dims: &[usize]| Tensor::from_vec(noise_f32(dims.iter().product(), 3), dims, &Device::Cpu).unwrap();
    check("causal softmax", &[2, 3, 5], |x| masked_softmax(x, Visible::Causal { first_row: 2 }));
    check("band softmax", &[4, 3, 6], |x| masked_softmax(x, Visible::Band { window: 3, n_blocks: 2 }));
    check("rms norm by x", &[3, 5], |x| rms_norm(x, &fixed(&[5]), 1e-5));
    check("rms norm by gain", &[5], |gain| rms_norm(&fixed(&[3, 5]), gain, 1e-5));
    check("swiglu by gate", &[2, 9], |x| swiglu(x, &fixed(&[2, 9])));
    check("swiglu by up", &[2, 9], |x| swiglu(&fixed(&[2, 9]), x));
    for pairing in [Pairing::HalfSplit, Pairing::Interleaved] {
        check("rotary", &[6, 8], |x| Rotary::new(pairing, 4, 10.0, 5, 3).apply(x));
    }
}
