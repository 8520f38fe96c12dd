//! AFT-full and AFT-local by name.

use super::{AftFull, AftGrads};
use crate::named::{self, give_grad, view};
use crate::packed;
use attn_core::registry::{Entry, NamedTensor, NamedTensors, OptionSpec, Options};
use attn_core::{Family, Qkv, Result};

const SLOPE: OptionSpec = OptionSpec {
    name: "slope",
    default: "0.05",
    help: "bias of a pair by its distance, where no tensor gives biases",
};

fn full(options: &Options) -> Result<AftFull> {
    Ok(AftFull {
        causal: options.get_or("causal", false)?,
        window: None,
        slope: options.get_or("slope", AftFull::default().slope)?,
    })
}

fn local(options: &Options) -> Result<AftFull> {
    Ok(AftFull { window: Some(options.get_or("window", 32)?), ..full(options)? })
}

pub(crate) fn entries() -> [Entry; 2] {
    [
        Entry {
            name: "aft-full",
            family: Family::Linear,
            summary: "AFT-full: weights of keys and of pairs of positions, no dot products (Zhai et al. 2021)",
            options: &[OptionSpec::CAUSAL, SLOPE],
            constructor: |options| Ok(Box::new(full(options)?)),
            runner: |entry, options, tensors| {
                packed::run(
                    |entry, options, tensors| run(&full(options)?, entry, tensors),
                    (entry, options, tensors),
                )
            },
        },
        Entry {
            name: "aft-local",
            family: Family::Linear,
            summary: "AFT-local: biases of near pairs alone, all pairs see each other (Zhai et al. 2021)",
            options: &[
                OptionSpec::CAUSAL,
                SLOPE,
                OptionSpec {
                    name: "window",
                    default: "32",
                    help: "pairs less than this far apart have a bias",
                },
            ],
            constructor: |options| Ok(Box::new(local(options)?)),
            runner: |entry, options, tensors| {
                packed::run(
                    |entry, options, tensors| run(&local(options)?, entry, tensors),
                    (entry, options, tensors),
                )
            },
        },
    ]
}

/// `q`, `k`, `v (batch, length, width)` or with heads, `wbias (length, length)` or with heads: gives `o`. Packed
/// sequences start over at the first position.
fn run(aft: &AftFull, entry: &Entry, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(entry.name, &["q", "k", "v", "wbias", "grad_o"])?;
    let x = Qkv::new(view(tensors, "q")?, view(tensors, "k")?, view(tensors, "v")?)?;
    let bias = tensors.f32("wbias")?.map(|(shape, data)| (data, shape));
    let mut axes = named::shape(tensors, "q")?.to_vec();
    if let Some(width) = axes.last_mut() {
        *width = x.shape().head_dim_v;
    }
    let mut all = NamedTensors::default();
    let mut out = NamedTensor::unwritten(&x.shape().out(), x.dtype());
    aft.forward_biased(&x, bias, out.as_out()?)?;
    out.shape = axes;
    all.0.insert("o".into(), out);
    if tensors.get("grad_o").is_some() {
        let AftGrads { q, k, v, bias } = aft.gradients(&x, bias, &view(tensors, "grad_o")?)?;
        let by = [("q", q), ("k", k), ("v", v), ("wbias", bias)];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    Ok(all)
}
