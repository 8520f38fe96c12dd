//! The largest softmax weights of each row of logits, one after another: `n_top` times the weight of the largest among those
//! that are left, ties to the lower index.
//!
//! Logits are scored in blocks of rows and never kept. With `p` the softmax over those left, `a` the largest and `g` the gradient
//! of its weight, `dlogit_s = g p_a ([s = a] - p_s)`.

use super::pools::Pools;
use crate::sorted::rows::BLOCK;
use crate::sorted::scores::Product;
use attn_core::simd::Isa;
use rayon::prelude::*;

/// The rows whose largest weights are wanted.
pub(super) struct Top<'a> {
    pub(super) pools: &'a Pools,
    pub(super) width: usize,
    /// Multiplies dot products of pools.
    pub(super) scale: f64,
    pub(super) n_top: usize,
    /// Sources with logit 0 in front of the others.
    pub(super) n_null: usize,
    /// Whether row `u` has only the first `u` sources that are not null.
    pub(super) causal: bool,
}

impl Top<'_> {
    /// Sources that are not null.
    fn buckets(&self) -> usize {
        self.pools.k.len() / self.width
    }

    /// Scores blocks of rows in order; `each(first row, logits [rows, null and other sources])`.
    fn for_each_block(&self, mut each: impl FnMut(usize, &mut [f32])) {
        let (width, buckets) = (self.width, self.buckets());
        let sources = self.n_null + buckets;
        if buckets == 0 {
            return;
        }
        let mut columns = vec![0.0f32; width * sources];
        for (s, row) in self.pools.k.chunks_exact(width).enumerate() {
            for (p, x) in row.iter().enumerate() {
                columns[p * sources + self.n_null + s] = (x * self.scale) as f32;
            }
        }
        let isa = Isa::current();
        let step = BLOCK * rayon::current_num_threads();
        for (block, rows) in self.pools.q.chunks(step * width).enumerate() {
            let rows: Vec<f32> = rows.iter().map(|x| *x as f32).collect();
            let mut logits = vec![0.0; rows.len() / width * sources];
            let parts = logits.par_chunks_mut(BLOCK * sources).zip(rows.par_chunks(BLOCK * width));
            parts.for_each(|(logits, rows)| {
                let sizes = [rows.len() / width, sources, width];
                isa.run(Product::new(sizes, rows, &columns, logits));
            });
            each(block * step, &mut logits);
        }
    }

    /// The logits that row `row` may choose from.
    fn open<'a>(&self, row: usize, logits: &'a [f32]) -> &'a [f32] {
        if self.causal { &logits[..self.n_null + row] } else { logits }
    }

    /// Source and weight of each choice, `[rows, n_top]`.
    pub(super) fn choose(&self) -> Vec<(u32, f32)> {
        let sources = self.n_null + self.buckets();
        let mut chosen = vec![(0, 0.0); self.pools.q.len() / self.width * self.n_top];
        if self.n_top == 0 {
            return chosen;
        }
        self.for_each_block(|first, logits| {
            let rows = chosen[first * self.n_top..].par_chunks_mut(self.n_top);
            rows.zip(logits.par_chunks(sources)).enumerate().for_each(|(i, (chosen, logits))| {
                let softmaxes = self.softmaxes(self.open(first + i, logits));
                let choice = |softmax: Softmax| (softmax.best as u32, (1.0 / softmax.sum) as f32);
                chosen.iter_mut().zip(softmaxes).for_each(|(to, softmax)| *to = choice(softmax));
            });
        });
        chosen
    }

    /// The choices of a row, one after another.
    fn softmaxes(&self, logits: &[f32]) -> Vec<Softmax> {
        let mut all: Vec<Softmax> = Vec::with_capacity(self.n_top);
        while all.len() < self.n_top.min(logits.len()) {
            let left = |s: &usize| all.iter().all(|softmax| softmax.best != *s);
            let first = (0..logits.len()).find(left).unwrap_or(0);
            let best = (0..logits.len())
                .filter(left)
                .fold(first, |best, s| if logits[s] > logits[best] { s } else { best });
            let weight = |s: usize| f64::from(logits[s] - logits[best]).exp();
            let sum = (0..logits.len()).filter(left).map(weight).sum();
            all.push(Softmax { best, sum });
        }
        all
    }

    /// Gradients of the pools, of those of the weights, `[rows, n_top]`.
    pub(super) fn gradients(&self, of_weights: &[f32]) -> Pools {
        let (width, buckets) = (self.width, self.buckets());
        let sources = self.n_null + buckets;
        let mut grads = Pools { q: vec![0.0; self.pools.q.len()], k: vec![0.0; self.pools.k.len()] };
        self.for_each_block(|first, logits| {
            logits.par_chunks_mut(sources).enumerate().for_each(|(i, logits)| {
                let open = self.open(first + i, logits).to_vec();
                logits.fill(0.0);
                let softmaxes = self.softmaxes(&open);
                for (r, softmax) in softmaxes.iter().enumerate() {
                    let grad = f64::from(of_weights[(first + i) * self.n_top + r]) / softmax.sum;
                    logits[softmax.best] += grad as f32;
                    for s in (0..open.len()).filter(|s| softmaxes[..r].iter().all(|before| before.best != *s))
                    {
                        let p = f64::from(open[s] - open[softmax.best]).exp() / softmax.sum;
                        logits[s] -= (grad * p) as f32;
                    }
                }
            });
            let n_rows = logits.len() / sources;
            let logit =
                |row: usize, s: usize| self.scale * f64::from(logits[row * sources + self.n_null + s]);
            grads.q[first * width..][..n_rows * width].par_chunks_mut(width).enumerate().for_each(
                |(i, to)| {
                    for s in 0..buckets {
                        let (g, k) = (logit(i, s), &self.pools.k[s * width..][..width]);
                        to.iter_mut().zip(k).for_each(|(to, k)| *to += g * k);
                    }
                },
            );
            grads.k.par_chunks_mut(width).enumerate().for_each(|(s, to)| {
                for i in 0..n_rows {
                    let (g, q) = (logit(i, s), &self.pools.q[(first + i) * width..][..width]);
                    to.iter_mut().zip(q).for_each(|(to, q)| *to += g * q);
                }
            });
        });
        grads
    }
}

/// A softmax over what is left of a row: its largest, and the sum of exponentials relative to it.
struct Softmax {
    best: usize,
    sum: f64,
}
