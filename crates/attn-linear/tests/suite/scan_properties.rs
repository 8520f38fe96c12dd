//! The scan engine's recurrences on their own inputs: states, extreme decays, identities between variants.

use attn_core::registry::{NamedTensor, NamedTensors, Options, TensorData, find};
use attn_linear::elementwise::hgrn::Hgrn;
use attn_linear::registry;
use attn_testkit::compare::{Tol, assert_close};
use proptest::prelude::*;

const WIDTH: usize = 5;

fn tensors(all: &[(&str, &[usize], Vec<f32>)]) -> NamedTensors {
    let tensors = all
        .iter()
        .map(|(name, shape, data)| (name.to_string(), NamedTensor::f32(name, shape, data.clone()).unwrap()));
    NamedTensors(tensors.collect())
}

fn run(variant: &str, inputs: &NamedTensors, name: &str) -> Vec<f32> {
    let got = find(&registry(), variant).unwrap().run(&Options::new(), inputs).unwrap();
    let TensorData::F32(data) = &got.get(name).unwrap().data else { panic!("f32") };
    data.clone()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Numbers that look random, in `[-1, 1]`.
fn numbers(len: usize, seed: u64) -> Vec<f32> {
    (0..len as u64).map(|i| (((i + 1) * (2 * seed + 7919)) as f32 * 0.618).sin()).collect()
}

/// `x`, `g (1, n, width)`, decays of every strength: none at all, everything at once, and between.
fn hgrn_inputs(n: usize, seed: u64) -> (Vec<f32>, Vec<f32>) {
    let strengths = [0.0, -1e-7, -1e-3, -0.3, -2.0, -20.0, f32::NEG_INFINITY];
    let g = (0..n * WIDTH).map(|i| strengths[(i * 31 + seed as usize) % 7]).collect();
    (numbers(n * WIDTH, seed), g)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn hgrn_is_exact_for_any_decay_and_any_split(n in 1usize..200, cut in 0usize..200, seed in 0u64..1000) {
        let (x, g) = hgrn_inputs(n, seed);
        let h0 = numbers(WIDTH, seed + 1);
        let mut h = wide(&h0);
        let want = Hgrn::naive(&wide(&x), &wide(&g), &mut h);

        let cut = cut.min(n);
        let (mut out, mut state) = (Vec::new(), h0);
        for rows in [0..cut, cut..n] {
            let part = |x: &[f32]| x[rows.start * WIDTH..rows.end * WIDTH].to_vec();
            let shape = [1, rows.len(), WIDTH];
            let inputs =
                tensors(&[("x", &shape, part(&x)), ("g", &shape, part(&g)), ("h0", &[1, WIDTH], state.clone())]);
            out.extend(run("hgrn", &inputs, "o"));
            state = run("hgrn", &inputs, "hT");
        }
        assert_close("o", &out, &want, Tol::ScaledMax(2e-6));
        assert_close("hT", &state, &h, Tol::ScaledMax(2e-6));
    }
}

#[test]
fn gradients_of_decays_that_forget_everything_are_finite() {
    let (x, g) = hgrn_inputs(100, 3);
    let shape = [1, 100, WIDTH];
    let inputs = tensors(&[("x", &shape, x.clone()), ("g", &shape, g), ("grad_o", &shape, x)]);
    for name in ["grad.x", "grad.g"] {
        let grads = run("hgrn", &inputs, name);
        assert!(grads.iter().all(|x| x.is_finite()), "{name}");
    }
}

#[test]
fn a_slow_decay_is_not_rounded_away() {
    // h stays at 1 if x makes up for the loss: only if both are accurate relative to themselves.
    let (n, g) = (200_000, -1e-6f32);
    let x = vec![-f64::from(g).exp_m1() as f32; n];
    let inputs = tensors(&[("x", &[1, n, 1], x), ("g", &[1, n, 1], vec![g; n]), ("h0", &[1, 1], vec![1.0])]);
    let last = run("hgrn", &inputs, "hT")[0];
    assert!((last - 1.0).abs() < 2e-3, "{last}");
}

#[test]
fn mingru_is_hgrn_with_its_gates_written_out() {
    let (a, c) = (numbers(60 * WIDTH, 1), numbers(60 * WIDTH, 2));
    let shape = [1, 60, WIDTH];
    let min_gru =
        run("mingru", &tensors(&[("update", &shape, a.clone()), ("candidate", &shape, c.clone())]), "o");
    let gate = |a: &f32| 1.0 / (1.0 + (-f64::from(*a)).exp());
    let g = a.iter().map(|a| (1.0 - gate(a)).ln() as f32).collect();
    let x = a.iter().zip(&c).map(|(a, c)| (gate(a) * f64::from(*c)) as f32).collect();
    let hgrn = run("hgrn", &tensors(&[("x", &shape, x), ("g", &shape, g)]), "o");
    assert_close("o", &min_gru, &wide(&hgrn), Tol::ScaledMax(2e-6));
}

#[test]
fn rwkv4_without_decay_and_bonus_averages_like_a_softmax_even_for_huge_keys() {
    // time_decay -inf is no decay; a maximum of 1e3 overflows unless sums are kept relative to it.
    let n = 300;
    let k: Vec<f32> = numbers(n, 5).iter().map(|k| 1e3 + 10.0 * k).collect();
    let v = numbers(n, 6);
    let inputs = tensors(&[
        ("k", &[1, n, 1], k.clone()),
        ("v", &[1, n, 1], v.clone()),
        ("time_decay", &[1], vec![f32::NEG_INFINITY]),
        ("time_first", &[1], vec![0.0]),
    ]);
    let (mut num, mut den) = (0.0, 0.0);
    let want: Vec<f64> = wide(&k)
        .iter()
        .zip(wide(&v))
        .map(|(k, v)| {
            num += (k - 1e3).exp() * v;
            den += (k - 1e3).exp();
            num / den
        })
        .collect();
    // A key of 1e3 is itself rounded by 6e-5, but here it is given so.
    assert_close("o", &run("rwkv4", &inputs, "o"), &want, Tol::ScaledMax(1e-5));
}
