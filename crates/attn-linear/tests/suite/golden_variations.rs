//! Every golden case once more: packed behind others of its kind, and stored in halves.

use attn_core::DType;
use attn_core::registry::{Entry, NamedTensor, NamedTensors, Options, TensorData};
use attn_testkit::compare::{Tol, assert_close};
use std::ops::Range;

/// Tokens of the cases that are varied: no width is a multiple of it.
pub(crate) const TOKENS: usize = 17;

/// Prefix sums of the lengths of the sequences that a case is cut into; one is empty.
const SUMS: [usize; 4] = [0, 5, 5, TOKENS];

/// Variants of another form than a sequence of tokens seen one after the other.
const NOT_PACKED: [&str; 4] = ["linformer", "nystromformer", "agent", "xca"];

/// What is known before the first token.
const STATES: [&str; 18] = [
    "s0",
    "z0",
    "h0",
    "b0",
    "hk0",
    "hv0",
    "m0",
    "n0",
    "num0",
    "den0",
    "max0",
    "use0",
    "phase0",
    "angle0",
    "initial_state",
    "initial_normaliser",
    "k_before",
    "v_before",
];

/// Which axis the tokens lie along, and how many rows each has: at most three.
fn token_axis(tensor: &NamedTensor) -> Option<(usize, usize)> {
    if tensor.shape.len() < 3 {
        return None;
    }
    let axis = tensor.shape.iter().position(|n| (1..4).any(|per| *n == per * TOKENS))?;
    Some((axis, tensor.shape[axis] / TOKENS))
}

/// Entries `range` of an axis.
fn sliced(tensor: &NamedTensor, axis: usize, range: Range<usize>) -> NamedTensor {
    let (n, inner) = (tensor.shape[axis], tensor.shape[axis + 1..].iter().product::<usize>());
    let data = tensor.data.to_f64();
    let rows = data.chunks(n * inner).flat_map(|outer| &outer[range.start * inner..range.end * inner]);
    let mut shape = tensor.shape.clone();
    shape[axis] = range.len();
    NamedTensor { shape, data: TensorData::F32(rows.map(|x| *x as f32).collect()) }
}

fn numbers(all: &NamedTensors, name: &str) -> Vec<f64> {
    all.require(name).unwrap().data.to_f64()
}

/// Outputs, states and gradients of packed sequences are those of the sequences alone.
pub(crate) fn packed(entry: &Entry, options: &Options, tensors: &NamedTensors) {
    if ["q", "k", "v"].iter().any(|name| tensors.get(name).is_some_and(|t| token_axis(t).is_none())) {
        // More keys than queries: no sequence of tokens.
        return;
    }
    let what = format!("{} {options:?}", entry.name);
    let n = SUMS.len() - 1;
    let mut all = tensors.clone();
    let sums = TensorData::I32(SUMS.map(|sum| sum as i32).to_vec());
    all.0.insert("cu_seqlens".into(), NamedTensor { shape: vec![n + 1], data: sums });
    for (name, tensor) in all.0.iter_mut().filter(|(name, _)| STATES.contains(&&***name)) {
        // Every sequence starts with what the case starts with.
        let entries = (0..tensor.shape[0]).flat_map(|batch| vec![sliced(tensor, 0, batch..batch + 1); n]);
        let data: Vec<f32> = entries.flat_map(|t| t.data.to_f64()).map(|x| x as f32).collect();
        let shape = [&[tensor.shape[0] * n], &tensor.shape[1..]].concat();
        *tensor = NamedTensor::f32(name, &shape, data).unwrap();
    }
    let got = entry.run(options, &all);
    if NOT_PACKED.contains(&entry.name) {
        let error = got.unwrap_err().to_string();
        assert!(error.contains("cu_seqlens"), "{what}: {error}");
        return;
    }
    let got = got.unwrap_or_else(|e| panic!("{what}: {e}"));
    let mut totals: Vec<(String, Vec<f64>)> = Vec::new();
    for (sequence, cut) in SUMS.windows(2).map(|pair| pair[0]..pair[1]).enumerate() {
        if cut.is_empty() {
            continue;
        }
        let own = tensors.0.iter().map(|(name, tensor)| match token_axis(tensor) {
            Some((axis, per)) => (name.clone(), sliced(tensor, axis, cut.start * per..cut.end * per)),
            None => (name.clone(), tensor.clone()),
        });
        let alone =
            entry.run(options, &NamedTensors(own.collect())).unwrap_or_else(|e| panic!("{what}: {e}"));
        for (name, tensor) in &got.0 {
            let what = format!("{what}: {name} of {cut:?}");
            let want = numbers(&alone, name);
            let is_state = name.strip_prefix("grad.").map_or(name != "o", |name| STATES.contains(&name));
            let found = match token_axis(tensor) {
                Some((axis, per)) => sliced(tensor, axis, cut.start * per..cut.end * per).data.to_f64(),
                None if is_state => {
                    let entries = (0..tensor.shape[0] / n).map(|batch| batch * n + sequence);
                    entries.flat_map(|at| sliced(tensor, 0, at..at + 1).data.to_f64()).collect()
                }
                // What all sequences read.
                None => {
                    match totals.iter_mut().find(|(known, _)| known == name) {
                        Some((_, sum)) => sum.iter_mut().zip(&want).for_each(|(sum, x)| *sum += x),
                        None => totals.push((name.clone(), want)),
                    }
                    continue;
                }
            };
            assert_close(&what, &found, &want, Tol::ScaledMax(1e-5));
        }
    }
    for (name, want) in totals {
        assert_close(&format!("{what}: {name}"), &numbers(&got, &name), &want, Tol::ScaledMax(1e-5));
    }
    let mut wrong = all;
    for sums in [vec![0, 5, 4, 17], vec![0, 16], vec![1, 17], vec![0, -1, 17]] {
        let shape = vec![sums.len()];
        wrong.0.insert("cu_seqlens".into(), NamedTensor { shape, data: TensorData::I32(sums.clone()) });
        let error = entry.run(options, &wrong).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("cu_seqlens"), "{what} {sums:?}: {error}");
    }
}

/// Inputs and outputs in halves give what the same numbers give as floats, rounded.
pub(crate) fn halves(entry: &Entry, options: &Options, tensors: &NamedTensors) {
    for (dtype, bound) in [(DType::Bf16, 6e-3), (DType::F16, 8e-4)] {
        let what = format!("{} {options:?} {dtype}", entry.name);
        let (mut half, mut full) = (tensors.clone(), tensors.clone());
        for (name, tensor) in tensors
            .0
            .iter()
            .filter(|(name, tensor)| token_axis(tensor).is_some() || ["q", "k", "v"].contains(&&***name))
        {
            let rounded = tensor.rounded(dtype);
            let wide = rounded.data.to_f64().into_iter().map(|x| x as f32).collect();
            full.0.insert(name.clone(), NamedTensor::f32(name, &tensor.shape, wide).unwrap());
            half.0.insert(name.clone(), rounded);
        }
        let [got, want] =
            [&half, &full].map(|all| entry.run(options, all).unwrap_or_else(|e| panic!("{what}: {e}")));
        let rows = ["q", "v", "x", "u", "candidate"].iter().find_map(|name| half.get(name));
        let out = rows.unwrap().data.dtype();
        for (name, tensor) in &got.0 {
            let input = name.strip_prefix("grad.").map_or(out, |name| half.get(name).unwrap().data.dtype());
            if name == "o" || name.starts_with("grad.") {
                assert_eq!(tensor.data.dtype(), input, "{what}: {name}");
            }
            assert_close(
                &format!("{what}: {name}"),
                &tensor.data.to_f64(),
                &numbers(&want, name),
                Tol::ScaledMax(bound),
            );
        }
    }
}
