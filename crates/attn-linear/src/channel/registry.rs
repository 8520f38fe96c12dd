//! The variant by name.

use super::Xca;
use crate::named::{self, give_grad, view};
use attn_core::registry::{Entry, NamedTensors, OptionSpec, Options, output_like};
use attn_core::{Attention, AttnError, Family, Result};

pub(crate) fn entries() -> Vec<Entry> {
    vec![Entry {
        name: "xca",
        family: Family::Linear,
        summary: "Cross-covariance attention: channels attend to channels (Ali et al. 2021)",
        options: &[OptionSpec {
            name: "temperature",
            default: "1",
            help: "multiplies inner products of unit channels",
        }],
        constructor: |options| Ok(Box::new(xca(options)?)),
        runner: |_, options, tensors| run(xca(options)?, tensors),
    }]
}

fn xca(options: &Options) -> Result<Xca> {
    let temperature: f32 = options.get_or("temperature", 1.0)?;
    if !temperature.is_finite() {
        return Err(AttnError::value("option `temperature`", temperature, "a finite number"));
    }
    Ok(Xca { temperature: vec![temperature] })
}

/// `q`, `k`, `v`, and `temp (heads)`.
fn run(mut variant: Xca, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only("xca", &["q", "k", "v", "temp", "grad_o"])?;
    let x = tensors.qkv()?;
    if let Some(temperature) = named::optional(tensors, "temp", &[x.shape().n_heads_q])? {
        variant.temperature = temperature.to_vec();
    }
    let (mut all, mut out) = (NamedTensors::default(), output_like(&x));
    variant.forward(x, out.as_out()?)?;
    all.0.insert("o".into(), out);
    if tensors.get("grad_o").is_some() {
        let grads = variant.gradients(&x, &view(tensors, "grad_o")?)?;
        let by = [("q", grads.q), ("k", grads.k), ("v", grads.v), ("temp", grads.temperature)];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    Ok(all)
}
