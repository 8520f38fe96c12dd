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
    rwkv5_keeps_its_promises "rwkv5"
    rwkv6_keeps_its_promises "rwkv6"
    rwkv7_keeps_its_promises "rwkv7"
    lightning_keeps_its_promises "lightning"
    hgrn2_keeps_its_promises "hgrn2"
    deltaproduct_keeps_its_promises "deltaproduct"
    gated_deltaproduct_keeps_its_promises "gated-deltaproduct"
    comba_keeps_its_promises "comba"
    gdn2_keeps_its_promises "gdn2"
    dplr_keeps_its_promises "dplr"
    iplr_keeps_its_promises "iplr"
    lightnet_keeps_its_promises "lightnet"
    gateloop_keeps_its_promises "gateloop"
    rodimus_keeps_its_promises "rodimus"
    mlstm_keeps_its_promises "mlstm"
    gsa_keeps_its_promises "gsa"
    abc_keeps_its_promises "abc"
    raven_keeps_its_promises "raven"
    precond_gdn_keeps_its_promises "precond-gdn"
    precond_kda_keeps_its_promises "precond-kda"
    fwp_dpfp_keeps_its_promises "fwp-dpfp"
    mamba3_keeps_its_promises "mamba3"
    gated_oja_keeps_its_promises "gated-oja"
    momentum_delta_keeps_its_promises "momentum-delta"
    titans_linear_keeps_its_promises "titans-linear"
    mesanet_keeps_its_promises "mesanet"
}
