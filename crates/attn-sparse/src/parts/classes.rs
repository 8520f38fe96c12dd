//! A mask of sorted rows: rows and keys lie class by class, and a query sees keys of its own class alone.

use attn_core::mask::{Cover, Head, Mask, Pair};
use std::ops::Range;

/// Block-diagonal: class `c` has rows `q_starts[c]..q_starts[c + 1]`, keys `kv_starts[c]..kv_starts[c + 1]`, and inside it a
/// mask that counts rows and keys from the class's start.
#[derive(Debug, Clone)]
pub(crate) struct Classes<M> {
    q_starts: Vec<usize>,
    kv_starts: Vec<usize>,
    inside: Vec<M>,
    /// Query heads that see anything at all.
    heads: Heads,
}

/// Some query heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heads {
    All,
    Even,
    None,
    Odd,
}

impl Heads {
    pub(crate) fn contain(self, head: usize) -> bool {
        match self {
            Self::All => true,
            Self::Even => head.is_multiple_of(2),
            Self::None => false,
            Self::Odd => !head.is_multiple_of(2),
        }
    }

    /// How many of the first `n`.
    pub(crate) fn count(self, n: usize) -> usize {
        match self {
            Self::All => n,
            Self::Even => n.div_ceil(2),
            Self::None => 0,
            Self::Odd => n / 2,
        }
    }
}

impl<M> Classes<M> {
    /// Classes of `(rows, keys, mask inside)`.
    pub(crate) fn new(classes: impl Iterator<Item = (usize, usize, M)>, heads: Heads) -> Self {
        let (mut q_starts, mut kv_starts, mut inside) = (vec![0], vec![0], Vec::new());
        for (rows, keys, mask) in classes {
            q_starts.push(q_starts[inside.len()] + rows);
            kv_starts.push(kv_starts[inside.len()] + keys);
            inside.push(mask);
        }
        Self { q_starts, kv_starts, inside, heads }
    }

    /// The class of row `i`; classes may be empty.
    fn class_of_row(&self, i: usize) -> usize {
        self.q_starts.partition_point(|start| *start <= i) - 1
    }

    fn class_of_key(&self, j: usize) -> usize {
        self.kv_starts.partition_point(|start| *start <= j) - 1
    }

    fn rows(&self, class: usize) -> Range<usize> {
        self.q_starts[class]..self.q_starts[class + 1]
    }

    fn keys(&self, class: usize) -> Range<usize> {
        self.kv_starts[class]..self.kv_starts[class + 1]
    }
}

fn less(range: &Range<usize>, start: usize) -> Range<usize> {
    range.start - start..range.end - start
}

impl<M: Mask> Mask for Classes<M> {
    fn sees(&self, pair: Pair) -> bool {
        let class = self.class_of_row(pair.i);
        let (rows, keys) = (self.rows(class), self.keys(class));
        self.heads.contain(pair.head)
            && keys.contains(&pair.j)
            && self.inside[class].sees(Pair { i: pair.i - rows.start, j: pair.j - keys.start, ..pair })
    }

    fn spans(&self, head: Head, rows: Range<usize>, _: usize) -> Vec<Range<usize>> {
        let mut spans: Vec<Range<usize>> = Vec::new();
        if rows.is_empty() || !self.heads.contain(head.head) {
            return spans;
        }
        for class in self.class_of_row(rows.start)..=self.class_of_row(rows.end - 1) {
            let (own, keys) = (self.rows(class), self.keys(class));
            let seen = rows.start.max(own.start)..rows.end.min(own.end);
            if seen.is_empty() || keys.is_empty() {
                continue;
            }
            for span in self.inside[class].spans(head, less(&seen, own.start), keys.len()) {
                let span = keys.start + span.start..keys.start + span.end;
                match spans.last_mut() {
                    Some(last) if last.end == span.start => last.end = span.end,
                    _ => spans.push(span),
                }
            }
        }
        spans
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        if !self.heads.contain(head.head) {
            return Cover::Empty;
        }
        let (first, last) = (self.class_of_row(rows.start), self.class_of_row(rows.end - 1));
        let (first_keys, last_keys) = (self.class_of_key(keys.start), self.class_of_key(keys.end - 1));
        if first_keys > last || last_keys < first {
            return Cover::Empty;
        }
        if first != last || first_keys != first || last_keys != first {
            return Cover::Partial;
        }
        let (rows, keys) = (less(&rows, self.q_starts[first]), less(&keys, self.kv_starts[first]));
        self.inside[first].cover(head, rows, keys)
    }

    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        let class = self.class_of_key(j);
        let own = self.rows(class);
        let seen = rows.start.max(own.start)..rows.end.min(own.end);
        if seen.is_empty() || !self.heads.contain(head.head) {
            return scores[..rows.len()].fill(f32::NEG_INFINITY);
        }
        let (first, end) = (seen.start - rows.start, seen.end - rows.start);
        scores[..first].fill(f32::NEG_INFINITY);
        scores[end..rows.len()].fill(f32::NEG_INFINITY);
        let j = j - self.kv_starts[class];
        self.inside[class].hide(head, less(&seen, own.start), j, &mut scores[first..end]);
    }
}

/// A mask for some heads; the others see nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OfHeads<M>(pub(crate) Heads, pub(crate) M);

impl<M: Mask> Mask for OfHeads<M> {
    fn sees(&self, pair: Pair) -> bool {
        self.0.contain(pair.head) && self.1.sees(pair)
    }

    fn spans(&self, head: Head, rows: Range<usize>, n_kv: usize) -> Vec<Range<usize>> {
        if self.0.contain(head.head) { self.1.spans(head, rows, n_kv) } else { Vec::new() }
    }

    fn cover(&self, head: Head, rows: Range<usize>, keys: Range<usize>) -> Cover {
        if self.0.contain(head.head) { self.1.cover(head, rows, keys) } else { Cover::Empty }
    }

    fn hide(&self, head: Head, rows: Range<usize>, j: usize, scores: &mut [f32]) {
        if self.0.contain(head.head) {
            self.1.hide(head, rows, j, scores);
        } else {
            scores[..rows.len()].fill(f32::NEG_INFINITY);
        }
    }
}
