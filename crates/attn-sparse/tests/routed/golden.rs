//! Stored choices and outputs; see `testdata/README.md`.

use attn_core::mask::Head;
use attn_core::registry::{NamedTensor, NamedTensors, Options, find};
use attn_core::{AttnShape, TensorView};
use attn_sparse::{BlockIndexer, BlockIndexerInputs, Decision, Dsa, DsaInputs, Moba, Routed};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::golden::{GoldenCase, load_dir};

pub(super) fn cases(variant: &str, count: usize) -> Vec<GoldenCase> {
    let all = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    let cases: Vec<_> = all.into_iter().filter(|c| c.variant == variant).collect();
    assert_eq!(cases.len(), count, "{variant}");
    cases
}

pub(super) fn size(case: &GoldenCase, name: &str) -> usize {
    case.options[name].as_u64().unwrap() as usize
}

pub(super) fn options(pairs: &[(&str, usize)]) -> Options {
    pairs.iter().fold(Options::new(), |all, (name, value)| all.with(name, value))
}

pub(super) fn run(name: &str, options: &Options, tensors: &NamedTensors) -> NamedTensors {
    find(&attn_sparse::registry(), name).unwrap().run(options, tensors).unwrap()
}

/// The outputs by the stored choice given as a tensor, and, where it is the same, by ours.
pub(super) fn check_outputs(case: &GoldenCase, name: &str, options: &Options, given: &str, same: bool) {
    if same {
        case.assert_outputs(&run(name, options, &case.inputs));
    }
    let mut tensors = case.inputs.clone();
    tensors.0.insert(given.into(), case.given.require(given).unwrap().clone());
    tensors.0.retain(|name, _| !name.starts_with("index_"));
    case.assert_outputs(&run(name, options, &tensors));
}

/// The entries of a row in blocks of `block_len` keys.
fn entries(
    decision: &Decision,
    (batch, head): (usize, usize),
    i: usize,
    n: usize,
    block_len: usize,
) -> Vec<usize> {
    let mut blocks = decision.selected(Head { batch, head }, i, n);
    blocks.iter_mut().for_each(|j| *j /= block_len);
    blocks.dedup();
    blocks
}

/// The stored slots of a row, sorted, without empty ones.
fn stored(slots: &[f64]) -> Vec<usize> {
    let mut list: Vec<usize> = slots.iter().filter(|x| **x >= 0.0).map(|x| *x as usize).collect();
    list.sort_unstable();
    list
}

fn one_head<'a>(tensor: &'a NamedTensor, made: &'a mut Option<NamedTensor>) -> TensorView<'a> {
    let mut shape = tensor.shape.clone();
    shape.insert(1, 1);
    made.insert(NamedTensor { shape, data: tensor.data.clone() }).view("index_k").unwrap()
}

#[test]
fn mixture_of_block_attention() {
    for case in cases("moba", 4) {
        let (chunk_len, top_k) = (size(&case, "chunk"), size(&case, "topk"));
        let x = case.inputs.qkv().unwrap();
        let decision = Routed::new(Moba { chunk_len, top_k }).decide(&x).unwrap();
        let (s, flags) = (x.shape(), case.given.require("block_select").unwrap().data.to_f64());
        let n_chunks = s.n_kv.div_ceil(chunk_len);
        for (row, flags) in flags.chunks_exact(n_chunks).enumerate() {
            let (head, i) = (row / s.n_q, row % s.n_q);
            let want: Vec<usize> = (0..n_chunks).filter(|chunk| flags[*chunk] != 0.0).collect();
            let got = entries(&decision, (head / s.n_heads_q, head % s.n_heads_q), i, s.n_kv, chunk_len);
            assert_eq!(got, want, "{} head {head} row {i}", case.case);
        }
        check_outputs(
            &case,
            "moba",
            &options(&[("chunk_len", chunk_len), ("top_k", top_k)]),
            "block_select",
            true,
        );
    }
}

fn index_score(x: &DsaInputs<'_>, batch: usize, i: usize, j: usize) -> f64 {
    let [_, heads, n, width] = x.index_q.shape();
    let mut k = vec![0.0; width];
    x.index_k.read_row(batch, 0, j, &mut k);
    let product = |head: usize| {
        let mut q = vec![0.0; width];
        x.index_q.read_row(batch, head, i, &mut q);
        q.iter().zip(&k).map(|(q, k)| q * k).sum::<f64>()
    };
    (0..heads).map(|h| f64::from(x.index_w[(batch * heads + h) * n + i]) * product(h).max(0.0)).sum()
}

#[test]
fn lightning_indexer() {
    for case in cases("dsa", 3) {
        let top_k = size(&case, "topk");
        let s: AttnShape = case.inputs.qkv().unwrap().shape();
        let mut made = None;
        let inputs = DsaInputs {
            index_q: case.inputs.require("index_q").unwrap().view("index_q").unwrap(),
            index_k: one_head(case.inputs.require("index_k").unwrap(), &mut made),
            index_w: case.inputs.f32("index_w").unwrap().unwrap().1,
        };
        let decision = Dsa { top_k, index_dim: None }.decide_with(&s, &inputs).unwrap();
        let slots = case.given.require("selected").unwrap().data.to_f64();
        let mut same = true;
        for (row, slots) in slots.chunks_exact(top_k).enumerate() {
            let (batch, i) = (row / s.n_q, row % s.n_q);
            for head in 0..s.n_heads_q {
                let (got, want) = (entries(&decision, (batch, head), i, s.n_kv, 1), stored(slots));
                // Where relu leaves many zeros the reference takes any of them, we the first.
                let score = |list: &[usize]| {
                    let mut scores: Vec<f64> =
                        list.iter().map(|j| index_score(&inputs, batch, i, *j)).collect();
                    scores.sort_by(f64::total_cmp);
                    scores
                };
                assert_close(
                    &format!("{} row {row}", case.case),
                    &score(&got),
                    &score(&want),
                    Tol::ScaledMax(1e-6),
                );
                assert_eq!(got.len(), want.len());
                same &= got == want;
            }
        }
        check_outputs(&case, "dsa", &options(&[("top_k", top_k)]), "selected", same);
    }
}

#[test]
fn block_indexer() {
    for case in cases("block-indexer", 2) {
        let [block_len, top_k, local_blocks] =
            ["block_size", "topk_blocks", "local_blocks"].map(|o| size(&case, o));
        let s: AttnShape = case.inputs.qkv().unwrap().shape();
        let mut made = None;
        let inputs = BlockIndexerInputs {
            index_q: case.inputs.require("index_q").unwrap().view("index_q").unwrap(),
            index_k: one_head(case.inputs.require("index_k").unwrap(), &mut made),
        };
        let indexer = BlockIndexer { block_len, top_k, local_blocks, index_dim: None };
        let decision = indexer.decide_with(&s, &inputs).unwrap();
        let slots = case.given.require("block_index").unwrap().data.to_f64();
        for (row, slots) in slots.chunks_exact(top_k).enumerate() {
            let (list, i) = (row / s.n_q, row % s.n_q);
            let head = (list / s.n_heads_kv, list % s.n_heads_kv * s.group_size());
            assert_eq!(
                entries(&decision, head, i, s.n_kv, block_len),
                stored(slots),
                "{} row {row}",
                case.case
            );
        }
        let options = options(&[("block_len", block_len), ("top_k", top_k), ("local_blocks", local_blocks)]);
        check_outputs(&case, "block-indexer", &options, "block_index", true);
    }
}
