//! Standard normal inputs: a control without any structure that attention could find.

use attn_core::registry::{NamedTensor, NamedTensors, TensorData};
use attn_core::{AttnShape, DType, Element};
use half::{bf16, f16};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rand_distr::StandardNormal;

/// `q`, `k` and `v` of a problem, the same for the same seed on every machine.
///
/// # Panics
/// If the tensors do not fit the memory.
pub fn qkv(shape: &AttnShape, dtype: DType, seed: u64) -> NamedTensors {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut tensors = NamedTensors::default();
    for (name, axes) in [("q", shape.q()), ("k", shape.k()), ("v", shape.v())] {
        let len = axes.iter().product();
        let data = match dtype {
            DType::F32 => TensorData::F32(normal(&mut rng, len)),
            DType::Bf16 => TensorData::Bf16(normal::<bf16>(&mut rng, len)),
            DType::F16 => TensorData::F16(normal::<f16>(&mut rng, len)),
        };
        tensors.0.insert(name.into(), NamedTensor { shape: axes.to_vec(), data });
    }
    tensors
}

fn normal<E: Element>(rng: &mut ChaCha8Rng, len: usize) -> Vec<E> {
    (0..len).map(|_| E::store(rng.sample::<f32, _>(StandardNormal))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_repeat_and_differ_and_the_moments_are_normal() {
        let shape = AttnShape::square(2, 100, 64);
        let numbers = |seed| match qkv(&shape, DType::F32, seed).0.remove("k").unwrap().data {
            TensorData::F32(data) => data,
            other => panic!("f32 wanted, got {other:?}"),
        };
        let (a, b) = (numbers(1), numbers(2));
        assert_eq!(a, numbers(1));
        assert_ne!(a, b);
        let mean = a.iter().sum::<f32>() / a.len() as f32;
        let variance = a.iter().map(|x| x * x).sum::<f32>() / a.len() as f32;
        assert!(mean.abs() < 0.05 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
    }
}
