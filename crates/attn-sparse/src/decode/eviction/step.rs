//! One token after another: attend what is held, learn from the weights, evict.

use super::policy::{EvictionPolicy, Importance, Share};
use super::row_product::row_product;
use super::slots::{LANES, Slots};
use super::worth::smooth;
use crate::decode::rows::widen_row;
use attn_core::simd::{Simd, SimdBase, SimdOp};
use attn_core::tile::exp2;
use attn_core::{OutRows, Qkv};
use std::ops::Range;

/// The tokens of `x` through key/value heads that decide together.
pub(super) struct Walk<'a, 'o> {
    pub(super) policy: &'a EvictionPolicy,
    pub(super) x: &'a Qkv<'a>,
    pub(super) softmax_scale: f32,
    pub(super) batch: usize,
    pub(super) kv_heads: Range<usize>,
    /// Position of the first token.
    pub(super) first: usize,
    /// One a head.
    pub(super) heads: &'a mut [Slots],
    /// One a query head.
    pub(super) out: Vec<OutRows<'o>>,
    /// One a query head, `[n]`; none at all if not asked for.
    pub(super) lse: Vec<&'a mut [f32]>,
}

impl SimdOp for Walk<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(mut self, simd: S) {
        let shape = self.x.shape();
        let group = shape.group_size();
        let mut q = vec![0.0; group * shape.head_dim];
        let (mut k, mut v) = (vec![0.0; shape.head_dim], vec![0.0; shape.head_dim_v]);
        let mut out = vec![0.0; shape.head_dim_v.next_multiple_of(LANES)];
        let factor = self.softmax_scale * std::f32::consts::LOG2_E;
        for i in 0..shape.n_q {
            let position = self.first + i;
            for (at, head) in self.heads.iter_mut().enumerate() {
                let kv_head = self.kv_heads.start + at;
                widen_row(self.x.k(), [self.batch, kv_head, i], &mut k);
                widen_row(self.x.v(), [self.batch, kv_head, i], &mut v);
                head.push(self.policy.importance, position, &k, &v);
                for (g, q) in q.chunks_exact_mut(shape.head_dim).enumerate() {
                    widen_row(self.x.q(), [self.batch, kv_head * group + g, i], q);
                    q.iter_mut().for_each(|q| *q *= factor);
                }
                head.mean.fill(0.0);
                score(simd, head, &q);
                for g in 0..group {
                    let (lse, sum) = weigh(simd, head, g);
                    if let Some(to) = self.lse.get_mut(at * group + g) {
                        to[i] = lse;
                    }
                    if sum.is_finite() {
                        // A query that is NaN has no say.
                        add_mean(head, g, 1.0 / (sum * group as f32));
                    }
                    mix(simd, head, g, 1.0 / sum, &mut out);
                    self.out[at * group + g].store(i, out[..shape.head_dim_v].iter().copied());
                }
                learn(simd, self.policy, head, position);
            }
            evict(self.policy, self.kv_heads.start, self.heads, position);
        }
    }
}

/// `weights [group, slots] = q [group, head_dim] * k [head_dim, slots]`, in base 2.
#[inline(always)]
fn score<S: Simd>(simd: S, head: &mut Slots, q: &[f32]) {
    let (n, padded) = (head.len(), head.padded());
    for (q, row) in q.chunks_exact(head.head_dim).zip(head.weights.chunks_exact_mut(head.capacity)) {
        row_product(simd, q, &head.k, head.capacity, &mut row[..padded]);
        row[n..padded].fill(f32::NEG_INFINITY);
    }
}

/// Turns the scores of a query head into `2^(s - max)`; gives the log-sum-exp and the sum.
#[inline(always)]
fn weigh<S: Simd>(simd: S, head: &mut Slots, g: usize) -> (f32, f32) {
    let padded = head.padded();
    simd.vectorize(
        #[inline(always)]
        || {
            let row = &mut head.weights[g * head.capacity..][..padded];
            let mut largest = [f32::NEG_INFINITY; LANES];
            for scores in row.as_chunks::<LANES>().0 {
                for (largest, score) in largest.iter_mut().zip(scores) {
                    *largest = if *score > *largest { *score } else { *largest };
                }
            }
            let max = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
            let from = S::f32s::splat(simd, if max == f32::NEG_INFINITY { 0.0 } else { max });
            let mut sums = [0.0f32; LANES];
            for weights in row.as_chunks_mut::<LANES>().0 {
                for lanes in weights.chunks_exact_mut(S::f32s::LEN) {
                    exp2(simd, S::f32s::from_slice(simd, lanes) - from).store_slice(lanes);
                }
                sums.iter_mut().zip(&*weights).for_each(|(sum, weight)| *sum += weight);
            }
            let sum: f32 = sums.iter().sum();
            ((max + sum.log2()) * std::f32::consts::LN_2, sum)
        },
    )
}

/// `mean += by * weights` of a query head.
fn add_mean(head: &mut Slots, g: usize, by: f32) {
    let weights = &head.weights[g * head.capacity..][..head.positions.len()];
    head.mean.iter_mut().zip(weights).for_each(|(mean, weight)| *mean += by * weight);
}

/// `out [head_dim_v] = by * weights [slots] * v [slots, head_dim_v]`.
#[inline(always)]
fn mix<S: Simd>(simd: S, head: &Slots, g: usize, by: f32, out: &mut [f32]) {
    let weights = &head.weights[g * head.capacity..][..head.len()];
    row_product(simd, weights, &head.v, head.v_stride, out);
    out.iter_mut().for_each(|o| *o *= by);
}

/// What every slot is worth after the query at `position`.
#[inline(always)]
fn learn<S: Simd>(simd: S, policy: &EvictionPolicy, head: &mut Slots, position: usize) {
    let n = head.len();
    match policy.importance {
        Importance::Recency => {
            head.worth.iter_mut().zip(&head.positions).for_each(|(worth, at)| *worth = *at as f64);
        }
        Importance::KeyNorm => head.worth[..n].copy_from_slice(&head.memory[..n]),
        Importance::LastQuery => {
            head.worth.iter_mut().zip(&head.mean[..n]).for_each(|(worth, mean)| *worth = f64::from(*mean));
        }
        Importance::TotalMass | Importance::MeanMass => {
            head.memory.iter_mut().zip(&head.mean[..n]).for_each(|(mass, mean)| *mass += f64::from(*mean));
            head.worth[..n].copy_from_slice(&head.memory[..n]);
            if policy.importance == Importance::MeanMass {
                let queries = |at: usize| (position - at + 1) as f64;
                head.worth.iter_mut().zip(&head.positions).for_each(|(worth, at)| *worth /= queries(*at));
            }
        }
        Importance::KeyDifference => differ(simd, head),
        Importance::WindowMass { window, kernel, pooling } => {
            let row = position % window * head.capacity;
            head.ring[row..][..n].copy_from_slice(&head.mean[..n]);
            head.worth[..n].fill(0.0);
            for row in head.ring.chunks_exact(head.capacity) {
                head.worth.iter_mut().zip(&row[..n]).for_each(|(sum, mass)| *sum += f64::from(*mass));
            }
            // Smoothed over the positions before the window, as they lie in the cache.
            let recent = policy.recent();
            let before = head.order.partition_point(|slot| head.positions[*slot] + recent <= position);
            let sums = head.order[..before].iter().map(|slot| head.worth[*slot] / window as f64).collect();
            let smoothed = smooth(sums, kernel, pooling);
            head.order[..before].iter().zip(smoothed).for_each(|(slot, worth)| head.worth[*slot] = worth);
        }
    }
}

/// `worth_j = -(k_j . anchor) / (|k_j| |anchor|)`.
#[inline(always)]
fn differ<S: Simd>(simd: S, head: &mut Slots) {
    let (n, padded) = (head.len(), head.padded());
    let norm = head.anchor.iter().map(|a| a * a).sum::<f64>().sqrt();
    let by = if norm > 0.0 { 1.0 / norm } else { 0.0 };
    let anchor: Vec<f32> = head.anchor.iter().map(|a| (by * a) as f32).collect();
    let mut cosines = vec![0.0; padded];
    row_product(simd, &anchor, &head.k, head.capacity, &mut cosines);
    for ((worth, inverse), cosine) in head.worth.iter_mut().zip(&head.memory).zip(&cosines[..n]) {
        *worth = -inverse * f64::from(*cosine);
    }
}

/// The slot of a head that goes first, if one may go: the least worth, the later of equals. NaN stays.
fn first_to_go(policy: &EvictionPolicy, head: &Slots, last: usize) -> Option<(f64, usize)> {
    let mut least: Option<(f64, usize)> = None;
    for slot in head.order.iter().rev().copied() {
        let worth = if head.worth[slot].is_nan() { f64::INFINITY } else { head.worth[slot] };
        if !policy.is_forced(head.positions[slot], last) && least.is_none_or(|(least, _)| worth < least) {
            least = Some((worth, slot));
        }
    }
    least
}

/// Brings heads that decide together down to their budget; `last` is the position of the last query.
fn evict(policy: &EvictionPolicy, first_head: usize, heads: &mut [Slots], last: usize) {
    match policy.share {
        Share::Head => {
            for (at, head) in heads.iter_mut().enumerate() {
                while head.len() > policy.budget && !policy.keeps_all(first_head + at) {
                    let Some((_, slot)) = first_to_go(policy, head, last) else { break };
                    head.evict(slot, last);
                }
            }
        }
        Share::Layer => {
            // All heads hold the same positions in the same slots.
            let Some((first, others)) = heads.split_first_mut() else { return };
            for other in others.iter() {
                first.worth.iter_mut().zip(&other.worth).for_each(|(sum, worth)| *sum += worth);
            }
            while first.len() > policy.budget {
                let Some((_, slot)) = first_to_go(policy, first, last) else { break };
                first.evict(slot, last);
                others.iter_mut().for_each(|other| other.evict(slot, last));
            }
        }
        Share::Budget { .. } => {
            let budget = policy.budget.saturating_mul(heads.len());
            while heads.iter().map(Slots::len).sum::<usize>() > budget {
                let open = heads.iter().enumerate().filter(|(_, head)| head.len() > policy.safe());
                let least = open.filter_map(|(at, head)| Some((first_to_go(policy, head, last)?, at)));
                // The later of equal heads.
                let least = least.reduce(|a, b| if b.0.0 <= a.0.0 { b } else { a });
                let Some(((_, slot), head)) = least else { break };
                heads[head].evict(slot, last);
            }
        }
    }
}
