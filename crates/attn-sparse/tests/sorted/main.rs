//! Variants that sort or cluster tokens: other people's numbers, their definitions, gradients, and what they must equal.

mod golden;
mod gradients;
mod properties;
mod refusals;

use attn_core::registry::{Entry, NamedTensor, NamedTensors, Options, find};
use attn_testkit::inputs::Problem;

fn entry(name: &str) -> Entry {
    *find(&attn_sparse::registry(), name).unwrap()
}

fn set(pairs: &[&str]) -> Options {
    Options::parse(pairs.iter().copied()).expect("key=value")
}

fn named(problem: &Problem) -> NamedTensors {
    let shape = problem.shape;
    let tensors = [("q", shape.q(), &problem.q), ("k", shape.k(), &problem.k), ("v", shape.v(), &problem.v)];
    let tensor = |(name, axes, data): (&str, [usize; 4], &Vec<f32>)| {
        (name.to_string(), NamedTensor::f32(name, &axes, data.clone()).unwrap())
    };
    NamedTensors(tensors.into_iter().map(tensor).collect())
}
