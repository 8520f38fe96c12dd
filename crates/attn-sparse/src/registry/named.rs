//! Options and tensors of more than one value.

use crate::attention::{BiasGrad, SparseGrads};
use crate::{Decider, SparseAttention};
use attn_core::registry::{NamedTensor, NamedTensors, OptionSpec, Options, output_like};
use attn_core::score::BiasIndex;
use attn_core::{AttnError, Differentiable, QkvGrads, Result, SoftmaxAttention};
use std::ops::Range;
use std::str::FromStr;

/// An option with its default.
pub(super) const fn option(name: &'static str, default: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec { name, default, help }
}

/// Causal unless told otherwise.
pub(super) const CAUSAL: OptionSpec = option("causal", "true", "no key after the query (true|false)");

/// The comma-separated values of an option; none if it is not given. Brackets around them are allowed.
pub(super) fn list<T: FromStr>(options: &Options, name: &str) -> Result<Vec<T>> {
    let Some(text) = options.get::<String>(name)? else { return Ok(Vec::new()) };
    let values = text.trim().trim_matches(['[', ']']).split(',').map(str::trim);
    let value = |value: &str| {
        let wrong = |_| AttnError::value(format!("option `{name}`"), format!("`{text}`"), "numbers: 3,5,8");
        value.parse().map_err(wrong)
    };
    values.filter(|value| !value.is_empty()).map(value).collect()
}

/// The comma-separated ranges of an option: `4..20,40..48`.
pub(super) fn ranges(options: &Options, name: &str) -> Result<Vec<Range<usize>>> {
    let Some(text) = options.get::<String>(name)? else { return Ok(Vec::new()) };
    let one = |part: &str| {
        let wrong =
            || AttnError::value(format!("option `{name}`"), format!("`{text}`"), "ranges: 4..20,40..48");
        let (first, end) = part.split_once("..").ok_or_else(wrong)?;
        let number = |text: &str| text.trim().parse::<usize>().map_err(|_| wrong());
        Ok(number(first)?..number(end)?)
    };
    text.split(',').map(one).collect()
}

/// A bias that is learned: its tensor's name, and which pair reads which element.
pub(super) type Learned<'a> = (&'static str, &'a dyn BiasIndex);

/// Runs the variant on `q`, `k`, `v`: `o`, `lse`, and with `grad_o` the gradients of these, of the tensor `sinks` if it is
/// there, and of the learned bias.
pub(super) fn run<D: Decider>(
    attention: &SparseAttention<D>,
    tensors: &NamedTensors,
    learned: Option<Learned<'_>>,
) -> Result<NamedTensors> {
    let x = tensors.qkv()?;
    let shape = x.shape();
    let (mut given, mut out) = (NamedTensors::default(), output_like(&x));
    let mut lse = vec![f32::NAN; shape.rows()];
    attention.forward_with_lse(x, out.as_out()?, &mut lse)?;
    let [batch, heads, n_q, _] = shape.out();
    given.0.insert("lse".into(), NamedTensor::f32("lse", &[batch, heads, n_q], lse)?);
    if let Some(grad_o) = tensors.get("grad_o") {
        let like = |shape: [usize; 4]| NamedTensor::unwritten(&shape, x.dtype());
        let (mut q, mut k, mut v) = (like(shape.q()), like(shape.k()), like(shape.v()));
        let mut sinks = tensors.get("sinks").map(|sinks| vec![f32::NAN; sinks.shape.iter().product()]);
        let mut bias = learned.map(|(_, index)| vec![f32::NAN; index.len()]);
        let grads = SparseGrads {
            qkv: QkvGrads { q: q.as_out()?, k: k.as_out()?, v: v.as_out()? },
            sinks: sinks.as_deref_mut(),
            bias: learned.zip(bias.as_deref_mut()).map(|((_, index), grad)| BiasGrad { index, grad }),
        };
        let saved = attention.forward_saving(x, out.as_out()?)?;
        attention.backward_all(x, out.view("o")?, &saved, grad_o.view("grad_o")?, grads)?;
        for (name, grad) in [("grad.q", q), ("grad.k", k), ("grad.v", v)] {
            given.0.insert(name.into(), grad);
        }
        for (name, grad) in [("sinks", sinks), (learned.map_or("", |(name, _)| name), bias)] {
            if let Some(grad) = grad {
                let axes = &tensors.require(name)?.shape;
                given.0.insert(format!("grad.{name}"), NamedTensor::f32(name, axes, grad)?);
            }
        }
    }
    given.0.insert("o".into(), out);
    Ok(given)
}
