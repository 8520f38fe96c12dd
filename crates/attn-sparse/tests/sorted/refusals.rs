//! What does not fit is refused.

use crate::{entry, named, set};
use attn_core::AttnShape;
use attn_core::registry::{NamedTensor, Options, TensorData};
use attn_testkit::inputs::Problem;

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let problem = Problem::normal(AttnShape::square(2, 16, 4), 11);
    let refused = |name: &str, options: &Options, more: &[(&str, NamedTensor)], word: &str| {
        let mut tensors = named(&problem);
        more.iter().for_each(|(name, tensor)| drop(tensors.0.insert(name.to_string(), tensor.clone())));
        let error = entry(name).run(options, &tensors).expect_err(word).to_string();
        assert!(error.contains(word), "{name}: {error}");
    };
    let floats = |n: usize| NamedTensor::f32("x", &[n], vec![0.5; n]).unwrap();
    let ints =
        |numbers: &[i32]| NamedTensor { shape: vec![numbers.len()], data: TensorData::I32(numbers.to_vec()) };
    let none = Options::new();
    refused("reformer-lsh", &set(&["n_buckets=3"]), &[], "n_buckets");
    refused("reformer-lsh", &none, &[("rotations", floats(7))], "rotations");
    refused(
        "reformer-lsh",
        &none,
        &[("buckets", ints(&[0; 128])), ("buckets_k", ints(&[0; 5]))],
        "buckets_k",
    );
    refused(
        "reformer-lsh",
        &set(&["n_buckets=4"]),
        &[("buckets", ints(&[9; 128])), ("buckets_k", ints(&[0; 128]))],
        "buckets",
    );
    refused("reformer-lsh", &none, &[("buckets", floats(128))], "buckets");
    refused("routing", &none, &[("means", floats(5))], "means");
    refused("routing", &none, &[("mem_key", floats(16)), ("mem_value", floats(15))], "mem_value");
    refused("routing", &set(&["num_clusters=1"]), &[("q_index", ints(&[0, 1, 2, 16]))], "q_index");
    refused("routing", &set(&["num_clusters=1"]), &[("q_index", ints(&[0, 1, 2, 2]))], "2 twice");
    refused("routing", &set(&["mean_eps=-1"]), &[], "mean_eps");
    refused("sinkhorn", &set(&["kind=hard"]), &[], "kind");
    refused("sinkhorn", &set(&["kind=soft", "causal=true"]), &[], "kind=soft");
    refused("sinkhorn", &set(&["temperature=0"]), &[], "temperature");
    refused("sinkhorn", &none, &[("null_key", floats(8))], "null_key");
    refused("sinkhorn", &set(&["causal=true"]), &[("null_key", floats(7))], "null_key");
    refused("sinkhorn", &set(&["bucket_size=4"]), &[("sort", floats(7))], "sort");
}
