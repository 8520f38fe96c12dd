//! Every variant of the matrix-state engine holds what its profile promises.

use attn_core::registry::{Entry, Options, find};
use attn_linear::registry;
use attn_testkit::conformance;

/// The defaults, and chunks whose edges short inputs reach.
fn check(name: &str) {
    let entry: Entry = *find(&registry(), name).unwrap();
    conformance::check(&entry);
    conformance::check_with(&entry, &[1, 7, 40].map(|len| Options::new().with("chunk_len", len)));
}

macro_rules! promises {
    ($($test:ident $name:literal)*) => {
        $(
            #[test]
            fn $test() {
                check($name);
            }
        )*
    };
}

promises! {
    gla_keeps_its_promises "gla"
    simple_gla_keeps_its_promises "simple-gla"
    deltanet_keeps_its_promises "deltanet"
    gated_deltanet_keeps_its_promises "gated-deltanet"
    kda_keeps_its_promises "kda"
    mamba2_keeps_its_promises "mamba2"
}
