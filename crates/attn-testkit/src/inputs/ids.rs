//! Ids of rows, for masks of documents and spans.

use proptest::collection::vec;
use proptest::prelude::*;

/// Ids of `n` rows in runs of equal ids: packed documents in order. Ids may skip numbers; runs may be a single row.
pub fn packed_ids(n: usize) -> impl Strategy<Value = Vec<i32>> {
    // A step at each row; most are 0, so that runs are long.
    let step = prop_oneof![12 => Just(0), 2 => Just(1), 1 => 2..4i32];
    vec(step, n).prop_map(|steps| {
        let sums = steps.into_iter().scan(0, |id, step| {
            *id += step;
            Some(*id)
        });
        sums.collect()
    })
}

/// Ids of `n` rows in no order, negative ones among them.
pub fn scattered_ids(n: usize) -> impl Strategy<Value = Vec<i32>> {
    vec((-2..4i32, 1..6usize), n).prop_map(move |runs| {
        runs.into_iter().flat_map(|(id, len)| std::iter::repeat_n(id, len)).take(n).collect()
    })
}
