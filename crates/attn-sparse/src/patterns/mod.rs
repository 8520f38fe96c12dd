//! Static patterns, one file each: the visible pairs follow from the shape alone.

mod bigbird;
mod block_layout;
mod chunked_causal;
mod fixed;
mod grid;
#[cfg(test)]
mod layout_tests;
mod longformer;
mod neighborhood;
mod sink_window;
mod sliding_window;
mod strided;
#[cfg(test)]
mod tests;

pub use bigbird::BigBird;
pub use block_layout::{
    BigBirdLayout, BlockLayout, FixedLayout, GlobalBlocks, LocalLayout, LongformerLayout, VariableLayout,
};
pub use chunked_causal::ChunkedCausal;
pub use fixed::FixedAttention;
pub use longformer::{GlobalProjections, GlobalTokens, Longformer, ProjectedGrads};
pub use neighborhood::{AxisWindow, Neighborhood};
pub use sink_window::SinkWindow;
pub use sliding_window::SlidingWindow;
pub use strided::StridedAttention;

/// The power of two next above the root of `n`: a stride for which windows and strided keys are about as many.
fn root_of(n: usize) -> usize {
    (0..32).map(|bits| 1usize << bits).find(|root| root * root >= n).unwrap_or(1)
}
