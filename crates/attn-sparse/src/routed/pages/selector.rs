//! The pages that a row takes: forced ones first, then those with the largest scores.

use super::Pages;
use crate::block_mask::lists::Slot;
use crate::routed::dsa::LargestTokens;
use crate::routed::indexer::RowSelector;
use crate::routed::router::visible;
use crate::select::largest::Largest;
use attn_core::AttnShape;
use attn_core::simd::Simd;

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

    fn largest(&self) -> LargestTokens<impl Fn(usize) -> usize + Sync + '_> {
        let Pages { n_pages, first, last, .. } = self.pages;
        LargestTokens {
            top_k: n_pages - first - last,
            visible: move |row| self.seen(row).saturating_sub(last),
        }
    }
}

impl RowSelector for TopPages<'_> {
    type State = Largest;

    fn visible(&self, row: usize) -> usize {
        (self.largest().visible)(row)
    }

    fn takes_all(&self, row: usize) -> Option<usize> {
        let (seen, keys) = (self.seen(row), visible(self.shape, row));
        (seen <= self.pages.n_pages || keys <= self.all_up_to).then_some(seen)
    }

    fn most(&self) -> usize {
        self.pages.n_pages
    }

    fn start(&self, top: &mut Largest, row: usize, guess: Option<f32>) {
        self.largest().start(top, row, guess);
    }

    #[inline(always)]
    fn take<S: Simd>(&self, simd: S, top: &mut Largest, first: usize, scores: &[f32]) {
        let forced = self.pages.first.saturating_sub(first).min(scores.len());
        top.take(simd, first + forced, &scores[forced..]);
    }

    fn merge(&self, top: &mut Largest, later: &Largest) {
        top.append(later);
    }

    #[inline(always)]
    fn finish<S: Simd>(&self, simd: S, row: usize, top: &mut Largest, mut list: Slot<'_>) -> bool {
        let Pages { first, last, .. } = self.pages;
        let seen = self.seen(row);
        let taken = top.finish(simd);
        if let Some(taken) = taken {
            list.append_range(0..first);
            list.append(taken);
            list.append_range(seen - last..seen);
        }
        taken.is_some()
    }
}
