//! What the lightning indexer of [`Dsa`] is trained towards: the attention's own probabilities.
//!
//! ```text
//! p_ij   = 1/H sum_h softmax_{j in S_i}(s q_ih . k_j)           head-summed and L1-normalised; held constant
//! pI_ij  = softmax_{j in S_i}(I_ij)                              I_ij = sum_h w_ih relu(qI_ih . kI_j)
//! loss_i = KL(p_i || pI_i) = sum_{j in S_i} p_ij (ln p_ij - ln pI_ij)
//! ```
//!
//! over all keys that the query sees while the indexer warms up, and over those that it selects later on
//! ([`IndexTarget`]). With `g_i` the gradient of the total loss with respect to `loss_i`:
//!
//! ```text
//! dI_ij  = g_i (pI_ij - p_ij)          dw_ih = sum_j dI_ij relu(qI_ih . kI_j)
//! dqI_ih = sum_j dI_ij w_ih [qI_ih . kI_j > 0] kI_j            dkI_j likewise, over queries and index heads
//! ```
//!
//! Queries and keys get no gradient: the indexer learns from the attention, not the other way round.
//!
//! Row by row, with nothing kept but one row's scores a thread: memory `O(n_kv)`, beside the selected lists. Time `O(|S_i|
//! (n_heads_q head_dim + index heads index_dim))` a query, and the indexer's scores where it selects. The result does not
//! depend on the number of threads.
//!
//! Source: DeepSeek-AI, "DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models", 2025, section 2.1.

use super::dsa::{Dsa, LargestTokens};
use super::index_inputs::{DsaInputs, index_queries, series};
use super::indexer::{IndexQueries, select};
use super::key_panels::{KeyPanels, PANEL, ScoreRows};
use super::router::visible;
use super::rows::heads_f32;
use crate::block_mask::lists::wide;
use attn_core::parallel::for_each_task;
use attn_core::simd::Isa;
use attn_core::{AttnError, AttnShape, Qkv, Result, View, softmax_scale_or_default};

/// Query `i` is in share `i % SHARES`: shares sum gradients of index keys apart.
const SHARES: usize = 4;

/// Over which keys the indexer is compared with the attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IndexTarget {
    /// All that a query sees: the warm-up.
    Visible,
    /// Those that the indexer selects.
    Selected,
}

/// Losses and gradients of an indexer, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct IndexerGrads {
    /// The divergence of each query, `[batch, n_q]`; 0 for a query that sees no key.
    pub loss: Vec<f32>,
    /// Of the index queries, `(batch, index heads, n_q, index_dim)`.
    pub index_q: Vec<f32>,
    /// Of the index keys, `(batch, 1, n_kv, index_dim)`.
    pub index_k: Vec<f32>,
    /// Of the index weights, `[batch, index heads, n_q]`.
    pub index_w: Vec<f32>,
}

impl Dsa {
    /// The divergence of the indexer's distribution from the attention's, and the gradients of `sum grad_loss * loss`;
    /// `grad_loss [batch, n_q]`, or `None` for ones. The values of `x` are not read. `softmax_scale` is the attention's, `None`
    /// for `1/sqrt(head_dim)`.
    ///
    /// # Errors
    /// [`AttnError`] for tensors that do not fit.
    pub fn train_indexer(
        &self,
        x: &Qkv<'_>,
        index: &DsaInputs<'_>,
        target: IndexTarget,
        softmax_scale: Option<f32>,
        grad_loss: Option<&[f32]>,
    ) -> Result<IndexerGrads> {
        let s = x.shape();
        index.check(self, &s)?;
        let softmax_scale = softmax_scale_or_default(softmax_scale, s.head_dim)?;
        let rows = s.batch * s.n_q;
        if let Some(grad) = grad_loss
            && grad.len() != rows
        {
            return Err(AttnError::shape("grad_loss", "elements", grad.len(), rows));
        }
        let queries = index_queries(&index.index_q, 1, Some(index.index_w), true);
        let index_keys = series(&index.index_k);
        let selected = match target {
            IndexTarget::Visible => None,
            IndexTarget::Selected => {
                let largest = LargestTokens { top_k: self.top_k, visible: |row| visible(&s, row) };
                let chosen = select(&queries, |list| &index_keys[list], &largest);
                Some(chosen.iter().map(wide).collect())
            }
        };
        let mut q = heads_f32(x.q(), 0..s.n_q);
        q.iter_mut().for_each(|x| *x *= softmax_scale);
        let k = heads_f32(x.k(), 0..s.n_kv);
        let keys = View::contiguous("k", &k, s.k())?.into();
        let training = Training {
            shape: s,
            q,
            panels: selected.is_none().then(|| per_head(&keys, &s)),
            k,
            queries,
            index_k: heads_f32(&index.index_k, 0..s.n_kv),
            index_keys: index_keys.into_iter().map(|keys| keys.all).collect(),
            selected,
            grad_loss,
            isa: Isa::current(),
        };
        Ok(training.run())
    }
}

/// The panels of all key/value heads.
fn per_head(k: &attn_core::TensorView<'_>, s: &AttnShape) -> Vec<KeyPanels<f32>> {
    let head = |head: usize| {
        let mut keys = KeyPanels::new(s.head_dim);
        let rows = super::rows::rows_f32(k, head / s.n_heads_kv, head % s.n_heads_kv, 0..s.n_kv);
        rows.chunks_exact(s.head_dim.max(1)).for_each(|row| keys.push(row.iter().copied()));
        keys
    };
    (0..s.batch * s.n_heads_kv).map(head).collect()
}

/// Everything that is read.
struct Training<'a> {
    shape: AttnShape,
    /// Scaled, `[batch, n_heads_q, n_q, head_dim]`.
    q: Vec<f32>,
    /// `[batch, n_heads_kv, n_kv, head_dim]`.
    k: Vec<f32>,
    /// The same for scoring, where all keys are scored.
    panels: Option<Vec<KeyPanels<f32>>>,
    queries: IndexQueries<f32>,
    /// `[batch, n_kv, index_dim]`.
    index_k: Vec<f32>,
    index_keys: Vec<KeyPanels<f32>>,
    /// `[batch, n_q]`.
    selected: Option<Vec<Vec<usize>>>,
    grad_loss: Option<&'a [f32]>,
    isa: Isa,
}

/// Gradients of one row.
struct Row {
    at: usize,
    loss: f32,
    /// `[index heads, index_dim]`.
    q: Vec<f32>,
    /// `[index heads]`.
    w: Vec<f32>,
}

/// What a share of the queries of a batch entry gives.
struct Share {
    rows: Vec<Row>,
    /// `[n_kv, index_dim]`.
    index_k: Vec<f32>,
}

#[derive(Default)]
struct Scratch {
    /// `[rows, keys, rounded up to panels]`.
    products: Vec<f32>,
    wide: Vec<f32>,
    target: Vec<f32>,
    scores: Vec<f32>,
}

impl Training<'_> {
    fn run(&self) -> IndexerGrads {
        let (s, heads, width) = (self.shape, self.queries.heads, self.queries.width);
        let mut shares: Vec<Option<Share>> = (0..s.batch * SHARES).map(|_| None).collect();
        for_each_task(shares.iter_mut().enumerate(), Scratch::default, |scratch, (at, share)| {
            let (batch, first) = (at / SHARES, at % SHARES);
            let mut index_k = vec![0.0; s.n_kv * width];
            let rows = (first..s.n_q).step_by(SHARES);
            let rows = rows.map(|i| self.row(batch, i, &mut index_k, scratch)).collect();
            *share = Some(Share { rows, index_k });
        });
        let mut grads = IndexerGrads {
            loss: vec![0.0; s.batch * s.n_q],
            index_q: vec![0.0; s.batch * heads * s.n_q * width],
            index_k: vec![0.0; s.batch * s.n_kv * width],
            index_w: vec![0.0; s.batch * heads * s.n_q],
        };
        for (at, share) in shares.into_iter().enumerate() {
            let (batch, Some(share)) = (at / SHARES, share) else { continue };
            let sums = &mut grads.index_k[batch * s.n_kv * width..][..s.n_kv * width];
            sums.iter_mut().zip(&share.index_k).for_each(|(sum, x)| *sum += x);
            for Row { at, loss, q, w } in share.rows {
                grads.loss[batch * s.n_q + at] = loss;
                for head in 0..heads {
                    let row = (batch * heads + head) * s.n_q + at;
                    grads.index_w[row] = w[head];
                    grads.index_q[row * width..][..width].copy_from_slice(&q[head * width..][..width]);
                }
            }
        }
        grads
    }

    /// The keys of a row that the indexer selected; `None`: all it sees.
    fn list(&self, batch: usize, i: usize) -> Option<&[usize]> {
        self.selected.as_ref().map(|lists| lists[batch * self.shape.n_q + i].as_slice())
    }

    fn row(&self, batch: usize, i: usize, grad_k: &mut [f32], scratch: &mut Scratch) -> Row {
        let (s, heads, width) = (self.shape, self.queries.heads, self.queries.width);
        let list = self.list(batch, i);
        let n = list.map_or_else(|| visible(&s, i), <[usize]>::len);
        let mut row = Row { at: i, loss: 0.0, q: vec![0.0; heads * width], w: vec![0.0; heads] };
        if n == 0 {
            return row;
        }
        self.target(batch, i, n, scratch);

        // The indexer's products and scores.
        let at = (batch * s.n_q + i) * heads;
        let index_q = &self.queries.data[at * width..][..heads * width];
        let ones = vec![1.0; heads];
        let w = self.queries.weights.as_ref().map_or(ones.as_slice(), |weights| &weights[at..at + heads]);
        let of_batch = &self.index_k[batch * s.n_kv * width..][..s.n_kv * width];
        let gathered = list.map(|list| gather(of_batch, list, width));
        let keys = gathered.as_ref().unwrap_or(&self.index_keys[batch]);
        let stride = self.score(index_q, keys, n, &mut scratch.products, &mut scratch.wide);
        let Scratch { products, target, scores, .. } = scratch;
        scores.clear();
        scores.resize(n, 0.0);
        for (products, w) in products.chunks_exact(stride).zip(w) {
            scores.iter_mut().zip(products).for_each(|(sum, x)| *sum += w * if *x < 0.0 { 0.0 } else { *x });
        }
        let lse = log_sum_exp(scores);
        let divergence = |(p, score): (&f32, &f32)| match *p > 0.0 {
            true => f64::from(*p) * f64::from(p.ln() - (score - lse)),
            false => 0.0,
        };
        row.loss = target.iter().zip(&*scores).map(divergence).sum::<f64>() as f32;

        // dI, in place of the scores.
        let weight = self.grad_loss.map_or(1.0, |grad| grad[batch * s.n_q + i]);
        scores.iter_mut().zip(&*target).for_each(|(score, p)| *score = weight * ((*score - lse).exp() - p));
        for (head, products) in products.chunks_exact(stride).enumerate() {
            let (q, grad_q) = (&index_q[head * width..][..width], &mut row.q[head * width..][..width]);
            for (at, (product, grad)) in products.iter().zip(&*scores).enumerate() {
                // Written so that NaN stays.
                if *product <= 0.0 {
                    continue;
                }
                row.w[head] += grad * product;
                let (by_product, j) = (grad * w[head], list.map_or(at, |list| list[at]));
                let key = &of_batch[j * width..][..width];
                grad_q.iter_mut().zip(key).for_each(|(sum, x)| *sum += by_product * x);
                let grad_k = &mut grad_k[j * width..][..width];
                grad_k.iter_mut().zip(q).for_each(|(sum, x)| *sum += by_product * x);
            }
        }
        row
    }

    /// `p_i` in `scratch.target [n]`.
    fn target(&self, batch: usize, i: usize, n: usize, scratch: &mut Scratch) {
        let (s, d) = (self.shape, self.shape.head_dim);
        let Scratch { products, wide, target, .. } = scratch;
        target.clear();
        target.resize(n, 0.0);
        let group = s.group_size();
        for kv_head in 0..s.n_heads_kv {
            let head = batch * s.n_heads_kv + kv_head;
            let gathered =
                self.list(batch, i).map(|list| gather(&self.k[head * s.n_kv * d..][..s.n_kv * d], list, d));
            let whole = self.panels.as_ref().map(|panels| &panels[head]);
            let Some(keys) = gathered.as_ref().or(whole) else { continue };
            let rows = (0..group).map(|h| ((batch * s.n_heads_q + kv_head * group + h) * s.n_q + i) * d);
            let q: Vec<f32> = rows.flat_map(|at| self.q[at..at + d].iter().copied()).collect();
            let stride = self.score(&q, keys, n, products, wide);
            for scores in products.chunks_exact(stride) {
                let lse = log_sum_exp(&scores[..n]);
                let share = 1.0 / s.n_heads_q as f32;
                target.iter_mut().zip(scores).for_each(|(sum, score)| *sum += share * (score - lse).exp());
            }
        }
    }

    /// Products of rows with the first `n` keys; gives the distance from one row's to the next one's.
    fn score(
        &self,
        q: &[f32],
        keys: &KeyPanels<f32>,
        n: usize,
        scores: &mut Vec<f32>,
        wide: &mut Vec<f32>,
    ) -> usize {
        let panels = n.div_ceil(PANEL);
        let stride = panels * PANEL;
        let rows = q.len().checked_div(keys.width()).unwrap_or(0);
        scores.resize(rows * stride, 0.0);
        self.isa.run(ScoreRows { q, keys, panels: 0..panels, scores, stride, wide });
        stride
    }
}

/// Some rows of `[n, width]`.
fn gather(rows: &[f32], list: &[usize], width: usize) -> KeyPanels<f32> {
    let mut keys = KeyPanels::new(width);
    list.iter().for_each(|j| keys.push(rows[j * width..][..width].iter().copied()));
    keys
}

/// Of at least one score.
fn log_sum_exp(scores: &[f32]) -> f32 {
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = scores.iter().map(|score| f64::from((score - max).exp())).sum();
    max + sum.ln() as f32
}
