//! From the gradients of scores to those of the rows they are products of.

use super::products::Lower;
use crate::matrix_state::fading::weigh;
use crate::matrix_state::lanes::{add, add_product};
use crate::matrix_state::scratch::Scratch;
use attn_core::simd::Simd;

/// Where readers stand.
pub(super) type At<'a> = &'a dyn Fn(usize) -> Option<usize>;

/// Readers `x` and columns `y`, whose scores have gradients.
pub(super) struct Pairs<'a> {
    pub(super) x: &'a [f32],
    pub(super) x_faded: &'a [f32],
    pub(super) at: At<'a>,
    pub(super) seen: &'a dyn Fn(usize) -> usize,
    pub(super) y: &'a [f32],
}

impl Pairs<'_> {
    /// Adds the gradients of `x` and `y` that those of their scores give; `scores` is left weighed.
    #[inline(always)]
    pub(super) fn run<S: Simd>(
        &self,
        simd: S,
        scores: &mut [f32],
        s: &mut Scratch,
        [part, faded, weights]: [&mut Vec<f32>; 3],
        [dx, dy]: [&mut [f32]; 2],
    ) {
        let (key_dim, stride, width) = (s.options.key_dim, s.prepared.stride, s.prepared.fading.key_width);
        let (rows, writes) = (self.x.len() / key_dim, self.y.len() / key_dim);
        if width <= 1 {
            for (i, row) in scores.chunks_exact_mut(stride).enumerate().take(rows) {
                s.prepared.fading.weigh_scores(simd, (self.at)(i), &mut row[..(self.seen)(i)]);
            }
            let scores = Lower { data: scores, stride, rows, seen: self.seen };
            scores.multiply(simd, self.y, key_dim, dx);
            return scores.multiply_turned(simd, writes, self.x, key_dim, dy);
        }
        let near = (0..rows).take_while(|i| s.prepared.fading.is_near((self.at)(*i))).count();
        if near > 0 {
            // Near the start: scores are x_faded . (y o up).
            let scores = Lower { data: scores, stride, rows: near, seen: self.seen };
            faded.resize(self.y.len(), 0.0);
            weigh(self.y, key_dim, &s.prepared.fading.up, width, faded);
            part.clear();
            part.resize(self.x.len().max(self.y.len()), 0.0);
            scores.multiply(simd, faded, key_dim, part);
            for (i, (dx, part)) in
                dx.chunks_exact_mut(key_dim).zip(part.chunks_exact(key_dim)).enumerate().take(near)
            {
                match (self.at)(i) {
                    Some(at) => add_product(simd, part, &s.prepared.fading.down[at * width..][..width], dx),
                    None => add(simd, part, dx),
                }
            }
            let all = &mut part[..self.y.len()];
            all.fill(0.0);
            scores.multiply_turned(simd, writes, self.x_faded, key_dim, all);
            add_product(simd, all, &s.prepared.fading.up, dy);
        }
        // Further on, pair by pair.
        weights.resize(width, 0.0);
        for i in near..rows {
            let own = i * key_dim..(i + 1) * key_dim;
            let (x, dx) = (&self.x[own.clone()], &mut dx[own]);
            for j in 0..(self.seen)(i) {
                let score = scores[i * stride + j];
                s.prepared.fading.pair_weights(simd, (self.at)(i), j, weights);
                let theirs = j * key_dim..(j + 1) * key_dim;
                let rows = dx.iter_mut().zip(&self.y[theirs.clone()]).zip(&mut dy[theirs]).zip(x);
                for ((((dx, y), dy), x), weight) in rows.zip(&*weights) {
                    let weighted = score * weight;
                    *dx += weighted * y;
                    *dy += weighted * x;
                }
            }
        }
    }
}
