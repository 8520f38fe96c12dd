//! Variants that sort or cluster tokens and attend inside the groups.
//!
//! | variant | groups |
//! |---|---|
//! | [`Reformer`] | chunks of tokens sorted by random hashes, several rounds |
//! | [`Routing`] | for each centroid, the queries and the keys nearest to it |
//! | [`Sinkhorn`] | buckets of consecutive tokens, and mixtures of others |
//!
//! A group's rows are gathered into contiguous copies, `O(n)` of them, and become a head of one call of the exact engine
//! ([`slots`]); results are merged or averaged where their tokens stand.

mod noise;
mod reformer;
mod repeats;
mod routing;
mod rows;
mod scores;
mod self_score;
mod sinkhorn;
mod slots;

pub(crate) use noise::normal;
pub use reformer::{Hashing, Reformer};
pub use routing::{Routing, RoutingGrads, RoutingInputs};
pub use sinkhorn::{Sinkhorn, SinkhornGrads, SinkhornInputs, SinkhornKind};
