//! The variants against outputs of their authors' code; see `testdata/README.md`.

use attn_core::registry::{Entry, Options, TensorData, find};
use attn_testkit::compare::assert_close;
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
    let got = entry.run(&options, &case.inputs).unwrap();
    for (name, want) in &case.outputs.0 {
        let got = got.require(name).unwrap();
        assert_eq!(got.shape, want.shape, "{}: {name}", case.case);
        let (TensorData::F32(got), TensorData::F32(want)) = (&got.data, &want.data) else {
            panic!("{}: {name} is not f32", case.case);
        };
        let want: Vec<f64> = want.iter().map(|x| f64::from(*x)).collect();
        let tol = case.tolerance_for(&format!("out.{name}")).unwrap();
        assert_close(&format!("{}: {name}", case.case), got, &want, tol);
    }
}
