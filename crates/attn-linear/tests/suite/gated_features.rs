//! Gated random feature attention: its recurrence in f64, gates of every strength, gradients, streams.

use attn_core::registry::{NamedTensor, NamedTensors, Options, TensorData, find};
use attn_core::{AttnShape, DType};
use attn_linear::features::{FeatureVariant, Map, Place, Rfa, Side};
use attn_linear::registry;
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::gradient::{Claim, GradientCheck};
use attn_testkit::inputs::Problem;
use proptest::prelude::*;

const D: usize = 4;
const FEATURES: usize = 6;

struct Case {
    n: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    gate: Vec<f32>,
    s0: Vec<f32>,
    z0: Vec<f32>,
}

impl Case {
    fn new(n: usize, gate: impl Fn(usize) -> f32, seed: u64) -> Self {
        let Problem { q, k, v, .. } = Problem::normal(AttnShape::square(1, n, D), seed);
        let state = Problem::normal(AttnShape::square(1, 2 * FEATURES, D), seed + 1).q;
        // Sums of weights well above the least divisor.
        let z0 = vec![3.0; 2 * FEATURES];
        Self { n, q, k, v, gate: (0..n).map(gate).collect(), s0: state, z0 }
    }

    fn tensors(&self) -> NamedTensors {
        let rows = [1, 1, self.n, D];
        let all: [(&str, &[usize], &Vec<f32>); 6] = [
            ("q", &rows, &self.q),
            ("k", &rows, &self.k),
            ("v", &rows, &self.v),
            ("gate", &[1, 1, self.n], &self.gate),
            ("s0", &[1, 1, 2 * FEATURES, D], &self.s0),
            ("z0", &[1, 1, 2 * FEATURES], &self.z0),
        ];
        let tensors = all
            .map(|(name, shape, data)| (name.into(), NamedTensor::f32(name, shape, data.clone()).unwrap()));
        NamedTensors(tensors.into_iter().collect())
    }

    fn map() -> Map {
        Rfa { features: FEATURES, ..Rfa::default() }.spec(1, D, 0).unwrap().keys
    }

    /// The recurrence; outputs, then the last state.
    fn recurrence(map: &Map, at: &[Vec<f64>]) -> (Vec<f64>, Vec<f64>) {
        let [q, k, v, gate, s0, z0] = at else { panic!("six inputs") };
        let phi = |x: &[f64]| map.define(Place { side: Side::Key, head: 0, first: 0, len: 1, shift: &[] }, x);
        let (mut s, mut z, mut out) = (s0.clone(), z0.clone(), Vec::new());
        for (t, r) in gate.iter().enumerate() {
            let (p, f) = (phi(&q[t * D..][..D]), phi(&k[t * D..][..D]));
            for (row, f) in f.iter().enumerate() {
                z[row] = r * z[row] + (1.0 - r) * f;
                for c in 0..D {
                    s[row * D + c] = r * s[row * D + c] + (1.0 - r) * f * v[t * D + c];
                }
            }
            let den = p.iter().zip(&z).map(|(p, z)| p * z).sum::<f64>().max(1e-6);
            out.extend((0..D).map(|c| (0..p.len()).map(|row| p[row] * s[row * D + c]).sum::<f64>() / den));
        }
        (out, s)
    }

    fn wide(&self) -> Vec<Vec<f64>> {
        [&self.q, &self.k, &self.v, &self.gate, &self.s0, &self.z0]
            .map(|x| x.iter().map(|x| f64::from(*x)).collect())
            .to_vec()
    }
}

fn run(tensors: &NamedTensors) -> NamedTensors {
    let options = Options::new().with("features", FEATURES);
    find(&registry(), "rfa").unwrap().run(&options, tensors).unwrap()
}

fn numbers(all: &NamedTensors, name: &str) -> Vec<f64> {
    all.require(name).unwrap().data.to_f64()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn gates_of_every_strength_follow_the_recurrence(n in 1usize..150, seed in 0u64..1000) {
        // All of the past, none of it, hardly any, nearly all.
        let strengths = [1.0, 0.0, 1e-20, 1e-4, 0.5, 0.9, 0.999_999];
        let case = Case::new(n, |t| strengths[(t * 31 + seed as usize) % 7], seed);
        let (out, state) = Case::recurrence(&Case::map(), &case.wide());
        let got = run(&case.tensors());
        // A divisor may come near its least value: the error of a row is then what that of the sums makes of it.
        assert_close("sT", &numbers(&got, "sT"), &state, Tol::ScaledMax(4e-6));
        let wild = out.iter().fold(0.0f64, |m, x| m.max(x.abs()));
        if wild < 20.0 {
            assert_close("o", &numbers(&got, "o"), &out, Tol::ScaledMax(2e-4));
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    for seed in 0..3 {
        let case = Case::new(90, |t| 0.8 + 0.15 * (t as f32).sin(), seed);
        let map = Case::map();
        let weights = Problem::normal(AttnShape::square(1, 90, D), 9).q;
        let mut tensors = case.tensors();
        tensors
            .0
            .insert("grad_o".into(), NamedTensor::f32("grad_o", &[1, 1, 90, D], weights.clone()).unwrap());
        let got = run(&tensors);
        let names = ["q", "k", "v", "gate", "s0", "z0"];
        let by: Vec<Vec<f64>> = names.iter().map(|name| numbers(&got, &format!("grad.{name}"))).collect();
        let loss = |at: &[Vec<f64>]| -> f64 {
            Case::recurrence(&map, at).0.iter().zip(&weights).map(|(o, w)| o * f64::from(*w)).sum()
        };
        let at = case.wide();
        let claims: Vec<Claim<'_>> =
            (0..6).map(|i| Claim { name: names[i], at: &at[i], gradient: &by[i] }).collect();
        let check = GradientCheck { step: 1e-4, tol: Tol::ScaledMax(2e-4), sample: Some(20), seed };
        check.check(loss, &claims).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
    }
}

#[test]
fn a_gate_that_forgets_everything_has_the_gradient_of_what_was_forgotten() {
    let case = Case::new(12, |t| if t == 7 { 0.0 } else { 0.7 }, 5);
    let mut tensors = case.tensors();
    tensors.0.insert("grad_o".into(), NamedTensor::f32("grad_o", &[1, 1, 12, D], case.v.clone()).unwrap());
    let got = numbers(&run(&tensors), "grad.gate");
    let (map, at) = (Case::map(), case.wide());
    let loss = |at: &[Vec<f64>]| -> f64 {
        Case::recurrence(&map, at).0.iter().zip(&case.v).map(|(o, w)| o * f64::from(*w)).sum()
    };
    let moved = |by: f64| {
        let mut at = at.clone();
        at[3][7] += by;
        loss(&at)
    };
    let want = (moved(1e-5) - moved(-1e-5)) / 2e-5;
    assert!((got[7] - want).abs() < 1e-3 * want.abs().max(1.0), "{} instead of {want}", got[7]);
}

#[test]
fn what_is_no_gate_is_refused() {
    let refuses = |options: Options, change: &dyn Fn(&mut NamedTensors), words: &str| {
        let mut tensors = Case::new(5, |_| 0.5, 1).tensors();
        change(&mut tensors);
        let options = options.with("features", FEATURES);
        let error = find(&registry(), "rfa").unwrap().run(&options, &tensors).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    let with_gate = |gate: Vec<f32>, shape: Vec<usize>| {
        move |tensors: &mut NamedTensors| {
            let tensor = NamedTensor { shape: shape.clone(), data: TensorData::F32(gate.clone()) };
            tensors.0.insert("gate".into(), tensor);
        }
    };
    refuses(Options::new(), &with_gate(vec![1.5; 5], vec![1, 1, 5]), "gate is 1.5");
    refuses(Options::new(), &with_gate(vec![0.5; 4], vec![1, 1, 4]), "gate: length is 4");
    refuses(Options::new(), &with_gate(vec![0.5; 5], vec![5]), "gate's shape");
    refuses(Options::new().with("gate", 2), &|_| {}, "gate");
    let without = |tensors: &mut NamedTensors| {
        tensors.0.retain(|name, _| !["s0", "z0"].contains(&&**name));
    };
    refuses(Options::new().with("causal", false), &without, "a gate without `causal`");
}

#[test]
fn halves_are_gated_as_floats_are() {
    let case = Case::new(40, |t| 0.9 - 0.01 * t as f32, 2);
    let exact = numbers(&run(&case.tensors()), "o");
    for dtype in [DType::Bf16, DType::F16] {
        let mut tensors = case.tensors();
        for name in ["q", "k", "v", "gate"] {
            let rounded = tensors.get(name).unwrap().rounded(dtype);
            tensors.0.insert(name.into(), rounded);
        }
        let got = run(&tensors);
        assert_eq!(got.get("o").unwrap().data.dtype(), Some(dtype));
        let bound = if dtype == DType::Bf16 { 0.1 } else { 0.02 };
        assert_close("o", &numbers(&got, "o"), &exact, Tol::ScaledMax(bound));
    }
}
