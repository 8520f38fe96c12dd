//! Every variant keeps what its profile promises.

use attn_core::registry::{Options, find};
use attn_testkit::conformance::{check, check_with};

#[test]
fn every_variant_keeps_its_promises_with_its_defaults() {
    attn_hier::registry().iter().for_each(check);
}

#[test]
fn h_transformer_keeps_its_promises_with_small_blocks() {
    let entries = attn_hier::registry();
    let configs: Vec<Options> = ["2", "6", "16"]
        .into_iter()
        .flat_map(|block| [false, true].map(|causal| (block, causal)))
        .map(|(block, causal)| Options::new().with("block_size", block).with("causal", causal))
        .collect();
    check_with(find(&entries, "h-transformer-1d").unwrap(), &configs);
}
