//! What the softmax engine asks of a block mask: which keys some rows can see, and how much of a tile.

use super::{BlockMask, SharedMask};
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
        let entries = |row: usize| self.entries(list, row);
        if rows.len() == 1 {
            let row = entries(rows.start / self.sizes.q);
            let is_partial = self.partial[row.clone()].contains(&true);
            return self.spans_of_blocks(&self.blocks[row], is_partial, head, rows, n_kv);
        }
        let mut touched = self.cut(rows.clone()).map(|(row, _)| row);
        let Some(first) = touched.next() else { return Vec::new() };
        let mut partial = self.partial[entries(first)].contains(&true);
        let (mut last, mut lists) = (first, vec![&self.blocks[entries(first)]]);
        for row in touched {
            partial |= self.partial[entries(row)].contains(&true);
            // Neighbours often see the same.
            if self.blocks[entries(row)] != self.blocks[entries(last)] {
                lists.push(&self.blocks[entries(row)]);
                last = row;
            }
        }
        let merged = either(&lists);
        let blocks = if let [one] = lists.as_slice() { one } else { merged.as_slice() };
        self.spans_of_blocks(blocks, partial, head, rows, n_kv)
    }

    /// The keys of ascending blocks that some of `rows` may see.
    fn spans_of_blocks(
        &self,
        blocks: &[u32],
        is_partial: bool,
        head: Head,
        rows: Range<usize>,
        n_kv: usize,
    ) -> Vec<Range<usize>> {
        let mut spans: Vec<Range<usize>> = Vec::with_capacity(blocks.len());
        for &block in blocks {
            let first = block as usize * self.sizes.kv;
            let end = (first + self.sizes.kv).min(n_kv);
            match spans.last_mut() {
                Some(last) if last.end == first => last.end = end,
                _ if first < end => spans.push(first..end),
                _ => {}
            }
        }
        match &self.inside {
            Some(inside) if is_partial => common(&spans, &inside.spans(head, rows, n_kv)),
            _ => spans,
        }
    }

    /// Whether all rows see the same blocks, and none of them is partial; or a single row sees what the spans of the mask inside
    /// leave of its blocks.
    pub(super) fn spans_are_full(&self, head: Head, rows: Range<usize>) -> bool {
        let list = self.list(head);
        if rows.len() == 1 {
            let is_partial = self.partial[self.entries(list, rows.start / self.sizes.q)].contains(&true);
            let seen = |inside: &SharedMask| {
                let spans = inside.spans(head, rows.clone(), self.shape.n_kv);
                spans.into_iter().all(|span| inside.cover(head, rows.clone(), span) == Cover::Full)
            };
            return !is_partial || self.inside.as_ref().is_none_or(seen);
        }
        let mut touched = self.cut(rows).map(|(row, _)| self.entries(list, row));
        let Some(first) = touched.next() else { return true };
        let alike = |row: Range<usize>| self.blocks[row] == self.blocks[first.clone()];
        !self.partial[first.clone()].contains(&true)
            && touched.all(|row| !self.partial[row.clone()].contains(&true) && alike(row))
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

    /// Hides what `rows` do not see of `keys`; the scores of a key are `stride` numbers apart.
    pub(super) fn hide_pairs(
        &self,
        head: Head,
        rows: Range<usize>,
        keys: Range<usize>,
        scores: &mut [f32],
        stride: usize,
    ) {
        let (list, start, size) = (self.list(head), rows.start, self.sizes.kv);
        for (block_row, rows) in self.cut(rows) {
            let mut first = keys.start;
            while first < keys.end {
                let block = first / size;
                let some = first..keys.end.min((block + 1) * size);
                let scores = &mut scores[(first - keys.start) * stride + rows.start - start..];
                match (self.find(list, block_row, block), &self.inside) {
                    (None, _) => {
                        let hidden = (0..some.len()).map(|key| key * stride..key * stride + rows.len());
                        hidden.for_each(|row| scores[row].fill(f32::NEG_INFINITY));
                    }
                    (Some(entry), Some(inside)) if self.partial[entry] => {
                        inside.hide_tile(head, rows.clone(), some.clone(), scores, stride);
                    }
                    _ => {}
                }
                first = some.end;
            }
        }
    }
}

/// Blocks of any of several ascending lists, ascending; nothing for one list, which is there already.
fn either(lists: &[&[u32]]) -> Vec<u32> {
    if lists.len() < 2 {
        return Vec::new();
    }
    let mut blocks = lists.concat();
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

/// What two lists of ranges, each sorted and disjoint, have in common.
fn common(a: &[Range<usize>], b: &[Range<usize>]) -> Vec<Range<usize>> {
    let (mut both, mut at) = (Vec::with_capacity(a.len()), 0);
    for x in a {
        while b.get(at).is_some_and(|y| y.end <= x.start) {
            at += 1;
        }
        let meets = b[at..].iter().take_while(|y| y.start < x.end);
        both.extend(meets.map(|y| x.start.max(y.start)..x.end.min(y.end)));
    }
    both
}
