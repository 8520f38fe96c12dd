//! The variants against outputs of their authors' code; see `testdata/README.md`.

use attn_core::registry::{Entry, Options, find};
use attn_testkit::golden::{GoldenCase, load_dir};

#[test]
fn h_transformer_equals_the_authors_code() {
    let entries = attn_hier::registry();
    let entry = find(&entries, "h-transformer-1d").unwrap();
    let cases = load_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/testdata")).unwrap();
    let cases: Vec<_> = cases.iter().filter(|c| c.variant == "h-transformer-1d").collect();
    assert_eq!(cases.len(), 7);
    for case in cases {
        check(entry, case);
    }
}

fn check(entry: &Entry, case: &GoldenCase) {
    assert_eq!(case.options["coarsening_ratio"], 2, "{}", case.case);
    assert_eq!(case.options["scale"], "d**-0.5", "{}: our default", case.case);
    let options =
        Options::new().with("block_size", &case.options["block"]).with("causal", &case.options["causal"]);
    case.assert_outputs(&entry.run(&options, &case.inputs).unwrap());
}
