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
