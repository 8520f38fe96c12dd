//! Sparse attention: patterns decide which pairs are seen, the exact tile engine attends them.
//!
//! | variant | a query at position `p` sees |
//! |---|---|
//! | [`SlidingWindow`] | keys `p - left ..= p + right` |
//! | [`SinkWindow`] | the first `n_sinks` keys and the last `window`, itself included |
//! | [`ChunkedCausal`] | its own chunk of `chunk_len` positions, up to itself |
//!
//! A variant is a [`Pattern`]: its mask and its words. Everything else, from the log-sum-exp to streaming, is shared.

mod chunked_causal;
mod pattern;
mod registry;
mod sink_window;
mod sliding_window;

pub use chunked_causal::ChunkedCausal;
pub use pattern::{Pattern, SparseAttention};
pub use registry::registry;
pub use sink_window::SinkWindow;
pub use sliding_window::SlidingWindow;
