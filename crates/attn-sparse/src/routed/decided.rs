//! A choice that has been made already.

use crate::decider::{Decider, Decision, Promises, Work};
use attn_core::mask::Head;
use attn_core::{AttnError, AttnShape, Causality, Growth, Qkv, Result};

/// Attends a given [`Decision`]: from an indexer with inputs of its own, from another layer, or from a file.
#[derive(Debug, Clone)]
pub struct Decided(pub Decision);

impl Decider for Decided {
    const NAME: &'static str = "decided";

    fn decide(&self, x: &Qkv<'_>) -> Result<Decision> {
        self.0.mask().check(&x.shape())?;
        Ok(self.0.clone())
    }

    fn promises(&self) -> Promises {
        Promises {
            causality: Causality::Bidirectional,
            key_order_free: false,
            cross_lengths: true,
            time: Growth::Linear,
            memory: Growth::Linear,
            kept: None,
        }
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let heads =
            (0..shape.batch).flat_map(|batch| (0..shape.n_heads_q).map(move |head| Head { batch, head }));
        let seen = |head| {
            let rows = (0..shape.n_q).map(move |i| self.0.mask().spans(head, i..i + 1, shape.n_kv));
            rows.flatten().map(|span| span.len() as u64).sum::<u64>()
        };
        Work { pairs: heads.map(seen).sum(), ..Work::default() }
    }
}

/// What was chosen before: lists `[batch, lists, n_q]` of blocks of `block_len` keys for `lists` groups of query heads, seen
/// causally.
///
/// # Errors
/// [`AttnError`] for lists that do not fit.
pub(crate) fn given_lists(
    shape: &AttnShape,
    block_len: usize,
    lists: usize,
    chosen: &[Vec<usize>],
) -> Result<Decision> {
    let expected = shape.batch * lists * shape.n_q;
    if chosen.len() != expected {
        return Err(AttnError::shape("chosen", "rows", chosen.len(), expected));
    }
    Ok(Decision::by_lists(super::block_indexer::blocks(shape, block_len, lists, |at| chosen[at].clone())?))
}
