//! Static patterns, one file each: the visible pairs follow from the shape alone.

mod axial;
mod bigbird;
mod block_layout;
mod chunked_causal;
mod compose;
mod dilated_window;
mod documents;
mod fixed;
mod grid;
mod growth;
#[cfg(test)]
mod layout_tests;
mod local_buckets;
mod longformer;
mod neighborhood;
mod padded;
mod per_head;
mod positions;
mod prefix_lm;
mod sink_window;
mod sliding_window;
mod spans;
mod strided;
#[cfg(test)]
mod tests;
mod video;

pub use axial::Axial;
pub use bigbird::BigBird;
pub use block_layout::{
    BigBirdLayout, BlockLayout, FixedLayout, GlobalBlocks, LocalLayout, LongformerLayout, SeenBlocks,
    VariableLayout,
};
pub use chunked_causal::ChunkedCausal;
pub(crate) use chunked_causal::SameChunk;
pub use compose::{Intersection, Union};
pub use dilated_window::DilatedWindow;
pub use documents::{DocumentLayout, Documents};
pub use fixed::FixedAttention;
pub use local_buckets::LocalBuckets;
pub use longformer::{GlobalProjections, GlobalTokens, Longformer, ProjectedGrads};
pub use neighborhood::{AxisWindow, Neighborhood};
pub use padded::Padded;
pub use per_head::{HeadChoice, PerHead};
pub use prefix_lm::PrefixLm;
pub use sink_window::SinkWindow;
pub use sliding_window::SlidingWindow;
pub use spans::{BidirectionalSpans, SpanLayout};
pub use strided::StridedAttention;
pub use video::{Radial, SlidingTile, VideoHeads, VideoKinds};

/// The power of two next above the root of `n`: a stride for which windows and strided keys are about as many.
fn root_of(n: usize) -> usize {
    (0..32).map(|bits| 1usize << bits).find(|root| root * root >= n).unwrap_or(1)
}
