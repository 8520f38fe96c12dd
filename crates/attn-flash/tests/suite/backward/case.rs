//! A problem with the gradients of its outputs: run, and compared with gradients in f64.

use attn_core::exact::Exact;
use attn_core::mask::{Mask, Pair};
use attn_core::score::{BiasIndex, ScoreMod};
use attn_core::simd::{Isa, with_isa};
use attn_core::{AttnShape, OutMut, TensorView, View, ViewMut};
use attn_flash::engine::{ForwardResult, Grads, OutputGrad, Problem, Spec, attend_any, attend_backward_any};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs;

pub(crate) const SCALE: f32 = 0.3;

/// Trait objects: one kernel for all masks and score functions, else this file compiles for minutes.
pub(crate) type DynSpec<'a> = Spec<'a, dyn Mask + 'a, dyn ScoreMod + 'a>;

pub(crate) fn spec<'a>(mask: &'a dyn Mask, score_mod: &'a dyn ScoreMod) -> DynSpec<'a> {
    Spec::new(SCALE, mask, score_mod)
}

/// Inputs, and the gradients of output and log-sum-exp.
pub(crate) struct Case {
    pub(crate) shape: AttnShape,
    pub(crate) inputs: inputs::Problem,
    pub(crate) grad_out: Vec<f32>,
    pub(crate) grad_lse: Vec<f32>,
}

/// Gradients, row-major.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Found {
    pub(crate) q: Vec<f32>,
    pub(crate) k: Vec<f32>,
    pub(crate) v: Vec<f32>,
    pub(crate) sinks: Vec<f32>,
    pub(crate) key_bias: Vec<f32>,
    pub(crate) bias: Vec<f32>,
    pub(crate) gamma_q: Vec<f32>,
    pub(crate) gamma_k: Vec<f32>,
}

impl Case {
    pub(crate) fn new(shape: AttnShape) -> Self {
        let more = inputs::Problem::normal(AttnShape { n_kv: 1, head_dim: shape.head_dim_v, ..shape }, 77);
        let grad_lse = (0..shape.rows()).map(|x| ((x * 7 % 11) as f32 - 5.0) / 10.0).collect();
        Self { shape, inputs: inputs::Problem::normal(shape, 5), grad_out: more.q, grad_lse }
    }

    pub(crate) fn grad_out(&self) -> TensorView<'_> {
        View::contiguous("grad_out", &self.grad_out, self.shape.out()).unwrap().into()
    }

    pub(crate) fn forward(&self, problem: Problem<'_>, spec: &DynSpec<'_>) -> (Vec<f32>, Vec<f32>) {
        let mut out = vec![f32::NAN; self.shape.out().iter().product()];
        let mut lse = vec![f32::NAN; self.shape.rows()];
        let view = ViewMut::contiguous("out", &mut out, self.shape.out()).unwrap();
        attend_any(problem, view.into(), Some(&mut lse), spec).unwrap();
        (out, lse)
    }

    pub(crate) fn backward(
        &self,
        problem: Problem<'_>,
        spec: &DynSpec<'_>,
        bias: Option<&dyn BiasIndex>,
    ) -> Found {
        let (out, lse) = self.forward(problem, spec);
        let out = View::contiguous("out", &out, self.shape.out()).unwrap().into();
        let forward = ForwardResult { out, lse: &lse };
        let grad = OutputGrad { out: self.grad_out(), lse: Some(&self.grad_lse) };
        self.collect(spec, bias, |grads| attend_backward_any(problem, forward, grad, grads, spec))
    }

    /// Buffers full of NaN, so that a row nobody writes is seen.
    pub(crate) fn collect(
        &self,
        spec: &DynSpec<'_>,
        bias: Option<&dyn BiasIndex>,
        run: impl FnOnce(Grads<'_>) -> attn_core::Result<()>,
    ) -> Found {
        let nan = |len: usize| vec![f32::NAN; len];
        let of = |axes: [usize; 4]| nan(axes.iter().product());
        let s = &self.shape;
        let gammas = spec.qk_norm.map(|norm| [norm.gamma_q, norm.gamma_k]);
        let [gamma_q, gamma_k] = gammas.unwrap_or_default();
        let mut found = Found {
            q: of(s.q()),
            k: of(s.k()),
            v: of(s.v()),
            sinks: nan(spec.sinks.map_or(0, <[f32]>::len)),
            key_bias: nan(spec.key_bias.map_or(0, <[f32]>::len)),
            bias: nan(bias.map_or(0, |bias| bias.len())),
            gamma_q: nan(gamma_q.map_or(0, <[f32]>::len)),
            gamma_k: nan(gamma_k.map_or(0, <[f32]>::len)),
        };
        fn view<'a>(name: &str, data: &'a mut [f32], axes: [usize; 4]) -> OutMut<'a> {
            ViewMut::contiguous(name, data, axes).unwrap().into()
        }
        run(Grads {
            sinks: spec.sinks.map(|_| &mut *found.sinks),
            key_bias: spec.key_bias.map(|_| &mut *found.key_bias),
            bias: bias.map(|bias| (bias, &mut *found.bias)),
            gamma_q: gamma_q.map(|_| &mut *found.gamma_q),
            gamma_k: gamma_k.map(|_| &mut *found.gamma_k),
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
    pub(crate) fn check(&self, what: &str, spec: &DynSpec<'_>) {
        self.check_bias(what, spec, None);
    }

    /// Also the gradient of the bias with which the score mod ends.
    pub(crate) fn check_bias(&self, what: &str, spec: &DynSpec<'_>, bias: Option<&dyn BiasIndex>) {
        let want = self.want(spec, bias);
        for isa in Isa::available() {
            let problem = self.inputs.qkv().unwrap().into();
            let found = with_isa(isa, || self.backward(problem, spec, bias)).unwrap();
            found.assert_close(&format!("{what} {:?} {isa}", self.shape), &want, TOL);
        }
    }

    pub(crate) fn want(&self, spec: &DynSpec<'_>, bias: Option<&dyn BiasIndex>) -> Want {
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
        let mut of_bias = vec![0.0; bias.map_or(0, |bias| bias.len())];
        let add = |pair: Pair, ds: f64| {
            if let Some(bias) = bias {
                of_bias[bias.index(pair)] += ds;
            }
            if let Some(sum) = key_bias.get_mut(pair.j) {
                *sum += ds;
            }
        };
        let grads = exact.backward(&x, &wide(&self.grad_out), Some(&wide(&self.grad_lse)), add).unwrap();
        Want {
            q: grads.q,
            k: grads.k,
            v: grads.v,
            sinks: grads.sinks.unwrap_or_default(),
            key_bias,
            bias: of_bias,
            gamma_q: grads.gamma_q.unwrap_or_default(),
            gamma_k: grads.gamma_k.unwrap_or_default(),
        }
    }
}

pub(crate) struct Want {
    pub(crate) q: Vec<f64>,
    pub(crate) k: Vec<f64>,
    pub(crate) v: Vec<f64>,
    pub(crate) sinks: Vec<f64>,
    pub(crate) key_bias: Vec<f64>,
    pub(crate) bias: Vec<f64>,
    pub(crate) gamma_q: Vec<f64>,
    pub(crate) gamma_k: Vec<f64>,
}

/// Of the largest element of each gradient.
pub(crate) const TOL: Tol = Tol::ScaledMax(4e-6);

impl Found {
    #[track_caller]
    pub(crate) fn assert_close(&self, what: &str, want: &Want, tol: Tol) {
        let all = [
            ("dq", &self.q, &want.q),
            ("dk", &self.k, &want.k),
            ("dv", &self.v, &want.v),
            ("dsinks", &self.sinks, &want.sinks),
            ("dkey_bias", &self.key_bias, &want.key_bias),
            ("dgamma_q", &self.gamma_q, &want.gamma_q),
            ("dgamma_k", &self.gamma_k, &want.gamma_k),
        ];
        for (name, got, want) in all {
            assert_close(&format!("{what}: {name}"), got, want, tol);
        }
        // An element that many pairs read is a sum of many terms that nearly cancel.
        assert_close(&format!("{what}: dbias"), &self.bias, &want.bias, Tol::ScaledMax(3e-5));
    }
}
