//! Streams with given indexers, gates and entries: whatever the pieces, they give what the whole gives.

use super::golden::run;
use super::promises::{parse, tensors};
use attn_core::registry::{NamedTensor, NamedTensors, TensorData};
use attn_core::{AttnShape, Qkv, StreamShape, StreamState, TensorView, ViewMut};
use attn_sparse::{
    BlockIndexer, BlockIndexerInputs, CompressedAttention, CompressedInputs, CompressedKv, Dsa, DsaInputs,
    Entries, EntryIndexer, EntryPooling, Nsa, NsaGates, NsaInputs, NsaStream,
};
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::inputs::Problem;
use std::ops::Range;

const N: usize = 60;
/// Ends of pieces: a prompt, single tokens, a piece that ends several blocks.
const CUTS: [Range<usize>; 6] = [0..25, 25..26, 26..27, 27..28, 28..29, 29..60];

fn numbers(n: usize, seed: f32) -> Vec<f32> {
    (0..n).map(|at| ((at as f32 + seed) * 0.731 + (at * at) as f32 * 0.0013).sin()).collect()
}

fn shape() -> AttnShape {
    AttnShape { batch: 2, n_heads_kv: 2, ..AttnShape::square(4, N, 8) }
}

fn tensor(name: &str, axes: &[usize], seed: f32) -> NamedTensor {
    NamedTensor::f32(name, axes, numbers(axes.iter().product(), seed)).unwrap()
}

/// Rows of a tensor `[.., n, width]` or `[.., n]` whose length is the axis `axis`.
fn cut(x: &NamedTensor, axis: usize, rows: &Range<usize>) -> NamedTensor {
    let TensorData::F32(data) = &x.data else { panic!("f32") };
    let inner: usize = x.shape[axis + 1..].iter().product();
    let step = x.shape[axis] * inner;
    let part = |outer: &[f32]| outer[rows.start * inner..rows.end * inner].to_vec();
    let mut shape = x.shape.clone();
    shape[axis] = rows.len();
    NamedTensor { shape, data: TensorData::F32(data.chunks_exact(step).flat_map(part).collect()) }
}

fn flat(x: &NamedTensor) -> &[f32] {
    let TensorData::F32(data) = &x.data else { panic!("f32") };
    data
}

/// The output of pieces that `append` is given, `[batch, heads, N, width]`.
fn in_pieces(
    problem: &Problem,
    mut append: impl FnMut(Qkv<'_>, &Range<usize>, ViewMut<'_, f32>),
) -> Vec<f32> {
    let (x, s) = (problem.qkv().unwrap(), problem.shape);
    let mut out = vec![f32::NAN; s.rows() * s.head_dim_v];
    for rows in CUTS {
        let part =
            Qkv::new(x.q().narrow(rows.clone()), x.k().narrow(rows.clone()), x.v().narrow(rows.clone()))
                .unwrap();
        let strides = [s.n_heads_q * N * s.head_dim_v, N * s.head_dim_v, s.head_dim_v, 1];
        let view =
            ViewMut::new("out", &mut out[rows.start * s.head_dim_v..], part.shape().out(), strides).unwrap();
        append(part, &rows, view);
    }
    out
}

fn same(what: &str, got: &[f32], whole: &NamedTensors) {
    assert_close(what, got, &whole.require("o").unwrap().data.to_f64(), Tol::ScaledMax(2e-6));
}

#[test]
fn a_given_lightning_indexer_streams() {
    let (problem, s) = (Problem::normal(shape(), 1), shape());
    let (q, k, w) =
        (tensor("q", &[2, 3, N, 5], 1.0), tensor("k", &[2, 1, N, 5], 2.0), tensor("w", &[2, 3, N], 3.0));
    let mut given = tensors(&problem);
    let one = NamedTensor { shape: vec![2, N, 5], data: k.data.clone() };
    given.0.extend([("index_q".into(), q.clone()), ("index_k".into(), one), ("index_w".into(), w.clone())]);
    let whole = run("dsa", &parse("top_k=7"), &given);
    let mut stream =
        Dsa { top_k: 7, index_dim: None }.stream(StreamShape::of(&problem.qkv().unwrap()), None).unwrap();
    assert!(stream.is_empty());
    let got = in_pieces(&problem, |x, rows, out| {
        let (q, k, w) = (cut(&q, 2, rows), cut(&k, 2, rows), cut(&w, 2, rows));
        let (index_q, index_k) = (q.view("index_q").unwrap(), k.view("index_k").unwrap());
        let index = DsaInputs { index_q, index_k, index_w: flat(&w) };
        stream.append(x, &index, out.into()).unwrap();
    });
    same("dsa", &got, &whole);
    assert_eq!(stream.len(), N);
    assert!(stream.bytes() >= 4 * 2 * N * (2 * 16 + 5));
    // Other weights choose other keys.
    given.0.insert("index_w".into(), tensor("w", &[2, 3, N], 9.0));
    assert_ne!(run("dsa", &parse("top_k=7"), &given).require("o").unwrap(), whole.require("o").unwrap());
    // A piece whose index does not fit is refused, and nothing is appended.
    let part = problem.qkv().unwrap();
    let mut out = vec![0.0; s.rows() * 8];
    let (index_q, index_k) = (q.view("index_q").unwrap(), cut(&k, 2, &(0..9)));
    let index = DsaInputs { index_q, index_k: index_k.view("index_k").unwrap(), index_w: flat(&w) };
    let view = ViewMut::contiguous("out", &mut out, s.out()).unwrap();
    assert!(stream.append(part, &index, view.into()).unwrap_err().to_string().contains("index_k"));
    assert_eq!(stream.len(), N);
}

#[test]
fn a_given_block_indexer_streams() {
    let problem = Problem::normal(shape(), 2);
    let (q, k) = (tensor("q", &[2, 2, N, 5], 4.0), tensor("k", &[2, 1, N, 5], 5.0));
    let mut given = tensors(&problem);
    let one = NamedTensor { shape: vec![2, N, 5], data: k.data.clone() };
    given.0.extend([("index_q".into(), q.clone()), ("index_k".into(), one)]);
    let whole = run("block-indexer", &parse("block_len=4 top_k=3"), &given);
    let indexer = BlockIndexer { block_len: 4, top_k: 3, local_blocks: 1, index_dim: None };
    let mut stream = indexer.stream(StreamShape::of(&problem.qkv().unwrap()), None).unwrap();
    let got = in_pieces(&problem, |x, rows, out| {
        let (q, k) = (cut(&q, 2, rows), cut(&k, 2, rows));
        let (index_q, index_k) = (q.view("index_q").unwrap(), k.view("index_k").unwrap());
        stream.append(x, &BlockIndexerInputs { index_q, index_k }, out.into()).unwrap();
    });
    same("block-indexer", &got, &whole);
    assert!(stream.len() == N && !stream.is_empty() && stream.bytes() > 0);
}

fn small_nsa() -> Nsa {
    Nsa { compress_len: 6, compress_stride: 3, select_len: 4, n_selected: 4, window: 8, softmax_scale: None }
}

#[test]
fn gates_and_given_blocks_stream() {
    let (problem, s) = (Problem::normal(shape(), 3), shape());
    let nsa = small_nsa();
    let options = parse("compress_len=6 compress_stride=3 select_len=4 n_selected=4 window=8");
    let complete = |n: usize| if n < 6 { 0 } else { (n - 6) / 3 + 1 };
    let gates = [6.0, 7.0, 8.0].map(|seed| tensor("gate", &[2, 4, N], seed));
    let blocks = [9.0, 10.0].map(|seed| tensor("block", &[2, 2, complete(N), 8], seed));
    for is_given in [false, true] {
        let mut inputs = tensors(&problem);
        for (name, gate) in ["gate_compress", "gate_select", "gate_window"].into_iter().zip(&gates) {
            inputs.0.insert(name.into(), gate.clone());
        }
        if is_given {
            inputs.0.insert("k_compress".into(), blocks[0].clone());
            inputs.0.insert("v_compress".into(), blocks[1].clone());
        }
        let whole = run("nsa", &options, &inputs);
        let mut stream = nsa.stream(StreamShape::of(&problem.qkv().unwrap())).unwrap();
        let got = in_pieces(&problem, |qkv, rows, out| {
            let [compress, select, window] = gates.each_ref().map(|gate| cut(gate, 2, rows));
            let new = complete(rows.start)..complete(rows.end);
            let [k, v] = blocks.each_ref().map(|blocks| cut(blocks, 2, &new));
            let compressed = is_given
                .then(|| CompressedKv { k: k.view("k_compress").unwrap(), v: v.view("v_compress").unwrap() });
            let gates =
                NsaGates { compress: flat(&compress), select: flat(&select), window: Some(flat(&window)) };
            let x = NsaInputs { qkv, gates: Some(gates), compressed, selected: None };
            stream.append_with(&x, out.into()).unwrap();
        });
        same("nsa", &got, &whole);
        // The other kind of blocks is refused now.
        let part = problem.qkv().unwrap();
        let [k, v] = blocks.each_ref().map(|blocks| blocks.view("block").unwrap());
        let compressed = (!is_given).then_some(CompressedKv { k, v });
        let x = NsaInputs { compressed, ..NsaInputs::new(part) };
        let mut out = vec![0.0; s.rows() * 8];
        let view = ViewMut::contiguous("out", &mut out, s.out()).unwrap();
        assert!(stream.append_with(&x, view.into()).unwrap_err().to_string().contains("k_compress"));
    }
}

/// A prompt whose outputs nobody asks for leaves the stream as if somebody had.
#[test]
fn a_stream_takes_keys_without_queries() {
    let problem = Problem::normal(shape(), 3);
    let (x, nsa) = (problem.qkv().unwrap(), small_nsa());
    let part = |rows: Range<usize>| {
        Qkv::new(x.q().narrow(rows.clone()), x.k().narrow(rows.clone()), x.v().narrow(rows)).unwrap()
    };
    let (prompt, rest) = (part(0..41), part(41..N));
    let (mut asked, mut silent) =
        (nsa.stream(StreamShape::of(&x)).unwrap(), nsa.stream(StreamShape::of(&x)).unwrap());
    let append = |stream: &mut NsaStream, x: Qkv<'_>| {
        let mut out = vec![f32::NAN; x.shape().rows() * x.shape().head_dim_v];
        let view = ViewMut::contiguous("out", &mut out, x.shape().out()).unwrap();
        stream.append_with(&NsaInputs::new(x), view.into()).unwrap();
        out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
    };
    append(&mut asked, prompt);
    silent.append_keys(*prompt.k(), *prompt.v()).unwrap();
    let other = Problem::normal(AttnShape { batch: 1, ..shape() }, 3);
    let other = other.qkv().unwrap();
    assert!(silent.append_keys(*other.k(), *other.v()).is_err(), "half a batch");
    assert_eq!(silent.len(), 41);
    assert_eq!(append(&mut silent, rest), append(&mut asked, rest));
}

#[test]
fn learned_entries_stream() {
    let width = 8;
    for sparse in [false, true] {
        let entries = if sparse { Entries::Sparse { top_k: 3, index_dim: None } } else { Entries::Heavy };
        let attention = CompressedAttention { rate: 4, window: 7, entries, softmax_scale: None };
        let slots = if sparse { 2 * width } else { width };
        let (q, raw) = (tensor("q", &[2, 3, N, width], 1.0), tensor("raw", &[2, 1, N, width], 2.0));
        let (kv, gate) = (tensor("kv", &[2, 1, N, slots], 3.0), tensor("gate", &[2, 1, N, slots], 4.0));
        let bias = numbers(4 * slots, 5.0);
        let sinks = [0.3, -0.5, 1.0];
        let (index_q, index_w) = (tensor("index_q", &[2, 2, N, 5], 6.0), tensor("index_w", &[2, 2, N], 7.0));
        let (index_kv, index_gate) = (tensor("kv", &[2, 1, N, 10], 8.0), tensor("gate", &[2, 1, N, 10], 9.0));
        let index_bias = numbers(40, 11.0);
        let all = [&q, &raw, &kv, &gate, &index_q, &index_kv, &index_gate];
        let of = |tensors: &[NamedTensor], w: &NamedTensor, append: &mut dyn FnMut(&CompressedInputs<'_>)| {
            let views: Vec<TensorView<'_>> = tensors.iter().map(|x| x.view("x").unwrap()).collect();
            let [q, kv_raw, kv, gate, index_q, index_kv, index_gate] = views[..] else { panic!("seven") };
            let index = EntryPooling { kv: index_kv, gate: index_gate, position_bias: &index_bias };
            append(&CompressedInputs {
                q,
                kv_raw,
                compress: EntryPooling { kv, gate, position_bias: &bias },
                sinks: Some(&sinks),
                indexer: sparse.then_some(EntryIndexer { q: index_q, compress: index, w: flat(w) }),
                chosen: None,
            });
        };
        let mut whole = Vec::new();
        of(&all.map(Clone::clone), &index_w, &mut |x| whole = attention.forward_with(x).unwrap().out);
        let mut stream = attention.stream_given(2, 3, width).unwrap();
        let mut got = vec![f32::NAN; whole.len()];
        for rows in CUTS {
            let mut part = Vec::new();
            let cuts = all.map(|x| cut(x, 2, &rows));
            of(&cuts, &cut(&index_w, 2, &rows), &mut |x| part = stream.append(x).unwrap());
            for (head, part) in part.chunks_exact(rows.len() * width).enumerate() {
                got[(head * N + rows.start) * width..][..part.len()].copy_from_slice(part);
            }
        }
        let want: Vec<f64> = whole.iter().map(|x| f64::from(*x)).collect();
        assert_close(if sparse { "sparse" } else { "heavy" }, &got, &want, Tol::ScaledMax(2e-6));
        assert!(stream.len() == N && !stream.is_empty() && stream.bytes() > 0);
        // Half a batch does not fit.
        let half = all.map(|x| {
            let data = flat(x)[..flat(x).len() / 2].to_vec();
            NamedTensor::f32("x", &[&[1][..], &x.shape[1..]].concat(), data).unwrap()
        });
        let half_w = NamedTensor::f32("w", &[1, 2, N], flat(&index_w)[..2 * N].to_vec()).unwrap();
        of(&half, &half_w, &mut |x| {
            assert!(stream.append(x).unwrap_err().to_string().contains("batch"));
        });
    }
}
