//! Gradients of kernelised attention by q, k and v.

use crate::differences;
use attn_core::AttnShape;
use attn_core::registry::{Options, find};
use attn_linear::registry;

/// Two pieces, shared key/value heads; without `causal` also other numbers of queries than keys.
#[test]
fn gradients_equal_finite_differences() {
    let shape = AttnShape { batch: 2, n_heads_kv: 1, head_dim_v: 5, ..AttnShape::square(2, 70, 4) };
    let cross = AttnShape { n_q: 9, ..shape };
    let names = ["performer", "rfa", "cosformer", "based", "rebased", "hedgehog", "efficient"];
    for name in names {
        let entry = *find(&registry(), name).unwrap();
        for (causal, shape) in [(true, shape), (false, shape), (false, cross)] {
            let mut options = Options::new().with("causal", causal);
            if name == "performer" {
                // What exponents are lowered by has no gradient; without these it has no influence either.
                options = options.with("feature_eps", 0).with("denom_eps", 0);
            }
            differences::check(&entry, &options, shape, 3);
        }
    }
}
