//! Gradients of every variant against finite differences of its definition in f64.

use super::{N, build, variants};
use attn_core::registry::{NamedTensor, gradients, output_like};
use attn_core::{Attention, AttnShape};
use attn_testkit::inputs::Problem;

/// A power of two, so that inputs stay exact in f32 when it is added.
const STEP: f32 = 1.0 / 512.0;
/// Coordinates tried of each input.
const TRIED: usize = 8;

/// `sum(out * w)` by the definition.
fn loss(attention: &dyn Attention, problem: &Problem, w: &[f32]) -> f64 {
    let out = attention.definition(&problem.qkv().expect("it fits")).expect("it is defined").out;
    out.iter().zip(w).map(|(o, w)| o * f64::from(*w)).sum()
}

/// Variants that take a number which they find from queries and keys as a constant: how likely a key was sampled.
const CONSTANTS: [&str; 1] = ["magicpig"];

/// Which input, and where.
#[derive(Debug, Clone, Copy)]
enum Input {
    Q,
    K,
    V,
}

impl Input {
    fn of(self, problem: &mut Problem) -> &mut Vec<f32> {
        match self {
            Self::Q => &mut problem.q,
            Self::K => &mut problem.k,
            Self::V => &mut problem.v,
        }
    }
}

/// The derivative of the loss by one coordinate, with an error of the fourth power of the step.
fn difference(
    attention: &dyn Attention,
    problem: &Problem,
    w: &[f32],
    (input, at): (Input, usize),
    step: f32,
) -> f64 {
    let moved = |by: f32| {
        let mut problem = problem.clone();
        input.of(&mut problem)[at] += by;
        loss(attention, &problem, w)
    };
    let (near, far) = (moved(step) - moved(-step), moved(2.0 * step) - moved(-2.0 * step));
    (8.0 * near - far) / (12.0 * f64::from(step))
}

fn check(attention: &dyn Attention, problem: &Problem) {
    let (name, shape) = (attention.name(), problem.shape);
    let w: Vec<f32> = (0..shape.rows() * shape.head_dim_v).map(|at| (at as f32 * 0.37).sin()).collect();
    let x = problem.qkv().expect("it fits");
    let grad_o = NamedTensor::f32("grad_o", &shape.out(), w.clone()).expect("it fits");
    let grads = gradients(attention, x, &mut output_like(&x), &grad_o);
    let grads = grads.unwrap_or_else(|error| panic!("{name}: {error}"));
    for (input, tensor) in [(Input::Q, "grad.q"), (Input::K, "grad.k"), (Input::V, "grad.v")] {
        let got = grads.require(tensor).expect("it is given").data.to_f64();
        let largest = got.iter().fold(0.0, |most: f64, x| most.max(x.abs()));
        assert!(largest > 1e-2 && largest.is_finite(), "{name}: {tensor} is next to nothing");
        let mut tried = 0;
        for sample in 0..4 * TRIED {
            let at = (sample * 7919 + 13) % got.len();
            let [coarse, fine] =
                [STEP, STEP / 2.0].map(|step| difference(attention, problem, &w, (input, at), step));
            // Where a choice flips, the loss jumps, and has no derivative.
            if (coarse - fine).abs() > 1e-3 * largest {
                continue;
            }
            let error = (got[at] - fine).abs();
            assert!(error < 1e-3 * largest, "{name}: {tensor}[{at}] is {}, difference {fine}", got[at]);
            tried += 1;
            if tried == TRIED {
                break;
            }
        }
        assert!(tried >= TRIED / 2, "{name}: choices flip wherever {tensor} is tried");
    }
}

#[test]
fn gradients_of_every_variant_are_those_of_its_definition() {
    let mut problem =
        Problem::normal(AttnShape { n_heads_kv: 1, head_dim_v: 3, ..AttnShape::square(2, N, 4) }, 2);
    let exact = |x: &mut f32| *x = (*x * 1024.0).round() / 1024.0;
    [&mut problem.q, &mut problem.k, &mut problem.v].into_iter().flatten().for_each(exact);
    let variants: Vec<_> =
        variants().into_iter().filter(|(entry, _)| !CONSTANTS.contains(&entry.name)).collect();
    // Two halves, one a thread.
    std::thread::scope(|scope| {
        for half in 0..2 {
            let (variants, problem) = (&variants, &problem);
            scope.spawn(move || {
                for (entry, options) in variants.iter().skip(half).step_by(2) {
                    check(&*build(entry, options), problem);
                }
            });
        }
    });
}
