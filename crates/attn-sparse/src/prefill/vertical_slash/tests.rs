//! Lines in two parts against the definition.

use super::cut::Cut;
use super::forward::in_parts;
use super::lines::Sets;
use super::*;
use crate::SparseAttention;
use attn_core::exact::{Exact, Reference};
use attn_core::mask::{Mask, Pair};
use attn_core::{Attention, DType, Element, Qkv, SoftmaxAttention, View, ViewMut};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs::Problem;
use attn_testkit::masks::assert_consistent;
use half::bf16;

/// Keys and distances of a head, both with runs and single ones.
fn lists(n: usize, seed: usize) -> (Vec<usize>, Vec<usize>) {
    let some = |every: usize| (0..n).filter(move |x| (x * x + seed * x) % every < 3 || x % 29 < seed);
    (some(23).collect(), some(17).collect())
}

fn lines(shape: &AttnShape, batch: usize) -> Lines {
    let heads = (0..batch * shape.n_heads_q).map(|list| lists(shape.n_kv, list));
    Lines::new(shape, batch, heads.collect()).unwrap()
}

/// Every `every`-th run of distances is attended apart; 1 is all.
fn cut(lines: &Lines, n_kv: usize, every: usize) -> Cut {
    let cut = |sets: &Sets| {
        let apart: Vec<_> = sets.runs.iter().step_by(every).cloned().collect();
        (sets.without(n_kv, apart.clone()), apart)
    };
    Cut::of(lines, cut).unwrap()
}

fn truth(x: &Qkv<'_>, lines: &Lines, softmax_scale: f32) -> Reference {
    let softmax_scale = Some(f64::from(softmax_scale));
    Exact { softmax_scale, mask: lines, ..Exact::default() }.all(x).unwrap()
}

fn check<const W: usize>(shape: AttnShape, batch: usize, every: usize) {
    let (problem, lines) = (Problem::normal(shape, 3), lines(&shape, batch));
    let cut = cut(&lines, shape.n_kv, every);
    let x = problem.qkv().unwrap();
    let want = truth(&x, &lines, 0.3);
    let (mut out, mut lse) = (vec![f32::NAN; shape.rows() * shape.head_dim_v], vec![f32::NAN; shape.rows()]);
    let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
    in_parts::<W>(&lines, &cut, 0.3, x, view.into(), Some(&mut lse)).unwrap();
    let (what, tol): (String, _) =
        (format!("{shape:?}, every {every}"), Tol::AllClose { atol: 4e-6, rtol: 4e-6 });
    assert_close(&what, &out, &want.out, tol);
    assert_close(&format!("lse of {what}"), &lse, &want.lse.unwrap(), tol);
}

#[test]
fn parts_equal_the_definition() {
    for every in [1, 2, 3] {
        check::<64>(AttnShape::square(2, 130, 64), 1, every);
        check::<64>(AttnShape { batch: 2, n_heads_kv: 2, ..AttnShape::square(4, 67, 24) }, 2, every);
        check::<64>(
            AttnShape { n_q: 40, n_kv: 150, head_dim_v: 33, ..AttnShape::square(1, 0, 16) },
            1,
            every,
        );
        check::<128>(AttnShape { n_q: 90, n_kv: 50, ..AttnShape::square(2, 0, 128) }, 1, every);
        check::<128>(AttnShape { head_dim_v: 96, ..AttnShape::square(2, 70, 72) }, 1, every);
    }
}

#[test]
fn half_precision_is_rounded_once() {
    let shape = AttnShape { n_heads_kv: 1, ..AttnShape::square(2, 100, 20) };
    let round = |numbers: &[f32]| numbers.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>();
    let problem = Problem::normal(shape, 5);
    let [q, k, v] = [&problem.q, &problem.k, &problem.v].map(|numbers| round(numbers));
    let view = |data, shape| View::contiguous("rows", data, shape).unwrap();
    let x = Qkv::new(view(&q, shape.q()), view(&k, shape.k()), view(&v, shape.v())).unwrap();
    assert_eq!(x.dtype(), DType::Bf16);
    let lines = lines(&shape, 1);
    let want = truth(&x, &lines, 0.2);
    let mut out = vec![bf16::NAN; shape.rows() * 20];
    let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
    in_parts::<64>(&lines, &cut(&lines, 100, 2), 0.2, x, view.into(), None).unwrap();
    let out: Vec<f32> = out.into_iter().map(Element::load).collect();
    // Half a unit in the last of eight places.
    assert_close("out", &out, &want.out, Tol::AllClose { atol: 1e-6, rtol: 1.0 / 256.0 });
}

#[test]
fn what_remains_for_the_tiles_is_a_mask() {
    let shape = AttnShape { n_q: 60, n_kv: 77, ..AttnShape::square(2, 0, 8) };
    let lines = lines(&shape, 1);
    for every in [1, 2] {
        let cut = cut(&lines, shape.n_kv, every);
        assert_consistent(&cut.tiles, &shape);
        for (i, j, head) in (0..60).flat_map(|i| (0..77).flat_map(move |j| [(i, j, 0), (i, j, 1)])) {
            let pair = Pair { batch: 0, head, i, j };
            let distance = (i + 17).checked_sub(j).map(|d| d as u32);
            let apart = distance.is_some_and(|d| cut.apart[head].contains(&d));
            assert_eq!(lines.sees(pair), apart || cut.tiles.sees(pair));
            assert!(!(apart && cut.tiles.sees(pair)), "{pair:?} is attended twice");
        }
    }
}

/// Long enough for single distances to be worth taking apart.
#[test]
fn the_decider_takes_single_distances_apart_and_stays_right() {
    let shape = AttnShape::square(1, 1500, 64);
    let decider =
        VerticalSlash { num_vertical: 30, num_slash: 130, forced_slash: 60, ..VerticalSlash::default() };
    let problem = Problem::normal(shape, 1);
    let x = problem.qkv().unwrap();
    let attention = SparseAttention::new(decider);
    let decision = decider.decide(&x).unwrap();
    let crate::decider::Arrangement::ByLines(lines) = decision.arrangement() else { panic!("not by lines") };
    let apart = &Cut::cheapest(lines, &shape, 2.0).unwrap().apart[0];
    assert!(apart.len() > 40 && apart.iter().all(|d| *d >= 60), "{apart:?}");
    let want = attention.definition(&x).unwrap();
    let (mut out, mut lse) = (vec![0.0; 1500 * 64], vec![0.0; 1500]);
    let view = ViewMut::contiguous("out", &mut out, shape.out()).unwrap();
    attention.forward_with_lse(x, view.into(), &mut lse).unwrap();
    let tol = Tol::AllClose { atol: 3e-6, rtol: 3e-6 };
    assert_close("out", &out, &want.out, tol);
    assert_close("lse", &lse, &want.lse.unwrap(), tol);
}

#[test]
fn what_covers_everything_is_left_to_the_tiles() {
    let shape = AttnShape::square(1, 500, 64);
    let all = |n| (0..n).collect::<Vec<_>>();
    for (keys, distances) in
        [(all(500), vec![1, 9, 40]), (vec![3], all(500)), (vec![], vec![]), (all(9), vec![])]
    {
        let lines = Lines::new(&shape, 1, vec![(keys, distances)]).unwrap();
        assert!(Cut::cheapest(&lines, &shape, 2.0).is_none());
    }
    let lines = Lines::new(&shape, 1, vec![(vec![0], (0..500).step_by(40).collect())]).unwrap();
    assert!(Cut::cheapest(&lines, &shape, 2.0).is_some());
    assert!(Cut::cheapest(&lines, &shape, f64::INFINITY).is_none());
}
