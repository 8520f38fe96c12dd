//! The variants by name.

use super::infini::Infini;
use super::ttt::{TttInputs, TttLinear};
use crate::named::{self, check_causal, give, give_grad, output, view};
use crate::packed;
use crate::scan::{ScanAttention, ScanVariant, sequences_of};
use attn_core::registry::{Entry, NamedTensors, OptionSpec, Options, output_like, run_qkv};
use attn_core::{Attention, AttnError, AttnShape, Family, Result};

const CAUSAL: OptionSpec =
    OptionSpec { name: "causal", default: "true", help: "always true: the recurrence has no other form" };

fn built<V: ScanVariant>(options: &Options, variant: V) -> Result<Box<dyn Attention>> {
    check_causal(V::NAME, options)?;
    variant.cell(1, 1, 1)?;
    Ok(Box::new(ScanAttention::new(variant)))
}

pub(crate) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: "ttt-linear",
            family: Family::Linear,
            summary: "TTT-linear: a linear model trained on each mini-batch of tokens (Sun et al. 2024)",
            options: &[
                CAUSAL,
                OptionSpec { name: "mini_batch", default: "16", help: "tokens of a step" },
                OptionSpec {
                    name: "scale",
                    default: "",
                    help: "multiplies queries; default 1/sqrt(head_dim_v)",
                },
                OptionSpec { name: "eps", default: "1e-6", help: "added to variances" },
            ],
            constructor: |options| built(options, ttt(options)?),
            runner: |entry, options, tensors| {
                if tensors.get("eta").is_none() {
                    return packed::run(run_qkv, (entry, options, tensors));
                }
                check_causal(entry.name, options)?;
                run_ttt(ttt(options)?, tensors)
            },
        },
        Entry {
            name: "infini",
            family: Family::Linear,
            summary: "The memory of Infini-attention: earlier segments, summed (Munkhdalai et al. 2024)",
            options: &[
                CAUSAL,
                OptionSpec { name: "segment", default: "32", help: "tokens of a segment" },
                OptionSpec {
                    name: "delta",
                    default: "false",
                    help: "write what is not held yet (true|false)",
                },
                OptionSpec { name: "eps", default: "1e-6", help: "added to the sum of weights" },
            ],
            constructor: |options| built(options, infini(options)?),
            runner: |entry, options, tensors| {
                check_causal(entry.name, options)?;
                run_infini(infini(options)?, tensors)
            },
        },
    ]
}

fn ttt(options: &Options) -> Result<TttLinear> {
    let (mini_batch, eps) = (options.get_or("mini_batch", 16)?, options.get_or("eps", 1e-6)?);
    Ok(TttLinear { mini_batch, scale: options.get("scale")?, eps })
}

fn infini(options: &Options) -> Result<Infini> {
    let (segment, delta) = (options.get_or("segment", 32)?, options.get_or("delta", false)?);
    Ok(Infini { segment, delta, eps: options.get_or("eps", 1e-6)? })
}

/// `q`, `k`, `v (batch, heads, length, width)`, `eta (batch, heads, length)`, `ln_w`, `ln_b (heads, width)`, and together
/// `s0 (batch, heads, width, width)`, `b0 (batch, heads, 1, width)`. Gives `o`, `sT`, `bT`: the model of the last whole mini-batch.
fn run_ttt(variant: TttLinear, tensors: &NamedTensors) -> Result<NamedTensors> {
    let known = ["q", "k", "v", "eta", "ln_w", "ln_b", "s0", "b0", "cu_seqlens", "grad_o"];
    tensors.only(TttLinear::NAME, &known)?;
    let v = view(tensors, "v")?;
    let axes @ [batch, heads, _, width] = v.shape();
    let sums = named::prefix_sums(tensors)?;
    let cu_seqlens = sums.as_deref();
    let inputs = TttInputs {
        q: view(tensors, "q")?,
        k: view(tensors, "k")?,
        v,
        eta: named::numbers(tensors, "eta")?,
        norm_weight: named::floats(tensors, "ln_w", &[heads, width])?,
        norm_bias: named::floats(tensors, "ln_b", &[heads, width])?,
        cu_seqlens,
    };
    let batch = sequences_of(cu_seqlens, batch);
    let (model, bias) = ([batch, heads, width, width], [batch, heads, 1, width]);
    let mut before = variant.state(&inputs)?;
    if tensors.get("s0").is_some() || tensors.get("b0").is_some() {
        before.set_part(0, "s0", named::floats(tensors, "s0", &model)?)?;
        before.set_part(1, "b0", named::floats(tensors, "b0", &bias)?)?;
    }
    let (mut all, mut state) = (NamedTensors::default(), before.clone());
    let o = output(&v, axes, &axes, |out| variant.forward(&inputs, out, Some(&mut state)))?;
    all.0.insert("o".into(), o);
    give(&mut all, "sT", &model, state.part(0))?;
    give(&mut all, "bT", &bias, state.part(1))?;
    if tensors.get("grad_o").is_some() {
        let grads = variant.backward(&inputs, Some(&before), &view(tensors, "grad_o")?)?;
        let by = [
            ("q", grads.q),
            ("k", grads.k),
            ("v", grads.v),
            ("eta", grads.eta),
            ("ln_w", grads.norm_weight),
            ("ln_b", grads.norm_bias),
            ("s0", grads.state.part(0)),
            ("b0", grads.state.part(1)),
        ];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    Ok(all)
}

/// `q`, `k`, `v`, and together `s0 (batch, heads, head_dim, head_dim_v)`, `z0 (batch, heads, head_dim)`. Gives `o`, `sT`, `zT`, the
/// present segment included.
fn run_infini(variant: Infini, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(Infini::NAME, &["q", "k", "v", "s0", "z0", "cu_seqlens", "grad_o"])?;
    let x = tensors.qkv()?;
    let sums = named::prefix_sums(tensors)?;
    let cu_seqlens = sums.as_deref();
    let s = AttnShape { batch: sequences_of(cu_seqlens, x.shape().batch), ..x.shape() };
    if s.n_q != s.n_kv {
        return Err(AttnError::shape("k", "n_kv", s.n_kv, s.n_q));
    }
    let (s_axes, z_axes) =
        ([s.batch, s.n_heads_q, s.head_dim, s.head_dim_v], [s.batch, s.n_heads_q, s.head_dim]);
    let mut before = variant.state(&s)?;
    if tensors.get("s0").is_some() || tensors.get("z0").is_some() {
        let sums = named::floats(tensors, "s0", &s_axes)?.chunks_exact(s.head_dim_v);
        let rows = sums.zip(named::floats(tensors, "z0", &z_axes)?);
        let rows: Vec<f32> = rows.flat_map(|(row, z)| row.iter().chain([z]).copied()).collect();
        before.set_part(0, "s0", &rows)?;
    }
    let (mut all, mut state, mut out) = (NamedTensors::default(), before.clone(), output_like(&x));
    variant.forward_from(&x, cu_seqlens, out.as_out()?, &mut state)?;
    all.0.insert("o".into(), out);
    let split = |rows: &[f32]| -> (Vec<f32>, Vec<f32>) {
        let rows = rows.chunks_exact(s.head_dim_v + 1);
        let sums = rows.clone().flat_map(|row| &row[..s.head_dim_v]).copied().collect();
        (sums, rows.map(|row| row[s.head_dim_v]).collect())
    };
    let whole: Vec<f32> = state.part(0).iter().zip(state.part(1)).map(|(a, b)| a + b).collect();
    let (sums, z) = split(&whole);
    give(&mut all, "sT", &s_axes, sums)?;
    give(&mut all, "zT", &z_axes, z)?;
    if tensors.get("grad_o").is_some() {
        let grads = variant.gradients(&x, cu_seqlens, Some(&before), &view(tensors, "grad_o")?)?;
        let (sums, z) = split(&grads.state.part(0));
        let by = [("q", grads.q), ("k", grads.k), ("v", grads.v), ("s0", sums), ("z0", z)];
        by.into_iter().try_for_each(|(name, data)| give_grad(&mut all, tensors, name, data))?;
    }
    Ok(all)
}
