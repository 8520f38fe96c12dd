//! What a call will take, known before it runs.

use crate::{AttnShape, DType};
use serde::{Deserialize, Serialize};

/// Floating-point operations, traffic and memory of one forward call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Cost {
    /// Floating-point operations of the algorithm's matrix products (a multiply-add counts two).
    pub flops: u64,
    /// Bytes that must be read or written at least once: inputs and output.
    pub bytes_moved: u64,
    /// Bytes allocated beyond inputs and output, over all threads.
    pub bytes_allocated: u64,
}

impl Cost {
    /// `flops` and `bytes_allocated` with the traffic of reading q, k, v and writing out once.
    pub fn of(shape: &AttnShape, dtype: DType, flops: u64, bytes_allocated: u64) -> Self {
        Self { flops, bytes_moved: shape.io_bytes(dtype), bytes_allocated }
    }
}

/// FLOPs of softmax attention over `pairs` (query, key) pairs: two products of widths `head_dim` and `head_dim_v`.
pub fn softmax_flops(pairs: u64, shape: &AttnShape) -> u64 {
    2 * pairs * (shape.head_dim + shape.head_dim_v) as u64
}

/// Pairs that a band mask `p - left <= j <= p + right`, `p = i + offset`, leaves visible in one head.
pub fn band_pairs(shape: &AttnShape, band: &crate::mask::Band) -> u64 {
    let (n_q, n_kv) = (shape.n_q as i128, shape.n_kv as i128);
    let offset = band.offset as i128;
    // Keys below `x`, summed over rows whose bound moves with the row: sum of clamp(i + shift, 0, n_kv).
    let clamped_sum = |shift: i128| {
        let below = (-shift).clamp(0, n_q); // rows whose bound is still 0
        let above = (n_kv - shift).clamp(below, n_q); // rows from here on see the whole axis
        let rising = above - below;
        rising * shift + (below + above - 1) * rising / 2 + (n_q - above) * n_kv
    };
    let ends = band.right.map_or(n_q * n_kv, |right| clamped_sum(offset + right as i128 + 1));
    let starts = band.left.map_or(0, |left| clamped_sum(offset - left as i128));
    (ends - starts).max(0) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mask::{Band, Head, Mask};

    #[test]
    fn band_pairs_counts_what_the_mask_sees() {
        let head = Head { batch: 0, head: 0 };
        for (n_q, n_kv) in [(1, 1), (5, 9), (9, 5), (16, 16), (0, 4), (4, 0)] {
            let shape = AttnShape { n_q, n_kv, ..AttnShape::square(1, 1, 1) };
            for offset in [-20, -3, 0, 4, n_kv as isize - n_q as isize, 60] {
                for left in [None, Some(0), Some(2), Some(100)] {
                    for right in [None, Some(0), Some(3), Some(100)] {
                        let band = Band { offset, left, right };
                        let seen = (0..n_q).flat_map(|i| (0..n_kv).map(move |j| (i, j)));
                        let want = seen.filter(|&(i, j)| band.sees(head.pair(i, j))).count();
                        assert_eq!(band_pairs(&shape, &band), want as u64, "{band:?} on {n_q} x {n_kv}");
                    }
                }
            }
        }
    }
}
