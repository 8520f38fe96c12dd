//! Gradients of sinks, score mods, tables and class-by-class attention against exact attention in f64.

use attn_core::exact::{Exact, ExactGrads};
use attn_core::mask::{Mask, Pair, Predicate};
use attn_core::score::{BiasIndex, RelativeBias, ScoreFnWithDerivative, ScoreMod, Unchanged};
use attn_core::{AttnShape, Differentiable, QkvGrads, Result, SoftmaxAttention, View, ViewMut};
use attn_sparse::{
    BiasGrad, Branch, Decider, DilatedWindow, LongNet, Pattern, ScoreRule, SinkWindow, SlidingWindow,
    SparseAttention, SparseGrads, Union,
};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::gradient::{Claim, GradientCheck};
use attn_testkit::inputs::Problem;

const TOL: Tol = Tol::AllClose { atol: 2e-5, rtol: 2e-5 };

const GROUPED: AttnShape =
    AttnShape { batch: 2, n_heads_q: 6, n_heads_kv: 2, n_q: 37, n_kv: 37, head_dim: 8, head_dim_v: 5 };

/// The gradient of the output that all tests share.
fn grad_out(shape: &AttnShape) -> Vec<f32> {
    (0..shape.rows() * shape.head_dim_v).map(|at| (at as f32 * 0.37).sin()).collect()
}

struct Gradients {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    sinks: Vec<f32>,
    bias: Vec<f32>,
}

/// Gradients of one call; `backward` is given what the forward pass saved.
fn gradients<A: Differentiable>(
    attention: &A,
    problem: &Problem,
    backward: impl FnOnce(&A, QkvGrads<'_>, &View<'_, f32>, &attn_core::Saved) -> Result<()>,
) -> [Vec<f32>; 3] {
    let (x, s) = (problem.qkv().unwrap(), problem.shape);
    let mut out = vec![f32::NAN; s.rows() * s.head_dim_v];
    let view = ViewMut::contiguous("out", &mut out, s.out()).unwrap();
    let saved = attention.forward_saving(x, view.into()).unwrap();
    let out = View::contiguous("out", &out, s.out()).unwrap();
    let mut grads = [s.q(), s.k(), s.v()].map(|axes| vec![f32::NAN; axes.iter().product()]);
    let [q, k, v] = &mut grads;
    let all = QkvGrads {
        q: ViewMut::contiguous("q", q, s.q()).unwrap().into(),
        k: ViewMut::contiguous("k", k, s.k()).unwrap().into(),
        v: ViewMut::contiguous("v", v, s.v()).unwrap().into(),
    };
    backward(attention, all, &out, &saved).unwrap();
    grads
}

fn sparse<D: Decider>(
    attention: &SparseAttention<D>,
    problem: &Problem,
    index: Option<&dyn BiasIndex>,
) -> Gradients {
    let (x, s) = (problem.qkv().unwrap(), problem.shape);
    let mut sinks = vec![f32::NAN; attention.sinks.as_ref().map_or(0, |sinks| sinks.len())];
    let mut bias = vec![f32::NAN; index.map_or(0, BiasIndex::len)];
    let [q, k, v] = gradients(attention, problem, |attention, qkv, out, saved| {
        let grad_out = grad_out(&s);
        let grad_out = View::contiguous("grad_out", &grad_out, s.out())?;
        let grads = SparseGrads {
            qkv,
            sinks: attention.sinks.is_some().then_some(&mut sinks[..]),
            bias: index.map(|index| BiasGrad { index, grad: &mut bias }),
        };
        attention.backward_all(x, (*out).into(), saved, grad_out.into(), grads)
    });
    Gradients { q, k, v, sinks, bias }
}

fn check_qkv(what: &str, [q, k, v]: [&[f32]; 3], want: &ExactGrads) {
    assert_close(&format!("{what}: q"), q, &want.q, TOL);
    assert_close(&format!("{what}: k"), k, &want.k, TOL);
    assert_close(&format!("{what}: v"), v, &want.v, TOL);
}

/// All gradients of a pattern with sinks and a score mod against those of exact attention under its mask.
fn check<P: Pattern>(
    what: &str,
    attention: &SparseAttention<P>,
    problem: &Problem,
    score_mod: &dyn ScoreMod,
    index: Option<&dyn BiasIndex>,
) {
    let (x, s) = (problem.qkv().unwrap(), problem.shape);
    let mask = attention.decider.mask(&s).unwrap();
    let mask: &dyn Mask = &mask;
    let each: Option<Vec<f64>> = attention.sinks.as_deref().map(|sinks| match sinks {
        [one] => vec![f64::from(*one); s.n_heads_q],
        each => each.iter().map(|sink| f64::from(*sink)).collect(),
    });
    let exact = Exact { mask, score_mod, sinks: each.as_deref(), ..Exact::default() };
    let grad: Vec<f64> = grad_out(&s).into_iter().map(f64::from).collect();
    let mut bias = vec![0.0; index.map_or(0, BiasIndex::len)];
    let want = exact
        .backward(&x, &grad, None, |pair, ds| {
            if let Some(index) = index {
                bias[index.index(pair)] += ds;
            }
        })
        .unwrap();
    let got = sparse(attention, problem, index);
    check_qkv(what, [&got.q, &got.k, &got.v], &want);
    assert_close(&format!("{what}: bias"), &got.bias, &bias, TOL);
    if let Some(sinks) = want.sinks {
        let one = vec![sinks.iter().sum()];
        let want = if got.sinks.len() == 1 { one } else { sinks };
        assert_close(&format!("{what}: sinks"), &got.sinks, &want, TOL);
    }
}

#[test]
fn sinks_learn() {
    let problem = Problem::normal(GROUPED, 1);
    let window = SparseAttention::new(SlidingWindow::causal(7));
    let each = window.clone().with_sinks([0.5, -1.0, 0.0, 2.0, f32::NEG_INFINITY, 1.0]);
    check("one each", &each, &problem, &Unchanged, None);
    check("one for all", &window.with_sinks([0.25]), &problem, &Unchanged, None);
    let dilated = SparseAttention::new(DilatedWindow::new(3, 4, false)).with_sinks([0.0; 6]);
    check("dilated", &dilated, &problem, &Unchanged, None);
    let cross = Problem::normal(AttnShape { n_q: 9, ..GROUPED }, 2);
    check("cross lengths", &each, &cross, &Unchanged, None);
}

#[test]
fn the_gradient_of_sinks_is_the_slope_of_the_loss() {
    let problem = Problem::normal(AttnShape { n_q: 9, n_kv: 20, ..GROUPED }, 8);
    let (x, s) = (problem.qkv().unwrap(), problem.shape);
    let sinks = [0.5f32, -1.0, 0.0, 2.0, -3.0, 1.0];
    for dilation in [1, 3] {
        let pattern = DilatedWindow::new(4, dilation, true);
        let mask = pattern.mask(&s).unwrap();
        let weights = grad_out(&s);
        let loss = |at: &[Vec<f64>]| {
            let out = Exact { mask: &mask, sinks: Some(&at[0]), ..Exact::default() }.all(&x).unwrap().out;
            out.iter().zip(&weights).map(|(out, w)| out * f64::from(*w)).sum()
        };
        let got = sparse(&SparseAttention::new(pattern).with_sinks(sinks), &problem, None).sinks;
        let (at, gradient) = (sinks.map(f64::from), got.iter().map(|g| f64::from(*g)).collect::<Vec<_>>());
        let claim = Claim { name: "sinks", at: &at, gradient: &gradient };
        GradientCheck { tol: TOL, ..GradientCheck::default() }.check(loss, &[claim]).unwrap();
    }
}

#[test]
fn dilated_windows_learn_in_any_mixture_of_heads() {
    for causal in [true, false] {
        for steps in [vec![1], vec![5], vec![100], vec![2, 2, 2, 3, 3, 3], vec![1, 2, 3, 3, 3, 7], vec![4; 6]]
        {
            for n_q in [37, 2, 60] {
                let problem = Problem::normal(AttnShape { n_q, ..GROUPED }, 3);
                let pattern = DilatedWindow { window: 3, dilation: steps.clone().into(), causal };
                let what = format!("dilation {steps:?}, causal {causal}, {n_q} queries");
                check(&what, &SparseAttention::new(pattern), &problem, &Unchanged, None);
            }
        }
    }
}

#[test]
fn score_mods_learn_with_any_pattern() {
    let problem = Problem::normal(GROUPED, 4);
    let (f, df) =
        (|s: f32, p: Pair| s * (1.0 + p.j as f32 * 0.01), |_: f32, p: Pair| 1.0 + p.j as f32 * 0.01);
    let closure = ScoreFnWithDerivative(f, df);
    let sinks = [0.5; 6];
    let union = Union(SinkWindow { n_sinks: 2, window: 5 }, SlidingWindow { left: 3, right: 3 });
    let attention = SparseAttention::new(union).with_sinks(sinks).with_score_rule(ScoreRule::new(closure));
    check("union", &attention, &problem, &closure, None);
    let dilated =
        SparseAttention::new(DilatedWindow::new(4, 3, true)).with_score_rule(ScoreRule::new(closure));
    check("dilated", &dilated, &problem, &closure, None);
}

#[test]
fn tables_learn() {
    let (max, heads) = (4, GROUPED.n_heads_q);
    // The rule's table counts from the key to the query, the bias of attn-core from the query to the key.
    let table: Vec<f32> = (0..heads * 9).map(|at| (at as f32 * 0.7).cos()).collect();
    let mut turned = table.clone();
    turned.chunks_exact_mut(9).for_each(<[f32]>::reverse);
    for n_q in [37, 11] {
        let problem = Problem::normal(AttnShape { n_q, ..GROUPED }, 5);
        let offset = problem.shape.n_kv as isize - n_q as isize;
        let bias = RelativeBias::new(&turned, max, &problem.shape, offset).unwrap();
        let rule = ScoreRule::relative(table.clone(), max);
        let window = SparseAttention::new(SlidingWindow { left: 9, right: 6 }).with_score_rule(rule.clone());
        check("window", &window, &problem, &bias, Some(&bias));
        let dilated = DilatedWindow { window: 3, dilation: [1, 1, 2, 2, 2, 5].into(), causal: false };
        let dilated = SparseAttention::new(dilated).with_score_rule(rule);
        check("dilated", &dilated, &problem, &bias, Some(&bias));
    }
}

#[test]
fn a_score_mod_without_derivative_has_no_backward_pass() {
    use attn_core::score::ScoreFn;
    let problem = Problem::normal(AttnShape::square(1, 6, 4), 6);
    let rule = || ScoreRule::new(ScoreFn(|s: f32, _: Pair| s.abs()));
    let refused = |error: attn_core::AttnError| assert!(error.to_string().contains("derivative"), "{error}");
    let x = problem.qkv().unwrap();
    fn fails<D: Decider>(attention: &SparseAttention<D>, x: attn_core::Qkv<'_>) -> attn_core::AttnError {
        let s = x.shape();
        let numbers = || vec![0.0f32; 24];
        let (mut out, mut q, mut k, mut v) = (numbers(), numbers(), numbers(), numbers());
        let view = ViewMut::contiguous("out", &mut out, s.out()).unwrap();
        let saved = attention.forward_saving(x, view.into()).unwrap();
        let grads = QkvGrads {
            q: ViewMut::contiguous("q", &mut q, s.q()).unwrap().into(),
            k: ViewMut::contiguous("k", &mut k, s.k()).unwrap().into(),
            v: ViewMut::contiguous("v", &mut v, s.v()).unwrap().into(),
        };
        let out: attn_core::TensorView<'_> = View::contiguous("out", &out, s.out()).unwrap().into();
        attention.backward(x, out, &saved, out, grads).unwrap_err()
    }
    refused(fails(&SparseAttention::new(SlidingWindow::causal(3)).with_score_rule(rule()), x));
    refused(fails(&SparseAttention::new(DilatedWindow::new(3, 2, true)).with_score_rule(rule()), x));
}

/// Branches of `(segment, dilation)` that see a pair.
fn copies(branches: &[(usize, usize)], causal: bool, p: Pair, offset: usize) -> usize {
    let position = p.i + offset;
    let sees = |&&(segment, dilation): &&(usize, usize)| {
        let kept = |at: usize| at % dilation == p.head % dilation;
        kept(position) && kept(p.j) && position / segment == p.j / segment && (!causal || p.j <= position)
    };
    branches.iter().filter(sees).count()
}

#[test]
fn longnet_is_a_softmax_over_its_branches() {
    let branches = vec![(8, 1), (12, 2), (40, 4)];
    for causal in [true, false] {
        for n_q in [37, 10] {
            let problem = Problem::normal(AttnShape { n_q, ..GROUPED }, 7);
            let (x, s) = (problem.qkv().unwrap(), problem.shape);
            let count = |p: Pair| copies(&branches, causal, p, s.n_kv - s.n_q);
            let mask = Predicate(|p| count(p) > 0);
            let often = ScoreFnWithDerivative(|s: f32, p| s + (count(p) as f32).ln(), |_, _| 1.0);
            let exact = Exact { mask: &mask, score_mod: &often, ..Exact::default() };

            let list = branches.iter().map(|&(segment, dilation)| Branch { segment, dilation }).collect();
            let longnet = LongNet::new(list, causal).unwrap();
            let mut out = vec![f32::NAN; s.rows() * s.head_dim_v];
            let mut lse = vec![f32::NAN; s.rows()];
            let view = ViewMut::contiguous("out", &mut out, s.out()).unwrap();
            longnet.forward_with_lse(x, view.into(), &mut lse).unwrap();
            let want = exact.all(&x).unwrap();
            assert_close("out", &out, &want.out, TOL);
            assert_close("lse", &lse, &want.lse.unwrap(), TOL);

            let grad: Vec<f64> = grad_out(&s).into_iter().map(f64::from).collect();
            let want = exact.backward(&x, &grad, None, |_, _| ()).unwrap();
            let [q, k, v] = gradients(&longnet, &problem, |longnet, grads, out, saved| {
                let grad_out = grad_out(&s);
                let grad_out = View::contiguous("grad_out", &grad_out, s.out())?;
                longnet.backward(x, (*out).into(), saved, grad_out.into(), grads)
            });
            check_qkv(&format!("longnet, causal {causal}"), [&q, &k, &v], &want);
        }
    }
}
