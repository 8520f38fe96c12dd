//! What the softmax engine asks of a block mask: which keys some rows can see, and how much of a tile.

use super::BlockMask;
use attn_core::mask::{Cover, Head};
use std::ops::Range;

impl BlockMask {
    /// The rows of each block of queries that `rows` touches.
    fn cut(&self, rows: Range<usize>) -> impl Iterator<Item = (usize, Range<usize>)> + use<> {
        let (size, end) = (self.sizes.q, rows.end);
        let blocks = if rows.is_empty() { 0..0 } else { rows.start / size..(end - 1) / size + 1 };
        blocks.map(move |block| (block, rows.start.max(block * size)..end.min((block + 1) * size)))
    }

    pub(super) fn spans_of(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        let list = self.list(head);
        let rows: Vec<_> = self.cut(rows).map(|(row, _)| self.entries(list, row)).collect();
        let (mut spans, mut merged): (Vec<Range<usize>>, Vec<u32>) = (Vec::new(), Vec::new());
        let blocks = match rows.as_slice() {
            [one] => &self.blocks[one.clone()],
            many => {
                merged.extend(many.iter().flat_map(|row| &self.blocks[row.clone()]));
                merged.sort_unstable();
                merged.dedup();
                &merged
            }
        };
        for &block in blocks {
            let first = block as usize * self.sizes.kv;
            let end = (first + self.sizes.kv).min(n_kv);
            match spans.last_mut() {
                Some(last) if last.end == first => last.end = end,
                _ if first < end => spans.push(first..end),
                _ => {}
            }
        }
        spans
    }

    pub(super) fn cover_of(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        let list = self.list(head);
        let mut covers = self.cut(rows).map(|(row, rows)| self.cover_of_row(head, list, (row, rows), &keys));
        let first = covers.next().unwrap_or(Cover::Empty);
        if first != Cover::Partial && covers.all(|cover| cover == first) { first } else { Cover::Partial }
    }

    /// The cover of rows of one block of queries.
    fn cover_of_row(
        &self,
        head: Head,
        list: usize,
        (block_row, rows): (usize, Range<usize>),
        keys: &Range<usize>,
    ) -> Cover {
        let touched = keys.start / self.sizes.kv..(keys.end - 1) / self.sizes.kv + 1;
        let row = self.entries(list, block_row);
        let blocks = &self.blocks[row.clone()];
        let first = blocks.partition_point(|block| (*block as usize) < touched.start);
        let listed = blocks[first..].iter().take_while(|block| (**block as usize) < touched.end).count();
        let (mut all, mut none) = (listed == touched.len(), true);
        let partial = &self.partial[row];
        for (block, partial) in blocks.iter().zip(partial).skip(first).take(listed) {
            let cover = match (partial, &self.inside) {
                (true, Some(inside)) => {
                    let block = self.block_keys(*block as usize);
                    let keys = block.start.max(keys.start)..block.end.min(keys.end);
                    inside.cover(head, rows.clone(), keys)
                }
                _ => Cover::Full,
            };
            all &= cover == Cover::Full;
            none &= cover == Cover::Empty;
        }
        match (all, none) {
            (true, _) => Cover::Full,
            (_, true) => Cover::Empty,
            _ => Cover::Partial,
        }
    }

    pub(super) fn hide_rows(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        let (list, block, start) = (self.list(head), j / self.sizes.kv, rows.start);
        for (block_row, rows) in self.cut(rows) {
            let scores = &mut scores[rows.start - start..rows.end - start];
            match (self.find(list, block_row, block), &self.inside) {
                (None, _) => scores.fill(f32::NEG_INFINITY),
                (Some(entry), Some(inside)) if self.partial[entry] => inside.hide(head, rows, j, scores),
                _ => {}
            }
        }
    }
}
