//! Every registered variant with its default options, at one length.
#![allow(missing_docs)]

use attn_benches::{Problem, Setting, forward};
use attn_core::AttnShape;
use attn_core::registry::Options;
use criterion::{Criterion, criterion_group, criterion_main};

fn all(c: &mut Criterion) {
    let problem = Problem::new(AttnShape::square(1, 16384, 64));
    let registries =
        [attn_flash::registry(), attn_sparse::registry(), attn_linear::registry(), attn_hier::registry()];
    for entry in registries.iter().flatten().filter(|e| e.name != "naive") {
        let has_causal = entry.options.iter().any(|o| o.name == "causal");
        let options = if has_causal { Options::new().with("causal", true) } else { Options::new() };
        let attention = entry.build(&options).expect("the defaults build");
        for threads in [1, 2] {
            forward(c, &format!("{} n=16384", entry.name), &*attention, &problem, Setting::threads(threads));
        }
    }
}

criterion_group!(benches, all);
criterion_main!(benches);
