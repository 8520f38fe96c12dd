//! The tokens nearest to each centroid, one pass over blocks of tokens.
//!
//! A cluster keeps the best so far ([`TopK`]); what a later token has to exceed is compared for all clusters at once.

use crate::select::TopK;
use crate::sorted::rows::normalize;
use crate::sorted::scores::{Product, head_rows};
use attn_core::TensorView;
use attn_core::simd::{Isa, Simd, SimdOp};
use rayon::prelude::*;

/// Clusters that a task looks for: two vectors of AVX-512.
const CLUSTERS: usize = 32;
/// Tokens scored at a time.
const TOKENS: usize = 128;

/// The search of some clusters.
struct Search<'a> {
    /// Rows of unit length, `[n, width]`.
    rows: &'a [f32],
    width: usize,
    /// Centroids as columns, `[width, clusters]`.
    columns: &'a [f32],
    best: Vec<TopK>,
}

impl SimdOp for Search<'_> {
    type Output = Vec<TopK>;

    #[inline(always)]
    fn eval<S: Simd>(mut self, simd: S) -> Self::Output {
        let n_columns = self.best.len();
        let mut scores = vec![0.0; TOKENS * n_columns];
        let mut to_exceed = vec![f32::NEG_INFINITY; n_columns];
        for (block, rows) in self.rows.chunks(TOKENS * self.width).enumerate() {
            let n_rows = rows.len() / self.width;
            Product::new([n_rows, n_columns, self.width], rows, self.columns, &mut scores).eval(simd);
            for (i, scores) in scores.chunks_exact(n_columns).enumerate().take(n_rows) {
                // Few tokens concern any cluster: one test without branches for all.
                let any =
                    scores.iter().zip(&to_exceed).fold(false, |any, (score, least)| any | (score > least));
                if any {
                    self.consider(block * TOKENS + i, scores, &mut to_exceed);
                }
            }
        }
        self.best
    }
}

impl Search<'_> {
    fn consider(&mut self, token: usize, scores: &[f32], to_exceed: &mut [f32]) {
        for ((&score, least), best) in scores.iter().zip(to_exceed).zip(&mut self.best) {
            if score > *least {
                best.offer(score, token);
                *least = best.threshold();
            }
        }
    }
}

/// The `window` tokens of a head whose cosine with each of `means [clusters, width]` is highest, `[clusters, window]`,
/// ascending, -1 behind the last. A token whose score is no number above -inf is taken by none.
pub(super) fn nearest(rows: &TensorView<'_>, at: [usize; 2], means: &[f32], window: usize) -> Vec<i32> {
    let width = rows.shape()[3];
    let clusters = means.len() / width;
    if window == 0 {
        return Vec::new();
    }
    let mut unit = head_rows(rows, at);
    normalize(&mut unit, width);
    let isa = Isa::current();
    let mut lists = vec![-1; clusters * window];
    lists.par_chunks_mut(CLUSTERS * window).zip(means.par_chunks(CLUSTERS * width)).for_each(
        |(lists, means)| {
            let n_columns = means.len() / width;
            let mut columns = vec![0.0; means.len()];
            for (c, mean) in means.chunks_exact(width).enumerate() {
                mean.iter().enumerate().for_each(|(p, x)| columns[p * n_columns + c] = *x);
            }
            let best = vec![TopK::new(window); n_columns];
            let found = isa.run(Search { rows: &unit, width, columns: &columns, best });
            for (list, mut best) in lists.chunks_exact_mut(window).zip(found) {
                list.iter_mut().zip(best.take()).for_each(|(to, token)| *to = token as i32);
            }
        },
    );
    lists
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sorted::noise::normal;
    use attn_core::View;

    #[test]
    fn the_nearest_are_those_of_a_full_sort() {
        for (n, clusters, window) in [(1, 1, 1), (300, 40, 7), (129, 3, 100), (50, 2, 50), (700, 33, 1)] {
            let (rows, mut means) = (normal(1, n * 4), normal(2, clusters * 4));
            normalize(&mut means, 4);
            let view = View::contiguous("k", &rows, [1, 1, n, 4]).unwrap().into();
            let found = nearest(&view, [0, 0], &means, window);
            for (mean, found) in means.chunks_exact(4).zip(found.chunks_exact(window)) {
                let score = |t: usize| {
                    let row = &rows[t * 4..][..4];
                    let dot: f64 = row.iter().zip(mean).map(|(x, m)| f64::from(*x) * f64::from(*m)).sum();
                    dot / row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
                };
                let mut all: Vec<usize> = (0..n).collect();
                all.sort_by(|a, b| score(*b).total_cmp(&score(*a)).then(a.cmp(b)));
                let mut best: Vec<i32> = all[..window].iter().map(|t| *t as i32).collect();
                best.sort_unstable();
                assert_eq!(found, best, "{n} tokens, {clusters} clusters, {window} taken");
            }
        }
    }

    #[test]
    fn ties_go_to_the_lower_index() {
        let rows = [1.0f32, 2.0, 3.0, -1.0, 0.5, f32::NAN];
        let view = View::contiguous("k", &rows, [1, 1, 6, 1]).unwrap().into();
        assert_eq!(nearest(&view, [0, 0], &[1.0, -1.0], 3), [0, 1, 2, 0, 1, 3]);
        assert_eq!(nearest(&view, [0, 0], &[1.0], 6), [0, 1, 2, 3, 4, -1]);
    }
}
