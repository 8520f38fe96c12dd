//! The variants by name.

use super::LowRank;
use super::{Agent, Linformer, LowRankAttention, Nystrom, Projection};
use crate::named::{self, give_grad, view};
use attn_core::registry::{Entry, NamedTensors, OptionSpec, Options, output_like};
use attn_core::{Attention, AttnError, AttnShape, Family, Result};
use std::sync::Arc;

pub(crate) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: "linformer",
            family: Family::Linear,
            summary: "Linformer: keys and values projected along the length to few rows (Wang et al. 2020)",
            options: &[
                OptionSpec {
                    name: "rank",
                    default: "256",
                    help: "rows projected to, where no projection is given",
                },
                OptionSpec::SCALE,
            ],
            constructor: |options| built(linformer(options)?),
            runner: |_, options, tensors| run_linformer(linformer(options)?, tensors),
        },
        Entry {
            name: "nystromformer",
            family: Family::Linear,
            summary: "Nystromformer: softmax attention through landmarks and a pseudo-inverse (Xiong et al. 2021)",
            options: &[
                OptionSpec { name: "landmarks", default: "64", help: "means of keys and queries" },
                OptionSpec { name: "pinv_iters", default: "6", help: "steps of the pseudo-inverse" },
                OptionSpec {
                    name: "init",
                    default: "per_matrix",
                    help: "what it starts from (per_matrix|global: of all heads, as the reference code)",
                },
                OptionSpec::SCALE,
            ],
            constructor: |options| {
                let nystrom = nystrom(options)?;
                if nystrom.shared_init {
                    let what = "init=global, by which batch entries reach one another, but on named tensors";
                    return Err(AttnError::unsupported(Nystrom::NAME, what));
                }
                built(nystrom)
            },
            runner: |_, options, tensors| run_nystrom(nystrom(options)?, tensors),
        },
        Entry {
            name: "agent",
            family: Family::Linear,
            summary: "Agent attention: agent tokens gather the values, queries read them (Han et al. 2024)",
            options: &[
                OptionSpec { name: "agents", default: "64", help: "agent tokens, where none are given" },
                OptionSpec::SCALE,
            ],
            constructor: |options| built(agent(options)?),
            runner: |_, options, tensors| run_agent(agent(options)?, tensors),
        },
    ]
}

/// Checks what can be checked without a problem.
#[allow(private_bounds, reason = "which variants there are is closed")]
fn built<V: super::attention::Compose>(variant: V) -> Result<Box<dyn Attention>> {
    variant.check(&AttnShape::square(1, 1, 1))?;
    Ok(Box::new(LowRankAttention::new(variant)))
}

fn linformer(options: &Options) -> Result<Linformer> {
    Ok(Linformer {
        rank: options.get_or("rank", 256)?,
        softmax_scale: options.get("scale")?,
        projection: None,
    })
}

fn nystrom(options: &Options) -> Result<Nystrom> {
    let init: String = options.get_or("init", "per_matrix".into())?;
    let shared_init = match init.as_str() {
        "global" => true,
        "per_matrix" => false,
        other => return Err(AttnError::value("option `init`", other, "per_matrix or global")),
    };
    Ok(Nystrom {
        landmarks: options.get_or("landmarks", 64)?,
        steps: options.get_or("pinv_iters", 6)?,
        shared_init,
        softmax_scale: options.get("scale")?,
        conv: None,
    })
}

fn agent(options: &Options) -> Result<Agent> {
    Ok(Agent { agents: options.get_or("agents", 64)?, softmax_scale: options.get("scale")? })
}

/// `q`, `k`, `v`, and `E`, `F (max_len, rank)` or `E` alone for both.
fn run_linformer(mut variant: Linformer, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(Linformer::NAME, &["q", "k", "v", "E", "F", "grad_o"])?;
    if tensors.get("E").is_some() || tensors.get("F").is_some() {
        let axes = named::shape(tensors, "E")?;
        let rank = axes.last().copied().unwrap_or(0);
        let values = named::optional(tensors, "F", axes)?.map(<[f32]>::to_vec);
        let keys = named::floats(tensors, "E", axes)?.to_vec();
        variant.projection = Some(Arc::new(Projection::new(keys, values, rank)?));
    }
    let x = tensors.qkv()?;
    let (mut all, mut out) = (NamedTensors::default(), output_like(&x));
    LowRankAttention::new(variant.clone()).forward(x, out.as_out()?)?;
    all.0.insert("o".into(), out);
    if tensors.get("grad_o").is_some() {
        let grads = variant.gradients(&x, &view(tensors, "grad_o")?)?;
        let by = [
            ("q", grads.q),
            ("k", grads.k),
            ("v", grads.v),
            ("E", grads.keys),
            ("F", grads.values.unwrap_or_default()),
        ];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    Ok(all)
}

/// `q`, `k`, `v`, and `conv (heads, 1, kernel, 1)`.
fn run_nystrom(mut variant: Nystrom, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(Nystrom::NAME, &["q", "k", "v", "conv", "grad_o"])?;
    variant.conv = tensors.f32("conv")?.map(|(_, conv)| conv.to_vec());
    let x = tensors.qkv()?;
    let (mut all, mut out) = (NamedTensors::default(), output_like(&x));
    LowRankAttention::new(variant.clone()).forward(x, out.as_out()?)?;
    all.0.insert("o".into(), out);
    if tensors.get("grad_o").is_some() {
        let grads = variant.gradients(&x, &view(tensors, "grad_o")?)?;
        let by = [("q", grads.q), ("k", grads.k), ("v", grads.v), ("conv", grads.conv)];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    Ok(all)
}

/// `q`, `k`, `v`, and `agent (batch, heads, agents, head_dim)`.
fn run_agent(variant: Agent, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(Agent::NAME, &["q", "k", "v", "agent", "grad_o"])?;
    let x = tensors.qkv()?;
    let (mut all, mut out) = (NamedTensors::default(), output_like(&x));
    if tensors.get("agent").is_none() {
        if tensors.get("grad_o").is_some() {
            return Err(AttnError::unsupported(Agent::NAME, "`grad_o` without `agent`"));
        }
        LowRankAttention::new(variant).forward(x, out.as_out()?)?;
        all.0.insert("o".into(), out);
        return Ok(all);
    }
    let agents = view(tensors, "agent")?;
    variant.forward_with(&x, &agents, out.as_out()?)?;
    all.0.insert("o".into(), out);
    if tensors.get("grad_o").is_some() {
        let grads = variant.gradients_with(&x, &agents, &view(tensors, "grad_o")?)?;
        let by = [("q", grads.q), ("k", grads.k), ("v", grads.v), ("agent", grads.agents)];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    Ok(all)
}
