//! Choices against sorting in f64, on small inputs.

use attn_core::mask::Head;
use attn_core::{AttnShape, Qkv};
use attn_sparse::{BlockIndexer, Decision, Dsa, InfLlm, Moba, Routed, Router};
use attn_testkit::inputs::Problem;

/// Grouped heads, two batch entries, longer keys, ragged ends.
pub(super) fn shapes() -> Vec<AttnShape> {
    let grouped = AttnShape { batch: 2, n_heads_kv: 2, ..AttnShape::square(4, 97, 12) };
    vec![grouped, AttnShape { n_q: 7, n_kv: 150, ..AttnShape::square(2, 1, 8) }, AttnShape::square(1, 9, 3)]
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// The forced ones, then the largest, `k` in all, ascending.
pub(super) fn best(scores: &[f64], k: usize, forced: &[usize]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let mut taken: Vec<usize> = forced.iter().copied().take(k).collect();
    order.retain(|x| !taken.contains(x));
    taken.extend(order.into_iter().take(k - taken.len()));
    taken.sort_unstable();
    taken
}

/// Every row of every head sees what `want(x, (batch, head), i, position)` says.
pub(super) fn check<R: Router>(
    router: R,
    want: impl Fn(&Qkv<'_>, (usize, usize), usize, usize) -> Vec<usize>,
) {
    for (seed, s) in shapes().into_iter().enumerate() {
        let problem = Problem::normal(s, seed as u64);
        let x = problem.qkv().unwrap();
        let decision: Decision = Routed::new(router.clone()).decide(&x).unwrap();
        for (batch, head) in (0..s.batch).flat_map(|b| (0..s.n_heads_q).map(move |h| (b, h))) {
            for i in 0..s.n_q {
                let got = decision.selected(Head { batch, head }, i, s.n_kv);
                let want = want(&x, (batch, head), i, i + s.n_kv - s.n_q);
                assert_eq!(got, want, "{router:?}: row {i} of head {head} in {s:?}");
            }
        }
    }
}

pub(super) fn rows(x: &attn_core::TensorView<'_>, batch: usize, head: usize) -> Vec<Vec<f64>> {
    x.head_f64(batch, head).chunks_exact(x.shape()[3]).map(<[f64]>::to_vec).collect()
}

pub(super) fn keys_of(blocks: &[usize], len: usize, position: usize) -> Vec<usize> {
    blocks.iter().flat_map(|b| b * len..(b + 1) * len).filter(|j| *j <= position).collect()
}

#[test]
fn moba_takes_the_chunks_with_the_largest_gates() {
    for (chunk_len, top_k) in [(8, 3), (5, 1), (16, 2), (1, 4), (200, 2)] {
        check(Moba { chunk_len, top_k }, |x, (batch, head), i, p| {
            let (q, k) = (rows(x.q(), batch, head), rows(x.k(), batch, x.shape().kv_head(head)));
            let gate = |c: usize| {
                let chunk = &k[c * chunk_len..(c + 1) * chunk_len];
                chunk.iter().map(|k| dot(&q[i], k)).sum::<f64>()
            };
            let own = p / chunk_len;
            let mut chunks = best(&(0..own).map(gate).collect::<Vec<_>>(), top_k - 1, &[]);
            chunks.push(own);
            keys_of(&chunks, chunk_len, p)
        });
    }
}

/// Channels that an index keeps, rounded or not.
fn narrow(row: &[f64], width: usize, round: bool) -> Vec<f64> {
    let channel = |c: usize| row[c * row.len() / width];
    let rounded = |x: f64| if round { half::bf16::from_f64(x).to_f64() } else { x };
    (0..width).map(|c| rounded(channel(c))).collect()
}

#[test]
fn dsa_takes_the_tokens_with_the_largest_index_scores() {
    for (top_k, index_dim) in [(1, Some(2)), (5, Some(3)), (40, None), (500, None)] {
        check(Dsa { top_k, index_dim }, |x, (batch, head), i, p| {
            let s = x.shape();
            let width = index_dim.unwrap_or(s.head_dim.div_ceil(4));
            let k = rows(x.k(), batch, s.kv_head(head));
            let group = s.kv_head(head) * s.group_size()..(s.kv_head(head) + 1) * s.group_size();
            let q: Vec<_> = group.map(|h| narrow(&rows(x.q(), batch, h)[i], width, true)).collect();
            let score = |j: usize| {
                let k = narrow(&k[j], width, true);
                q.iter().map(|q| dot(q, &k).max(0.0)).sum::<f64>()
            };
            best(&(0..=p).map(score).collect::<Vec<_>>(), top_k.min(p + 1), &[])
        });
    }
}

#[test]
fn block_indexers_take_the_blocks_with_the_largest_token() {
    for (block_len, top_k, local_blocks) in [(8, 3, 1), (5, 4, 2), (3, 2, 5), (7, 3, 0), (64, 2, 1)] {
        let router = BlockIndexer { block_len, top_k, local_blocks, index_dim: Some(3) };
        check(router, |x, (batch, head), i, p| {
            let s = x.shape();
            let k = rows(x.k(), batch, s.kv_head(head));
            let group = s.kv_head(head) * s.group_size()..(s.kv_head(head) + 1) * s.group_size();
            let mut q = vec![0.0; 3];
            for h in group {
                let head = narrow(&rows(x.q(), batch, h)[i], 3, false);
                q.iter_mut().zip(head).for_each(|(q, x)| *q += x);
            }
            let q = narrow(&q, 3, true);
            let blocks = p / block_len + 1;
            let score = |b: usize| {
                let keys = b * block_len..((b + 1) * block_len).min(p + 1);
                keys.map(|j| dot(&q, &narrow(&k[j], 3, true))).fold(f64::NEG_INFINITY, f64::max)
            };
            let local: Vec<usize> = (0..blocks).rev().take(local_blocks).collect();
            let scores: Vec<f64> = (0..blocks).map(score).collect();
            keys_of(&best(&scores, top_k.min(blocks), &local), block_len, p)
        });
    }
}

#[test]
fn infllm_takes_the_blocks_with_the_most_probable_mean() {
    for (mean_len, mean_stride, block_len, top_k, init_blocks, local_blocks, dense_len) in
        [(8, 4, 8, 4, 1, 2, 0), (5, 5, 7, 3, 0, 1, 20), (4, 2, 6, 2, 3, 5, 0), (3, 4, 5, 6, 1, 0, 10)]
    {
        let router = InfLlm {
            mean_len,
            mean_stride,
            block_len,
            top_k,
            init_blocks,
            local_blocks,
            dense_len,
            softmax_scale: None,
        };
        check(router, |x, (batch, head), i, p| {
            let s = x.shape();
            let k = rows(x.k(), batch, s.kv_head(head));
            let group = s.kv_head(head) * s.group_size()..(s.kv_head(head) + 1) * s.group_size();
            let starts: Vec<usize> =
                (0..=p).step_by(mean_stride).take_while(|start| start + mean_len <= p + 1).collect();
            let mut shares = vec![0.0; starts.len()];
            for h in group {
                let q = &rows(x.q(), batch, h)[i];
                let score = |start: &usize| {
                    let sum: f64 = k[*start..start + mean_len].iter().map(|k| dot(q, k)).sum();
                    (sum / mean_len as f64 / (s.head_dim as f64).sqrt()).exp()
                };
                let exp: Vec<f64> = starts.iter().map(score).collect();
                let sum: f64 = exp.iter().sum();
                shares.iter_mut().zip(exp).for_each(|(share, exp)| *share += exp / sum);
            }
            let blocks = p / block_len + 1;
            if p < dense_len || blocks <= top_k {
                return (0..=p).collect();
            }
            let mut importance = vec![0.0f64; blocks];
            for (start, share) in starts.iter().zip(&shares) {
                for j in *start..start + mean_len {
                    importance[j / block_len] = importance[j / block_len].max(*share);
                }
            }
            let order = [blocks - 1].into_iter().chain((0..blocks).take(init_blocks));
            let order = order.chain((0..blocks).rev().take(local_blocks));
            let mut forced: Vec<usize> = Vec::new();
            order.for_each(|block| {
                if !forced.contains(&block) {
                    forced.push(block);
                }
            });
            keys_of(&best(&importance, top_k, &forced), block_len, p)
        });
    }
}
