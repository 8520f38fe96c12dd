//! The indexer's loss against its formula in f64, and its gradients against finite differences.

use super::golden::run;
use super::promises::{parse, tensors};
use attn_core::registry::NamedTensor;
use attn_core::{AttnShape, View};
use attn_sparse::{Dsa, DsaInputs, IndexTarget};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::gradient::{Claim, GradientCheck};
use attn_testkit::inputs::Problem;

/// Index heads and channels.
const HEADS: usize = 3;
const WIDTH: usize = 5;

struct Case {
    problem: Problem,
    index_q: Vec<f32>,
    index_k: Vec<f32>,
    index_w: Vec<f32>,
    grad_loss: Vec<f32>,
}

fn numbers(n: usize, seed: f32) -> Vec<f32> {
    (0..n).map(|at| ((at as f32 + seed) * 0.731 + (at * at) as f32 * 0.013).sin()).collect()
}

impl Case {
    fn new() -> Self {
        let shape = AttnShape { batch: 2, n_heads_kv: 2, n_q: 9, ..AttnShape::square(4, 14, 6) };
        Self {
            problem: Problem::normal(shape, 3),
            index_q: numbers(2 * HEADS * 9 * WIDTH, 1.0),
            index_k: numbers(2 * 14 * WIDTH, 2.0),
            index_w: numbers(2 * HEADS * 9, 3.0),
            grad_loss: numbers(2 * 9, 4.0),
        }
    }

    fn index(&self) -> DsaInputs<'_> {
        let view = |name: &'static str, data, axes| View::contiguous(name, data, axes).unwrap();
        DsaInputs {
            index_q: view("index_q", &self.index_q, [2, HEADS, 9, WIDTH]).into(),
            index_k: view("index_k", &self.index_k, [2, 1, 14, WIDTH]).into(),
            index_w: &self.index_w,
        }
    }
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

fn softmax(scores: &[f64]) -> Vec<f64> {
    let sum: f64 = scores.iter().map(|x| x.exp()).sum();
    scores.iter().map(|x| x.exp() / sum).collect()
}

/// Index scores of the keys that a query sees.
fn scores(at: &[Vec<f64>], batch: usize, i: usize) -> Vec<f64> {
    let [index_q, index_k, index_w] = at else { panic!("three inputs") };
    let score = |j: usize| -> f64 {
        let of_head = |h: usize| {
            let row = (batch * HEADS + h) * 9 + i;
            let q = &index_q[row * WIDTH..][..WIDTH];
            let k = &index_k[(batch * 14 + j) * WIDTH..][..WIDTH];
            index_w[row] * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>().max(0.0)
        };
        (0..HEADS).map(of_head).sum()
    };
    (0..i + 6).map(score).collect()
}

/// The divergence of every query; `kept` says which keys take part.
fn losses(case: &Case, at: &[Vec<f64>], kept: &[Vec<usize>]) -> Vec<f64> {
    let s = case.problem.shape;
    let (q, k) = (wide(&case.problem.q), wide(&case.problem.k));
    let mut all = Vec::new();
    for (row, kept) in kept.iter().enumerate() {
        let (batch, i) = (row / 9, row % 9);
        let mut target = vec![0.0; kept.len()];
        for head in 0..4 {
            let q = &q[((batch * 4 + head) * 9 + i) * 6..][..6];
            let score = |j: &usize| {
                let k = &k[((batch * 2 + s.kv_head(head)) * 14 + j) * 6..][..6];
                q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / 6f64.sqrt()
            };
            let weights = softmax(&kept.iter().map(score).collect::<Vec<f64>>());
            target.iter_mut().zip(weights).for_each(|(sum, p)| *sum += p / 4.0);
        }
        let scores = scores(at, batch, i);
        let indexed = softmax(&kept.iter().map(|j| scores[*j]).collect::<Vec<f64>>());
        all.push(target.iter().zip(indexed).map(|(p, q)| p * (p.ln() - q.ln())).sum());
    }
    all
}

/// The keys that take part, by sorting.
fn kept(at: &[Vec<f64>], top_k: usize) -> Vec<Vec<usize>> {
    let row = |row: usize| {
        let scores = scores(at, row / 9, row % 9);
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        order.truncate(top_k);
        order.sort_unstable();
        order
    };
    (0..18).map(row).collect()
}

#[test]
fn the_indexer_is_pulled_towards_the_attention() {
    let case = Case::new();
    let x = case.problem.qkv().unwrap();
    let at = [wide(&case.index_q), wide(&case.index_k), wide(&case.index_w)];
    for (target, top_k) in
        [(IndexTarget::Visible, 4), (IndexTarget::Selected, 4), (IndexTarget::Selected, 100)]
    {
        let dsa = Dsa { top_k, index_dim: None };
        let got = dsa.train_indexer(&x, &case.index(), target, None, Some(&case.grad_loss)).unwrap();
        let kept = kept(&at, if target == IndexTarget::Visible { 100 } else { top_k });
        let want = losses(&case, &at, &kept);
        assert!(want.iter().all(|loss| *loss > 1e-4), "the two distributions differ");
        assert_close(
            &format!("{target:?} of {top_k}"),
            &got.loss,
            &want,
            Tol::AllClose { atol: 2e-6, rtol: 2e-5 },
        );

        let [by_q, by_k, by_w] = [wide(&got.index_q), wide(&got.index_k), wide(&got.index_w)];
        let claims = [
            Claim { name: "index_q", at: &at[0], gradient: &by_q },
            Claim { name: "index_k", at: &at[1], gradient: &by_k },
            Claim { name: "index_w", at: &at[2], gradient: &by_w },
        ];
        let weights = wide(&case.grad_loss);
        let total = |at: &[Vec<f64>]| losses(&case, at, &kept).iter().zip(&weights).map(|(l, w)| l * w).sum();
        // Small steps: relu has corners.
        let check = GradientCheck { tol: Tol::ScaledMax(2e-5), step: 1e-5, ..GradientCheck::default() };
        check.check(total, &claims).unwrap_or_else(|error| panic!("{target:?} of {top_k}: {error}"));

        // Without weights every query counts once.
        let plain = dsa.train_indexer(&x, &case.index(), target, None, None).unwrap();
        let ones = dsa.train_indexer(&x, &case.index(), target, None, Some(&[1.0; 18])).unwrap();
        assert_eq!(plain, ones);
        assert_ne!(plain.index_q, got.index_q);
    }
}

#[test]
fn an_indexer_that_follows_its_gradient_comes_closer() {
    let mut case = Case::new();
    let dsa = Dsa { top_k: 6, index_dim: None };
    let total = |case: &Case| -> f32 {
        let x = case.problem.qkv().unwrap();
        dsa.train_indexer(&x, &case.index(), IndexTarget::Visible, None, None).unwrap().loss.iter().sum()
    };
    let before = total(&case);
    for _ in 0..60 {
        let x = case.problem.qkv().unwrap();
        let grads = dsa.train_indexer(&x, &case.index(), IndexTarget::Visible, None, None).unwrap();
        let step = |x: &mut Vec<f32>, grad: &[f32]| x.iter_mut().zip(grad).for_each(|(x, g)| *x -= 0.1 * g);
        step(&mut case.index_q, &grads.index_q);
        step(&mut case.index_k, &grads.index_k);
        step(&mut case.index_w, &grads.index_w);
    }
    let after = total(&case);
    assert!(after < 0.5 * before, "{before} falls to {after} only");
}

#[test]
fn the_runner_gives_losses_and_gradients_by_name() {
    let case = Case::new();
    let mut given = tensors(&case.problem);
    for (name, axes, data) in [
        ("index_q", vec![2, HEADS, 9, WIDTH], &case.index_q),
        ("index_k", vec![2, 14, WIDTH], &case.index_k),
        ("index_w", vec![2, HEADS, 9], &case.index_w),
        ("grad_indexer_loss", vec![2, 9], &case.grad_loss),
    ] {
        given.0.insert(name.into(), NamedTensor::f32(name, &axes, data.clone()).unwrap());
    }
    let x = case.problem.qkv().unwrap();
    for (options, target) in
        [("top_k=4", IndexTarget::Selected), ("top_k=4 indexer_target=visible", IndexTarget::Visible)]
    {
        let dsa = Dsa { top_k: 4, index_dim: None };
        let want = dsa.train_indexer(&x, &case.index(), target, None, Some(&case.grad_loss)).unwrap();
        let got = run("dsa", &parse(options), &given);
        for (name, want, like) in [
            ("indexer_loss", want.loss, "grad_indexer_loss"),
            ("grad.index_q", want.index_q, "index_q"),
            ("grad.index_k", want.index_k, "index_k"),
            ("grad.index_w", want.index_w, "index_w"),
        ] {
            let got = got.require(name).unwrap();
            assert_eq!(got.shape, given.require(like).unwrap().shape, "{name}");
            assert_eq!(got.data.to_f64(), wide(&want), "{name} with {options}");
        }
    }
    given.0.remove("grad_indexer_loss");
    assert!(run("dsa", &parse("top_k=4"), &given).get("indexer_loss").is_none());
}

#[test]
fn what_does_not_fit_is_refused() {
    let case = Case::new();
    let x = case.problem.qkv().unwrap();
    let train = |dsa: Dsa, index: &DsaInputs<'_>, grad: Option<&[f32]>| {
        let done = dsa.train_indexer(&x, index, IndexTarget::Selected, None, grad);
        done.map(drop).map_err(|error| error.to_string())
    };
    let dsa = Dsa { top_k: 4, index_dim: None };
    assert_eq!(train(dsa, &case.index(), None), Ok(()));
    assert!(train(Dsa { top_k: 0, ..dsa }, &case.index(), None).unwrap_err().contains("top_k"));
    assert!(train(dsa, &case.index(), Some(&[1.0; 3])).unwrap_err().contains("grad_loss"));
    let short = DsaInputs { index_w: &case.index_w[1..], ..case.index() };
    assert!(train(dsa, &short, None).unwrap_err().contains("index_w"));
}
