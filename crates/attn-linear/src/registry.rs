//! The linear variants by name: one list a family of variants.

use attn_core::registry::Entry;

/// Every variant of this crate.
pub fn registry() -> Vec<Entry> {
    [
        crate::recurrent::entries(),
        crate::elementwise::entries(),
        crate::features::entries(),
        crate::low_rank::entries(),
        crate::segments::entries(),
        crate::channel::entries(),
    ]
    .concat()
}
