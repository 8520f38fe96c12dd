//! Gradients against those of the definition in f64, which finite differences have checked.

use attn_core::exact::Exact;
use attn_core::mask::{And, Mask, Pair, Predicate};
use attn_core::registry::{NamedTensor, NamedTensors, Options, find};
use attn_core::{Attention, AttnShape};
use attn_sparse::*;
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs::Problem;

const TOL: Tol = Tol::ScaledMax(2e-5);

fn f64s(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// `q`, `k`, `v` of a problem, with `suffix` behind their names.
fn named(problem: &Problem, suffix: &str) -> NamedTensors {
    let s = problem.shape;
    let tensors = [("q", s.q(), &problem.q), ("k", s.k(), &problem.k), ("v", s.v(), &problem.v)];
    let named = tensors.map(|(name, axes, data)| {
        let name = format!("{name}{suffix}");
        (name.clone(), NamedTensor::f32(&name, &axes, data.clone()).unwrap())
    });
    NamedTensors(named.into_iter().collect())
}

/// What the registry gives for q, k, v against the definition under `mask`.
fn check(name: &str, options: Options, shape: AttnShape, mask: &dyn Mask) {
    let problem = Problem::normal(shape, 5);
    let grad_o = Problem::normal(AttnShape { head_dim: shape.head_dim_v, ..shape }, 6).q;
    let mut inputs = named(&problem, "");
    inputs.0.insert("grad_o".into(), NamedTensor::f32("grad_o", &shape.out(), grad_o.clone()).unwrap());
    let got = find(&registry(), name).unwrap().run(&options, &inputs).unwrap();
    let exact = Exact { mask, ..Exact::default() };
    let want = exact.backward(&problem.qkv().unwrap(), &f64s(&grad_o), None, |_, _| {}).unwrap();
    for (input, want) in [("q", want.q), ("k", want.k), ("v", want.v)] {
        let got = got.require(&format!("grad.{input}")).unwrap();
        assert_close(&format!("{name} {options:?}: grad.{input}"), &got.data.to_f64(), &want, TOL);
    }
}

#[test]
fn gradients_are_those_of_the_definition() {
    let shape = AttnShape { batch: 2, n_heads_q: 4, head_dim_v: 5, ..AttnShape::square(2, 70, 8) };
    let set = |pairs: &[&str]| Options::parse(pairs.iter().copied()).unwrap();
    let strided = |merged| StridedAttention { stride: Some(9), merged }.mask(&shape).unwrap();
    check("sparse-transformer-strided", set(&["stride=9"]), shape, &strided(true));
    check("sparse-transformer-strided", set(&["stride=9", "merged=false"]), shape, &strided(false));
    let fixed = FixedAttention { stride: Some(16), summary: 3, merged: true };
    check("sparse-transformer-fixed", set(&["stride=16", "summary=3"]), shape, &fixed.mask(&shape).unwrap());
    let axis = |kernel_size, dilation| AxisWindow { dilation, ..AxisWindow::of(kernel_size) };
    let plane = Neighborhood { axes: [axis(3, 2), axis(5, 1)], grid: Some([7, 10]) };
    let options = set(&["kernel_size=3,5", "dilation=2,1", "grid=7,10"]);
    check("neighborhood-2d", options, shape, &plane.mask(&shape).unwrap());
    let radial = Radial { frame: 5, first_frame: true };
    check("radial", set(&["frame=5"]), shape, &radial.mask(&shape).unwrap());
    let axial = Axial { grid: Some([7, 10]), axis: None, causal: false };
    check("axial", set(&["grid=7,10"]), shape, &axial.mask(&shape).unwrap());
    let globals = GlobalTokens::shared([3, 40]);
    let longformer = Longformer { window: 4, globals, causal: true };
    let options = set(&["window=4", "global_tokens=3,40", "causal=true"]);
    check("longformer", options, shape, &longformer.mask(&shape).unwrap());
    let bigbird = BigBird {
        block: 8,
        num_random_blocks: 1,
        num_window_blocks: 3,
        num_global_blocks: 1,
        seed: 4,
        causal: false,
    };
    let options = set(&["block=8", "num_random_blocks=1", "seed=4"]);
    check("bigbird", options, shape, &bigbird.mask(&shape).unwrap());
}

/// Global rows attend with their own projections, so each projection has the gradients of its own rows.
#[test]
fn longformer_gradients_reach_both_projections() {
    let shape = AttnShape { batch: 2, n_heads_q: 4, ..AttnShape::square(2, 40, 6) };
    let (local, global) = (Problem::normal(shape, 1), Problem::normal(shape, 2));
    let flags: Vec<f32> = (0..80).map(|p| f32::from(u8::from(matches!(p, 2 | 17 | 45)))).collect();
    let grad_o = Problem::normal(shape, 3).q;
    let mut inputs = named(&local, "");
    inputs.0.extend(named(&global, "_global").0);
    inputs.0.insert("grad_o".into(), NamedTensor::f32("grad_o", &shape.out(), grad_o.clone()).unwrap());
    let bits = attn_core::registry::TensorData::U8(flags.iter().map(|x| *x as u8).collect());
    inputs.0.insert("global_tokens".into(), NamedTensor { shape: vec![2, 40], data: bits });
    let options = Options::new().with("window", 5);
    let got = find(&registry(), "longformer").unwrap().run(&options, &inputs).unwrap();

    let is_global = |p: Pair| flags[p.batch * 40 + p.i] == 1.0;
    let globals = GlobalTokens::per_batch(vec![vec![2, 17], vec![5]]);
    let mask = Longformer { window: 5, globals, causal: false }.mask(&shape).unwrap();
    let local_rows = And(&mask, Predicate(|p: Pair| !is_global(p)));
    let global_rows = Predicate(is_global);
    let sources: [(&Problem, &dyn Mask, &str); 2] =
        [(&local, &local_rows, ""), (&global, &global_rows, "_global")];
    let mut out = vec![0.0; shape.rows() * 6];
    for (problem, mask, suffix) in sources {
        let exact = Exact { mask, ..Exact::default() };
        let x = problem.qkv().unwrap();
        out.iter_mut().zip(exact.all(&x).unwrap().out).for_each(|(sum, x)| *sum += x);
        let want = exact.backward(&x, &f64s(&grad_o), None, |_, _| {}).unwrap();
        for (input, want) in [("q", want.q), ("k", want.k), ("v", want.v)] {
            let name = format!("grad.{input}{suffix}");
            assert_close(&name, &got.require(&name).unwrap().data.to_f64(), &want, TOL);
        }
    }
    assert_close("o", &got.require("o").unwrap().data.to_f64(), &out, TOL);
}

/// Half types go through the parts as f32 and are rounded once.
#[test]
fn half_types_are_rounded_once() {
    use attn_core::{DType, Element};
    let shape = AttnShape::square(2, 70, 8);
    let problem = Problem::normal(shape, 9);
    let mut inputs = named(&problem, "");
    inputs.0.insert("grad_o".into(), NamedTensor::f32("grad_o", &shape.out(), problem.v.clone()).unwrap());
    let half = NamedTensors(inputs.0.iter().map(|(n, t)| (n.clone(), t.rounded(DType::Bf16))).collect());
    let widened = NamedTensors(
        half.0
            .iter()
            .map(|(n, t)| {
                let data = t.data.to_f64().iter().map(|x| *x as f32).collect();
                (n.clone(), NamedTensor::f32(n, &t.shape, data).unwrap())
            })
            .collect(),
    );
    let entries = registry();
    let entry = find(&entries, "sparse-transformer-strided").unwrap();
    let options = Options::new().with("stride", 6);
    let (got, want) = (entry.run(&options, &half).unwrap(), entry.run(&options, &widened).unwrap());
    let want = want.require("o").unwrap().data.to_f64();
    let rounded: Vec<f64> = want.iter().map(|x| half::bf16::store(*x as f32).to_f64()).collect();
    assert_eq!(got.require("o").unwrap().data.to_f64(), rounded);
    let strided = PartedAttention::new(StridedAttention { stride: Some(6), merged: true });
    assert!(strided.profile().dtypes.contains(&DType::Bf16));
}
