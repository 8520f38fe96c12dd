//! Longformer.

use super::{build_parted, list};
use crate::{GlobalProjections, GlobalTokens, Longformer, PartedAttention, Pattern, ProjectedGrads};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, OptionSpec, Options, output_like, run_built};
use attn_core::{AttnError, Family, Qkv, QkvGrads, Result};

/// The second projections, under the names of their tensors.
const PROJECTED: [&str; 3] = ["q_global", "k_global", "v_global"];

pub(super) fn entries() -> Vec<Entry> {
    vec![Entry {
        name: <Longformer as Pattern>::NAME,
        family: Family::Sparse,
        summary: "A window and global tokens that all see and that see all (Beltagy et al. 2020)",
        options: &[
            OptionSpec { name: "window", default: "256", help: "keys seen on each side of the query" },
            OptionSpec {
                name: "global_tokens",
                default: "0",
                help: "their positions, by commas (none: no token)",
            },
            OptionSpec::CAUSAL,
            OptionSpec::SCALE,
        ],
        constructor: |options| build_parted(options, longformer(options)?),
        runner: run_longformer,
    }]
}

fn longformer(options: &Options) -> Result<Longformer> {
    let name = "global_tokens";
    let globals = if options.0.contains_key(name) { list(options, name)? } else { vec![0] };
    Ok(Longformer {
        window: options.get_or("window", 256)?,
        globals: GlobalTokens::shared(globals),
        causal: options.get_or("causal", false)?,
    })
}

/// Reads `global_tokens [batch or 1, n]` (instead of the option) and, for global rows, `q_global`, `k_global`, `v_global`.
fn run_longformer(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    let known = ["q", "k", "v", "grad_o", "global_tokens", PROJECTED[0], PROJECTED[1], PROJECTED[2]];
    tensors.only(entry.name, &known)?;
    let mut longformer = longformer(options)?;
    let x = tensors.qkv()?;
    if let Some(tensor) = tensors.get("global_tokens") {
        longformer.globals = global_tokens(tensor, x.shape().n_kv)?;
    }
    let softmax_scale = options.get("scale")?;
    if PROJECTED.iter().any(|name| tensors.get(name).is_some()) {
        return run_projected(&longformer, softmax_scale, tensors);
    }
    run_built(&PartedAttention::new(longformer).with_scale(softmax_scale), tensors)
}

fn global_tokens(tensor: &NamedTensor, n_kv: usize) -> Result<GlobalTokens> {
    let flags = tensor.booleans("global_tokens")?;
    match tensor.shape.as_slice() {
        [_, n] if *n == n_kv => {}
        [_, n] => return Err(AttnError::shape("global_tokens", "n_kv", *n, n_kv)),
        other => {
            return Err(AttnError::value("global_tokens's shape", format!("{other:?}"), "(batch, n_kv)"));
        }
    }
    let entries = flags.chunks_exact(n_kv.max(1));
    let positions = |entry: &[bool]| (0..n_kv).filter(|p| entry[*p]).collect();
    Ok(GlobalTokens::per_batch(entries.map(positions).collect()))
}

fn run_projected(
    longformer: &Longformer,
    scale: Option<f32>,
    tensors: &NamedTensors,
) -> Result<NamedTensors> {
    let local = tensors.qkv()?;
    let view = |name: &str| tensors.require(name)?.view(name);
    let global = Qkv::new(view(PROJECTED[0])?, view(PROJECTED[1])?, view(PROJECTED[2])?)?;
    let inputs = GlobalProjections { local, global };
    let mut out = output_like(&local);
    let lse = longformer.forward_projected(inputs, scale, out.as_out()?)?;
    let mut given = NamedTensors::default();
    if let Some(grad_o) = tensors.get("grad_o") {
        let like = |x: &Qkv<'_>| {
            [x.q(), x.k(), x.v()].map(|view| NamedTensor::unwritten(&view.shape(), view.dtype()))
        };
        let ([mut q, mut k, mut v], [mut q_global, mut k_global, mut v_global]) =
            (like(&local), like(&global));
        let grads = ProjectedGrads {
            local: QkvGrads { q: q.as_out()?, k: k.as_out()?, v: v.as_out()? },
            global: QkvGrads { q: q_global.as_out()?, k: k_global.as_out()?, v: v_global.as_out()? },
        };
        let rows = (out.view("o")?, lse.as_slice());
        longformer.backward_projected(inputs, scale, rows, grad_o.view("grad_o")?, grads)?;
        let names = ["q", "k", "v"].into_iter().chain(PROJECTED);
        let grads = [q, k, v, q_global, k_global, v_global];
        given.0.extend(names.zip(grads).map(|(name, grad)| (format!("grad.{name}"), grad)));
    }
    let [batch, heads, n_q, _] = local.shape().out();
    given.0.insert("lse".into(), NamedTensor::f32("lse", &[batch, heads, n_q], lse)?);
    given.0.insert("o".into(), out);
    Ok(given)
}
