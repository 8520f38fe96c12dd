//! Gradients of a registry entry by q, k and v against finite differences of its definition.

use attn_core::registry::{Entry, Options};
use attn_core::{AttnShape, Qkv, QkvGrads, View, ViewMut};
use attn_testkit::compare::Tol;
use attn_testkit::gradient::{Claim, GradientCheck};
use attn_testkit::inputs::Problem;

/// Numbers of `[-1, 1]` on a grid so coarse that they and all steps of the differences are exact in f32.
fn on_grid(x: &[f32]) -> Vec<f32> {
    x.iter().map(|x| (x.clamp(-1.0, 1.0) * 256.0).round() / 256.0).collect()
}

fn view<'a>(name: &str, data: &'a [f32], axes: [usize; 4]) -> View<'a, f32> {
    View::contiguous(name, data, axes).unwrap()
}

/// Checks some coordinates of each gradient, of a definition in f64.
pub(crate) fn check(entry: &Entry, options: &Options, s: AttnShape, seed: u64) {
    let check = GradientCheck { step: 1.0 / 512.0, tol: Tol::ScaledMax(3e-5), sample: Some(24), seed };
    check_by(check, entry, options, s);
}

/// As [`check`], of a definition whose front end rounds to f32.
pub(crate) fn check_rounded(entry: &Entry, options: &Options, s: AttnShape, seed: u64) {
    let check = GradientCheck { step: 1.0 / 256.0, tol: Tol::ScaledMax(4e-3), sample: Some(24), seed };
    check_by(check, entry, options, s);
}

fn check_by(check: GradientCheck, entry: &Entry, options: &Options, s: AttnShape) {
    let seed = check.seed;
    let attention = entry.build(options).unwrap();
    let differentiable = attention.as_differentiable().expect("a backward pass");
    let problem = Problem::normal(s, seed);
    let (q, k, v) = (on_grid(&problem.q), on_grid(&problem.k), on_grid(&problem.v));
    let weights = Problem::normal(AttnShape { head_dim: s.head_dim_v, ..s }, seed + 1).q;

    let x = Qkv::new(view("q", &q, s.q()), view("k", &k, s.k()), view("v", &v, s.v())).unwrap();
    let mut out = vec![f32::NAN; weights.len()];
    let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
    let saved = differentiable
        .forward_saving(x, ViewMut::contiguous("out", &mut out, s.out()).unwrap().into())
        .unwrap();
    let grads = QkvGrads {
        q: ViewMut::contiguous("grad_q", &mut dq, s.q()).unwrap().into(),
        k: ViewMut::contiguous("grad_k", &mut dk, s.k()).unwrap().into(),
        v: ViewMut::contiguous("grad_v", &mut dv, s.v()).unwrap().into(),
    };
    let (out, grad) = (view("out", &out, s.out()), view("grad_out", &weights, s.out()));
    differentiable.backward(x, out.into(), &saved, grad.into(), grads).unwrap();

    let loss = |at: &[Vec<f64>]| -> f64 {
        let narrow = |x: &[f64]| -> Vec<f32> {
            let narrow: Vec<f32> = x.iter().map(|x| *x as f32).collect();
            assert!(narrow.iter().zip(x).all(|(n, x)| f64::from(*n) == *x), "a step that f32 cannot hold");
            narrow
        };
        let (q, k, v) = (narrow(&at[0]), narrow(&at[1]), narrow(&at[2]));
        let x = Qkv::new(view("q", &q, s.q()), view("k", &k, s.k()), view("v", &v, s.v())).unwrap();
        let out = attention.definition(&x).unwrap().out;
        out.iter().zip(&weights).map(|(o, w)| o * f64::from(*w)).sum()
    };
    let wide = |x: &[f32]| -> Vec<f64> { x.iter().map(|x| f64::from(*x)).collect() };
    let all = [&q, &k, &v, &dq, &dk, &dv].map(|x| wide(x));
    let claims =
        [("q", 0), ("k", 1), ("v", 2)].map(|(name, at)| Claim { name, at: &all[at], gradient: &all[at + 3] });
    check.check(loss, &claims).unwrap_or_else(|e| panic!("{} {options:?}: {e}", entry.name));
}
