//! Every registered variant keeps its promises.

use attn_core::registry::{Options, find};
use attn_testkit::conformance;

#[test]
fn every_variant_keeps_its_promises() {
    for entry in attn_flash::registry() {
        conformance::check(&entry);
    }
}

#[test]
fn flash_keeps_them_under_every_option() {
    let entries = attn_flash::registry();
    let set = |pairs: &[&str]| Options::parse(pairs.iter().copied()).expect("key=value");
    let configs = [
        set(&["causal=true", "window_left=9"]),
        set(&["window_left=0", "window_right=0"]),
        set(&["window_right=40"]),
        set(&["softcap=3"]),
        set(&["causal=true", "align=top-left"]),
        set(&["scale=-0.3"]),
    ];
    conformance::check_with(find(&entries, "flash").expect("flash is registered"), &configs);
}
