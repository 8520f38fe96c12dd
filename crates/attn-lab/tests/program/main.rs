//! The program `attn`, from outside: arguments in, files and exit codes out.

mod bench;
mod check;
mod errors;
mod list;
mod run;

use assert_cmd::Command;
use attn_core::registry::{NamedTensor, NamedTensors};
use attn_core::{AttnShape, DType};
use std::path::{Path, PathBuf};
use std::process::Output;

/// Runs `attn` with these arguments.
fn attn<S: AsRef<str>>(args: impl IntoIterator<Item = S>) -> Output {
    let mut command = Command::cargo_bin("attn").expect("the binary is built with the tests");
    command.args(args.into_iter().map(|a| a.as_ref().to_string())).output().expect("it starts")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("text")
}

/// Standard output as JSON, of a run that succeeded.
#[track_caller]
fn json(output: &Output) -> serde_json::Value {
    let text = stdout(output);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"))
}

/// Exit code 2, nothing on standard output, and one line on standard error that names all of `words`.
#[track_caller]
fn refuses(output: &Output, words: &[&str]) {
    let complaint = String::from_utf8_lossy(&output.stderr).to_string();
    assert_eq!(output.status.code(), Some(2), "{complaint}");
    assert_eq!(complaint.trim_end().lines().count(), 1, "one line: {complaint}");
    assert_eq!(stdout(output), "");
    for word in words {
        assert!(complaint.contains(word), "`{word}` is not in: {complaint}");
    }
}

/// Small random q, k and v.
fn inputs() -> NamedTensors {
    let shape = AttnShape { n_heads_q: 4, n_kv: 21, head_dim_v: 5, ..AttnShape::square(2, 17, 8) };
    attn_lab::gauss::qkv(&shape, DType::F32, 7)
}

fn save(folder: &Path, name: &str, tensors: &NamedTensors) -> String {
    let path = folder.join(name);
    attn_lab::tensors::save(&path, tensors).expect("a temporary folder can be written");
    text(&path)
}

fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_string()
}

fn with(tensors: NamedTensors, name: &str, tensor: NamedTensor) -> NamedTensors {
    let mut tensors = tensors;
    tensors.0.insert(name.into(), tensor);
    tensors
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("testdata/golden").join(name)
}
