//! AFT with learned biases: against its formula in f64, in extreme ranges, by differences.

use attn_core::{AttnShape, Qkv, View, ViewMut};
use attn_linear::AftFull;
use attn_linear::elementwise::aft_full::Biases;
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::gradient::{Claim, GradientCheck};
use attn_testkit::inputs::Problem;
use proptest::prelude::*;

struct Case {
    aft: AftFull,
    shape: AttnShape,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    bias: Vec<f32>,
    axes: Vec<usize>,
}

impl Case {
    fn new(aft: AftFull, shape: AttnShape, bias_axes: &[usize], seed: u64) -> Self {
        let Problem { q, k, v, .. } = Problem::normal(shape, seed);
        let len: usize = bias_axes.iter().product();
        let bias = Problem::normal(AttnShape::square(1, len, 1), seed + 1).q;
        Self { aft, shape, q, k, v, bias, axes: bias_axes.to_vec() }
    }

    fn x(&self) -> Qkv<'_> {
        let s = &self.shape;
        let view = |name, data, axes| View::contiguous(name, data, axes).unwrap();
        Qkv::new(view("q", &self.q[..], s.q()), view("k", &self.k, s.k()), view("v", &self.v, s.v())).unwrap()
    }

    fn biases(&self) -> Biases<'_> {
        (&self.bias, &self.axes)
    }

    fn run(&self) -> Vec<f32> {
        let mut out = vec![f32::NAN; self.shape.out().iter().product()];
        let view = ViewMut::contiguous("out", &mut out, self.shape.out()).unwrap();
        self.aft.forward_biased(&self.x(), Some(self.biases()), view.into()).unwrap();
        out
    }

    /// The formula, exponents relative to the largest.
    fn formula(&self, q: &[f64], k: &[f64], v: &[f64], bias: &[f64]) -> Vec<f64> {
        let s = &self.shape;
        let (rows, columns) = (self.axes[self.axes.len() - 2], self.axes[self.axes.len() - 1]);
        let mut out = Vec::new();
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                let kv = (batch * s.n_heads_kv + s.kv_head(head)) * s.n_kv;
                let bias = &bias[if self.axes.len() == 3 { head * rows * columns } else { 0 }..];
                for i in 0..s.n_q {
                    let row = ((batch * s.n_heads_q + head) * s.n_q + i) * s.head_dim;
                    for c in 0..s.head_dim_v {
                        let seen = 0..if self.aft.causal { i + 1 } else { s.n_kv };
                        let exponent = |j: usize| {
                            let near = self.aft.window.is_none_or(|window| i.abs_diff(j) < window);
                            let w = if near { bias[i * columns + j] } else { 0.0 };
                            w + k[(kv + j) * s.head_dim + c % s.head_dim]
                        };
                        let max = seen.clone().map(exponent).fold(f64::NEG_INFINITY, f64::max);
                        let (mut num, mut den) = (0.0, 0.0);
                        for j in seen {
                            let e = (exponent(j) - max).exp();
                            num += e * v[(kv + j) * s.head_dim_v + c];
                            den += e;
                        }
                        out.push(num / den / (1.0 + (-q[row + c % s.head_dim]).exp()));
                    }
                }
            }
        }
        out
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_window_equals_the_formula_at_any_range(
        n in 1usize..150, window in proptest::option::of(1usize..90), causal: bool, per_head: bool,
        spread in 0usize..4, more in 0usize..3, seed in 0u64..1000,
    ) {
        let aft = AftFull { causal, window, ..AftFull::default() };
        let shape = AttnShape { batch: 2, n_heads_kv: 1, head_dim_v: 5, ..AttnShape::square(2, n, 3) };
        let axes = [2, n + more, n + more];
        let mut case = Case::new(aft, shape, if per_head { &axes } else { &axes[1..] }, seed);
        // Ranges far beyond those of exponentials in f32, the largest bias and the largest key apart.
        let by = [1.0, 10.0, 100.0, 1000.0][spread];
        case.k.iter_mut().chain(&mut case.bias).for_each(|x| *x *= by);
        let want = case.formula(&wide(&case.q), &wide(&case.k), &wide(&case.v), &wide(&case.bias));
        // The exponent itself is rounded.
        assert_close("o", &wide(&case.run()), &want, Tol::ScaledMax(4e-6 + 3e-7 * f64::from(by)));
    }
}

#[test]
fn gradients_of_everything_equal_finite_differences() {
    for (seed, (causal, window)) in
        [(false, None), (true, None), (false, Some(9)), (true, Some(9))].into_iter().enumerate()
    {
        let aft = AftFull { causal, window, ..AftFull::default() };
        let shape = AttnShape { n_heads_kv: 1, head_dim_v: 5, ..AttnShape::square(2, 110, 3) };
        let case = Case::new(aft, shape, &[112, 112], seed as u64);
        let weights = Problem::normal(AttnShape { head_dim: 5, ..shape }, 77).q;
        let grad = View::contiguous("grad_out", &weights, shape.out()).unwrap().into();
        let got = aft.gradients(&case.x(), Some(case.biases()), &grad).unwrap();
        let loss = |at: &[Vec<f64>]| -> f64 {
            let out = case.formula(&at[0], &at[1], &at[2], &at[3]);
            out.iter().zip(&weights).map(|(o, w)| o * f64::from(*w)).sum()
        };
        let at = [&case.q, &case.k, &case.v, &case.bias].map(|x| wide(x));
        let by = [&got.q, &got.k, &got.v, &got.bias].map(|x| wide(x));
        let names = ["q", "k", "v", "bias"];
        let claims: Vec<Claim<'_>> =
            (0..4).map(|i| Claim { name: names[i], at: &at[i], gradient: &by[i] }).collect();
        let check =
            GradientCheck { step: 1e-3, tol: Tol::ScaledMax(3e-5), sample: Some(24), seed: seed as u64 };
        check.check(loss, &claims).unwrap_or_else(|e| panic!("causal {causal}, window {window:?}: {e}"));
    }
}

#[test]
fn a_bias_of_minus_infinity_hides_a_pair() {
    let n = 40;
    let mut case = Case::new(AftFull::default(), AttnShape::square(1, n, 4), &[n, n], 3);
    for i in 0..n {
        (0..n).filter(|j| i == 7 || (i + j) % 3 == 0).for_each(|j| case.bias[i * n + j] = f32::NEG_INFINITY);
    }
    let before = case.run();
    assert!(before[7 * 4..8 * 4].iter().all(|x| *x == 0.0), "a query that sees nothing");
    // What key 0 holds reaches no query that does not see it.
    case.v[..4].fill(f32::NAN);
    for (i, (row, was)) in case.run().chunks(4).zip(before.chunks(4)).enumerate() {
        if i % 3 == 0 || i == 7 {
            assert_eq!(row, was, "query {i}");
        } else {
            assert!(row.iter().all(|x| x.is_nan()), "query {i}");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::new(AftFull::default(), AttnShape::square(2, 6, 4), &[5, 6], 1);
    let mut out = vec![0.0; 48];
    let mut refuses = |aft: &AftFull, bias: Biases<'_>, words: &str| {
        let view = ViewMut::contiguous("out", &mut out, case.shape.out()).unwrap();
        let error = aft.forward_biased(&case.x(), Some(bias), view.into()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    let aft = AftFull::default();
    refuses(&aft, (&case.bias, &[5, 6]), "bias: rows is 5");
    refuses(&aft, (&case.bias, &[6, 5]), "bias: columns is 5");
    refuses(&aft, (&case.bias, &[6, 6]), "bias: elements is 30");
    refuses(&aft, (&case.bias, &[3, 6, 6]), "bias' shape");
    refuses(&AftFull { window: Some(0), ..aft }, (&case.bias, &[5, 6]), "window");
}
