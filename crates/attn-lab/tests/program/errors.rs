use super::{attn, inputs, refuses, save, text, with};
use attn_core::registry::{NamedTensor, NamedTensors, TensorData};

/// Runs flash on `tensors`; returns what the program did with an output that already existed.
#[track_caller]
fn run_is_refused(tensors: &NamedTensors, extra: &[&str], words: &[&str]) {
    let folder = tempfile::tempdir().unwrap();
    let input = save(folder.path(), "in.safetensors", tensors);
    let output = folder.path().join("out.safetensors");
    std::fs::write(&output, "an older result").unwrap();
    let variant = if extra.contains(&"--variant") { &[][..] } else { &["--variant", "flash"] };
    let files = ["run", "--input", &input, "--output", &text(&output)].map(str::to_string);
    let args = files.into_iter().chain(variant.iter().chain(extra).map(|s| s.to_string()));
    refuses(&attn(args), words);
    assert_eq!(std::fs::read_to_string(&output).unwrap(), "an older result", "nothing is lost");
}

#[test]
fn wrong_tensors() {
    let mut missing = inputs();
    missing.0.remove("k");
    run_is_refused(&missing, &[], &["missing tensor `k`", "q, v"]);
    let flat = with(inputs(), "v", NamedTensor::f32("v", &[21, 5], vec![0.0; 105]).unwrap());
    run_is_refused(&flat, &[], &["v's shape", "[21, 5]", "(batch, heads, length, width)"]);
    let narrow = with(inputs(), "k", NamedTensor::f32("k", &[1, 2, 21, 7], vec![0.0; 294]).unwrap());
    run_is_refused(&narrow, &[], &["k: head_dim is 7", "8"]);
    let indices = NamedTensor { shape: vec![1, 2, 21, 8], data: TensorData::I32(vec![0; 336]) };
    run_is_refused(&with(inputs(), "k", indices), &[], &["k: dtype", "f32"]);
    let other = with(inputs(), "gate", NamedTensor::f32("gate", &[1], vec![0.0]).unwrap());
    run_is_refused(&other, &["--variant", "naive"], &["naive", "`gate`", "q, k, v"]);
}

#[test]
fn nan_is_refused_with_its_place() {
    let mut nan = inputs();
    let TensorData::F32(v) = &mut nan.0.get_mut("v").unwrap().data else { panic!("f32") };
    v[5 * 21 + 7] = f32::NAN;
    run_is_refused(&nan, &[], &["`v`", "[0, 1, 1, 2]", "--allow-nan"]);
}

#[test]
fn unknown_names() {
    run_is_refused(&inputs(), &["--variant", "flesh"], &["flesh", "flash", "retnet"]);
    run_is_refused(&inputs(), &["--set", "casual=true"], &["casual", "causal"]);
    run_is_refused(&inputs(), &["--set", "causal=yes"], &["causal", "yes", "bool"]);
    run_is_refused(&inputs(), &["--set", "causal"], &["causal", "key=value"]);
}

#[test]
fn files_that_cannot_be_used() {
    let folder = tempfile::tempdir().unwrap();
    let input = save(folder.path(), "in.safetensors", &inputs());
    let run =
        |input: &str, output: &str| attn(["run", "--variant", "flash", "--input", input, "--output", output]);
    refuses(&run("no/such.safetensors", "x.safetensors"), &["cannot read", "no/such.safetensors"]);
    refuses(&run(&input, "no/such/out.safetensors"), &["cannot write", "no/such/out.safetensors"]);
    let text_file = text(&folder.path().join("q.txt"));
    std::fs::write(&text_file, "0.5").unwrap();
    refuses(&run(&text_file, "x.safetensors"), &["q.txt", ".safetensors"]);
    let damaged = text(&folder.path().join("damaged.safetensors"));
    std::fs::write(&damaged, "0.5").unwrap();
    refuses(&run(&damaged, "x.safetensors"), &["damaged.safetensors", "not a safetensors file"]);
}

#[test]
fn bad_usage() {
    refuses(&attn([] as [&str; 0]), &["--help"]);
    refuses(&attn(["dance"]), &["dance"]);
    refuses(&attn(["run", "--variant", "flash"]), &["--input", "--output"]);
    refuses(&attn(["list", "--family", "royal"]), &["royal", "linear"]);
    refuses(&attn(["limits", "--isa", "mmx"]), &["mmx", "portable"]);
    refuses(&attn(["limits", "--threads", "0"]), &["threads"]);
}

#[test]
fn captures_that_cannot_be() {
    let folder = tempfile::tempdir().unwrap();
    let story = text(&folder.path().join("story.txt"));
    std::fs::write(&story, "once").unwrap();
    let out = text(&folder.path().join("qkv.safetensors"));
    let capture = |more: &[&str]| {
        let args = ["capture", "--text", &story, "--output", &out].into_iter().chain(more.iter().copied());
        attn(args.collect::<Vec<_>>())
    };
    refuses(&capture(&["--n", "1000"]), &["4 bytes", "1000", "--text"]);
    refuses(&capture(&["--n", "4", "--layer", "99"]), &["layer 99"]);
    refuses(&capture(&["--n", "0"]), &["--n"]);
    assert!(!std::path::Path::new(&out).exists());
    let ended = capture(&["--n", "4"]);
    assert!(ended.status.success(), "{}", String::from_utf8_lossy(&ended.stderr));
    let captured = attn_lab::tensors::load(out.as_ref()).unwrap();
    assert_eq!(captured.qkv().unwrap().shape().n_q, 4);
}
