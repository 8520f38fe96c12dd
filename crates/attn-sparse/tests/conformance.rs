//! Every registered variant keeps its promises.

mod registry;

use attn_core::registry::Options;
use attn_testkit::conformance;

#[test]
fn every_variant_keeps_its_promises() {
    for entry in attn_sparse::registry() {
        conformance::check(&entry);
    }
}

#[test]
fn short_windows_keep_them_too() {
    for entry in attn_sparse::registry() {
        let set = |pairs: &[&str]| Options::parse(pairs.iter().copied()).expect("key=value");
        let configs = match entry.name {
            "sliding-window" => {
                vec![
                    set(&["window=1"]),
                    set(&["causal=true", "window=7"]),
                    set(&["window_left=3", "window_right=40"]),
                ]
            }
            "sink-window" => vec![set(&["n_sinks=0", "window=1"]), set(&["n_sinks=3", "window=20"])],
            "chunked-causal" => vec![set(&["chunk_len=1"]), set(&["chunk_len=24"])],
            _ => continue, // in the tests of its group
        };
        conformance::check_with(&entry, &configs);
    }
}
