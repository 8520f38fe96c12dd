//! Hash tables of codes that grow at the end, and the keys that collide with a query in two tables or more.
//!
//! Keys are cut into segments. Of a complete one, each table is sorted by code, so that a bucket is a run of keys; in the last,
//! open one, each key points to the one before it in its bucket. Either way a query meets `len / 2^bits` keys a table on
//! average, and counts them.

use std::ops::Range;

/// Tables in which a key has to collide to be sampled.
const COLLISIONS: u8 = 2;
/// Keys of a segment: their counts stay in the first-level cache.
pub(super) const SEGMENT: usize = 8192;
/// The end of a bucket's keys.
const NONE: u16 = u16::MAX;

/// Codes of keys.
#[derive(Debug, Clone)]
pub(super) struct HashTables {
    tables: usize,
    buckets: usize,
    closed: Vec<Segment>,
    open: OpenSegment,
}

/// Keys that are still added to.
#[derive(Debug, Clone, Default)]
struct OpenSegment {
    /// `[tables, buckets]`: the last key of a bucket.
    last: Vec<u16>,
    /// `[keys, tables]`: the key before it in its bucket.
    before: Vec<u16>,
}

/// Complete keys, sorted by code once for each table.
#[derive(Debug, Clone)]
struct Segment {
    /// `[tables, buckets + 1]`: where the keys of a bucket start among those of the table.
    starts: Vec<u16>,
    /// `[tables, SEGMENT]`: ascending in a bucket.
    keys: Vec<u16>,
}

/// How often the keys of a segment collide.
struct Counts<F> {
    counts: [u8; SEGMENT],
    /// Called with each key that collides often enough.
    hit: F,
}

impl<F: FnMut(usize)> Counts<F> {
    fn new(hit: F) -> Self {
        Self { counts: [0; SEGMENT], hit }
    }

    fn add(&mut self, key: usize) {
        let count = &mut self.counts[key];
        *count = count.saturating_add(1);
        if *count == COLLISIONS {
            (self.hit)(key);
        }
    }
}

impl OpenSegment {
    fn keys_of(&self, bucket: usize, table: usize, tables: usize) -> impl Iterator<Item = usize> + '_ {
        let some = |key: u16| (key != NONE).then_some(usize::from(key));
        let before = move |key: &usize| some(self.before[key * tables + table]);
        std::iter::successors(self.last.get(bucket).and_then(|key| some(*key)), before)
    }

    fn sorted(&self, tables: usize, buckets: usize) -> Segment {
        let mut starts = Vec::with_capacity(tables * (buckets + 1));
        let mut keys = vec![0; self.before.len()];
        for (table, keys) in keys.chunks_exact_mut(SEGMENT).enumerate() {
            let mut end = 0;
            starts.push(0);
            for bucket in 0..buckets {
                let start = end;
                for key in self.keys_of(table * buckets + bucket, table, tables) {
                    keys[end] = key as u16;
                    end += 1;
                }
                keys[start..end].reverse();
                starts.push(end as u16);
            }
        }
        Segment { starts, keys }
    }
}

impl HashTables {
    pub(super) fn new(tables: usize, bits: usize) -> Self {
        Self { tables, buckets: 1 << bits, closed: Vec::new(), open: OpenSegment::default() }
    }

    /// Appends the codes of a key, one a table.
    pub(super) fn push(&mut self, codes: &[u16]) {
        let Self { tables, buckets, closed, open } = self;
        if open.last.is_empty() {
            open.last.resize(*tables * *buckets, NONE);
        }
        let key = (open.before.len() / *tables) as u16;
        for (last, code) in open.last.chunks_exact_mut(*buckets).zip(codes) {
            open.before.push(std::mem::replace(&mut last[usize::from(*code)], key));
        }
        if usize::from(key) + 1 == SEGMENT {
            closed.push(open.sorted(*tables, *buckets));
            open.last.fill(NONE);
            open.before.clear();
        }
    }

    /// Bytes of memory held.
    pub(super) fn bytes(&self) -> usize {
        let of = |segment: &Segment| segment.starts.capacity() + segment.keys.capacity();
        let open = self.open.last.capacity() + self.open.before.capacity();
        size_of::<u16>() * (open + self.closed.iter().map(of).sum::<usize>())
    }

    /// Segments that have some of the first `end` keys.
    pub(super) fn segments(end: usize) -> Range<usize> {
        0..end.div_ceil(SEGMENT)
    }

    /// Adds the keys of a segment, all in `keys`, that collide with the codes of a query often enough; ascending.
    pub(super) fn sample(&self, segment: usize, query: &[u16], keys: &Range<usize>, sample: &mut Vec<u32>) {
        let (first, found) = (segment * SEGMENT, sample.len());
        let end = keys.end.saturating_sub(first).min(SEGMENT);
        let mut counts = Counts::new(|key: usize| {
            if first + key >= keys.start {
                sample.push((first + key) as u32);
            }
        });
        for (table, code) in query.iter().enumerate() {
            let bucket = usize::from(*code);
            match self.closed.get(segment) {
                Some(Segment { starts, keys }) => {
                    let starts = &starts[table * (self.buckets + 1) + bucket..][..2];
                    let keys = &keys[table * SEGMENT..][usize::from(starts[0])..usize::from(starts[1])];
                    let n = match end {
                        SEGMENT => keys.len(),
                        _ => keys.partition_point(|key| usize::from(*key) < end),
                    };
                    keys[..n].iter().for_each(|key| counts.add(usize::from(*key)));
                }
                None => {
                    let keys = self.open.keys_of(table * self.buckets + bucket, table, self.tables);
                    keys.filter(|key| *key < end).for_each(|key| counts.add(key));
                }
            }
        }
        sample[found..].sort_unstable();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sorted or open, the keys are those that a count over all tables finds.
    #[test]
    fn sampled_keys_are_those_of_a_count() {
        let (tables, bits) = (7, 3);
        let n = 2 * SEGMENT + 200;
        let code =
            |key: usize, t: usize| ((key * 7919 + t * 104_729 + key * key % 911 * (t + 3)) >> 4) as u16 % 8;
        let codes: Vec<Vec<u16>> = (0..n).map(|key| (0..tables).map(|t| code(key, t)).collect()).collect();
        let mut hashed = HashTables::new(tables, bits);
        codes.iter().for_each(|codes| hashed.push(codes));
        for keys in [0..n, 5..n - 3, 100..SEGMENT, 3..SEGMENT + 70, SEGMENT + 9..2 * SEGMENT + 65, 4..4] {
            for query in [&codes[17], &codes[n - 1], &vec![0; tables]] {
                let collisions =
                    |key: &usize| codes[*key].iter().zip(query).filter(|(a, b)| a == b).count() >= 2;
                let want: Vec<u32> = keys.clone().filter(collisions).map(|key| key as u32).collect();
                let mut got = Vec::new();
                HashTables::segments(keys.end).for_each(|at| hashed.sample(at, query, &keys, &mut got));
                assert_eq!(got, want, "{keys:?}");
                assert!(keys.len() < 1000 || (1..keys.len()).contains(&want.len()));
            }
        }
    }

    #[test]
    fn many_collisions_count_as_two() {
        let mut hashed = HashTables::new(600, 0);
        (0..SEGMENT + 1).for_each(|_| hashed.push(&[0; 600]));
        let mut got = Vec::new();
        (0..2).for_each(|segment| hashed.sample(segment, &[0; 600], &(0..SEGMENT + 1), &mut got));
        assert!(got.into_iter().eq(0..SEGMENT as u32 + 1));
    }
}
