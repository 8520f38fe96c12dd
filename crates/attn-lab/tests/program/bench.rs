use super::{attn, json, refuses};

const SMALL: [&str; 7] = ["bench", "--n", "64", "--threads", "1", "--seconds", "0"];

fn bench(more: &[&str]) -> std::process::Output {
    attn(SMALL.into_iter().chain(more.iter().copied()))
}

#[test]
fn a_case_is_reported_with_its_figures() {
    let more =
        ["--variant", "flash", "--causal", "--heads", "4", "--kv-heads", "2", "--dtype", "bf16", "--json"];
    let report = json(&bench(&more));
    let number = |path: &str| report.pointer(path).and_then(|v| v.as_f64()).unwrap_or(f64::NAN);
    for path in [
        "/seconds/p20",
        "/seconds/median",
        "/seconds/p80",
        "/gflops",
        "/peak_gflops",
        "/share_of_peak",
        "/gb_s",
        "/read_gb_s",
        "/share_of_read",
        "/tokens_s",
        "/extra_bytes",
        "/peak_rss_bytes",
    ] {
        assert!(number(path) > 0.0, "{path}: {report}");
    }
    let share = number("/gflops") / number("/peak_gflops");
    assert!((share / number("/share_of_peak") - 1.0).abs() < 1e-9);
    assert_eq!((number("/threads"), &report["mode"]), (1.0, &"forward".into()));
    assert_eq!((&report["dtype"], &report["n_heads_kv"]), (&"bf16".into(), &2.into()));
    assert_eq!(report["options"]["causal"], "true");
    assert!(report["isa"].is_string() && report["limits_drift"].is_number());
    // 64 queries see 64 * 65 / 2 pairs in each of 4 heads; a pair costs two products of width 64.
    let flops = 4.0 * (64.0 * 65.0 / 2.0) * 2.0 * 128.0;
    assert!((number("/gflops") * 1e9 * number("/seconds/median") / flops - 1.0).abs() < 1e-6);
}

#[test]
fn decoding_appends_one_token() {
    let report = json(&bench(&["--variant", "flash", "--mode", "decode", "--causal", "--json"]));
    assert_eq!((&report["mode"], &report["n_q"], &report["n_kv"]), (&"decode".into(), &1.into(), &64.into()));
    let tokens = report["tokens_s"].as_f64().unwrap() * report["seconds"]["median"].as_f64().unwrap();
    assert!((tokens - 1.0).abs() < 1e-9);
}

#[test]
fn every_instruction_set_can_be_forced() {
    for isa in attn_core::simd::Isa::available() {
        let report = json(&bench(&["--variant", "flash", "--json", "--isa", &isa.to_string()]));
        assert_eq!(report["isa"], isa.to_string());
    }
}

#[test]
fn what_cannot_be_measured_is_refused() {
    refuses(&bench(&["--variant", "flash", "--mode", "backward"]), &["flash", "backward"]);
    refuses(&bench(&["--variant", "flash", "--mode", "decode"]), &["flash", "decode"]);
    refuses(
        &bench(&["--variant", "flash", "--heads", "3", "--kv-heads", "2"]),
        &["n_heads_q is 3", "2 heads"],
    );
    refuses(&bench(&["--variant", "flash", "--causal", "--set", "causal=false"]), &["--causal"]);
    refuses(&bench(&["--variant", "flash", "--batch", "99999999999"]), &["elements"]);
    refuses(&bench(&["--variant", "flash", "--batch", "99999999"]), &["GiB"]);
    refuses(&bench(&["--variant", "flash", "--dtype", "f8"]), &["f8", "bf16"]);
    refuses(&bench(&["--variant", "none"]), &["none", "flash"]);
}
