//! The backward pass of the softmax engine against gradients in f64: masks, score mods, sizes, instruction sets, threads.

use attn_core::exact::Exact;
use attn_core::mask::{And, Band, DenseMask, Documents, KeysBelow, Mask, Or, Pair, Predicate, SeeAll};
use attn_core::score::{Alibi, Bias, ScoreFnWithDerivative, ScoreMod, SoftCap, Then, Unchanged};
use attn_core::simd::{Isa, with_isa};
use attn_core::{AttnShape, OutMut, TensorView, View, ViewMut};
use attn_flash::engine::{ForwardResult, Grads, OutputGrad, Problem, Spec, attend, attend_backward};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs;

const SCALE: f32 = 0.3;

/// Trait objects: one kernel for all masks and score functions, else this file compiles for minutes.
type DynSpec<'a> = Spec<'a, dyn Mask + 'a, dyn ScoreMod + 'a>;

fn spec<'a>(mask: &'a dyn Mask, score_mod: &'a dyn ScoreMod) -> DynSpec<'a> {
    Spec::new(SCALE, mask, score_mod)
}

/// Inputs, and the gradients of output and log-sum-exp.
struct Case {
    shape: AttnShape,
    inputs: inputs::Problem,
    grad_out: Vec<f32>,
    grad_lse: Vec<f32>,
}

/// Gradients, row-major.
#[derive(Debug, Clone, PartialEq)]
struct Found {
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    sinks: Vec<f32>,
    key_bias: Vec<f32>,
}

impl Case {
    fn new(shape: AttnShape) -> Self {
        let more = inputs::Problem::normal(AttnShape { n_kv: 1, head_dim: shape.head_dim_v, ..shape }, 77);
        let grad_lse = (0..shape.rows()).map(|x| ((x * 7 % 11) as f32 - 5.0) / 10.0).collect();
        Self { shape, inputs: inputs::Problem::normal(shape, 5), grad_out: more.q, grad_lse }
    }

    fn grad_out(&self) -> TensorView<'_> {
        View::contiguous("grad_out", &self.grad_out, self.shape.out()).unwrap().into()
    }

    fn forward(&self, problem: Problem<'_>, spec: &DynSpec<'_>) -> (Vec<f32>, Vec<f32>) {
        let mut out = vec![f32::NAN; self.shape.out().iter().product()];
        let mut lse = vec![f32::NAN; self.shape.rows()];
        let view = ViewMut::contiguous("out", &mut out, self.shape.out()).unwrap();
        attend(problem, view.into(), Some(&mut lse), spec).unwrap();
        (out, lse)
    }

    fn backward(&self, problem: Problem<'_>, spec: &DynSpec<'_>) -> Found {
        let (out, lse) = self.forward(problem, spec);
        let out = View::contiguous("out", &out, self.shape.out()).unwrap().into();
        let forward = ForwardResult { out, lse: &lse };
        let grad = OutputGrad { out: self.grad_out(), lse: Some(&self.grad_lse) };
        self.collect(spec, |grads| attend_backward(problem, forward, grad, grads, spec))
    }

    /// Buffers full of NaN, so that a row nobody writes is seen.
    fn collect(&self, spec: &DynSpec<'_>, run: impl FnOnce(Grads<'_>) -> attn_core::Result<()>) -> Found {
        let nan = |len: usize| vec![f32::NAN; len];
        let of = |axes: [usize; 4]| nan(axes.iter().product());
        let s = &self.shape;
        let mut found = Found {
            q: of(s.q()),
            k: of(s.k()),
            v: of(s.v()),
            sinks: nan(spec.sinks.map_or(0, <[f32]>::len)),
            key_bias: nan(spec.key_bias.map_or(0, <[f32]>::len)),
        };
        fn view<'a>(name: &str, data: &'a mut [f32], axes: [usize; 4]) -> OutMut<'a> {
            ViewMut::contiguous(name, data, axes).unwrap().into()
        }
        run(Grads {
            sinks: spec.sinks.map(|_| &mut *found.sinks),
            key_bias: spec.key_bias.map(|_| &mut *found.key_bias),
            ..Grads::new(
                view("q", &mut found.q, s.q()),
                view("k", &mut found.k, s.k()),
                view("v", &mut found.v, s.v()),
            )
        })
        .unwrap();
        found
    }

    /// On every instruction set, against f64.
    fn check(&self, what: &str, spec: &DynSpec<'_>) {
        let want = self.want(spec);
        for isa in Isa::available() {
            let problem = self.inputs.qkv().unwrap().into();
            let found = with_isa(isa, || self.backward(problem, spec)).unwrap();
            found.assert_close(&format!("{what} {:?} {isa}", self.shape), &want, TOL);
        }
    }

    fn want(&self, spec: &DynSpec<'_>) -> Want {
        let wide = |x: &[f32]| x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
        let sinks = spec.sinks.map(wide);
        let exact = Exact {
            softmax_scale: Some(f64::from(spec.softmax_scale)),
            mask: spec.mask,
            score_mod: spec.score_mod,
            key_bias: spec.key_bias,
            sinks: sinks.as_deref(),
            dropout: spec.dropout,
            qk_norm: spec.qk_norm,
        };
        let x = self.inputs.qkv().unwrap();
        let mut key_bias = vec![0.0; spec.key_bias.map_or(0, <[f32]>::len)];
        let add = |pair: Pair, ds: f64| {
            if let Some(sum) = key_bias.get_mut(pair.j) {
                *sum += ds;
            }
        };
        let grads = exact.backward(&x, &wide(&self.grad_out), Some(&wide(&self.grad_lse)), add).unwrap();
        Want { q: grads.q, k: grads.k, v: grads.v, sinks: grads.sinks.unwrap_or_default(), key_bias }
    }
}

struct Want {
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    sinks: Vec<f64>,
    key_bias: Vec<f64>,
}

/// Of the largest element of each gradient.
const TOL: Tol = Tol::ScaledMax(4e-6);

impl Found {
    #[track_caller]
    fn assert_close(&self, what: &str, want: &Want, tol: Tol) {
        let all = [
            ("dq", &self.q, &want.q),
            ("dk", &self.k, &want.k),
            ("dv", &self.v, &want.v),
            ("dsinks", &self.sinks, &want.sinks),
            ("dkey_bias", &self.key_bias, &want.key_bias),
        ];
        for (name, got, want) in all {
            assert_close(&format!("{what}: {name}"), got, want, tol);
        }
    }
}

fn shape(n_q: usize, n_kv: usize) -> AttnShape {
    AttnShape { batch: 1, n_heads_q: 2, n_heads_kv: 1, n_q, n_kv, head_dim: 9, head_dim_v: 5 }
}

#[test]
fn every_mask_at_every_tile_edge_equals_the_definition() {
    for (n_q, n_kv) in [(0, 3), (3, 0), (1, 1), (63, 65), (64, 64), (65, 257), (130, 129), (300, 40)] {
        let case = Case::new(shape(n_q, n_kv));
        let causal = Band { offset: n_kv as isize - n_q as isize, left: None, right: Some(0) };
        let check = |what: &str, mask: &dyn Mask| case.check(what, &spec(mask, &Unchanged));
        check("all", &SeeAll);
        check("causal", &causal);
        check("top-left", &Band { offset: 0, ..causal });
        check("window", &Band { left: Some(5), right: Some(3), ..causal });
        check("sinks", &And(causal, Or(KeysBelow(3), Band { left: Some(7), ..causal })));
        check("closure", &Predicate(|p: Pair| (p.i * 7 + p.j * 3 + p.head) % 5 < 2));
        check("nobody", &Predicate(|_| false));
        let seen: Vec<bool> = (0..n_q * n_kv).map(|x| x % 3 == 0 && (x / n_kv) % 4 != 1).collect();
        check("dense", &DenseMask::new(&seen, &[n_q, n_kv], &case.shape).unwrap());
    }
}

#[test]
fn every_width_equals_the_definition() {
    for (head_dim, head_dim_v) in [(1, 1), (8, 3), (16, 16), (40, 72), (64, 64), (128, 128)] {
        let case = Case::new(AttnShape { head_dim, head_dim_v, ..shape(70, 90) });
        case.check("all", &spec(&SeeAll, &Unchanged));
        case.check("causal", &spec(&Band { offset: 20, left: None, right: Some(0) }, &Unchanged));
    }
}

#[test]
fn several_blocks_and_groups_equal_the_definition() {
    // Blocks have 256 rows.
    for (n_q, n_kv) in [(600, 530), (257, 1000), (700, 90)] {
        let shape =
            AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, n_q, n_kv, head_dim: 8, head_dim_v: 8 };
        let case = Case::new(shape);
        case.check("all", &spec(&SeeAll, &Unchanged));
        let causal = Band { offset: n_kv as isize - n_q as isize, left: None, right: Some(0) };
        case.check("causal", &spec(&causal, &Unchanged));
        case.check("window", &spec(&Band { left: Some(100), ..causal }, &Unchanged));
        let ids = |n: usize| (0..n).map(|i| (i / 190) as i32).collect::<Vec<_>>();
        let documents = Documents::new(&ids(n_q), &ids(n_kv), &case.shape).unwrap();
        case.check("documents", &spec(&documents, &Unchanged));
    }
}

#[test]
fn score_mods_equal_the_definition() {
    let case = Case::new(shape(80, 150));
    let s = &case.shape;
    let causal = Band { offset: 70, left: None, right: Some(0) };
    let mut bias: Vec<f32> = (0..s.n_heads_q * s.n_q * s.n_kv).map(|x| (x as f32).sin()).collect();
    bias.iter_mut().step_by(11).for_each(|b| *b = f32::NEG_INFINITY);
    bias[5 * s.n_kv..6 * s.n_kv].fill(f32::NEG_INFINITY); // a row hidden by its bias alone
    let bias = Bias::new(&bias, &[s.n_heads_q, s.n_q, s.n_kv], s).unwrap();
    let cap = SoftCap::new(2.0).unwrap();
    case.check("softcap", &spec(&SeeAll, &cap));
    case.check("alibi", &spec(&causal, &Alibi::new(Alibi::default_slopes(2), s, 70).unwrap()));
    case.check("bias", &spec(&causal, &bias));
    case.check("cap then bias", &spec(&SeeAll, &Then(cap, bias)));
    let fades = ScoreFnWithDerivative(
        |score: f32, p: Pair| score * (1.0 + 0.1 * p.head as f32) + score * score * 0.05,
        |score: f32, p: Pair| 1.0 + 0.1 * p.head as f32 + score * 0.1,
    );
    case.check("closure", &spec(&causal, &fades));
}

#[test]
fn key_bias_and_sinks_have_gradients() {
    let case = Case::new(AttnShape { batch: 2, n_heads_q: 4, n_heads_kv: 2, ..shape(100, 300) });
    let mut key_bias: Vec<f32> = (0..300).map(|j| (j as f32).cos()).collect();
    key_bias[7] = f32::NEG_INFINITY;
    let sinks = [0.5, -1.0, 2.0, f32::NEG_INFINITY];
    let causal = Band { offset: 200, left: Some(150), right: Some(0) };
    for mask in [&SeeAll as &dyn Mask, &causal] {
        let plain = spec(mask, &Unchanged);
        case.check("key bias", &Spec { key_bias: Some(&key_bias), ..plain });
        case.check("sinks", &Spec { sinks: Some(&sinks), ..plain });
        let cap = SoftCap::new(3.0).unwrap();
        case.check("both", &Spec { key_bias: Some(&key_bias), sinks: Some(&sinks), ..spec(mask, &cap) });
    }
}
