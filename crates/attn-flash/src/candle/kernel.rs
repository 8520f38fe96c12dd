//! One call of attention on tensors, ready to run forwards and backwards.

use super::numbers::as_slice;
use crate::FlashCall;
use crate::engine::{ForwardResult, Grads, OutputGrad, Problem};
use attn_core::candle::QkvOp;
use attn_core::candle::candle_core::Tensor;
use attn_core::mask::Mask;
use attn_core::score::{Alibi, Bias, ScoreMod, Then};
use attn_core::{AttnError, AttnShape, OutMut, Qkv, QkvGrads, Result, Saved, TensorView};
use std::sync::Arc;

/// Prefix sums of packed sequences, with the names that errors call them.
#[derive(Debug, Clone)]
pub(super) struct Lengths {
    pub(super) q: Vec<i32>,
    pub(super) kv: Vec<i32>,
    pub(super) names: [&'static str; 2],
}

/// A call and the tensors that come with it; all but `call` are f32, contiguous, on the CPU.
#[derive(Debug)]
pub(super) struct Kernel<M, C> {
    pub(super) call: Arc<FlashCall<'static, M, C>>,
    /// `[n_heads_q]` or `[batch, n_heads_q]`.
    pub(super) slopes: Option<Vec<f32>>,
    pub(super) bias: Option<Tensor>,
    pub(super) sinks: Option<Tensor>,
    pub(super) lengths: Option<Lengths>,
}

/// The numbers of a tensor and its axes.
pub(super) type Numbers<'a> = (&'a [f32], &'a [usize]);

/// Numbers that may have gradients.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Extras<'a> {
    pub(super) bias: Option<Numbers<'a>>,
    pub(super) sinks: Option<Numbers<'a>>,
}

/// Gradients of [`Extras`], where asked for.
#[derive(Debug, Default)]
pub(super) struct ExtraGrads<'a> {
    pub(super) bias: Option<&'a mut [f32]>,
    pub(super) sinks: Option<&'a mut [f32]>,
}

/// The user's call with slopes and a bias behind its score mods.
type Ready<'a, M, C> = FlashCall<'a, &'a M, Then<Then<&'a C, Option<&'a Alibi>>, Option<Bias<'a>>>>;

impl<M: Mask, C: ScoreMod> Kernel<M, C> {
    /// Lends the tensors that were given with the call; `instead` goes before them.
    pub(super) fn with_extras<R>(
        &self,
        instead: Extras<'_>,
        run: impl FnOnce(Extras<'_>) -> Result<R>,
    ) -> Result<R> {
        let (bias, sinks) =
            [&self.bias, &self.sinks].map(|t| t.as_ref().map(Tensor::storage_and_layout)).into();
        let bias = bias.as_ref().map(|(storage, at)| Ok((as_slice(storage, at)?, at.dims()))).transpose()?;
        let sinks =
            sinks.as_ref().map(|(storage, at)| Ok((as_slice(storage, at)?, at.dims()))).transpose()?;
        run(Extras { bias: instead.bias.or(bias), sinks: instead.sinks.or(sinks) })
    }

    pub(super) fn forward(
        &self,
        x: Qkv<'_>,
        extras: Extras<'_>,
        out: OutMut<'_>,
        lse: Option<&mut [f32]>,
    ) -> Result<()> {
        self.with_call(x, extras, |problem, call, _| call.forward(problem, out, lse))
    }

    pub(super) fn backward(
        &self,
        x: Qkv<'_>,
        extras: Extras<'_>,
        forward: ForwardResult<'_>,
        grad: OutputGrad<'_>,
        (grads, extra): (QkvGrads<'_>, ExtraGrads<'_>),
    ) -> Result<()> {
        grads.check(&x)?;
        self.with_call(x, extras, |problem, call, bias| {
            let grads = Grads {
                sinks: extra.sinks,
                bias: bias.zip(extra.bias).map(|(index, grad)| (index as _, grad)),
                ..Grads::new(grads.q, grads.k, grads.v)
            };
            call.backward(problem, forward, grad, grads)
        })
    }

    fn with_call<'a, R>(
        &'a self,
        x: Qkv<'a>,
        extras: Extras<'a>,
        run: impl FnOnce(Problem<'a>, Ready<'_, M, C>, Option<&Bias<'a>>) -> Result<R>,
    ) -> Result<R> {
        let problem = match &self.lengths {
            None => Problem::batch(x),
            Some(Lengths { q, kv, names }) => Problem::packed(x, q, kv).map_err(|e| renamed(e, *names))?,
        };
        let shape = longest(&problem);
        let alibi = self.slopes.as_ref().map(|slopes| {
            let offsets = self.call.offsets(&problem);
            Alibi::with_offsets(slopes.clone(), &shape, &offsets)
        });
        let alibi = alibi.transpose()?;
        let bias = extras.bias.map(|(data, axes)| Bias::new(data, axes, &shape)).transpose()?;
        let mut call = self.call.by_ref().score_mod(alibi.as_ref()).score_mod(bias);
        if let Some((sinks, axes)) = extras.sinks {
            if axes != [shape.n_heads_q] {
                let expected = format!("({}), one a query head", shape.n_heads_q);
                return Err(AttnError::value("sinks' shape", format!("{axes:?}"), expected));
            }
            call = call.sinks(sinks);
        }
        run(problem, call, bias.as_ref())
    }
}

/// What masks and score mods see: a sequence for each batch entry, lengths that all of them fit in.
fn longest(problem: &Problem<'_>) -> AttnShape {
    let sequences = 0..problem.n_sequences();
    let longest = |len: &dyn Fn(usize) -> usize| sequences.clone().map(len).max().unwrap_or(0);
    AttnShape {
        batch: sequences.len(),
        n_q: longest(&|s| problem.q_range(s).len()),
        n_kv: longest(&|s| problem.kv_range(s).len()),
        ..problem.shape()
    }
}

/// Errors of [`Problem::packed`] with the caller's names for its arguments.
fn renamed(error: AttnError, [q, kv]: [&str; 2]) -> AttnError {
    let name = |name: String| name.replace("cu_seqlens_kv", kv).replace("cu_seqlens_q", q);
    match error {
        AttnError::Value { name: argument, found, expected } => {
            AttnError::Value { name: name(argument), found, expected: name(expected) }
        }
        AttnError::Shape { tensor, axis, found, expected } => {
            AttnError::Shape { tensor: name(tensor), axis, found, expected: name(expected) }
        }
        other => other,
    }
}

impl<M: Mask + Send + 'static, C: ScoreMod + Send + 'static> QkvOp for Kernel<M, C> {
    fn name(&self) -> &'static str {
        "flash"
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>, tracked: bool) -> Result<Option<Saved>> {
        self.with_extras(Extras::default(), |extras| {
            let mut lse = tracked.then(|| vec![0.0; x.shape().rows()]);
            Kernel::forward(self, x, extras, out, lse.as_deref_mut())?;
            Ok(lse.map(Saved::new))
        })
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        self.with_extras(Extras::default(), |extras| {
            let forward = ForwardResult { out, lse: saved.get::<Vec<f32>>()? };
            let grad = OutputGrad { out: grad_out, lse: None };
            Kernel::backward(self, x, extras, forward, grad, (grads, ExtraGrads::default()))
        })
    }
}
