//! True scores: in f64, where products of f32 are exact.

use crate::scores::HeadRows;
use attn_core::simd::Simd;

/// The keys to be scored.
pub(super) struct Exact<'a> {
    keys: HeadRows<'a>,
    /// A key that is not stored as f32.
    row: Vec<f32>,
}

impl<'a> Exact<'a> {
    pub(super) fn new(keys: HeadRows<'a>) -> Self {
        Self { keys, row: vec![0.0; keys.width()] }
    }

    /// The score of a key for the query `x`.
    #[inline(always)]
    pub(super) fn score<S: Simd>(&mut self, simd: S, x: &[f64], key: u32) -> f64 {
        let key = key as usize;
        if let HeadRows::F32(rows) = self.keys {
            return dot(x, rows.row(key));
        }
        self.keys.read(simd, key..key + 1, &mut self.row);
        dot(x, &self.row)
    }
}

#[inline(always)]
fn dot(x: &[f64], k: &[f32]) -> f64 {
    let mut sums = [0.0f64; 16];
    let ((x_chunks, x_rest), (k_chunks, k_rest)) = (x.as_chunks::<16>(), k.as_chunks::<16>());
    // By indices: iterators would stay calls, without the vectors of the caller.
    for c in 0..x_chunks.len().min(k_chunks.len()) {
        for lane in 0..16 {
            sums[lane] += x_chunks[c][lane] * f64::from(k_chunks[c][lane]);
        }
    }
    let mut rest = 0.0;
    for c in 0..x_rest.len().min(k_rest.len()) {
        rest += x_rest[c] * f64::from(k_rest[c]);
    }
    sums.iter().sum::<f64>() + rest
}
