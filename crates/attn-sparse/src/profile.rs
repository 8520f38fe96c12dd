//! What the profiles of all variants have in common.

use attn_core::{Causality, DType, Family, Growth, Profile, Target};

/// Attention over chosen pairs with the accuracy of the engine; a variant says what is different.
pub(crate) const USUAL: Profile = Profile {
    family: Family::Sparse,
    target: Target::SoftmaxOverChosen,
    causality: Causality::Strict,
    convex: true,
    key_order_free: false,
    cross_lengths: true,
    grouped_heads: true,
    dtypes: &DType::ALL,
    max_error: 4e-6,
    time: Growth::Linear,
    memory: Growth::Linear,
};
