//! Native sparse attention.

use super::routed::{CAUSAL, floats, slots};
use super::{at_least_1, only_causal};
use crate::{CompressedKv, Nsa, NsaBranch, NsaGates, NsaInputs};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, OptionSpec, Options};
use attn_core::{DType, Family, Result};

pub(super) fn entry() -> Entry {
    Entry {
        name: "nsa",
        family: Family::Sparse,
        summary: "Compressed blocks, selected blocks and a window (native sparse attention, Yuan et al. 2025)",
        options: &[
            CAUSAL,
            OptionSpec { name: "compress_len", default: "32", help: "keys of a compressed block" },
            OptionSpec {
                name: "compress_stride",
                default: "16",
                help: "keys from one compressed block's start to the next one's",
            },
            OptionSpec { name: "select_len", default: "64", help: "keys of a selected block" },
            OptionSpec {
                name: "n_selected",
                default: "16",
                help: "blocks that a query selects, its own, the first and the previous one among them",
            },
            OptionSpec {
                name: "window",
                default: "512",
                help: "last keys seen, the query's own included; 0 leaves the branch out",
            },
            OptionSpec::SCALE,
        ],
        constructor: |options| Ok(Box::new(nsa(options)?)),
        runner: run,
    }
}

fn nsa(options: &Options) -> Result<Nsa> {
    only_causal(options, "nsa")?;
    Ok(Nsa {
        compress_len: at_least_1(options, "compress_len", 32)?,
        compress_stride: at_least_1(options, "compress_stride", 16)?,
        select_len: at_least_1(options, "select_len", 64)?,
        n_selected: at_least_1(options, "n_selected", 16)?,
        window: options.get_or("window", 512)?,
        softmax_scale: options.get("scale")?,
    })
}

/// `q`, `k`, `v`; perhaps gates `gate_compress`, `gate_select` and, with a window, `gate_window`, `[batch, n_heads_q, n_q]`;
/// compressed blocks `k_compress`, `v_compress (batch, n_heads_kv, blocks, width)`; selected blocks
/// `block_index [batch, n_heads_kv, n_q, slots]`, -1 for an empty slot.
///
/// Gives `o`, and each branch by itself: `o_compress`, `lse_compress`, `o_select`, `lse_select`, `o_window`, `lse_window`.
fn run(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    const GATES: [&str; 3] = ["gate_compress", "gate_select", "gate_window"];
    let known = ["q", "k", "v", "grad_o", "k_compress", "v_compress", "block_index"];
    tensors.only(entry.name, &[known.as_slice(), &GATES].concat())?;
    let (nsa, qkv) = (nsa(options)?, tensors.qkv()?);
    let s = qkv.shape();
    let gates = match GATES.iter().any(|name| tensors.get(name).is_some()) {
        false => None,
        true => Some(NsaGates {
            compress: floats(tensors, GATES[0])?,
            select: floats(tensors, GATES[1])?,
            window: match (nsa.window, tensors.get(GATES[2])) {
                (0, None) => None,
                _ => Some(floats(tensors, GATES[2])?),
            },
        }),
    };
    let compressed = match ["k_compress", "v_compress"].iter().any(|name| tensors.get(name).is_some()) {
        false => None,
        true => Some(CompressedKv {
            k: tensors.require("k_compress")?.view("k_compress")?,
            v: tensors.require("v_compress")?.view("v_compress")?,
        }),
    };
    let selected = match tensors.get("block_index") {
        None => None,
        Some(given) => Some(slots(given, &[s.batch, s.n_heads_kv, s.n_q])?),
    };
    let x = NsaInputs { qkv, gates, compressed, selected: selected.as_deref() };
    let y = nsa.forward_with(&x)?;

    let mut given = NamedTensors::default();
    let mut give = |name: &str, shape: &[usize], data: &[f32], dtype: DType| -> Result<()> {
        let tensor = NamedTensor::f32(name, shape, data.to_vec())?.rounded(dtype);
        given.0.insert(name.into(), tensor);
        Ok(())
    };
    let (out, rows) = (s.out(), &s.out()[..3]);
    give("o", &out, &y.out, qkv.dtype())?;
    let branches =
        [("compress", Some(&y.compress)), ("select", Some(&y.select)), ("window", y.window.as_ref())];
    for (name, branch) in branches {
        if let Some(NsaBranch { out: o, lse }) = branch {
            give(&format!("o_{name}"), &out, o, DType::F32)?;
            give(&format!("lse_{name}"), rows, lse, DType::F32)?;
        }
    }
    if tensors.get("grad_o").is_some() {
        let grad_o = tensors.require("grad_o")?;
        super::routed::check_shape("grad_o", grad_o, &out)?;
        let grad_o: Vec<f32> = grad_o.data.to_f64().into_iter().map(|x| x as f32).collect();
        let grads = nsa.backward_with(&x, &y, &grad_o)?;
        give("grad.q", &s.q(), &grads.q, qkv.dtype())?;
        give("grad.k", &s.k(), &grads.k, qkv.dtype())?;
        give("grad.v", &s.v(), &grads.v, qkv.dtype())?;
        if let Some(gates) = &x.gates {
            give("grad.gate_compress", rows, &grads.gate_compress, DType::F32)?;
            give("grad.gate_select", rows, &grads.gate_select, DType::F32)?;
            if gates.window.is_some() {
                give("grad.gate_window", rows, &grads.gate_window, DType::F32)?;
            }
        }
        if let Some(CompressedKv { k, v }) = &x.compressed {
            give("grad.k_compress", &k.shape(), &grads.k_compress, k.dtype())?;
            give("grad.v_compress", &v.shape(), &grads.v_compress, v.dtype())?;
        }
    }
    Ok(given)
}
