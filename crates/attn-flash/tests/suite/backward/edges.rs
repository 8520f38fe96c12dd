//! What must not leak, what must not matter, and what is refused.

use super::case::{Case, TOL, spec};
use super::definition::shape;
use attn_core::dropout::Dropout;
use attn_core::exact::Exact;
use attn_core::mask::{And, Band, Head, KeysBelow, Mask, Pair, Predicate, SeeAll};
use attn_core::merge::merge_into;
use attn_core::score::{Bias, ScoreFn, Unchanged};
use attn_core::{AttnShape, Element, TensorView, View};
use attn_flash::engine::ForwardResult;
use attn_flash::engine::{
    Grads, KvView, OutputGrad, Problem, RowState, Spec, attend_backward_any, attend_backward_from_delta_any,
};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::gradient::{Claim, GradientCheck};
use attn_testkit::inputs::{Layout, StoredTensor};
use half::{bf16, f16};
use std::ops::Range;

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let shape = AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, ..shape(1100, 900) };
    let case = Case::new(shape);
    let key_bias: Vec<f32> = (0..900).map(|j| (j as f32).cos()).collect();
    let numbers: Vec<f32> = (0..1100 * 900).map(|x| (x as f32).sin()).collect();
    let bias = Bias::new(&numbers, &[1100, 900], &case.shape).unwrap();
    let causal = Band { offset: -200, left: None, right: Some(0) };
    let spec = Spec { key_bias: Some(&key_bias), ..spec(&causal, &bias) };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| case.backward(case.inputs.qkv().unwrap().into(), &spec, Some(&bias)))
    };
    let one = run(1);
    assert!(one.q.iter().all(|x| x.is_finite()));
    for threads in [2, 3, 5, 8] {
        assert_eq!(run(threads), one, "{threads} threads");
    }
}

#[test]
fn what_a_pair_does_not_see_never_reaches_it() {
    for poison in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 31, 64, 127] {
            let mut case = Case::new(shape(130, 130));
            let hidden = |p: Pair| p.i != place && p.j != place;
            case.inputs.k_row(0, 0, place)[2] = poison;
            case.inputs.v_row(0, 0, place)[1] = poison;
            case.inputs.q_row(0, 1, place)[3] = poison;
            let d_v = case.shape.head_dim_v;
            case.grad_out[place * d_v] = poison;
            case.check("unseen", &spec(&Predicate(hidden), &Unchanged));
            let dropout = Some(Dropout::new(0.2, 1).unwrap());
            case.check("unseen", &Spec { dropout, ..spec(&Predicate(hidden), &Unchanged) });
            // Hidden by the bias alone.
            let n = 130;
            let bias: Vec<f32> = (0..n * n)
                .map(|x| if x / n == place { f32::NEG_INFINITY } else { (x as f32).sin() })
                .collect();
            let mut case = Case::new(shape(n, n));
            case.grad_out[place * d_v] = poison;
            case.check("bias", &spec(&SeeAll, &Bias::new(&bias, &[n, n], &case.shape).unwrap()));
        }
    }
}

#[test]
fn a_nan_stays_with_the_rows_that_see_it() {
    // A NaN query: its own dq is NaN, and dk, dv of the keys it sees; nothing else.
    let mut case = Case::new(AttnShape { n_heads_q: 1, ..shape(200, 200) });
    case.inputs.q_row(0, 0, 100)[0] = f32::NAN;
    let causal = Band { offset: 0, left: Some(20), right: Some(0) };
    let found = case.backward(case.inputs.qkv().unwrap().into(), &spec(&causal, &Unchanged), None);
    for (i, row) in found.q.chunks(9).enumerate() {
        assert_eq!(row.iter().any(|x| x.is_nan()), i == 100, "dq of row {i}");
    }
    for (j, (dk, dv)) in found.k.chunks(9).zip(found.v.chunks(5)).enumerate() {
        let seen = (80..=100).contains(&j);
        assert_eq!(dk.iter().chain(dv).any(|x| x.is_nan()), seen, "dk, dv of key {j}");
    }
}

/// Every block of queries sees its own scattered keys.
struct Scattered;

impl Mask for Scattered {
    fn sees(&self, p: Pair) -> bool {
        (p.j * 13 + p.i / 32 * 5 + p.head * 3).is_multiple_of(17) || (700..760).contains(&p.j)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let seen = (0..n_kv).filter(|j| rows.clone().any(|i| self.sees(head.pair(i, *j))));
        let mut spans: Vec<Range<usize>> = Vec::new();
        for j in seen {
            match spans.last_mut() {
                Some(span) if span.end == j => span.end += 1,
                _ => spans.push(j..j + 1),
            }
        }
        spans
    }
}

#[test]
fn single_keys_are_gathered() {
    let mut case = Case::new(AttnShape { n_heads_q: 4, n_heads_kv: 2, ..shape(100, 1500) });
    // Seen by nobody.
    let nobody = (0..1500)
        .find(|j| (0..100).all(|i| (0..4).all(|head| !Scattered.sees(Pair { batch: 0, head, i, j: *j }))));
    if let Some(j) = nobody {
        case.inputs.v_row(0, 0, j).fill(f32::NAN);
    }
    let key_bias: Vec<f32> = (0..1500).map(|j| (j as f32).cos()).collect();
    case.check("scattered", &spec(&Scattered, &Unchanged));
    case.check("scattered", &Spec { key_bias: Some(&key_bias), ..spec(&Scattered, &Unchanged) });
}

#[test]
fn parts_of_a_merged_result_add_up() {
    let case = Case::new(shape(90, 150));
    let causal = Band { offset: 60, left: None, right: Some(0) };
    let want = case.want(&spec(&causal, &Unchanged), None);
    let (near, far) = (And(causal, KeysBelow(70)), And(causal, Predicate(|p: Pair| p.j >= 70)));
    let problem = || case.inputs.qkv().unwrap().into();
    let (mut out, mut lse) = case.forward(problem(), &spec(&near, &Unchanged));
    let part = case.forward(problem(), &spec(&far, &Unchanged));
    merge_into(&mut out, &mut lse, &part.0, &part.1).unwrap();
    let rows = out.chunks(5).zip(case.grad_out.chunks(5)).zip(&case.grad_lse);
    let delta: Vec<f32> =
        rows.map(|((o, g), l)| o.iter().zip(g).map(|(o, g)| o * g).sum::<f32>() - l).collect();
    let state = RowState { lse: &lse, delta: &delta, grad_out: case.grad_out() };
    let of = |mask: &dyn Mask| {
        let spec = spec(mask, &Unchanged);
        case.collect(&spec, None, |grads| attend_backward_from_delta_any(problem(), state, grads, &spec))
    };
    let (a, b) = (of(&near), of(&far));
    for (name, a, b, want) in [("dq", a.q, b.q, want.q), ("dk", a.k, b.k, want.k), ("dv", a.v, b.v, want.v)] {
        let sum: Vec<f32> = a.iter().zip(b).map(|(a, b)| a + b).collect();
        assert_close(name, &sum, &want, TOL);
    }
}

#[test]
fn gradients_are_finite_differences_of_the_definition() {
    let case = Case::new(AttnShape { n_heads_q: 2, ..shape(6, 8) });
    let s = case.shape;
    let causal = Band { offset: 2, left: None, right: Some(0) };
    let spec = spec(&causal, &Unchanged);
    let found = case.backward(case.inputs.qkv().unwrap().into(), &spec, None);
    let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<f64>>();
    // Values enter linearly and the definition takes f32 inputs: steps that f32 holds exactly.
    let loss = |at: &[Vec<f64>]| {
        let narrow = |x: &[f64]| x.iter().map(|x| *x as f32).collect::<Vec<f32>>();
        let [q, k, v] = [narrow(&at[0]), narrow(&at[1]), narrow(&at[2])];
        let view = |data, axes| View::contiguous("x", data, axes).unwrap();
        let x = attn_core::Qkv::new(view(&q, s.q()), view(&k, s.k()), view(&v, s.v())).unwrap();
        let exact =
            Exact { softmax_scale: Some(f64::from(spec.softmax_scale)), mask: &causal, ..Exact::default() };
        let got = exact.all(&x).unwrap();
        let of_out = got.out.iter().zip(&case.grad_out).map(|(o, g)| o * f64::from(*g)).sum::<f64>();
        let lse = got.lse.unwrap();
        of_out + lse.iter().zip(&case.grad_lse).map(|(l, g)| l * f64::from(*g)).sum::<f64>()
    };
    let point = [wide(&case.inputs.q), wide(&case.inputs.k), wide(&case.inputs.v)];
    let gradients = [wide(&found.q), wide(&found.k), wide(&found.v)];
    let claims: Vec<Claim<'_>> = ["q", "k", "v"]
        .into_iter()
        .zip(point.iter().zip(&gradients))
        .map(|(name, (at, gradient))| Claim { name, at, gradient })
        .collect();
    let check = GradientCheck { step: 2f64.powi(-6), tol: Tol::ScaledMax(2e-5), ..GradientCheck::default() };
    check.check(loss, &claims).unwrap();
}

fn check_storage<E: Element>(layout: Layout, tol: f64) {
    let shape = AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, ..shape(300, 290) };
    let mut case = Case::new(shape);
    let round = |x: &mut Vec<f32>| x.iter_mut().for_each(|x| *x = E::store(*x).load());
    for numbers in [&mut case.inputs.q, &mut case.inputs.k, &mut case.inputs.v, &mut case.grad_out] {
        round(numbers);
    }
    let causal = Band { offset: -10, left: None, right: Some(0) };
    let spec = spec(&causal, &Unchanged);
    let want = case.want(&spec, None);
    let stored = case.inputs.store::<E>(layout);
    let problem = stored.qkv().unwrap();
    // The forward pass of the same numbers in f32: only the backward pass is judged.
    let (out, lse) = case.forward(case.inputs.qkv().unwrap().into(), &spec);
    let grad_out = StoredTensor::<E>::from_rows(&case.grad_out, shape.out(), layout);
    let grads =
        [shape.q(), shape.k(), shape.v()].map(|axes| StoredTensor::<E>::filled(axes, layout, f32::NAN));
    let [mut q, mut k, mut v] = grads;
    let view: TensorView<'_> = View::contiguous("out", &out, shape.out()).unwrap().into();
    let grad = OutputGrad { out: grad_out.view("grad_out").unwrap().into(), lse: Some(&case.grad_lse) };
    let buffers = Grads::new(
        q.view_mut("q").unwrap().into(),
        k.view_mut("k").unwrap().into(),
        v.view_mut("v").unwrap().into(),
    );
    attend_backward_any(problem.into(), ForwardResult { out: view, lse: &lse }, grad, buffers, &spec)
        .unwrap();
    for (name, got, want) in [("dq", q, want.q), ("dk", k, want.k), ("dv", v, want.v)] {
        let what = format!("{name} {layout:?} {:?}", E::DTYPE);
        assert_close(&what, &got.to_rows(), &want, Tol::ScaledMax(tol));
        assert!(got.gaps_hold(f32::NAN), "{what}: gaps");
    }
}

#[test]
fn every_storage_order_and_type_is_read_and_written() {
    for layout in Layout::ALL {
        check_storage::<f32>(layout, 4e-6);
        check_storage::<bf16>(layout, 4e-6 + bf16::DTYPE.roundoff());
        check_storage::<f16>(layout, 4e-6 + f16::DTYPE.roundoff());
    }
}

#[test]
fn what_does_not_fit_is_refused_and_nothing_is_written() {
    let case = Case::new(shape(4, 6));
    let (mut q, mut k, mut v) = (vec![7.0f32; 72], vec![7.0f32; 54], vec![7.0f32; 30]);
    let x = case.inputs.qkv().unwrap();
    let (out, lse) = case.forward(x.into(), &spec(&SeeAll, &Unchanged));
    let s = case.shape;
    let mut error =
        |problem: Problem<'_>, lse: &[f32], change: &mut dyn FnMut(&mut Grads<'_>), fixed: bool| {
            fn view<'a>(data: &'a mut [f32], axes: [usize; 4]) -> attn_core::OutMut<'a> {
                attn_core::ViewMut::contiguous("grad", data, axes).unwrap().into()
            }
            let mut grads = Grads::new(view(&mut q, s.q()), view(&mut k, s.k()), view(&mut v, s.v()));
            change(&mut grads);
            let forward = ForwardResult { out: View::contiguous("out", &out, s.out()).unwrap().into(), lse };
            let grad = OutputGrad { out: case.grad_out(), lse: None };
            let closure = ScoreFn(|score: f32, _: Pair| score);
            let spec = if fixed { spec(&SeeAll, &Unchanged) } else { spec(&SeeAll, &closure) };
            attend_backward_any(problem, forward, grad, grads, &spec).unwrap_err().to_string()
        };
    let mut nothing = |_: &mut Grads<'_>| {};
    let no_slope = error(x.into(), &lse, &mut nothing, false);
    assert!(no_slope.contains("score mod without derivative"), "{no_slope}");
    let short = error(x.into(), &lse[1..], &mut nothing, true);
    assert!(short.contains("lse: rows is 7, expected 8"), "{short}");
    let cached = Problem::cached(*x.q(), *x.k(), KvView::from(*x.v()), Some(&[5])).unwrap();
    let cached = error(cached, &lse, &mut nothing, true);
    assert!(cached.contains("cache"), "{cached}");
    let mut sinks = [0.0; 2];
    let none = error(x.into(), &lse, &mut |grads| grads.sinks = Some(sinks_of(&mut sinks)), true);
    assert!(none.contains("grad_sinks"), "{none}");
    assert!(q.iter().chain(&k).chain(&v).all(|x| *x == 7.0));
}

/// A gradient that outlives the call.
fn sinks_of(sinks: &mut [f32; 2]) -> &'static mut [f32] {
    sinks.to_vec().leak()
}
