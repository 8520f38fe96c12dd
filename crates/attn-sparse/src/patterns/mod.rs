//! Static patterns, one file each: the visible pairs follow from the shape alone.

mod chunked_causal;
mod compose;
mod dilated_window;
mod documents;
mod growth;
mod local_buckets;
mod padded;
mod per_head;
mod positions;
mod prefix_lm;
mod sink_window;
mod sliding_window;
mod spans;
#[cfg(test)]
mod tests;

pub use chunked_causal::ChunkedCausal;
pub(crate) use chunked_causal::SameChunk;
pub use compose::{Intersection, Union};
pub use dilated_window::DilatedWindow;
pub use documents::{DocumentLayout, Documents};
pub use local_buckets::LocalBuckets;
pub use padded::Padded;
pub use per_head::{HeadChoice, PerHead};
pub use prefix_lm::PrefixLm;
pub use sink_window::SinkWindow;
pub use sliding_window::SlidingWindow;
pub use spans::{BidirectionalSpans, SpanLayout};
