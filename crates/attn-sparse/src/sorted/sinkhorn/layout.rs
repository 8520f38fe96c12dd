//! Which token stands in which slot of which bucket.

use super::{Sinkhorn, SinkhornKind};
use attn_core::AttnShape;

/// The buckets of a head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Buckets {
    pub(super) n: usize,
    pub(super) size: usize,
    /// Buckets of every head of the call.
    pub(super) count: usize,
    /// Tokens that stand before the first bucket, in a group of their own: those that a rotation takes to the end.
    pub(super) before: usize,
}

impl Buckets {
    pub(super) fn new(config: &Sinkhorn, shape: &AttnShape, head: usize) -> Self {
        let (n, size) = (shape.n_q, config.size(shape));
        let rotated = config.kind == SinkhornKind::Causal && head >= shape.n_heads_q / 2;
        Self { n, size, count: n.div_ceil(size), before: if rotated { (size - 1).min(n) } else { 0 } }
    }

    /// The token in slot `e` of a bucket; bucket `count` holds the tokens before the first.
    #[inline(always)]
    pub(super) fn token(&self, bucket: usize, e: usize) -> Option<usize> {
        let token = if bucket == self.count { e } else { self.before + bucket * self.size + e };
        (token < if bucket == self.count { self.before } else { self.n }).then_some(token)
    }

    /// Tokens of a bucket.
    pub(super) fn len(&self, bucket: usize) -> usize {
        self.n.saturating_sub(self.before + bucket * self.size).min(self.size)
    }

    /// Bucket and slot of a token.
    #[inline(always)]
    pub(super) fn place(&self, token: usize) -> (usize, usize) {
        match token.checked_sub(self.before) {
            Some(at) => (at / self.size, at % self.size),
            None => (self.count, token),
        }
    }
}
