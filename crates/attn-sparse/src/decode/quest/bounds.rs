//! What is kept of a page of keys: the largest and the smallest value of each feature.

use attn_core::simd::{Simd, SimdOp};
use attn_core::view::Rows;
use attn_core::{Element, LargeVec, TensorView};
use std::ops::Range;

/// Pages whose bounds lie side by side, in the vector lanes of the product that scores them.
pub(super) const LANES: usize = 32;

/// Bounds of the pages of one key/value head.
///
/// Tiles `[2 * head_dim, LANES]`: the maxima of feature `c` in row `c`, its minima in row `head_dim + c`, page
/// `tile * LANES + lane` in column `lane`. Columns without a page hold numbers that nobody reads.
#[derive(Debug)]
pub(super) struct PageBounds {
    page_len: usize,
    head_dim: usize,
    n_pages: usize,
    tiles: LargeVec<f32>,
}

impl PageBounds {
    pub(super) fn new(page_len: usize, head_dim: usize) -> Self {
        Self { page_len, head_dim, n_pages: 0, tiles: LargeVec::zeroed(0) }
    }

    pub(super) fn n_pages(&self) -> usize {
        self.n_pages
    }

    /// Rows of a tile.
    pub(super) fn width(&self) -> usize {
        2 * self.head_dim
    }

    fn tile_len(&self) -> usize {
        self.width() * LANES
    }

    pub(super) fn tile(&self, tile: usize) -> &[f32] {
        &self.tiles[tile * self.tile_len()..][..self.tile_len()]
    }

    pub(super) fn bytes(&self) -> usize {
        size_of_val(&*self.tiles)
    }

    /// Forgets all pages from `n_pages` on.
    pub(super) fn truncate(&mut self, n_pages: usize) {
        self.n_pages = self.n_pages.min(n_pages);
    }

    /// Adds the bounds of the next pages, up to `n_pages` in total; the last one may be short. `keys` are all keys of the
    /// head, from the first on.
    pub(super) fn grow<S: Simd, E: Element>(&mut self, simd: S, keys: Rows<'_, E>, n_pages: usize) {
        if n_pages <= self.n_pages {
            return;
        }
        let needed = n_pages.div_ceil(LANES) * self.tile_len();
        if needed > self.tiles.len() {
            self.tiles.resize(if self.tiles.is_empty() { needed } else { needed.max(2 * self.tiles.len()) });
        }
        let mut bounds = vec![0.0; self.width()];
        for page in self.n_pages..n_pages {
            let rows = page * self.page_len..((page + 1) * self.page_len).min(keys.len());
            bounds_of(simd, keys, rows, &mut bounds);
            let first = page / LANES * self.tile_len() + page % LANES;
            let column = self.tiles[first..].iter_mut().step_by(LANES);
            column.zip(&bounds).for_each(|(to, bound)| *to = *bound);
        }
        self.n_pages = n_pages;
    }
}

/// Writes the largest, then the smallest value of each feature of some rows. NaN is left out unless there is nothing else.
#[inline(always)]
pub(super) fn bounds_of<S: Simd, E: Element>(
    simd: S,
    keys: Rows<'_, E>,
    rows: Range<usize>,
    bounds: &mut [f32],
) {
    simd.vectorize(
        #[inline(always)]
        || {
            let (max, min) = bounds.split_at_mut(keys.width());
            for (at, row) in rows.enumerate() {
                let row = keys.row(row);
                if at == 0 {
                    max.iter_mut().zip(row).for_each(|(max, x)| *max = x.load());
                    min.copy_from_slice(max);
                }
                for ((max, min), x) in max.iter_mut().zip(min.iter_mut()).zip(row) {
                    let x = x.load();
                    *max = max.max(x);
                    *min = min.min(x);
                }
            }
        },
    );
}

/// [`PageBounds::grow`] for keys of any storage type.
pub(super) struct Grow<'a> {
    pub(super) bounds: &'a mut PageBounds,
    pub(super) k: &'a TensorView<'a>,
    /// Batch entry and key/value head.
    pub(super) head: [usize; 2],
    pub(super) n_pages: usize,
}

impl SimdOp for Grow<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let [batch, head] = self.head;
        match self.k {
            TensorView::F32(k) => self.bounds.grow(simd, k.head(batch, head), self.n_pages),
            TensorView::Bf16(k) => self.bounds.grow(simd, k.head(batch, head), self.n_pages),
            TensorView::F16(k) => self.bounds.grow(simd, k.head(batch, head), self.n_pages),
        }
    }
}

/// [`bounds_of`] for keys of any storage type.
pub(super) struct OwnBounds<'a> {
    pub(super) k: &'a TensorView<'a>,
    /// Batch entry and key/value head.
    pub(super) head: [usize; 2],
    pub(super) rows: Range<usize>,
    pub(super) bounds: &'a mut [f32],
}

impl SimdOp for OwnBounds<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let [batch, head] = self.head;
        match self.k {
            TensorView::F32(k) => bounds_of(simd, k.head(batch, head), self.rows, self.bounds),
            TensorView::Bf16(k) => bounds_of(simd, k.head(batch, head), self.rows, self.bounds),
            TensorView::F16(k) => bounds_of(simd, k.head(batch, head), self.rows, self.bounds),
        }
    }
}
