//! Cuts the spans that a block of queries sees into the chunks of keys that one tile takes.
//!
//! A long span is cut by itself and read in place. Short ones are joined, in order, until a chunk is full; the kernel
//! gathers their rows. What is short is a matter of what a tile costs beside its pairs, and what a copy.

use std::ops::Range;

/// Spans below this many keys are gathered where nothing else is said: a tile of their own would leave the kernel's inner
/// loops too short.
pub(super) const SHORT: usize = 32;

/// Calls `visit` with the key ranges of each chunk of at most `block_kv` keys, in ascending order. Spans of fewer than
/// `short` keys are joined.
pub(super) fn for_each_chunk(
    spans: &[Range<usize>],
    block_kv: usize,
    short: usize,
    mut visit: impl FnMut(&[Range<usize>]),
) {
    let mut gathered: Vec<Range<usize>> = Vec::new();
    let mut n_gathered = 0;
    let mut spans = spans.iter().peekable();
    while let Some(span) = spans.next() {
        let alone = gathered.is_empty() && spans.peek().is_none_or(|next| next.len() >= short);
        if span.len() < short && !alone {
            let mut rest = span.clone();
            while n_gathered + rest.len() >= block_kv {
                let cut = rest.start + block_kv - n_gathered;
                gathered.push(rest.start..cut);
                visit(&gathered);
                gathered.clear();
                n_gathered = 0;
                rest.start = cut;
            }
            if !rest.is_empty() {
                n_gathered += rest.len();
                gathered.push(rest);
            }
            continue;
        }
        if !gathered.is_empty() {
            visit(&gathered);
            gathered.clear();
            n_gathered = 0;
        }
        for first in span.clone().step_by(block_kv) {
            visit(std::slice::from_ref(&(first..first.saturating_add(block_kv).min(span.end))));
        }
    }
    if !gathered.is_empty() {
        visit(&gathered);
    }
}

/// All chunks of some spans, to look ahead in.
pub(super) struct Chunks {
    ranges: Vec<Range<usize>>,
    /// Where each chunk's ranges start.
    first: Vec<usize>,
}

impl Chunks {
    /// See [`for_each_chunk`].
    pub(super) fn new(spans: &[Range<usize>], block_kv: usize, short: usize) -> Self {
        let (mut ranges, mut first) = (Vec::new(), vec![0]);
        for_each_chunk(spans, block_kv, short, |chunk| {
            ranges.extend_from_slice(chunk);
            first.push(ranges.len());
        });
        Self { ranges, first }
    }

    /// Chunk `at`, if there is one.
    pub(super) fn get(&self, at: usize) -> Option<&[Range<usize>]> {
        self.first.get(at..at + 2).map(|ends| &self.ranges[ends[0]..ends[1]])
    }

    /// The chunks in order.
    pub(super) fn iter(&self) -> impl Iterator<Item = &[Range<usize>]> {
        self.first.windows(2).map(|ends| &self.ranges[ends[0]..ends[1]])
    }
}

/// The part of `spans` that holds the keys `share`, counted along the spans.
pub(super) fn share_of(spans: &[Range<usize>], share: Range<usize>) -> Vec<Range<usize>> {
    let mut before = 0;
    let parts = spans.iter().map(|span| {
        let first = span.start + share.start.saturating_sub(before).min(span.len());
        let end = span.start + share.end.saturating_sub(before).min(span.len());
        before += span.len();
        first..end
    });
    parts.filter(|part| !part.is_empty()).collect()
}

/// The union of sorted, disjoint span lists, sorted and disjoint.
pub(super) fn union(mut spans: Vec<Range<usize>>) -> Vec<Range<usize>> {
    spans.sort_by_key(|span| span.start);
    let mut merged: Vec<Range<usize>> = Vec::with_capacity(spans.len());
    for span in spans {
        match merged.last_mut() {
            Some(last) if span.start <= last.end => last.end = last.end.max(span.end),
            _ => merged.push(span),
        }
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunks(spans: &[Range<usize>], block_kv: usize) -> Vec<Vec<Range<usize>>> {
        let mut all = Vec::new();
        for_each_chunk(spans, block_kv, SHORT, |chunk| all.push(chunk.to_vec()));
        all
    }

    #[test]
    fn chunks_hold_every_key_once_in_order() {
        let span = |range: Range<usize>| vec![range];
        let (one, long) = (span(0..1), span(0..300));
        let cases: [&[Range<usize>]; 6] = [
            &one,
            &long,
            &[3..4, 7..9, 20..90, 100..131, 140..141],
            &[0..31, 40..71, 80..111, 120..151],
            &[5..6, 8..200, 300..301],
            &[],
        ];
        for spans in cases {
            for block_kv in [1, 7, 32, 64, 128] {
                let all = chunks(spans, block_kv);
                let keys: Vec<usize> = all.iter().flatten().cloned().flatten().collect();
                let wanted: Vec<usize> = spans.iter().cloned().flatten().collect();
                assert_eq!(keys, wanted, "{spans:?} by {block_kv}");
                assert!(
                    all.iter().all(|c| (1..=block_kv).contains(&c.iter().map(Range::len).sum::<usize>()))
                );
            }
        }
    }

    #[test]
    fn single_keys_share_a_chunk_and_long_spans_stay_in_place() {
        let spans: Vec<_> = (0..100).map(|j| 10 * j..10 * j + 1).collect();
        assert_eq!(chunks(&spans, 64).iter().map(Vec::len).collect::<Vec<_>>(), [64, 36]);
        assert_eq!(chunks(&[0..128, 256..384], 128).len(), 2);
    }

    #[test]
    fn shares_partition_the_spans() {
        let spans = [2..5, 8..9, 20..30];
        let whole: Vec<usize> = spans.iter().cloned().flatten().collect();
        for cut in 0..=whole.len() {
            let keys = |share| share_of(&spans, share).into_iter().flatten().collect::<Vec<_>>();
            assert_eq!([keys(0..cut), keys(cut..whole.len())].concat(), whole, "cut at {cut}");
        }
        assert_eq!(union(vec![4..6, 0..2, 5..9, 9..10]), [0..2, 4..10]);
    }
}
