//! The variants by name.

use super::kernels::{Based, CosFormer, Efficient, Hedgehog, LinearRelu, ReBased, Rfa};
use super::performer::{Kernel, Performer};
use super::{FeatureAttention, FeatureInputs, FeatureVariant};
use crate::matrix_state::sequences;
use crate::named::{self, give, give_grad, view};
use attn_core::registry::{Entry, NamedTensors, OptionSpec, Options, output_like};
use attn_core::{Attention, AttnError, AttnShape, Family, Result};

const CAUSAL_TRUE: OptionSpec = OptionSpec { default: "true", ..OptionSpec::CAUSAL };

const fn eps(default: &'static str, help: &'static str) -> OptionSpec {
    OptionSpec { name: "eps", default, help }
}

const EPS_0: OptionSpec = eps("0", "added to the sum of weights");
const EPS_6: OptionSpec = eps("1e-6", "added to the sum of weights");
const EPS_10: OptionSpec = eps("1e-10", "added to the sum of weights");
const LEAST: OptionSpec = eps("1e-6", "least divisor");
const SEED: OptionSpec = OptionSpec { name: "seed", default: "0", help: "what the projection is drawn with" };

/// Checks what can be checked without a problem.
fn built<V: FeatureVariant>(variant: V) -> Result<Box<dyn Attention>> {
    variant.spec(1, 1, 0)?;
    Ok(Box::new(FeatureAttention::new(variant)))
}

pub(crate) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: "linear-relu",
            family: Family::Linear,
            summary: "Linear attention with ReLU features (Cai et al. 2023)",
            options: &[OptionSpec::CAUSAL, EPS_0],
            constructor: |options| built(linear_relu(options)?),
            runner: |_, options, tensors| run(linear_relu(options)?, tensors, &[], |_, _| Ok(())),
        },
        Entry {
            name: "performer",
            family: Family::Linear,
            summary: "Performer: random orthogonal features of the softmax or ReLU kernel (Choromanski et al. 2021)",
            options: &[
                OptionSpec::CAUSAL,
                OptionSpec { name: "kernel", default: "softmax", help: "what is estimated (softmax|relu)" },
                OptionSpec { name: "features", default: "", help: "random features; default d ln d" },
                OptionSpec {
                    name: "ortho_scaling",
                    default: "0",
                    help: "1: rows of the projection have equal lengths",
                },
                OptionSpec {
                    name: "feature_eps",
                    default: "",
                    help: "added to features; default 1e-4, relu 1e-3",
                },
                OptionSpec {
                    name: "denom_eps",
                    default: "1e-6",
                    help: "with causal, added to each summed feature",
                },
                OptionSpec {
                    name: "key_max",
                    default: "",
                    help: "lower keys' exponents by the largest of all; default without causal (true|false)",
                },
                SEED,
            ],
            constructor: |options| {
                let performer = performer(options)?;
                if performer.causal && performer.looks_ahead() {
                    let what = "key_max=true with causal=true: it looks at later keys";
                    return Err(AttnError::unsupported("performer", what));
                }
                built(performer)
            },
            runner: |_, options, tensors| {
                let mut performer = performer(options)?;
                if let Some((shape, weight)) = tensors.f32("proj")? {
                    performer = performer.with_weight(weight.to_vec(), shape.last().copied().unwrap_or(0))?;
                }
                run(performer, tensors, &["proj"], |_, _| Ok(()))
            },
        },
        Entry {
            name: "rfa",
            family: Family::Linear,
            summary: "Random feature attention: sines and cosines of the Gaussian kernel (Peng et al. 2021)",
            options: &[
                CAUSAL_TRUE,
                OptionSpec { name: "features", default: "128", help: "rows of the projection" },
                OptionSpec {
                    name: "gate",
                    default: "",
                    help: "what is left of the past at a token, in [0, 1], where no tensor gives it; default no gate",
                },
                LEAST,
                SEED,
            ],
            constructor: |options| built(rfa(options)?),
            runner: |_, options, tensors| {
                let mut rfa = rfa(options)?;
                if let Some((shape, weight)) = tensors.f32("proj")? {
                    let axes = match *shape {
                        [heads, features, width] => [heads, features, width],
                        [features, width] => [1, features, width],
                        _ => {
                            return Err(AttnError::value(
                                "proj's shape",
                                format!("{shape:?}"),
                                "(heads, features, width)",
                            ));
                        }
                    };
                    rfa = rfa.with_weight(weight.to_vec(), axes)?;
                }
                run(rfa, tensors, &["proj", "s0", "z0"], |_, _| Ok(()))
            },
        },
        Entry {
            name: "cosformer",
            family: Family::Linear,
            summary: "cosFormer: ReLU features that turn with the position (Qin et al. 2022)",
            options: &[
                OptionSpec::CAUSAL,
                OptionSpec { name: "length", default: "", help: "a quarter turn; default the length itself" },
                LEAST,
            ],
            constructor: |options| built(cosformer(options)?),
            runner: |_, options, tensors| run(cosformer(options)?, tensors, &[], |_, _| Ok(())),
        },
        Entry {
            name: "based",
            family: Family::Linear,
            summary: "Based: second-order Taylor features of the softmax kernel (Arora et al. 2024)",
            options: &[
                CAUSAL_TRUE,
                OptionSpec {
                    name: "normalize",
                    default: "true",
                    help: "divide by the sum of weights (true|false)",
                },
                EPS_6,
            ],
            constructor: |options| built(based(options)?),
            runner: |_, options, tensors| run(based(options)?, tensors, &[], |_, _| Ok(())),
        },
        Entry {
            name: "rebased",
            family: Family::Linear,
            summary: "ReBased: squares of normalised inner products (Aksenov et al. 2024)",
            options: &[CAUSAL_TRUE, EPS_6],
            constructor: |options| built(rebased(options)?),
            runner: |_, options, tensors| run(rebased(options)?, tensors, &[], |_, _| Ok(())),
        },
        Entry {
            name: "hedgehog",
            family: Family::Linear,
            summary: "Hedgehog: learned features that imitate softmax weights (Zhang et al. 2024)",
            options: &[
                CAUSAL_TRUE,
                OptionSpec { name: "factor", default: "2", help: "multiplies what the softmax is of" },
                EPS_10,
            ],
            constructor: |options| built(hedgehog(options)?),
            runner: |_, options, tensors| {
                let mut hedgehog = hedgehog(options)?;
                if tensors.get("wq").is_some() {
                    let head_dim = named::shape(tensors, "q")?.last().copied().unwrap_or(0);
                    let of = |name| named::floats(tensors, name, named::shape(tensors, name)?);
                    let (query, key) = ((of("wq")?, of("bq")?), (of("wk")?, of("bk")?));
                    hedgehog = hedgehog.with_layer(query, key, head_dim)?;
                }
                run(hedgehog, tensors, &["wq", "bq", "wk", "bk"], |all, grads| {
                    for (w, b, mut by) in [("wq", "bq", grads.query_params), ("wk", "bk", grads.key_params)] {
                        let bias = tensors.get(b).map_or(0, |b| b.shape.iter().product());
                        let by_bias = by.split_off(by.len().saturating_sub(bias));
                        give_grad(all, tensors, w, by)?;
                        give_grad(all, tensors, b, by_bias)?;
                    }
                    Ok(())
                })
            },
        },
        Entry {
            name: "efficient",
            family: Family::Linear,
            summary: "Efficient attention: softmax over channels and over tokens (Shen et al. 2021)",
            options: &[
                OptionSpec::CAUSAL,
                OptionSpec { name: "scale", default: "1", help: "multiplies the weights" },
            ],
            constructor: |options| built(efficient(options)?),
            runner: |_, options, tensors| run(efficient(options)?, tensors, &[], |_, _| Ok(())),
        },
    ]
}

fn linear_relu(options: &Options) -> Result<LinearRelu> {
    Ok(LinearRelu { causal: options.get_or("causal", false)?, eps: options.get_or("eps", 0.0)? })
}

fn performer(options: &Options) -> Result<Performer> {
    let kernel: String = options.get_or("kernel", "softmax".into())?;
    let kernel = match kernel.as_str() {
        "softmax" => Kernel::Softmax,
        "relu" => Kernel::Relu,
        other => return Err(AttnError::value("option `kernel`", other, "softmax or relu")),
    };
    Ok(Performer {
        causal: options.get_or("causal", false)?,
        kernel,
        features: options.get("features")?,
        equal_lengths: options.get_or("ortho_scaling", 0u8)? == 1,
        feature_eps: options.get("feature_eps")?,
        denom_eps: options.get_or("denom_eps", 1e-6)?,
        key_max: options.get("key_max")?,
        seed: options.get_or("seed", 0)?,
        weight: None,
    })
}

fn rfa(options: &Options) -> Result<Rfa> {
    let causal = options.get_or("causal", true)?;
    let (features, seed) = (options.get_or("features", 128)?, options.get_or("seed", 0)?);
    let (eps, gate) = (options.get_or("eps", 1e-6)?, options.get("gate")?);
    Ok(Rfa { causal, features, eps, gate, seed, weight: None })
}

fn cosformer(options: &Options) -> Result<CosFormer> {
    let causal = options.get_or("causal", false)?;
    Ok(CosFormer { causal, length: options.get("length")?, eps: options.get_or("eps", 1e-6)? })
}

fn based(options: &Options) -> Result<Based> {
    let (causal, normalise) = (options.get_or("causal", true)?, options.get_or("normalize", true)?);
    Ok(Based { causal, normalise, eps: options.get_or("eps", 1e-6)? })
}

fn rebased(options: &Options) -> Result<ReBased> {
    let causal = options.get_or("causal", true)?;
    Ok(ReBased { causal, eps: options.get_or("eps", 1e-6)?, ..ReBased::default() })
}

fn hedgehog(options: &Options) -> Result<Hedgehog> {
    let (causal, factor) = (options.get_or("causal", true)?, options.get_or("factor", 2.0)?);
    Ok(Hedgehog { causal, factor, eps: options.get_or("eps", 1e-10)?, layer: None })
}

fn efficient(options: &Options) -> Result<Efficient> {
    let scale = options.get("scale")?.filter(|scale: &f32| *scale != 1.0);
    Ok(Efficient { causal: options.get_or("causal", false)?, scale })
}

/// `q`, `k`, `v`, for gated variants `gate (batch, heads, length)`, `cu_seqlens`, the tensors `more` that the variant has read, and
/// with `s0`, `z0` among them a state. Gives `o`, for causal forms `sT` and `zT`, and with `grad_o` the gradients.
fn run<V: FeatureVariant>(
    variant: V,
    tensors: &NamedTensors,
    more: &[&str],
    give_params: impl FnOnce(&mut NamedTensors, super::FeatureGrads) -> Result<()>,
) -> Result<NamedTensors> {
    let gated: &[&str] = if V::GATED { &["gate"] } else { &[] };
    tensors.only(V::NAME, &[&["q", "k", "v", "cu_seqlens", "grad_o"], gated, more].concat())?;
    let (x, cu_seqlens) = (tensors.qkv()?, named::prefix_sums(tensors)?);
    let gate = tensors.get("gate").map(|_| named::numbers(tensors, "gate")).transpose()?;
    let inputs = FeatureInputs { x, gate, cu_seqlens: cu_seqlens.as_deref() };
    let s = x.shape();
    let attention = FeatureAttention::new(variant);
    let (mut all, mut out) = (NamedTensors::default(), output_like(&x));
    let mut before = None;
    if attention.variant.is_causal() {
        let sequences = s.batch * sequences(inputs.cu_seqlens, s.n_q)?.len();
        let mut state = attention.state(&AttnShape { batch: sequences, ..s })?;
        let columns = state.width(0);
        let features = state.part(0).len() / (sequences * s.n_heads_q * columns).max(1);
        let (s_axes, z_axes) =
            ([sequences, s.n_heads_q, features, s.head_dim_v], [sequences, s.n_heads_q, features]);
        if tensors.get("s0").is_some() {
            let sums = named::floats(tensors, "s0", &s_axes)?.chunks_exact(s.head_dim_v);
            let z = named::floats(tensors, "z0", &z_axes)?;
            let rows = sums.zip(z).flat_map(|(row, z)| row.iter().chain([z]).copied());
            state.set_part(0, "s0", &rows.collect::<Vec<f32>>())?;
        }
        before = Some(state.clone());
        attention.forward_from(inputs, out.as_out()?, &mut state)?;
        let (sums, z) = split(&state.part(0), s.head_dim_v, columns);
        give(&mut all, "sT", &s_axes, sums)?;
        if columns > s.head_dim_v {
            give(&mut all, "zT", &z_axes, z)?;
        }
    } else {
        attention.forward_inputs(&inputs, out.as_out()?)?;
    }
    all.0.insert("o".into(), out);
    if tensors.get("grad_o").is_some() {
        let mut grads = attention.gradients(inputs, before.as_ref(), &view(tensors, "grad_o")?)?;
        let by = [("q", &mut grads.q), ("k", &mut grads.k), ("v", &mut grads.v), ("gate", &mut grads.gate)];
        by.into_iter().try_for_each(|(n, d)| give_grad(&mut all, tensors, n, std::mem::take(d)))?;
        if let Some(state) = &grads.state {
            let (sums, z) = split(&state.part(0), s.head_dim_v, state.width(0));
            give_grad(&mut all, tensors, "s0", sums)?;
            give_grad(&mut all, tensors, "z0", z)?;
        }
        give_params(&mut all, grads)?;
    }
    Ok(all)
}

/// The first `width` columns, and the one behind them if there is one.
fn split(rows: &[f32], width: usize, columns: usize) -> (Vec<f32>, Vec<f32>) {
    let rows = rows.chunks_exact(columns.max(1));
    let sums = rows.clone().flat_map(|row| &row[..width]).copied().collect();
    (sums, rows.filter_map(|row| row.get(width)).copied().collect())
}
