//! Registry entries of the variants of [`crate::engine`]: kernelised attention, and retention.

use crate::engine::State;
use crate::{CHUNK_LEN, Gammas, Linear, LinearAttention, LinearElu, RetNet, Variant};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, OptionSpec, Options, output_like};
use attn_core::{AttnError, Family, Result};

const CHUNK: OptionSpec =
    OptionSpec { name: "chunk_len", default: "64", help: "tokens the chunked form handles at once" };
const SCALE: OptionSpec =
    OptionSpec { name: "scale", default: "", help: "multiplies the output; default 1/sqrt(head_dim)" };

/// The variants of [`crate::engine`].
pub(crate) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: "linear",
            family: Family::Linear,
            summary: "Linear attention, neither mapped nor normalised: fast weights (Schmidhuber 1992)",
            options: &[OptionSpec::CAUSAL, SCALE, CHUNK],
            constructor: |options| Ok(Box::new(LinearAttention::new(linear(options)?))),
            runner: |_, options, tensors| {
                tensors.only("linear", &["q", "k", "v", "initial_state"])?;
                run(tensors, &linear(options)?)
            },
        },
        Entry {
            name: "linear-elu",
            family: Family::Linear,
            summary: "Linear attention with elu + 1 features and a normaliser (Katharopoulos et al. 2020)",
            options: &[
                OptionSpec::CAUSAL,
                OptionSpec { name: "scale", default: "1", help: "multiplies the weights" },
                OptionSpec { name: "eps", default: "1e-10", help: "added to the sum of weights" },
                CHUNK,
            ],
            constructor: |options| Ok(Box::new(LinearAttention::new(linear_elu(options)?))),
            runner: |_, options, tensors| {
                tensors.only("linear-elu", &["q", "k", "v", "initial_state", "initial_normaliser"])?;
                run(tensors, &linear_elu(options)?)
            },
        },
        Entry {
            name: "retnet",
            family: Family::Linear,
            summary: "Retention: a state that fades at a constant rate a head, no group norm (Sun et al. 2023)",
            options: &[
                OptionSpec {
                    name: "causal",
                    default: "true",
                    help: "always true: retention has no other form",
                },
                SCALE,
                OptionSpec {
                    name: "gammas",
                    default: "fla",
                    help: "decays: fla = 1 - 2^(-5-h), torchscale = 1 - 1/32 .. 1 - 1/512",
                },
                CHUNK,
            ],
            constructor: |options| Ok(Box::new(LinearAttention::new(retnet(options)?))),
            runner: |_, options, tensors| {
                tensors.only("retnet", &["q", "k", "v", "log_decay", "initial_state"])?;
                let mut retnet = retnet(options)?;
                retnet.log_decay = tensors.f32("log_decay")?.map(|(_, g)| g.to_vec());
                run(tensors, &retnet)
            },
        },
    ]
}

fn chunk_len(options: &Options) -> Result<usize> {
    let chunk_len = options.get_or("chunk_len", CHUNK_LEN)?;
    if chunk_len == 0 {
        return Err(AttnError::value("option `chunk_len`", 0, "at least 1"));
    }
    Ok(chunk_len)
}

fn linear(options: &Options) -> Result<Linear> {
    let causal = options.get_or("causal", false)?;
    Ok(Linear { scale: options.get("scale")?, causal, chunk_len: chunk_len(options)? })
}

fn linear_elu(options: &Options) -> Result<LinearElu> {
    let elu = LinearElu {
        scale: options.get_or("scale", 1.0)?,
        eps: options.get_or("eps", 1e-10)?,
        causal: options.get_or("causal", false)?,
        chunk_len: chunk_len(options)?,
    };
    elu.spec(0, 1)?.check(0)?;
    Ok(elu)
}

fn retnet(options: &Options) -> Result<RetNet> {
    if !options.get_or("causal", true)? {
        return Err(AttnError::unsupported("retnet", "causal=false"));
    }
    let gammas: String = options.get_or("gammas", "fla".into())?;
    let gammas: Gammas = gammas.parse()?;
    Ok(RetNet { scale: options.get("scale")?, gammas, log_decay: None, chunk_len: chunk_len(options)? })
}

/// `q`, `k`, `v` and, where given, `log_decay` (one a query head), `initial_state (batch, n_heads_q, key_dim, value_dim)`
/// and for normalised variants with it `initial_normaliser (batch, n_heads_q, key_dim)`, all f32. Gives `o`, `sT` and, for normalised variants, `zT`;
/// `o` alone where queries stand before the first key, hence before any state.
fn run(tensors: &NamedTensors, variant: &impl Variant) -> Result<NamedTensors> {
    let x = tensors.qkv()?;
    let spec = variant.spec(x.shape().n_heads_q, x.shape().head_dim)?;
    let sizes = spec.state_shape(&x.shape());
    let (s_shape, z_shape) = (
        [sizes.batch, sizes.heads, sizes.key_dim, sizes.value_dim],
        [sizes.batch, sizes.heads, sizes.key_dim],
    );
    let given = |name: &str, wanted: &[usize]| match tensors.f32(name)? {
        Some((shape, _)) if shape != wanted => {
            Err(AttnError::value(format!("{name}'s shape"), format!("{shape:?}"), format!("{wanted:?}")))
        }
        Some((_, data)) => Ok(Some(data.to_vec())),
        None => Ok(None),
    };
    let (s, z) = (given("initial_state", &s_shape)?, given("initial_normaliser", &z_shape)?);
    if spec.has_normaliser() && s.is_some() != z.is_some() {
        tensors.require("initial_state")?;
        tensors.require("initial_normaliser")?;
    }
    let before_the_keys = spec.causal && x.shape().n_q > x.shape().n_kv;
    let stateless = before_the_keys && s.is_none() && z.is_none();
    let zero = State::zero(sizes, spec.has_normaliser());
    let s = s.unwrap_or_else(|| zero.s().to_vec());
    let z = z.or_else(|| zero.z().map(<[f32]>::to_vec));
    let mut all = NamedTensors::default();
    let mut out = output_like(&x);
    if stateless {
        spec.forward(x, out.as_out()?, None)?;
        all.0.insert("o".into(), out);
        return Ok(all);
    }
    let mut state = State::new(sizes, s, z)?;
    spec.forward(x, out.as_out()?, Some(&mut state))?;
    all.0.insert("o".into(), out);
    all.0.insert("sT".into(), NamedTensor::f32("sT", &s_shape, state.s().to_vec())?);
    if let Some(z) = state.z() {
        all.0.insert("zT".into(), NamedTensor::f32("zT", &z_shape, z.to_vec())?);
    }
    Ok(all)
}
