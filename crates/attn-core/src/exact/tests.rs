use super::*;
use crate::mask::{Band, Predicate};
use crate::qk_norm::NormKind;
use crate::score::{BiasIndex, RelativeBias, ScoreFn, SoftCap, Then};
use crate::{AttnShape, View};

fn qkv<'a>(q: &'a [f32], k: &'a [f32], v: &'a [f32], n_q: usize, n_kv: usize, d: usize) -> Qkv<'a> {
    let view = |name, data, n| View::contiguous(name, data, [1, 1, n, d]).unwrap();
    Qkv::new(view("q", q, n_q), view("k", k, n_kv), view("v", v, n_kv)).unwrap()
}

#[test]
fn two_keys_by_hand() {
    // scores 0 and ln 3 (scale 1): weights 1/4 and 3/4
    let (q, k, v) = ([1.0, 0.0], [0.0, 5.0, 3f32.ln(), 7.0], [4.0, 8.0, 0.0, 4.0]);
    let exact = Exact { softmax_scale: Some(1.0), ..Exact::default() };
    let got = exact.all(&qkv(&q, &k, &v, 1, 2, 2)).unwrap();
    assert!((got.out[0] - 1.0).abs() < 1e-7 && (got.out[1] - 5.0).abs() < 1e-7, "{:?}", got.out);
    assert!((got.lse.unwrap()[0] - 4f64.ln()).abs() < 1e-7);
}

#[test]
fn rows_that_see_nothing_are_zero() {
    let (q, k, v) = ([1.0; 4], [1.0; 2], [f32::NAN; 2]);
    let nobody = Predicate(|_| false);
    let exact = Exact { mask: &nobody, ..Exact::default() };
    let got = exact.all(&qkv(&q, &k, &v, 2, 1, 2)).unwrap();
    assert_eq!((got.out, got.lse), (vec![0.0; 4], Some(vec![f64::NEG_INFINITY; 2])));
    let none = exact.all(&qkv(&q, &[], &[], 2, 0, 2)).unwrap();
    assert_eq!(none.out, vec![0.0; 4]);
}

#[test]
fn nan_stays_with_the_rows_that_see_it() {
    let (q, k, v) = ([1.0, 1.0, 1.0], [1.0, f32::NAN, 1.0], [1.0, 2.0, 3.0]);
    let causal = Band { offset: 0, left: None, right: Some(0) };
    let got = Exact { mask: &causal, ..Exact::default() }.all(&qkv(&q, &k, &v, 3, 3, 1)).unwrap();
    assert_eq!(got.out[0], 1.0);
    assert!(got.out[1].is_nan() && got.out[2].is_nan());
}

#[test]
fn a_sink_takes_weight_and_gives_nothing() {
    let (q, k, v) = ([0.0], [0.0], [6.0]);
    let exact = Exact { sinks: Some(&[2f64.ln()]), ..Exact::default() };
    let got = exact.all(&qkv(&q, &k, &v, 1, 1, 1)).unwrap();
    assert!((got.out[0] - 2.0).abs() < 1e-12);
    assert!((got.lse.unwrap()[0] - 3f64.ln()).abs() < 1e-12);
}

#[test]
fn chosen_rows_equal_all_rows() {
    let data: Vec<f32> = (0..24).map(|x| (x as f32 * 0.7).sin()).collect();
    let x = qkv(&data[..12], &data[..12], &data[12..], 4, 4, 3);
    let all = Exact::default().all(&x).unwrap();
    let one = Exact::default().rows(&x, &[RowId { batch: 0, head: 0, i: 2 }]).unwrap();
    assert_eq!(one[0].out, all.out[6..9]);
    let outside = Exact::default().rows(&x, &[RowId { batch: 0, head: 0, i: 4 }]).unwrap_err();
    assert!(outside.to_string().contains("a row of 1 x 1 x 4"), "{outside}");
}

#[test]
fn key_biases_dropout_and_norms_by_hand() {
    // Two keys of equal score; the second stands for three tokens: weights 1/4 and 3/4.
    let (q, k, v) = ([2.0, 0.0], [0.0, 5.0, 0.0, 7.0], [4.0, 8.0, 0.0, 4.0]);
    let x = qkv(&q, &k, &v, 1, 2, 2);
    let biased = Exact { key_bias: Some(&[0.0, 3f32.ln()]), ..Exact::default() };
    let got = biased.all(&x).unwrap().out;
    assert!((got[0] - 1.0).abs() < 1e-7 && (got[1] - 5.0).abs() < 1e-7, "{got:?}");

    // Half of the weights are dropped: the other key counts twice, and the normaliser does not change.
    let dropout = Dropout::keep_mask(0.5, &[true, false], &[1, 2], &x.shape()).unwrap();
    let dropped = Exact { dropout: Some(dropout), ..Exact::default() }.all(&x).unwrap();
    assert_eq!((dropped.out, dropped.lse), (vec![4.0, 8.0], Some(vec![2f64.ln()])));

    // Unit vectors: the score of parallel ones is the scale.
    let norm = QkNorm { kind: NormKind::L2 { eps: 1e-12 }, gamma_q: None, gamma_k: None };
    let cosine = Exact { qk_norm: Some(norm), softmax_scale: Some(10.0), ..Exact::default() };
    let parallel = [6.0, 0.0, 0.0, 9.0];
    let lse = cosine.all(&qkv(&q, &parallel, &v, 1, 2, 2)).unwrap().lse.unwrap()[0];
    assert!((lse - (10f64.exp() + 1.0).ln()).abs() < 1e-12, "{lse}");
}

#[test]
fn what_does_not_fit_is_refused() {
    let x = qkv(&[0.0; 2], &[0.0; 4], &[0.0; 4], 1, 2, 2);
    let message = |exact: Exact<'_>| exact.all(&x).unwrap_err().to_string();
    let key_bias = Exact { key_bias: Some(&[0.0]), ..Exact::default() };
    assert_eq!(message(key_bias), "key_bias: n_kv is 1, expected 2");
    let norm = QkNorm { kind: NormKind::Rms { eps: 1e-6 }, gamma_q: Some(&[1.0]), gamma_k: None };
    assert!(message(Exact { qk_norm: Some(norm), ..Exact::default() }).starts_with("gamma_q"));
    let backward = |exact: Exact<'_>, grad: &[f64], lse: Option<&[f64]>| {
        exact.backward(&x, grad, lse, |_, _| ()).unwrap_err().to_string()
    };
    assert!(backward(Exact::default(), &[0.0; 3], None).contains("grad_out: elements is 3"));
    assert!(backward(Exact::default(), &[0.0; 2], Some(&[0.0; 2])).contains("grad_lse: rows is 2"));
    let closure = ScoreFn(|s, _| s);
    let no_slope = Exact { score_mod: &closure, ..Exact::default() };
    assert!(backward(no_slope, &[0.0; 2], None).contains("without derivative"));
}

/// Numbers that f32 holds exactly, also after steps of 2^-10.
fn numbers(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|at| ((at * 37 + seed * 101 + at * at * 11) % 257) as f32 / 128.0 - 1.0).collect()
}

/// Everything the gradient is taken of.
#[derive(Clone)]
struct Inputs {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    sinks: Vec<f32>,
    gamma_q: Vec<f32>,
    gamma_k: Vec<f32>,
    table: Vec<f32>,
}

const SHAPE: AttnShape =
    AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, n_q: 3, n_kv: 4, head_dim: 3, head_dim_v: 2 };

impl Inputs {
    fn new() -> Self {
        let len = |axes: [usize; 4]| axes.iter().product();
        let [q, k, v] = [SHAPE.q(), SHAPE.k(), SHAPE.v()].map(len);
        Self {
            q: numbers(q, 1),
            k: numbers(k, 2),
            v: numbers(v, 3),
            sinks: numbers(4, 4),
            gamma_q: numbers(3, 5),
            gamma_k: numbers(3, 6),
            table: numbers(4 * 3, 7),
        }
    }

    fn all(&mut self) -> [(&'static str, &mut Vec<f32>); 7] {
        [
            ("q", &mut self.q),
            ("k", &mut self.k),
            ("v", &mut self.v),
            ("sinks", &mut self.sinks),
            ("gamma_q", &mut self.gamma_q),
            ("gamma_k", &mut self.gamma_k),
            ("table", &mut self.table),
        ]
    }

    fn qkv(&self) -> Qkv<'_> {
        let view = |name, data, axes| View::contiguous(name, data, axes).unwrap();
        let (q, k, v) = (&self.q, &self.k, &self.v);
        Qkv::new(view("q", q, SHAPE.q()), view("k", k, SHAPE.k()), view("v", v, SHAPE.v())).unwrap()
    }

    /// Runs `work` on attention with every option, the norm of this kind.
    fn with_exact<R>(&self, kind: NormKind, work: impl FnOnce(&Exact<'_>, &RelativeBias<'_>) -> R) -> R {
        let table = RelativeBias::new(&self.table, 1, &SHAPE, 1).unwrap();
        // The last row of the second batch entry sees nothing, not even with its sink's help in `out`.
        let mask = Predicate(|p: Pair| p.j <= p.i + 1 && (p.batch == 0 || p.i < 2));
        let exact = Exact {
            softmax_scale: Some(0.75),
            mask: &mask,
            score_mod: &Then(SoftCap::new(1.5).unwrap(), table),
            key_bias: Some(&[0.5, -0.25, 0.0, 1.0]),
            sinks: Some(&self.sinks.iter().map(|x| f64::from(*x)).collect::<Vec<_>>()),
            dropout: Some(Dropout::new(0.25, 5).unwrap()),
            qk_norm: Some(QkNorm { kind, gamma_q: Some(&self.gamma_q), gamma_k: Some(&self.gamma_k) }),
        };
        work(&exact, &table)
    }

    fn loss(&self, kind: NormKind, grad_out: &[f64], grad_lse: &[f64]) -> f64 {
        let got = self.with_exact(kind, |exact, _| exact.all(&self.qkv()).unwrap());
        let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        sum(&got.out, grad_out) + sum(&got.lse.unwrap(), grad_lse)
    }
}

#[test]
fn gradients_are_those_of_finite_differences() {
    let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
    let grad_out = wide(numbers(SHAPE.rows() * SHAPE.head_dim_v, 8));
    let grad_lse = wide(numbers(SHAPE.rows(), 9));
    for kind in [NormKind::Rms { eps: 0.125 }, NormKind::L2 { eps: 1e-12 }] {
        let inputs = Inputs::new();
        let mut table = vec![0.0; inputs.table.len()];
        let grads = inputs.with_exact(kind, |exact, bias| {
            let each_pair = |at, ds| table[bias.index(at)] += ds;
            exact.backward(&inputs.qkv(), &grad_out, Some(&grad_lse), each_pair).unwrap()
        });
        let ExactGrads { q, k, v, sinks, gamma_q, gamma_k } = grads;
        let got = [q, k, v, sinks.unwrap(), gamma_q.unwrap(), gamma_k.unwrap(), table];
        for (which, got) in got.iter().enumerate() {
            for (at, got) in got.iter().enumerate() {
                let slope = |step: f32| {
                    let moved = |by: f32| {
                        let mut inputs = inputs.clone();
                        inputs.all()[which].1[at] += by;
                        inputs.loss(kind, &grad_out, &grad_lse)
                    };
                    (moved(step) - moved(-step)) / (2.0 * f64::from(step))
                };
                // Richardson: the error of the second order cancels.
                let want = (4.0 * slope(1.0 / 1024.0) - slope(1.0 / 512.0)) / 3.0;
                let name = inputs.clone().all()[which].0;
                assert!((got - want).abs() < 1e-8, "{kind:?} {name}[{at}]: {got} for {want}");
            }
        }
    }
}

#[test]
fn rows_that_see_nothing_have_no_gradient_and_hide_what_is_not_finite() {
    let (q, k, v) = ([1.0, 2.0], [3.0, f32::NAN], [1.0, f32::INFINITY]);
    let x = qkv(&q, &k, &v, 2, 2, 1);
    let first = Predicate(|p: Pair| p.i == 1 && p.j == 0);
    let mut pairs = Vec::new();
    let grads = Exact { mask: &first, ..Exact::default() }
        .backward(&x, &[1.0, 1.0], Some(&[1.0, 1.0]), |at, ds| pairs.push((at.i, at.j, ds)))
        .unwrap();
    assert_eq!(pairs, [(1, 0, 1.0)], "the log-sum-exp of one key is its score");
    assert_eq!((grads.q, grads.k, grads.v), (vec![0.0, 3.0], vec![2.0, 0.0], vec![1.0, 0.0]));
    assert_eq!((grads.sinks, grads.gamma_q), (None, None));
}
