//! Every registered variant on candle tensors: the numbers of the kernel layer, and its gradients through candle's graph.

use attn_core::candle::CandleAttention;
use attn_core::candle::candle_core::{Device, Tensor, Var};
use attn_core::registry::{NamedTensor, NamedTensors, Options};
use attn_core::{Attention, AttnShape};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs::Problem;
use std::sync::Arc;

fn tensor(data: &[f32], axes: [usize; 4]) -> Tensor {
    Tensor::from_slice(data, &axes[..], &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn tensors_and_their_gradients_are_those_of_the_kernels() {
    for entry in attn_sparse::registry() {
        let options = Options::new();
        let attention: Arc<dyn Attention> = entry.build(&options).unwrap().into();
        let grouped = attention.profile().grouped_heads;
        let shape = AttnShape { n_heads_kv: if grouped { 2 } else { 4 }, ..AttnShape::square(4, 70, 16) };
        let problem = Problem::normal(shape, 9);
        let w = Problem::normal(shape, 10).q;

        let mut tensors = NamedTensors::default();
        let inputs =
            [("q", shape.q(), &problem.q), ("k", shape.k(), &problem.k), ("v", shape.v(), &problem.v)];
        for (name, axes, data) in inputs.into_iter().chain([("grad_o", shape.out(), &w)]) {
            if name != "grad_o" || attention.as_differentiable().is_some() {
                tensors.0.insert(name.into(), NamedTensor::f32(name, &axes, data.clone()).unwrap());
            }
        }
        let want = entry.run(&options, &tensors).unwrap();
        let wanted = |name: &str| want.f32(name).unwrap().unwrap().1.iter().map(|x| f64::from(*x)).collect();
        let check = |name: &str, got: &Tensor| {
            let want: Vec<f64> = wanted(name);
            assert_close(&format!("{}: {name}", entry.name), &numbers(got), &want, Tol::ScaledMax(1e-6));
        };

        let [q, k, v] = inputs.map(|(_, axes, data)| Var::from_tensor(&tensor(data, axes)).unwrap());
        let out = attention.forward_t(&q, &k, &v).unwrap();
        check("o", &out);
        if attention.as_differentiable().is_some() {
            let loss = (out * tensor(&w, shape.out())).unwrap().sum_all().unwrap();
            let grads = loss.backward().unwrap();
            for (name, var) in [("grad.q", &q), ("grad.k", &k), ("grad.v", &v)] {
                check(name, grads.get(var).unwrap_or_else(|| panic!("{}: no {name}", entry.name)));
            }
        }
    }
}
