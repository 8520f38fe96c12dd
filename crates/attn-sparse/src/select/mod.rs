//! Selectors: from scores to sorted lists of indices.
//!
//! | selector | takes |
//! |---|---|
//! | [`top_k`] | the `k` largest |
//! | [`top_k_with`] | forced members first, then the largest, `k` in all |
//! | [`top_p`] | the fewest, largest first, whose share of the sum reaches `p` |
//! | [`top_p_with`] | the same after forced members, whose share counts |
//! | [`top_p_within`] | the most, largest first, whose share of the sum stays within `p` |
//! | [`at_least`] | all that reach a threshold |
//! | [`ranked`] | all, the largest first |
//! | [`TopK`] | the `k` largest of a stream that is never held |
//!
//! What makes them reproducible: a score of -inf is never taken (hide what a query does not see before selecting); forced
//! members take slots first; of equal scores the lower index comes first; indices are returned in ascending order, none
//! twice. NaN counts as larger than any number, so that a poisoned key is not lost silently. The functions are pure: same
//! scores, same list, on every machine.

pub(crate) mod largest;
pub(crate) mod rank;
mod stream;
#[cfg(test)]
mod tests;
mod top_k;
mod top_p;

pub use stream::TopK;
pub use top_k::{at_least, ranked, top_k, top_k_with};
pub use top_p::{softmax, top_p, top_p_with, top_p_within};
