use super::{attn, golden, json, refuses, stdout, text};
use std::collections::BTreeMap;

#[test]
fn every_kind_of_case_gets_its_verdict() {
    let folder = text(&golden(""));
    let all = json(&attn(["check", &folder, "--json"]));
    let stem = |f: &serde_json::Value| {
        let file = std::path::PathBuf::from(f["file"].as_str().unwrap());
        file.file_stem().unwrap().to_string_lossy().to_string()
    };
    let files: BTreeMap<String, &serde_json::Value> =
        all["files"].as_array().unwrap().iter().map(|f| (stem(f), f)).collect();
    for (case, file) in &files {
        assert_eq!(file["status"], "pass", "{case}: {file}");
    }
    assert_eq!((&all["failed"], &all["unsupported"]), (&0.into(), &0.into()));
    assert_eq!(all["passed"], files.len());
    let checked = |case: &str| files[case]["checked"].to_string();
    assert!(checked("cache-decode").contains("out.o (streamed)"), "{}", checked("cache-decode"));
    assert!(checked("merge-q64").contains("out.lse (merged)"), "{}", checked("merge-q64"));
    assert!(checked("retnet-rec-t1").contains("out.sT"), "{}", checked("retnet-rec-t1"));
    assert!(checked("streaming-sinks-00").contains("grad.q"), "{}", checked("streaming-sinks-00"));
    assert!(checked("sink-h8-kv2").contains("out.lse_without_sink"), "{}", checked("sink-h8-kv2"));
    assert!(checked("retnet-rec-t1").contains("grad.s0"), "{}", checked("retnet-rec-t1"));
}

#[test]
fn the_last_line_counts() {
    let (_folder, unknown) = changed("sink-h8-kv2.safetensors", |bytes| {
        replace(bytes, b"\"attention_sink\"", b"\"attention_sank\"")
    });
    let ended = attn(["check", &text(&golden("merge-q64.safetensors")), &unknown]);
    let out = stdout(&ended);
    assert_eq!(ended.status.code(), Some(0));
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!(lines.last(), Some(&"1 passed, 0 failed, 1 unsupported"));
    assert!(lines[0].starts_with("pass ") && lines[1].starts_with("unsupported "), "{out}");
    assert!(lines[1].contains("attention_sank"), "{out}");
}

#[test]
fn gradients_left_out_of_the_comparison_are_reported() {
    // The gradient of an input that no variant has: the rest still agrees.
    let (_folder, path) =
        changed("streaming-sinks-00.safetensors", |bytes| replace(bytes, b"\"grad.q\":{", b"\"grad.x\":{"));
    let ended = attn(["check", &path]);
    assert_eq!(ended.status.code(), Some(0));
    let line = stdout(&ended);
    assert!(line.starts_with("pass ") && line.contains("not checked: grad.x: "), "{line}");
    let all = json(&attn(["check", &path, "--json"]));
    let unchecked = &all["files"][0]["unchecked"];
    assert_eq!(unchecked.as_array().map(Vec::len), Some(1), "{unchecked}");
    assert_eq!(unchecked[0]["tensor"], "grad.x");
    assert!(unchecked[0]["because"].as_str().unwrap().contains("does not return it"), "{unchecked}");
    assert!(!all["files"][0]["checked"].to_string().contains("grad.x"));
}

/// Replaces the one place where `from` stands.
fn replace(bytes: &mut [u8], from: &[u8], to: &[u8]) {
    let places: Vec<usize> =
        (0..bytes.len() - from.len()).filter(|&at| bytes[at..].starts_with(from)).collect();
    assert_eq!(places.len(), 1, "places");
    bytes[places[0]..][..to.len()].copy_from_slice(to);
}

/// Adds `change` to the last number of a tensor of a golden file.
fn corrupt(name: &str, tensor: &str, change: f32) -> (tempfile::TempDir, String) {
    changed(name, |bytes| {
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let end = 8 + header + json[tensor]["data_offsets"][1].as_u64().unwrap() as usize;
        let number = f32::from_le_bytes(bytes[end - 4..end].try_into().unwrap());
        bytes[end - 4..end].copy_from_slice(&(number + change).to_le_bytes());
    })
}

/// A golden file with changed bytes, in a folder of its own.
fn changed(name: &str, change: impl FnOnce(&mut [u8])) -> (tempfile::TempDir, String) {
    let mut bytes = std::fs::read(golden(name)).unwrap();
    change(&mut bytes);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    let path = text(&path);
    (folder, path)
}

#[test]
fn one_wrong_number_fails_with_its_place() {
    for (file, tensor, place) in [
        ("causal-bottom_right-q17-k64.safetensors", "out.o", "16"),
        ("streaming-sinks-00.safetensors", "out.lse", "63"),
        ("retnet-rec-t1.safetensors", "out.sT", "7"),
        ("h-transformer-1d-01.safetensors", "out.o", "63"),
        ("onnx-attention_3d_gqa_causal.safetensors", "out.o", "3"),
        // The output of one decoded token, beside the queries of a prompt.
        ("kv-eviction-knorm-00.safetensors", "out.o", "15"),
    ] {
        let (_folder, path) = corrupt(file, tensor, 0.01);
        let ended = attn(["check", &path]);
        assert_eq!(ended.status.code(), Some(1), "{file}");
        let line = stdout(&ended);
        assert!(line.starts_with("fail ") && line.contains(tensor) && line.contains(place), "{line}");
        assert!(line.contains("1 failed"), "{line}");
        let ended = attn(["check", &path, "--json"]);
        assert_eq!(ended.status.code(), Some(1), "{file}");
        let all: serde_json::Value = serde_json::from_slice(&ended.stdout).unwrap();
        let failure = &all["files"][0]["failure"];
        assert!((failure["error"].as_f64().unwrap() - 0.01).abs() < 2e-3, "{file}: {failure}");
    }
}

#[test]
fn an_option_says_what_no_tensor_says() {
    let drop_ids = |bytes: &mut [u8]| replace(bytes, b"\"in.document_ids\":", b"\"aux.document_id\":");
    let (_folder, path) = changed("document-00.safetensors", drop_ids);
    let ended = attn(["check", &path]);
    assert_eq!(ended.status.code(), Some(0), "{}", stdout(&ended));
    let (_other, path) = changed("document-00.safetensors", |bytes| {
        drop_ids(bytes);
        replace(bytes, b"[0, 10, 11, 41, 64]", b"[0, 10, 12, 41, 64]");
    });
    assert_eq!(attn(["check", &path]).status.code(), Some(1));
}

#[test]
fn a_wrong_partial_result_fails_the_merge() {
    let (_folder, path) = corrupt("merge-q64.safetensors", "aux.part_out", 0.5);
    let ended = attn(["check", &path]);
    assert_eq!(ended.status.code(), Some(1));
    assert!(stdout(&ended).contains("(merged)"), "{}", stdout(&ended));
}

#[test]
fn paths_that_are_no_golden_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    refuses(&attn(["check", "no/such/file.safetensors"]), &["no/such/file.safetensors"]);
    refuses(&attn(["check", &text(folder.path())]), &["no .safetensors"]);
    let plain = super::save(folder.path(), "plain.safetensors", &super::inputs());
    refuses(&attn(["check", &plain]), &["plain.safetensors", "format"]);
    refuses(&attn(["check"]), &["PATHS"]);
}
