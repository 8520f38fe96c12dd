//! Page bounds that are kept up to date while tokens come.

use super::Quest;
use super::bounds::PageBounds;
use super::select::{choose, grow_all};
use crate::{Decision, Memory};
use attn_core::{Qkv, Result, StreamShape};

/// The bounds of the pages that are complete.
pub(super) struct QuestMemory {
    quest: Quest,
    /// `[batch * n_heads_kv]`.
    bounds: Vec<PageBounds>,
}

impl QuestMemory {
    pub(super) fn new(quest: Quest, shape: &StreamShape) -> Self {
        let bounds = || PageBounds::new(quest.page_len, shape.head_dim);
        Self { quest, bounds: (0..shape.batch * shape.n_heads_kv).map(|_| bounds()).collect() }
    }
}

impl Memory for QuestMemory {
    fn decide(&mut self, x: &Qkv<'_>) -> Result<Decision> {
        self.quest.check()?;
        grow_all(&mut self.bounds, x.k(), x.shape().n_kv / self.quest.page_len);
        self.quest.mask(x, &choose(&self.quest, x, &self.bounds))
    }

    fn truncate(&mut self, n_kv: usize) {
        let n_pages = n_kv / self.quest.page_len.max(1);
        self.bounds.iter_mut().for_each(|bounds| bounds.truncate(n_pages));
    }

    fn bytes(&self) -> usize {
        self.bounds.iter().map(PageBounds::bytes).sum()
    }
}
