//! Decoding: which cached keys a new query looks at, and which ones are kept at all.

mod eviction;
mod quest;
mod rows;

pub use eviction::{
    EvictionPolicy, EvictionStream, Importance, KvEviction, Pooling, Share, Survivors, pyramid_budgets,
};
pub use quest::Quest;
