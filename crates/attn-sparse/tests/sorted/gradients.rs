//! Gradients against finite differences of the definitions in f64.

use crate::{entry, named, set};
use attn_core::AttnShape;
use attn_core::registry::{NamedTensor, NamedTensors, Options, TensorData};
use attn_sparse::{Hashing, Reformer, Routing, RoutingInputs, Sinkhorn, SinkhornInputs, SinkhornKind};
use attn_testkit::compare::Tol;
use attn_testkit::gradient::{Claim, GradientCheck};
use attn_testkit::inputs::Problem;

/// A loss of the definition, and the gradients claimed by the runner.
fn check_gradients(
    name: &str,
    options: &Options,
    tensors: &NamedTensors,
    inputs: &[&str],
    out_shape: [usize; 4],
    loss: impl Fn(&NamedTensors, &[f64]) -> f64,
) {
    let weights: Vec<f32> = (0..out_shape.iter().product()).map(|i: usize| (0.7 * i as f32).sin()).collect();
    let mut all = tensors.clone();
    all.0.insert("grad_o".into(), NamedTensor::f32("grad_o", &out_shape, weights.clone()).unwrap());
    let given = entry(name).run(options, &all).unwrap();
    let weights: Vec<f64> = weights.iter().map(|w| f64::from(*w)).collect();
    let at: Vec<Vec<f64>> = inputs.iter().map(|i| tensors.require(i).unwrap().data.to_f64()).collect();
    let grads: Vec<Vec<f64>> =
        inputs.iter().map(|i| given.require(&format!("grad.{i}")).unwrap().data.to_f64()).collect();
    let claims: Vec<Claim<'_>> =
        (0..inputs.len()).map(|i| Claim { name: inputs[i], at: &at[i], gradient: &grads[i] }).collect();
    let f = |at: &[Vec<f64>]| {
        let mut moved = tensors.clone();
        for (name, numbers) in inputs.iter().zip(at) {
            let axes = tensors.require(name).unwrap().shape.clone();
            let numbers = numbers.iter().map(|x| *x as f32).collect();
            moved.0.insert(name.to_string(), NamedTensor::f32(name, &axes, numbers).unwrap());
        }
        loss(&moved, &weights)
    };
    // Inputs are f32, so steps are long, and rounding leaves some error.
    let check =
        GradientCheck { step: 0.03, tol: Tol::ScaledMax(3e-4), sample: Some(60), ..GradientCheck::default() };
    check.check(f, &claims).unwrap_or_else(|e| panic!("{name} {options:?}: {e}"));
}

fn weighted(out: &[f64], weights: &[f64]) -> f64 {
    out.iter().zip(weights).map(|(o, w)| o * w).sum()
}

#[test]
fn reformer_gradients() {
    let shape = AttnShape { n_heads_kv: 1, head_dim_v: 3, ..AttnShape::square(2, 21, 4) };
    let problem = Problem::normal(shape, 8);
    let configs = [
        Reformer { bucket_size: 6, n_hashes: 3, ..Reformer::default() },
        Reformer { bucket_size: 6, n_hashes: 2, causal: true, shared_qk: true, ..Reformer::default() },
        Reformer { bucket_size: 5, n_hashes: 2, allow_duplicate_attention: false, ..Reformer::default() },
        Reformer { bucket_size: 5, n_hashes: 1, attend_across_buckets: false, ..Reformer::default() },
    ];
    for config in configs {
        let x = problem.qkv().unwrap();
        let config = Reformer { n_buckets: vec![4], ..config };
        let (q, k) = (config.buckets(&x, false, Hashing::Drawn), config.buckets(&x, true, Hashing::Drawn));
        let (q, k) = (q.unwrap(), k.unwrap());
        let mut tensors = named(&problem);
        for (name, heads, buckets) in [("buckets", 2, &q), ("buckets_k", 1, &k)] {
            let axes = vec![1, heads, config.n_hashes, 21];
            tensors
                .0
                .insert(name.into(), NamedTensor { shape: axes, data: TensorData::I32(buckets.clone()) });
        }
        let options = Options::new()
            .with("bucket_size", config.bucket_size)
            .with("n_hashes", config.n_hashes)
            .with("n_buckets", 4)
            .with("causal", config.causal)
            .with("shared_qk", config.shared_qk)
            .with("attend_across_buckets", config.attend_across_buckets)
            .with("allow_duplicate_attention", config.allow_duplicate_attention);
        let loss = |tensors: &NamedTensors, weights: &[f64]| {
            let hashing = Hashing::Buckets { q: &q, k: &k };
            weighted(&config.definition_with(&tensors.qkv().unwrap(), hashing).unwrap().out, weights)
        };
        check_gradients("reformer-lsh", &options, &tensors, &["q", "k", "v"], shape.out(), loss);
    }
}

#[test]
fn routing_gradients() {
    let shape = AttnShape { n_heads_kv: 1, head_dim_v: 3, ..AttnShape::square(2, 21, 4) };
    let problem = Problem::normal(shape, 9);
    let memory = Problem::normal(AttnShape { n_q: 2, n_kv: 2, ..AttnShape::square(6, 2, 4) }, 10);
    // Without a memory some queries see themselves alone.
    for (causal, shared_qk, has_memory) in
        [(false, false, true), (true, false, true), (true, true, true), (true, true, false)]
    {
        let config = Routing {
            num_clusters: Some(3),
            window: Some(8),
            causal,
            shared_qk,
            mean_eps: 0.1,
            ..Routing::default()
        };
        let x = problem.qkv().unwrap();
        let [q_index, k_index] = config.select(&x, &RoutingInputs::default()).unwrap();
        let mut tensors = named(&problem);
        for (name, index) in [("q_index", &q_index), ("k_index", &k_index)] {
            let tensor = NamedTensor { shape: vec![1, 2, 3, 8], data: TensorData::I32(index.clone()) };
            tensors.0.insert(name.into(), tensor);
        }
        let memories = [("mem_key", 4, &memory.k), ("mem_value", 3, &memory.v)];
        for (name, width, numbers) in memories.into_iter().filter(|_| has_memory) {
            let numbers = numbers[..2 * 3 * 2 * width].to_vec();
            let tensor = NamedTensor::f32(name, &[2, 3, 2, width], numbers).unwrap();
            tensors.0.insert(name.into(), tensor);
        }
        let options = set(&["num_clusters=3", "window=8", "mean_eps=0.1"])
            .with("causal", causal)
            .with("shared_qk", shared_qk);
        let loss = |tensors: &NamedTensors, weights: &[f64]| {
            let number = |name: &str| tensors.f32(name).unwrap().map(|(_, numbers)| numbers);
            let inputs = RoutingInputs {
                means: None,
                mem_key: number("mem_key"),
                mem_value: number("mem_value"),
                q_index: Some(&q_index),
                k_index: Some(&k_index),
            };
            weighted(&config.definition_with(&tensors.qkv().unwrap(), &inputs).unwrap().out, weights)
        };
        let inputs = &["q", "k", "v", "mem_key", "mem_value"][..if has_memory { 5 } else { 3 }];
        check_gradients("routing", &options, &tensors, inputs, shape.out(), loss);
    }
}

#[test]
fn sinkhorn_gradients() {
    let shape = AttnShape { n_heads_kv: 1, head_dim_v: 3, ..AttnShape::square(2, 21, 4) };
    let problem = Problem::normal(shape, 14);
    let null = Problem::normal(AttnShape::square(2, 1, 4), 15);
    for (kind, name, sort_shape) in [
        (SinkhornKind::Soft, "soft", [6, 6]),
        (SinkhornKind::Causal, "causal", [12, 8]),
        (SinkhornKind::SortCut, "sortcut", [2, 6]),
    ] {
        let config = Sinkhorn { kind, bucket_size: Some(4), n_top: 2, iterations: 3, ..Sinkhorn::default() };
        let options = set(&["bucket_size=4", "n_top=2", "iterations=3"]).with("kind", name);
        let mut tensors = named(&problem);
        let mut inputs = vec!["q", "k", "v"];
        if kind == SinkhornKind::Causal {
            let value = (0..6).map(|e| null.v[e]).collect();
            tensors
                .0
                .insert("null_key".into(), NamedTensor::f32("null_key", &[2, 1, 4], null.k.clone()).unwrap());
            tensors.0.insert("null_value".into(), NamedTensor::f32("null_value", &[2, 1, 3], value).unwrap());
            inputs.extend(["null_key", "null_value"]);
        }
        let loss = |tensors: &NamedTensors, weights: &[f64]| {
            let number = |name: &str| tensors.f32(name).unwrap().map(|(_, numbers)| numbers);
            let inputs = SinkhornInputs {
                sort: number("sort"),
                null_key: number("null_key"),
                null_value: number("null_value"),
            };
            weighted(&config.definition_with(&tensors.qkv().unwrap(), &inputs).unwrap().out, weights)
        };
        check_gradients("sinkhorn", &options, &tensors, &inputs, shape.out(), loss);
        // Weights that are given: any numbers, and gradients go there instead of the network. A weight that is zero hides a
        // slot that nothing else is mixed into, so none is.
        let len: usize = 2 * sort_shape[0] * sort_shape[1];
        let sort = (0..len).map(|e| 0.3 + 0.2 * (1.3 * e as f32).sin()).collect();
        let sort = NamedTensor::f32("sort", &[1, 2, sort_shape[0], sort_shape[1]], sort).unwrap();
        tensors.0.insert("sort".into(), sort);
        inputs.push("sort");
        check_gradients("sinkhorn", &options, &tensors, &inputs, shape.out(), loss);
    }
}
