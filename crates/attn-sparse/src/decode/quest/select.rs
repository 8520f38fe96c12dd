//! Which pages each query takes.

use super::Quest;
use super::bounds::{Grow, LANES, OwnBounds, PageBounds};
use crate::decode::rows::widen_row;
use crate::select::largest::Largest;
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, product};
use attn_core::{AttnShape, Qkv, TensorView};
use std::ops::Range;

/// Queries scored together.
const BLOCK: usize = 32;
/// Fewer blocks of queries than this share the pages between tasks, ...
const FEW_TASKS: usize = 16;
/// ... into this many shares ...
const SHARES: usize = 8;
/// ... of at least so many tiles.
const SHARE_TILES: usize = 64;

/// Ends a list that is shorter than the others.
pub(super) const NONE: u32 = u32::MAX;

/// The pages of every query: lists of `per_row`, ascending, ended by [`NONE`], in the order batch entry, key/value head,
/// query row, query head of the group.
pub(super) struct Pages {
    pub(super) per_row: usize,
    pub(super) lists: Vec<u32>,
}

impl Pages {
    /// The list of a query.
    pub(super) fn row(&self, shape: &AttnShape, [batch, head, i]: [usize; 3]) -> Vec<usize> {
        if self.lists.is_empty() {
            return Vec::new();
        }
        let group = shape.group_size();
        let at = ((batch * shape.n_heads_kv + head / group) * shape.n_q + i) * group + head % group;
        let list = &self.lists[at * self.per_row..][..self.per_row];
        list.iter().take_while(|page| **page != NONE).map(|page| *page as usize).collect()
    }
}

/// Bounds of the pages of all heads, complete ones or, if `ragged`, all: `[batch * n_heads_kv]`.
pub(super) fn bounds_of_all(quest: &Quest, k: &TensorView<'_>, ragged: bool) -> Vec<PageBounds> {
    let [batch, heads, n_kv, head_dim] = k.shape();
    let mut bounds: Vec<PageBounds> =
        (0..batch * heads).map(|_| PageBounds::new(quest.page_len, head_dim)).collect();
    let n_pages = if ragged { n_kv.div_ceil(quest.page_len) } else { n_kv / quest.page_len };
    grow_all(&mut bounds, k, n_pages);
    bounds
}

/// Adds pages to the bounds of all heads, up to `n_pages` each.
pub(super) fn grow_all(bounds: &mut [PageBounds], k: &TensorView<'_>, n_pages: usize) {
    let (heads, isa) = (k.shape()[1], Isa::current());
    for_each_task(
        bounds.iter_mut().enumerate(),
        || (),
        |(), (at, bounds)| isa.run(Grow { bounds, k, head: [at / heads, at % heads], n_pages }),
    );
}

/// Rows of a block of one key/value head, with the queries of its group.
struct Block {
    batch: usize,
    kv_head: usize,
    rows: Range<usize>,
}

/// A thread's scratch.
#[derive(Default)]
struct Scratch {
    /// `[queries, 2 * head_dim]`: the positive parts, then the negative ones.
    q: Vec<f32>,
    /// `[queries, LANES]`.
    scores: Vec<f32>,
    tops: Vec<Largest>,
    own: Vec<f32>,
}

/// What the choice is made from.
struct Choice<'a> {
    quest: &'a Quest,
    x: &'a Qkv<'a>,
    shape: AttnShape,
    bounds: &'a [PageBounds],
    isa: Isa,
}

/// The pages that every query of `x` takes; `bounds [batch * n_heads_kv]` hold at least the pages that are complete before
/// the last position, and all of them if the choice is not causal.
pub(super) fn choose(quest: &Quest, x: &Qkv<'_>, bounds: &[PageBounds]) -> Pages {
    let shape = x.shape();
    let per_row = quest.n_pages().min(shape.n_kv.div_ceil(quest.page_len));
    let mut lists = vec![NONE; shape.rows() * per_row];
    if lists.is_empty() {
        return Pages { per_row, lists };
    }
    let choice = Choice { quest, x, shape, bounds, isa: Isa::current() };
    let group = shape.group_size();
    let block_rows = (BLOCK / group).max(1);
    let blocks_of_head = shape.n_q.div_ceil(block_rows);
    let block = |at: usize| {
        let (head, first) = (at / blocks_of_head, at % blocks_of_head * block_rows);
        Block {
            batch: head / shape.n_heads_kv,
            kv_head: head % shape.n_heads_kv,
            rows: first..(first + block_rows).min(shape.n_q),
        }
    };
    let heads = lists.chunks_mut(shape.n_q * group * per_row);
    let outputs: Vec<&mut [u32]> =
        heads.flat_map(|head| head.chunks_mut(block_rows * group * per_row)).collect();
    let n_tiles = choice.tiles(&block(blocks_of_head - 1));
    let shares = (n_tiles / SHARE_TILES).clamp(1, SHARES);
    if outputs.len() >= FEW_TASKS || shares == 1 {
        let run = |scratch: &mut Scratch, (at, list): (usize, &mut [u32])| {
            let block = block(at);
            choice.score(&block, 0..choice.tiles(&block), scratch);
            choice.finish(&block, scratch, per_row, list);
        };
        for_each_task(outputs.into_iter().enumerate(), Scratch::default, run);
        return Pages { per_row, lists };
    }
    let mut parts: Vec<Scratch> = Vec::new();
    parts.resize_with(outputs.len() * shares, Scratch::default);
    let share = |tiles: usize, part: usize| tiles * part / shares..tiles * (part + 1) / shares;
    for_each_task(
        parts.iter_mut().enumerate(),
        || (),
        |(), (at, scratch)| {
            let block = block(at / shares);
            choice.score(&block, share(choice.tiles(&block), at % shares), scratch);
        },
    );
    for ((at, list), parts) in outputs.into_iter().enumerate().zip(parts.chunks_mut(shares)) {
        let [first, rest @ ..] = parts else { continue };
        for part in rest {
            first.tops.iter_mut().zip(&part.tops).for_each(|(top, other)| top.append(other));
        }
        choice.finish(&block(at), first, per_row, list);
    }
    Pages { per_row, lists }
}

impl Choice<'_> {
    /// Keys that a row sees, and how many of their pages are scored from the stored bounds.
    fn visible(&self, row: usize) -> (usize, usize) {
        let (shape, page_len) = (&self.shape, self.quest.page_len);
        if self.quest.causal {
            let keys = (row + 1 + shape.n_kv).saturating_sub(shape.n_q).min(shape.n_kv);
            return (keys, keys / page_len);
        }
        (shape.n_kv, shape.n_kv.div_ceil(page_len))
    }

    /// Tiles of pages that the last row of a block sees.
    fn tiles(&self, block: &Block) -> usize {
        self.visible(block.rows.end - 1).1.div_ceil(LANES)
    }

    fn bounds(&self, block: &Block) -> &PageBounds {
        &self.bounds[block.batch * self.shape.n_heads_kv + block.kv_head]
    }

    /// Scores the pages of some tiles; `scratch.tops` then holds the best of them for each query.
    fn score(&self, block: &Block, tiles: Range<usize>, scratch: &mut Scratch) {
        let (group, bounds) = (self.shape.group_size(), self.bounds(block));
        let (lanes, width, d) = (block.rows.len() * group, bounds.width(), self.shape.head_dim);
        let Scratch { q, scores, tops, .. } = scratch;
        q.resize(lanes * width, 0.0);
        scores.resize(lanes * LANES, 0.0);
        tops.resize_with(lanes, Largest::default);
        tops.iter_mut().for_each(|top| top.start(self.quest.n_pages(), None));
        for (lane, q) in q.chunks_exact_mut(width).enumerate() {
            let (row, head) = (block.rows.start + lane / group, block.kv_head * group + lane % group);
            let (positive, negative) = q.split_at_mut(d);
            widen_row(self.x.q(), [block.batch, head, row], positive);
            for (positive, negative) in positive.iter_mut().zip(negative) {
                let q = *positive;
                (*positive, *negative) = if q > 0.0 { (q, 0.0) } else { (0.0, q) };
            }
        }
        let visible = |lane: usize| {
            let (keys, pages) = self.visible(block.rows.start + lane / group);
            // The own page is added at the end.
            if self.quest.keep_own { pages.min(keys.saturating_sub(1) / self.quest.page_len) } else { pages }
        };
        self.isa.run(ScoreTiles { bounds, tiles, q, scores, tops, visible });
    }

    /// Adds the page that is not complete before the query, and writes the lists.
    fn finish(&self, block: &Block, scratch: &mut Scratch, per_row: usize, lists: &mut [u32]) {
        let (group, page_len) = (self.shape.group_size(), self.quest.page_len);
        let width = 2 * self.shape.head_dim;
        scratch.own.resize(width, 0.0);
        for (at, row) in block.rows.clone().enumerate() {
            let (keys, complete) = self.visible(row);
            let open = complete * page_len < keys;
            if open {
                let (k, head) = (self.x.k(), [block.batch, block.kv_head]);
                let rows = complete * page_len..keys;
                self.isa.run(OwnBounds { k, head, rows, bounds: &mut scratch.own });
            }
            for lane in at * group..(at + 1) * group {
                let top = &mut scratch.tops[lane];
                if self.quest.keep_own && keys > 0 {
                    top.offer(f32::INFINITY, (keys - 1) / page_len);
                } else if open {
                    let q = &scratch.q[lane * width..][..width];
                    top.offer(q.iter().zip(&scratch.own).map(|(q, bound)| q * bound).sum(), complete);
                }
            }
        }
        let lanes = block.rows.len() * group;
        self.isa.run(WriteLists { tops: &mut scratch.tops[..lanes], lists, per_row });
    }
}

/// Writes the pages of each query.
struct WriteLists<'a> {
    tops: &'a mut [Largest],
    lists: &'a mut [u32],
    per_row: usize,
}

impl SimdOp for WriteLists<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        simd.vectorize(
            #[inline(always)]
            || {
                for (top, list) in self.tops.iter_mut().zip(self.lists.chunks_exact_mut(self.per_row)) {
                    let pages = top.finish(simd).unwrap_or_default();
                    list.iter_mut().zip(pages).for_each(|(to, page)| *to = *page);
                }
            },
        );
    }
}

/// `scores [queries, pages] = q [queries, 2 head_dim] * bounds [2 head_dim, pages]`, tile by tile.
struct ScoreTiles<'a, F> {
    bounds: &'a PageBounds,
    tiles: Range<usize>,
    q: &'a [f32],
    scores: &'a mut [f32],
    tops: &'a mut [Largest],
    /// Pages that a query sees.
    visible: F,
}

impl<F: Fn(usize) -> usize> SimdOp for ScoreTiles<'_, F> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let (lanes, width) = (self.tops.len(), self.bounds.width());
        for tile in self.tiles {
            product(
                simd,
                [lanes, LANES, width],
                Lhs { data: self.q, row_stride: width, col_stride: 1 },
                Rhs { data: self.bounds.tile(tile), stride: LANES },
                TileMut { data: self.scores, stride: LANES },
                Start::Zero,
            );
            let first = tile * LANES;
            for (lane, (top, scores)) in self.tops.iter_mut().zip(self.scores.chunks_exact(LANES)).enumerate()
            {
                let seen = (self.visible)(lane).saturating_sub(first).min(LANES);
                simd.vectorize(
                    #[inline(always)]
                    || top.take(simd, first, &scores[..seen]),
                );
            }
        }
    }
}

/// The bounds of all pages for all queries, `[batch, n_heads_q, n_q, n_pages]`.
pub(super) fn scores(quest: &Quest, x: &Qkv<'_>) -> Vec<f32> {
    let (shape, bounds) = (x.shape(), bounds_of_all(quest, x.k(), true));
    let mut q = vec![0.0; shape.head_dim];
    let mut all = Vec::new();
    for row in 0..shape.rows() {
        let (head, i) = (row / shape.n_q, row % shape.n_q);
        let (batch, head) = (head / shape.n_heads_q, head % shape.n_heads_q);
        widen_row(x.q(), [batch, head, i], &mut q);
        let bounds = &bounds[batch * shape.n_heads_kv + shape.kv_head(head)];
        all.extend((0..bounds.n_pages()).map(|page| {
            let column = bounds.tile(page / LANES).iter().skip(page % LANES).step_by(LANES);
            let (max, min) = (column.clone(), column.skip(shape.head_dim));
            q.iter().zip(max.zip(min)).map(|(q, (max, min))| (q * max).max(q * min)).sum::<f32>()
        }));
    }
    all
}
