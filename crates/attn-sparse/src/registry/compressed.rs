//! Compressed sparse and compressed heavy attention.

use super::routed::{CAUSAL, INDEX_DIM, check_shape, floats, one_head};
use super::{at_least_1, length, only_causal};
use crate::{CompressedAttention, CompressedInputs, Entries, EntryIndexer, EntryPooling};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, OptionSpec, Options, run_qkv};
use attn_core::{DType, Family, Result};

const WINDOW: OptionSpec =
    OptionSpec { name: "window", default: "128", help: "last raw keys seen, the query's own included" };

pub(super) fn heavy() -> Entry {
    Entry {
        name: "compressed-heavy",
        family: Family::Sparse,
        summary: "A window, and entries of many tokens each (compressed heavy attention, DeepSeek-V4 2026)",
        options: &[
            CAUSAL,
            OptionSpec { name: "rate", default: "128", help: "tokens of an entry" },
            WINDOW,
            OptionSpec::SCALE,
        ],
        constructor: |options| Ok(Box::new(configured(options, false)?)),
        runner: |entry, options, tensors| run(entry, options, tensors, false),
    }
}

pub(super) fn sparse() -> Entry {
    Entry {
        name: "compressed-sparse",
        family: Family::Sparse,
        summary: "A window, and entries chosen by an indexer (compressed sparse attention, DeepSeek-V4 2026)",
        options: &[
            CAUSAL,
            OptionSpec { name: "rate", default: "4", help: "tokens of an entry" },
            WINDOW,
            OptionSpec { name: "top_k", default: "512", help: "entries that a query sees" },
            INDEX_DIM,
            OptionSpec::SCALE,
        ],
        constructor: |options| Ok(Box::new(configured(options, true)?)),
        runner: |entry, options, tensors| run(entry, options, tensors, true),
    }
}

fn configured(options: &Options, sparse: bool) -> Result<CompressedAttention> {
    only_causal(options, if sparse { "compressed-sparse" } else { "compressed-heavy" })?;
    let entries = match sparse {
        false => Entries::Heavy,
        true => Entries::Sparse {
            top_k: at_least_1(options, "top_k", 512)?,
            index_dim: length(options, INDEX_DIM.name)?,
        },
    };
    Ok(CompressedAttention {
        rate: at_least_1(options, "rate", if sparse { 4 } else { 128 })?,
        window: at_least_1(options, "window", 128)?,
        entries,
        softmax_scale: options.get("scale")?,
    })
}

/// `q`, `k`, `v` alone; or `q`, `kv_raw [batch, n, head_dim]`, `compress_kv` and `compress_gate [batch, n, width]`,
/// `position_bias [rate, width]`, perhaps `sinks [n_heads_q]`; in the sparse form also `index_q (batch, index heads, n, index_dim)`,
/// `index_kv`, `index_gate`, `index_position_bias`, `index_w [batch, index heads, n]`, or the choice as
/// `compressed_mask [batch, 1, n, n / rate]`.
///
/// Gives `o`, and with given tensors `lse` (sinks included) and the entries as `compressed`.
fn run(entry: &Entry, options: &Options, tensors: &NamedTensors, sparse: bool) -> Result<NamedTensors> {
    if tensors.get("kv_raw").is_none() {
        return run_qkv(entry, options, tensors);
    }
    let mut known = vec!["q", "kv_raw", "compress_kv", "compress_gate", "position_bias", "sinks", "grad_o"];
    if sparse {
        known.extend([
            "index_q",
            "index_kv",
            "index_gate",
            "index_position_bias",
            "index_w",
            "compressed_mask",
        ]);
    }
    tensors.only(entry.name, &known)?;
    let attention = configured(options, sparse)?;
    let series = |name: &str| one_head(tensors.require(name)?);
    let (kv_raw, kv, gate) = (series("kv_raw")?, series("compress_kv")?, series("compress_gate")?);
    let compress = EntryPooling {
        kv: kv.view("compress_kv")?,
        gate: gate.view("compress_gate")?,
        position_bias: floats(tensors, "position_bias")?,
    };
    let q = tensors.require("q")?.view("q")?;
    let [batch, heads, n, width] = q.shape();
    let chosen = match tensors.get("compressed_mask") {
        None => None,
        Some(mask) => {
            let entries = n / attention.rate;
            check_shape("compressed_mask", mask, &[batch, 1, n, entries])?;
            let flags = mask.data.to_f64();
            let list = |row: usize| (0..entries).filter(|e| flags[row * entries + e] != 0.0).collect();
            Some((0..batch * n).map(list).collect::<Vec<Vec<usize>>>())
        }
    };
    let index = match sparse && chosen.is_none() {
        false => None,
        true => Some((series("index_kv")?, series("index_gate")?)),
    };
    let indexer = match &index {
        None => None,
        Some((kv, gate)) => Some(EntryIndexer {
            q: tensors.require("index_q")?.view("index_q")?,
            compress: EntryPooling {
                kv: kv.view("index_kv")?,
                gate: gate.view("index_gate")?,
                position_bias: floats(tensors, "index_position_bias")?,
            },
            w: floats(tensors, "index_w")?,
        }),
    };
    let sinks = match tensors.get("sinks") {
        None => None,
        Some(_) => Some(floats(tensors, "sinks")?),
    };
    let raw = kv_raw.view("kv_raw")?;
    let x = CompressedInputs { q, kv_raw: raw, compress, sinks, indexer, chosen: chosen.as_deref() };
    let y = attention.forward_with(&x)?;

    let mut given = NamedTensors::default();
    let mut give = |name: &str, shape: &[usize], data: Vec<f32>, dtype: DType| -> Result<()> {
        given.0.insert(name.into(), NamedTensor::f32(name, shape, data)?.rounded(dtype));
        Ok(())
    };
    let dtype = q.dtype();
    if let Some(grad_o) = tensors.get("grad_o") {
        check_shape("grad_o", grad_o, &[batch, heads, n, width])?;
        let grad_o: Vec<f32> = grad_o.data.to_f64().into_iter().map(|x| x as f32).collect();
        let grads = attention.backward_with(&x, &y, &grad_o)?;
        let named = [
            ("q", grads.q),
            ("kv_raw", grads.kv_raw),
            ("compress_kv", grads.compress_kv),
            ("compress_gate", grads.compress_gate),
            ("position_bias", grads.position_bias),
            ("sinks", grads.sinks),
        ];
        for (name, grad) in named {
            if let Some(input) = tensors.get(name) {
                let dtype = input.data.dtype().unwrap_or(DType::F32);
                give(&format!("grad.{name}"), &input.shape, grad, dtype)?;
            }
        }
    }
    give("o", &[batch, heads, n, width], y.out, dtype)?;
    give("lse", &[batch, heads, n], y.lse, DType::F32)?;
    give("compressed", &[batch, n / attention.rate, width], y.compressed, DType::F32)?;
    Ok(given)
}
