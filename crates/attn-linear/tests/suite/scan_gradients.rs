//! Gradients of the scan engine's variants by q, k and v.

use crate::differences;
use attn_core::AttnShape;
use attn_core::registry::{Options, find};
use attn_linear::registry;

/// Two pieces of the engine, shared key/value heads, values wider and narrower than keys.
#[test]
fn gradients_equal_finite_differences() {
    let shape = AttnShape { batch: 2, n_heads_kv: 1, head_dim_v: 5, ..AttnShape::square(2, 70, 3) };
    let narrow = AttnShape { head_dim_v: 2, n_q: 9, n_kv: 9, ..shape };
    for name in NAMES {
        let entry = *find(&registry(), name).unwrap();
        for (seed, shape) in [shape, narrow].into_iter().enumerate() {
            differences::check(&entry, &Options::new(), shape, seed as u64);
            if name.starts_with("aft") {
                differences::check(&entry, &Options::new().with("causal", true), shape, seed as u64);
            }
        }
    }
}

const NAMES: &[&str] =
    &["hgrn", "mingru", "rglru", "mamba1", "longhorn", "rwkv4", "aft-simple", "aft-full", "aft-local"];
