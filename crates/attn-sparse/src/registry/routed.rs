//! Trainable selection.

use super::given::run_decided;
use super::{at_least_1, length, only_causal};
use crate::routed::given_lists;
use crate::{BlockIndexer, BlockIndexerInputs, Dsa, DsaInputs, IndexTarget, InfLlm, Moba, Routed, Router};
use attn_core::registry::{Entry, NamedTensor, NamedTensors, OptionSpec, Options, run_qkv};
use attn_core::{Attention, AttnError, Family, Result};

pub(super) const INDEX_DIM: OptionSpec = OptionSpec {
    name: "index_dim",
    default: "",
    help: "channels of q and k that the index keeps where none is given; default a quarter of head_dim",
};

pub(super) const CAUSAL: OptionSpec = OptionSpec {
    name: "causal",
    default: "true",
    help: "always true: a query sees no key after its position",
};

pub(super) fn entries() -> Vec<Entry> {
    vec![
        Entry {
            name: Moba::NAME,
            family: Family::Sparse,
            summary: "Chunks chosen by the mean of their keys (mixture of block attention, Lu et al. 2025)",
            options: &[
                CAUSAL,
                OptionSpec { name: "chunk_len", default: "512", help: "keys of a chunk" },
                OptionSpec {
                    name: "top_k",
                    default: "8",
                    help: "chunks that a query sees, its own included",
                },
                OptionSpec::SCALE,
            ],
            constructor: |options| routed(options, moba(options)?),
            runner: run_moba,
        },
        Entry {
            name: Dsa::NAME,
            family: Family::Sparse,
            summary: "Tokens chosen by a lightning indexer (DeepSeek sparse attention, DeepSeek-AI 2025)",
            options: &[
                CAUSAL,
                OptionSpec { name: "top_k", default: "2048", help: "keys that a query sees" },
                INDEX_DIM,
                OptionSpec {
                    name: "indexer_target",
                    default: "selected",
                    help: "keys over which a given indexer is trained: selected|visible, the warm-up",
                },
                OptionSpec::SCALE,
            ],
            constructor: |options| routed(options, dsa(options)?),
            runner: run_dsa,
        },
        Entry {
            name: BlockIndexer::NAME,
            family: Family::Sparse,
            summary: "Blocks chosen by the largest index score of their tokens (MiniMax-M3, 2026)",
            options: &[
                CAUSAL,
                OptionSpec { name: "block_len", default: "64", help: "keys of a block" },
                OptionSpec { name: "top_k", default: "32", help: "blocks that a query sees" },
                OptionSpec {
                    name: "local_blocks",
                    default: "1",
                    help: "blocks that every query sees: its own and those before it",
                },
                INDEX_DIM,
                OptionSpec::SCALE,
            ],
            constructor: |options| routed(options, block_indexer(options)?),
            runner: run_block_indexer,
        },
        Entry {
            name: InfLlm::NAME,
            family: Family::Sparse,
            summary: "Blocks chosen by the probabilities of mean keys (InfLLM-v2, MiniCPM Team 2025)",
            options: &[
                CAUSAL,
                OptionSpec { name: "mean_len", default: "32", help: "keys of a mean" },
                OptionSpec {
                    name: "mean_stride",
                    default: "16",
                    help: "keys from one mean's start to the next one's",
                },
                OptionSpec { name: "block_len", default: "64", help: "keys of a block" },
                OptionSpec { name: "top_k", default: "64", help: "blocks that a query sees" },
                OptionSpec { name: "init_blocks", default: "1", help: "first blocks, seen by every query" },
                OptionSpec {
                    name: "local_blocks",
                    default: "32",
                    help: "blocks that every query sees: its own and those before it",
                },
                OptionSpec {
                    name: "dense_len",
                    default: "8192",
                    help: "queries that see no more keys attend all of them",
                },
                OptionSpec::SCALE,
            ],
            constructor: |options| routed(options, infllm(options)?),
            runner: run_qkv,
        },
        super::nsa::entry(),
        super::compressed::heavy(),
        super::compressed::sparse(),
    ]
}

pub(super) fn routed<R: Router>(options: &Options, router: R) -> Result<Box<dyn Attention>> {
    only_causal(options, R::NAME)?;
    Ok(Box::new(Routed { router, softmax_scale: options.get("scale")? }))
}

fn moba(options: &Options) -> Result<Moba> {
    Ok(Moba { chunk_len: at_least_1(options, "chunk_len", 512)?, top_k: at_least_1(options, "top_k", 8)? })
}

fn indexer_target(options: &Options) -> Result<IndexTarget> {
    match options.get::<String>("indexer_target")?.as_deref() {
        None | Some("selected") => Ok(IndexTarget::Selected),
        Some("visible") => Ok(IndexTarget::Visible),
        Some(other) => {
            let found = format!("`{other}`");
            Err(AttnError::value("option `indexer_target`", found, "selected or visible"))
        }
    }
}

fn dsa(options: &Options) -> Result<Dsa> {
    indexer_target(options)?;
    Ok(Dsa { top_k: at_least_1(options, "top_k", 2048)?, index_dim: length(options, INDEX_DIM.name)? })
}

fn block_indexer(options: &Options) -> Result<BlockIndexer> {
    Ok(BlockIndexer {
        block_len: at_least_1(options, "block_len", 64)?,
        top_k: at_least_1(options, "top_k", 32)?,
        local_blocks: options.get_or("local_blocks", 1)?,
        index_dim: length(options, INDEX_DIM.name)?,
    })
}

fn infllm(options: &Options) -> Result<InfLlm> {
    Ok(InfLlm {
        mean_len: at_least_1(options, "mean_len", 32)?,
        mean_stride: at_least_1(options, "mean_stride", 16)?,
        block_len: at_least_1(options, "block_len", 64)?,
        top_k: at_least_1(options, "top_k", 64)?,
        init_blocks: options.get_or("init_blocks", 1)?,
        local_blocks: options.get_or("local_blocks", 32)?,
        dense_len: options.get_or("dense_len", 8192)?,
        softmax_scale: options.get("scale")?,
    })
}

/// `q`, `k`, `v`, and perhaps the chosen chunks as `block_select [batch, n_heads_q, n_q, chunks]`, 0 or 1.
fn run_moba(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    let Some(given) = tensors.get("block_select") else { return run_qkv(entry, options, tensors) };
    tensors.only(entry.name, &["q", "k", "v", "grad_o", "block_select"])?;
    let (moba, s) = (moba(options)?, tensors.qkv()?.shape());
    let n_chunks = s.n_kv.div_ceil(moba.chunk_len);
    check_shape("block_select", given, &[s.batch, s.n_heads_q, s.n_q, n_chunks])?;
    let flags = given.data.to_f64();
    let rows = flags.chunks_exact(n_chunks.max(1));
    let lists: Vec<Vec<usize>> =
        rows.map(|row| (0..n_chunks).filter(|chunk| row[*chunk] != 0.0).collect()).collect();
    run_decided(options, tensors, given_lists(&s, moba.chunk_len, s.n_heads_q, &lists)?)
}

/// `q`, `k`, `v`, and perhaps `index_q (batch, index heads, n_q, width)`, `index_k [batch, n_kv, width]`,
/// `index_w [batch, index heads, n_q]`, or what was chosen: `selected [batch, n_q, slots]`, -1 for an empty slot.
///
/// With an indexer and `grad_indexer_loss [batch, n_q]` also its divergence from the attention, `indexer_loss [batch, n_q]`, and
/// `grad.index_q`, `grad.index_k`, `grad.index_w`.
fn run_dsa(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    const INDEX: [&str; 3] = ["index_q", "index_k", "index_w"];
    if !INDEX.iter().chain(&["selected"]).any(|name| tensors.get(name).is_some()) {
        return run_qkv(entry, options, tensors);
    }
    let known = ["q", "k", "v", "grad_o", "index_q", "index_k", "index_w", "selected", "grad_indexer_loss"];
    tensors.only(entry.name, &known)?;
    let (dsa, s) = (dsa(options)?, tensors.qkv()?.shape());
    if let Some(given) = tensors.get("selected") {
        if tensors.get("grad_indexer_loss").is_some() {
            return Err(AttnError::value("grad_indexer_loss", "beside `selected`", "an indexer to train"));
        }
        return run_decided(options, tensors, given_lists(&s, 1, 1, &slots(given, &[s.batch, s.n_q])?)?);
    }
    let index_k = one_head(tensors.require("index_k")?)?;
    let index_w = floats(tensors, "index_w")?;
    let inputs = DsaInputs {
        index_q: tensors.require("index_q")?.view("index_q")?,
        index_k: index_k.view("index_k")?,
        index_w,
    };
    let mut given = run_decided(options, tensors, dsa.decide_with(&s, &inputs)?)?;
    if let Some(grad) = tensors.get("grad_indexer_loss") {
        check_shape("grad_indexer_loss", grad, &[s.batch, s.n_q])?;
        let (target, grad) = (indexer_target(options)?, floats(tensors, "grad_indexer_loss")?);
        let x = tensors.qkv()?;
        let grads = dsa.train_indexer(&x, &inputs, target, options.get("scale")?, Some(grad))?;
        let loss = NamedTensor::f32("indexer_loss", &[s.batch, s.n_q], grads.loss)?;
        given.0.insert("indexer_loss".into(), loss);
        let of = [("index_q", grads.index_q), ("index_k", grads.index_k), ("index_w", grads.index_w)];
        for (name, grad) in of {
            let axes = &tensors.require(name)?.shape;
            given.0.insert(format!("grad.{name}"), NamedTensor::f32(name, axes, grad)?);
        }
    }
    Ok(given)
}

/// `q`, `k`, `v`, and perhaps `index_q (batch, n_heads_kv, n_q, width)` and `index_k [batch, n_kv, width]`, or what was chosen:
/// `block_index [batch, n_heads_kv, n_q, slots]`, -1 for an empty slot.
fn run_block_indexer(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    if !["index_q", "index_k", "block_index"].iter().any(|name| tensors.get(name).is_some()) {
        return run_qkv(entry, options, tensors);
    }
    tensors.only(entry.name, &["q", "k", "v", "grad_o", "index_q", "index_k", "block_index"])?;
    let (indexer, s) = (block_indexer(options)?, tensors.qkv()?.shape());
    if let Some(given) = tensors.get("block_index") {
        let lists = slots(given, &[s.batch, s.n_heads_kv, s.n_q])?;
        return run_decided(options, tensors, given_lists(&s, indexer.block_len, s.n_heads_kv, &lists)?);
    }
    let index_k = one_head(tensors.require("index_k")?)?;
    let inputs = BlockIndexerInputs {
        index_q: tensors.require("index_q")?.view("index_q")?,
        index_k: index_k.view("index_k")?,
    };
    run_decided(options, tensors, indexer.decide_with(&s, &inputs)?)
}

/// The numbers of an f32 tensor that has to be there.
pub(super) fn floats<'a>(tensors: &'a NamedTensors, name: &str) -> Result<&'a [f32]> {
    tensors.require(name)?;
    Ok(tensors.f32(name)?.map_or(&[], |(_, data)| data))
}

pub(super) fn check_shape(name: &str, tensor: &NamedTensor, expected: &[usize]) -> Result<()> {
    if tensor.shape == expected {
        return Ok(());
    }
    let found = format!("{:?}", tensor.shape);
    Err(AttnError::value(format!("{name}'s shape"), found, format!("{expected:?}")))
}

/// Lists of chosen entries from `[rows.., slots]`; negative slots are empty.
pub(super) fn slots(tensor: &NamedTensor, rows: &[usize]) -> Result<Vec<Vec<usize>>> {
    let n_slots = tensor.shape.last().copied().unwrap_or(0);
    let mut expected = rows.to_vec();
    expected.push(n_slots);
    check_shape("chosen entries", tensor, &expected)?;
    let all = tensor.data.to_f64();
    let list = |slots: &[f64]| slots.iter().filter(|x| **x >= 0.0).map(|x| *x as usize).collect();
    Ok(match n_slots {
        0 => vec![Vec::new(); rows.iter().product()],
        _ => all.chunks_exact(n_slots).map(list).collect(),
    })
}

/// `[batch, n, width]` as `(batch, 1, n, width)`.
pub(super) fn one_head(tensor: &NamedTensor) -> Result<NamedTensor> {
    match *tensor.shape {
        [batch, n, width] => Ok(NamedTensor { shape: vec![batch, 1, n, width], data: tensor.data.clone() }),
        [_, 1, _, _] => Ok(tensor.clone()),
        _ => {
            let found = format!("{:?}", tensor.shape);
            Err(AttnError::value("shape", found, "[batch, n, width]: one series for all heads"))
        }
    }
}
