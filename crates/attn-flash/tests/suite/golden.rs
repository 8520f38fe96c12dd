//! Flash against outputs and gradients of other people's code; see `testdata/README.md`.

use attn_core::registry::{Entry, find};
use attn_testkit::golden::{GoldenCase, Verdict, exact, judge, load_dir};

fn cases() -> Vec<GoldenCase> {
    let cases = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    assert_eq!(cases.len(), 135, "files");
    cases
}

fn flash() -> Entry {
    *find(&attn_flash::registry(), "flash").unwrap()
}

fn verdict(case: &GoldenCase) -> Verdict {
    let plan = exact::plan(case).unwrap_or_else(|why| panic!("{}: {why}", case.case));
    let outcome = plan.run(&flash(), case).unwrap_or_else(|e| panic!("{}: {e}", case.case));
    judge(&flash(), &plan, case, &outcome)
}

#[test]
fn every_case_agrees() {
    let mut wrong = Vec::new();
    for case in cases() {
        let Verdict { checked, unchecked, failure, .. } = verdict(&case);
        let outputs = checked.iter().filter(|name| name.starts_with("out.")).count();
        if let Some(failure) = failure {
            wrong.push(format!("{}: {failure}", case.case));
        } else if outputs == 0 || !unchecked.is_empty() {
            wrong.push(format!("{}: compared {checked:?}, but not {unchecked:?}", case.case));
        }
    }
    assert!(wrong.is_empty(), "{} cases:\n{}", wrong.len(), wrong.join("\n"));
}

/// What was compared, by case.
fn checked(name: &str) -> Vec<String> {
    let case = cases().into_iter().find(|case| case.case == name).unwrap();
    verdict(&case).checked
}

#[test]
fn streams_merges_and_diagnostics_are_compared_too() {
    for (case, tensors) in [
        ("cache-decode", &["out.lse", "out.o", "out.o (streamed)"][..]),
        ("merge-k257", &["out.lse", "out.lse (merged)", "out.o", "out.o (merged)"]),
        ("sink-window", &["out.lse", "out.lse_without_sink", "out.o"]),
        (
            "onnx-attention_3d_with_past_and_present_qk_matmul_bias",
            &["out.o", "out.present_key", "out.present_value", "out.qk_matmul_output"],
        ),
    ] {
        let mut outputs = checked(case);
        outputs.retain(|name| name.starts_with("out."));
        assert_eq!(outputs, tensors, "{case}");
    }
}

/// Where a file asks for more digits than f32 has, or for another convention, its verdict says so:
/// - `adv-big-v`: values of +-1e30 whose weighted sums cancel to a 65,000th in 4 of 2048 outputs; 1e-4 of each output needs
///   weights to nine digits (numpy in f32 misses it 270-fold).
/// - `adv-identical-keys`: log-sum-exps near 0 to a millionth, from scores near 4 whose last bit is worth 4.8e-7.
/// - `adv-scores-1e4`, `adv-tiny-weights`: gradients that cancel to nothing, to 1e-5, behind scores up to 1e4.
/// - `adv-nan-inf`: zeros are stored for the row of a NaN query; here, as the file's own note says, it is NaN.
#[test]
fn departures_from_files_are_few_and_said() {
    let all = cases();
    let noted = all.iter().filter(|case| verdict(case).notes.iter().any(|note| !note.starts_with("float64")));
    let noted: Vec<&str> = noted.map(|case| case.case.as_str()).collect();
    assert_eq!(
        noted,
        ["adv-big-v", "adv-identical-keys", "adv-nan-inf", "adv-scores-1e4", "adv-tiny-weights"]
    );
}
