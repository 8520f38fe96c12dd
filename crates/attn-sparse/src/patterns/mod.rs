//! Static patterns, one file each: the visible pairs follow from the shape alone.

mod chunked_causal;
mod sink_window;
mod sliding_window;
#[cfg(test)]
mod tests;

pub use chunked_causal::ChunkedCausal;
pub use sink_window::SinkWindow;
pub use sliding_window::SlidingWindow;
