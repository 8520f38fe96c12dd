//! The pages that a row takes: forced ones first, then those with the largest scores.

use super::Pages;
use crate::routed::dsa::Largest;
use crate::routed::indexer::RowSelector;
use crate::routed::router::visible;
use crate::select::TopK;
use attn_core::AttnShape;

/// See the module.
pub(super) struct TopPages<'a> {
    pub(super) pages: Pages,
    /// Rows that see no more keys take all.
    pub(super) all_up_to: usize,
    pub(super) shape: &'a AttnShape,
}

impl TopPages<'_> {
    /// Pages of the keys that a row sees, the last one perhaps not complete.
    fn seen(&self, row: usize) -> usize {
        visible(self.shape, row).div_ceil(self.pages.page_len)
    }

    fn largest(&self) -> Largest<impl Fn(usize) -> usize + Sync + '_> {
        let Pages { n_pages, first, last, .. } = self.pages;
        Largest { top_k: n_pages - first - last, visible: move |row| self.seen(row).saturating_sub(last) }
    }
}

impl RowSelector for TopPages<'_> {
    type State = TopK;

    fn visible(&self, row: usize) -> usize {
        (self.largest().visible)(row)
    }

    fn without_scores(&self, row: usize) -> Option<Vec<usize>> {
        let (seen, keys) = (self.seen(row), visible(self.shape, row));
        (seen <= self.pages.n_pages || keys <= self.all_up_to).then(|| (0..seen).collect())
    }

    fn start(&self, row: usize) -> TopK {
        self.largest().start(row)
    }

    fn take(&self, top: &mut TopK, first: usize, scores: &[f32]) {
        let forced = self.pages.first.saturating_sub(first).min(scores.len());
        self.largest().take(top, first + forced, &scores[forced..]);
    }

    fn finish(&self, row: usize, mut top: TopK) -> Vec<usize> {
        let Pages { first, last, .. } = self.pages;
        let seen = self.seen(row);
        (0..first).chain(top.take()).chain(seen - last..seen).collect()
    }
}
