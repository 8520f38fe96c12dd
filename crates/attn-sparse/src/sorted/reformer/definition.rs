//! The definition, pair by pair in f64.

use super::Reformer;
use super::hashing::Resolved;
use super::order::Orders;
use attn_core::Qkv;
use attn_core::exact::Reference;
use std::collections::BTreeMap;

/// Every round's softmax over the keys of two chunks, merged; pairs are counted by listing all of them.
pub(super) fn definition(
    config: &Reformer,
    x: &Qkv<'_>,
    softmax_scale: f64,
    hashing: &Resolved<'_>,
) -> Reference {
    let shape = x.shape();
    let (mut out, mut lse) = (Vec::new(), Vec::new());
    for batch in 0..shape.batch {
        for head in 0..shape.n_heads_q {
            let kv_head = shape.kv_head(head);
            let order = |rows, at, of_keys| {
                let buckets = hashing.buckets(rows, at, of_keys);
                Orders::new(buckets, shape.n_q, hashing.n_buckets(), config.bucket_size)
            };
            let order_q = order(x.q(), [batch, head], false);
            let (order_k, mut keys) = match config.shared_qk {
                true => (order_q.clone(), x.q().head_f64(batch, head)),
                false => (order(x.k(), [batch, kv_head], true), x.k().head_f64(batch, kv_head)),
            };
            if config.shared_qk {
                for key in keys.chunks_exact_mut(shape.head_dim) {
                    let length = key.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
                    key.iter_mut().for_each(|x| *x /= length);
                }
            }
            let values = x.v().head_f64(batch, kv_head);
            let queries = x.q().head_f64(batch, head);
            let pairs = Pairs { config, q: &order_q, k: &order_k };
            for i in 0..shape.n_q {
                let query = &queries[i * shape.head_dim..][..shape.head_dim];
                let mut met = BTreeMap::new();
                pairs.of(i).for_each(|j| *met.entry(j).or_insert(0.0f64) += 1.0);
                let scores = met.into_iter().map(|(j, count)| {
                    let key = &keys[j * shape.head_dim..][..shape.head_dim];
                    let dot: f64 = query.iter().zip(key).map(|(q, k)| q * k).sum();
                    let fixed = config.shared_qk && i == j;
                    let score = if fixed { f64::from(config.self_logit) } else { softmax_scale * dot };
                    let count = if config.allow_duplicate_attention { count.ln() } else { 0.0 };
                    (j, score + count)
                });
                let scores: Vec<(usize, f64)> = scores.collect();
                let most = scores.iter().map(|(_, s)| *s).fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|(_, s)| (s - most).exp()).sum();
                let mut row = vec![0.0; shape.head_dim_v];
                for (j, score) in &scores {
                    let weight = (score - most).exp() / sum;
                    let value = &values[j * shape.head_dim_v..][..shape.head_dim_v];
                    row.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
                }
                out.extend(row);
                lse.push(if scores.is_empty() { f64::NEG_INFINITY } else { most + sum.ln() });
            }
        }
    }
    Reference { out, lse: Some(lse) }
}

/// The pairs that the rounds meet.
struct Pairs<'a> {
    config: &'a Reformer,
    q: &'a Orders,
    k: &'a Orders,
}

impl Pairs<'_> {
    /// The keys of query `i`, once for every time they are met.
    fn of(&self, i: usize) -> impl Iterator<Item = usize> + '_ {
        let (n_rounds, n_chunks, chunk) = (self.config.n_hashes, self.k.n_chunks(), self.config.bucket_size);
        (0..n_rounds).flat_map(move |round| {
            let own = self.q.rank(round, i) / chunk;
            let before = match own {
                _ if n_rounds * n_chunks == 1 => None,
                0 => Some(((round + n_rounds - 1) % n_rounds, n_chunks - 1)),
                _ => Some((round, own - 1)),
            };
            let members = move |(of, at): (usize, usize)| {
                (at * chunk..(at + 1) * chunk).filter_map(move |slot| Some((of, self.k.token(of, slot)?)))
            };
            let met = std::iter::once((round, own)).chain(before).flat_map(members);
            met.filter_map(move |(of, j)| {
                let bucket = |orders: &Orders, round: usize, token: usize| {
                    (round, orders.buckets[round * orders.n + token])
                };
                let same =
                    self.config.attend_across_buckets || bucket(self.q, round, i) == bucket(self.k, of, j);
                (same && !(self.config.causal && j > i)).then_some(j)
            })
        })
    }
}
