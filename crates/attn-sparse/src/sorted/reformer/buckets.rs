//! The hash: which axis, with its sign, a rotated row points along most.

use crate::sorted::scores::for_each_row;
use attn_core::TensorView;

/// How the buckets of all rounds are read from scores.
pub(super) struct Digits {
    /// Buckets are numbers with these digits, the first counting most.
    pub(super) factors: Vec<usize>,
    pub(super) n_hashes: usize,
}

impl Digits {
    /// Columns of the rotations of one round.
    pub(super) fn columns(&self) -> usize {
        self.factors.iter().map(|factor| factor / 2).sum()
    }

    /// The bucket of each round, of scores `[n_hashes, columns]`.
    fn read(&self, scores: &[f32], buckets: &mut [i32]) {
        for (scores, bucket) in scores.chunks_exact(self.columns()).zip(buckets) {
            let (mut number, mut rest) = (0, scores);
            for factor in &self.factors {
                let (digit, others) = rest.split_at(factor / 2);
                number = number * factor + argmax(digit);
                rest = others;
            }
            *bucket = number as i32;
        }
    }
}

/// The first place of the largest number of `[x, -x]`.
fn argmax(x: &[f32]) -> usize {
    let (mut best, mut most) = (0, f32::NEG_INFINITY);
    for (at, &x) in x.iter().enumerate() {
        (best, most) = if x > most { (at, x) } else { (best, most) };
    }
    for (at, &y) in x.iter().enumerate() {
        (best, most) = if -y > most { (x.len() + at, -y) } else { (best, most) };
    }
    best
}

/// Buckets `[n_hashes, n]` of one head; `rotations [head_dim, n_hashes, columns]`.
pub(super) fn hash(rows: &TensorView<'_>, at: [usize; 2], rotations: &[f32], digits: &Digits) -> Vec<i32> {
    let (n, n_hashes) = (rows.shape()[2], digits.n_hashes);
    let mut by_token = vec![0; n * n_hashes];
    for_each_row(rows, at, rotations, &mut by_token, n_hashes, |scores, buckets| {
        digits.read(scores, buckets)
    });
    let by_round = |round: usize| by_token.iter().skip(round).step_by(n_hashes).copied();
    (0..n_hashes).flat_map(by_round).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_axis_counts_with_its_sign() {
        assert_eq!(argmax(&[0.5, -2.0, 1.0]), 4);
        assert_eq!(argmax(&[0.5, 2.0, -1.0]), 1);
        assert_eq!(argmax(&[1.0, -1.0]), 0, "ties go to the first");
        let digits = Digits { factors: vec![4, 2], n_hashes: 1 };
        let mut bucket = [0];
        digits.read(&[0.1, -3.0, -1.0], &mut bucket);
        assert_eq!(bucket, [3 * 2 + 1]);
    }
}
