//! MagicPIG: a sample of the keys by hash tables, each weighing as many as it stands for.
//!
//! ```text
//! S(i)  = { j : the codes of q_i and k_j - m are equal in two of L tables at least }       codes of K random signs
//! u_ij  = P(j in S(i)) = 1 - (1 - p^K)^L - L p^K (1 - p^K)^(L-1)          p = 1 - angle(q_i, k_j - m) / pi
//! s'_ij = s_ij - ln u_ij   for sampled keys,      s_ij   for the first keys and the last, which every query takes
//! out_i = softmax over these of s'_ij, times v_j
//! ```
//!
//! `sum_S e^s / u` is an unbiased estimate of `sum e^s`, and likewise of the sum with values; their quotient tends to dense
//! causal attention as tables grow. The choice is by direction alone: a key at right angles is sampled as well, and then
//! weighs `1 / u`. With `K = 0` every key is taken and weighs 1: dense attention. Gradients take the sample and `u` as
//! constants.
//!
//! Keys lie to one side of the origin, where all angles are alike; the centre `m` spreads them out. The authors take the mean of
//! the prompt's keys. Here it is given ([`MagicPig::means`]), or the mean of the first keys after the sinks, so that causality is
//! strict and a stream samples as a whole call does; queries that see no more than those attend all of them.
//!
//! Cost of a token and key/value head: a hash of `K L head_dim` multiply-adds, `2 L` bytes. Of a query: a hash, `L / 2^K` counts
//! a cached key, and the sample, about `u(90 degrees)` of the keys: 1% with the default 10 bits and 150 tables.
//!
//! Source: Chen, Sadhukhan, Ye, Zhou, Zhang, Nolte, Tian, Douze, Bottou, Jia, Chen, "MagicPIG: LSH Sampling for Efficient LLM
//! Generation", ICLR 2025.

mod hashing;
mod keys;
mod probability;
mod tables;

use super::dsa::tokens;
use super::router::{Router, causal_pairs, list_bytes, pairs_up_to, visible};
use super::rows::rows_f32;
use crate::block_mask::lists::Lists;
use crate::decider::Work;
use crate::score_rule::SharedScoreMod;
use crate::sorted::normal;
use crate::{BlockMask, heads};
use attn_core::parallel::for_each_task;
use attn_core::{AttnError, AttnShape, Growth, Result, StreamShape, Target, TensorView};
use hashing::{SimHash, Workspace};
pub use keys::HashedKeys;
use keys::HeadKeys;
use probability::{Collisions, Forced, Weights};
use std::ops::Range;
use std::sync::Arc;
use tables::HashTables;

/// Most bits of a code: a table has as many buckets as there are codes.
const MOST_BITS: usize = 12;
/// Queries of a task.
const ROWS: usize = 32;

/// Tokens sampled by hash tables, and weighed by how likely that was.
#[derive(Debug, Clone, PartialEq)]
pub struct MagicPig {
    /// Bits of a code, at most 12; the paper's `K`.
    pub n_bits: usize,
    /// Hash tables, at least 2; the paper's `L`.
    pub n_tables: usize,
    /// First keys, taken by every query.
    pub n_sinks: usize,
    /// Last keys, taken by every query, the one at its position included; at least 1.
    pub window: usize,
    /// First keys whose mean, without the sinks, is the centre; queries that see no more attend all of them.
    pub calibration_len: usize,
    /// What projections are drawn with.
    pub seed: u64,
    /// Projections `[head_dim, n_tables, n_bits]` instead of drawn ones.
    pub projections: Option<Arc<[f32]>>,
    /// The centre of each key/value head, `[n_heads_kv, head_dim]`, where it is known; nothing is then calibrated.
    pub means: Option<Arc<[f32]>>,
}

impl Default for MagicPig {
    /// 150 tables of 10 bits, 4 sinks, a window of 64.
    fn default() -> Self {
        Self {
            n_bits: 10,
            n_tables: 150,
            n_sinks: 4,
            window: 64,
            calibration_len: 256,
            seed: 0,
            projections: None,
            means: None,
        }
    }
}

impl MagicPig {
    /// Checks what can be without a shape.
    ///
    /// # Errors
    /// [`AttnError::Value`] for more than 12 bits, fewer than 2 tables, no window, or no keys to find a centre from.
    pub fn check(&self) -> Result<()> {
        if self.n_bits > MOST_BITS {
            return Err(AttnError::value("n_bits", self.n_bits, format!("at most {MOST_BITS}")));
        }
        if !(2..=usize::from(u16::MAX)).contains(&self.n_tables) {
            return Err(AttnError::value("n_tables", self.n_tables, "from 2 to 65535"));
        }
        if self.window == 0 {
            return Err(AttnError::value("window", 0, "at least 1, the key at the query's position"));
        }
        if self.means.is_none() && self.calibration_len <= self.n_sinks {
            let expected = format!("more than the {} sinks", self.n_sinks);
            return Err(AttnError::value("calibration_len", self.calibration_len, expected));
        }
        Ok(())
    }

    /// The probability that a query samples a key at an angle of this cosine to it.
    pub fn probability(&self, cos: f64) -> f64 {
        self.collisions().probability(cos)
    }

    fn collisions(&self) -> Collisions {
        Collisions { bits: self.n_bits, tables: self.n_tables }
    }

    fn forced(&self) -> Forced {
        let Self { n_sinks: sinks, window, .. } = *self;
        let learned = if self.means.is_some() { 0 } else { self.calibration_len };
        Forced { sinks, window, all_up_to: learned.max(sinks.saturating_add(window)) }
    }

    fn hash(&self, head_dim: usize) -> Result<SimHash> {
        let sizes = [head_dim, self.n_tables, self.n_bits];
        let len = sizes.iter().product();
        match &self.projections {
            None => Ok(SimHash::new(sizes, &normal(self.seed, len))),
            Some(given) if given.len() == len => Ok(SimHash::new(sizes, given)),
            Some(given) => {
                let expected = format!("head_dim x n_tables x n_bits = {len}");
                Err(AttnError::shape("projections", "elements", given.len(), expected))
            }
        }
    }

    /// The share of keys that is sampled where they lie at right angles to the query.
    fn usual_share(&self) -> f64 {
        self.probability(0.0)
    }
}

impl Router for MagicPig {
    const NAME: &'static str = "magicpig";

    type Summary = HashedKeys;

    fn summary(&self, shape: &StreamShape) -> Result<HashedKeys> {
        self.check()?;
        let (heads, d) = (shape.n_heads_kv, shape.head_dim);
        let centre = |head: usize| match &self.means {
            None => Ok(None),
            Some(means) if means.len() == heads * d => Ok(Some(means[head * d..][..d].to_vec())),
            Some(means) => {
                let expected = format!("n_heads_kv x head_dim = {}", heads * d);
                Err(AttnError::shape("means", "elements", means.len(), expected))
            }
        };
        let tables = || HashTables::new(self.n_tables, self.n_bits);
        let keys = |at: usize| Ok(HeadKeys::new(centre(at % heads)?, tables()));
        let all = (0..shape.batch * heads).map(keys).collect::<Result<_>>()?;
        Ok(HashedKeys { hash: self.hash(d)?, heads: all, n_heads_kv: heads })
    }

    fn append(&self, keys: &mut HashedKeys, k: &TensorView<'_>) {
        keys.append(k, self.n_sinks..self.calibration_len);
    }

    fn bytes(&self, keys: &HashedKeys) -> usize {
        keys.bytes()
    }

    fn choose(&self, keys: &HashedKeys, q: &TensorView<'_>, shape: &AttnShape) -> Result<BlockMask> {
        let s = *shape;
        let mut chosen = vec![Vec::new(); s.rows()];
        let kv_head = |list: usize| list / s.n_heads_q * s.n_heads_kv + s.kv_head(list % s.n_heads_q);
        let rows_of = |list: usize, first: usize, n: usize| {
            rows_f32(q, list / s.n_heads_q, list % s.n_heads_q, first..first + n)
        };
        let tasks = chosen.chunks_mut(s.n_q.max(1)).enumerate().flat_map(|(list, rows)| {
            rows.chunks_mut(ROWS).enumerate().map(move |(at, rows)| (list, at * ROWS, rows))
        });
        let few = s.rows() < 2 * rayon::current_num_threads();
        let run = |scratch: &mut Workspace, (list, first, chosen): (usize, usize, &mut [Vec<u32>])| {
            let rows = rows_of(list, first, chosen.len());
            let codes = keys.hash.codes(&rows, chosen.len(), scratch);
            let tables = &keys.heads[kv_head(list)].tables;
            for ((row, chosen), codes) in (first..).zip(chosen).zip(codes.chunks_exact(self.n_tables)) {
                let sample = if few { sample_by_segments } else { sample_all };
                *chosen = self.taken(visible(&s, row), |keys, taken| sample(tables, codes, keys, taken));
            }
        };
        match few {
            true => tasks.for_each(|task| run(&mut Workspace::default(), task)),
            false => for_each_task(tasks, Workspace::default, run),
        }
        tokens(&s, s.n_heads_q, Lists::of(&chosen))
    }

    fn score_mod(
        &self,
        keys: &HashedKeys,
        q: &TensorView<'_>,
        shape: &AttnShape,
        softmax_scale: f32,
    ) -> Result<Option<SharedScoreMod>> {
        if softmax_scale == 0.0 {
            return Err(AttnError::value("softmax_scale", 0, "another number: angles are found from scores"));
        }
        Ok(Some(Arc::new(Weights {
            shape: *shape,
            forced: self.forced(),
            collisions: self.collisions(),
            softmax_scale,
            queries: keys.queries(q, shape),
            key_norms: keys.heads.iter().map(|head| head.norms.clone()).collect(),
        })))
    }

    fn entries(&self) -> usize {
        self.forced().all_up_to.max((self.usual_share() * f64::from(1 << 20)) as usize)
    }

    /// For keys at right angles to the queries.
    fn work(&self, shape: &AttnShape) -> Work {
        let s = shape;
        let forced = self.forced();
        let all = heads(s) * causal_pairs(s);
        let taken = pairs_up_to(s, forced.all_up_to).min(all);
        let sampled = ((all - taken) as f64 * self.usual_share()) as u64;
        let hashed = s.batch * (s.n_heads_q * s.n_q + s.n_heads_kv * s.n_kv);
        let width = (self.n_tables * self.n_bits) as u64;
        let keys = (s.batch * s.n_heads_kv * s.n_kv) as u64;
        let counts = (all as f64 * self.n_tables as f64 / (1u64 << self.n_bits) as f64) as u64;
        let entries = (s.n_kv as f64 * self.usual_share()) as usize + forced.sinks + forced.window;
        Work {
            pairs: taken + sampled,
            decision_flops: 2 * hashed as u64 * s.head_dim as u64 * width + counts,
            decision_bytes: keys * keys::bytes_a_key(self.n_tables, self.n_bits)
                + 4 * width * s.head_dim as u64
                + list_bytes(s, s.n_heads_q, entries.min(s.n_kv)),
        }
    }

    /// At a million keys of width 64: hashes are linear, counts and the sample are not.
    fn growth(&self) -> Growth {
        let hashes = (2 * 2 * 64 * self.n_tables * self.n_bits) as f64;
        let counts = self.n_tables as f64 / f64::from(1 << self.n_bits);
        let of_keys = f64::from(1 << 19) * (self.usual_share() * 4.0 * 64.0 + counts);
        match of_keys / hashes {
            ..0.6 => Growth::Linear,
            0.6..6.0 => Growth::SubQuadratic,
            _ => Growth::Quadratic,
        }
    }

    fn target(&self) -> Target {
        Target::SoftmaxApproximately
    }
}

impl MagicPig {
    /// What a query that sees `visible` keys takes: `sample` adds those of a range that are sampled.
    fn taken(&self, visible: usize, sample: impl FnOnce(Range<usize>, &mut Vec<u32>)) -> Vec<u32> {
        let forced = self.forced();
        if visible <= forced.all_up_to {
            return (0..visible as u32).collect();
        }
        let last = visible - forced.window;
        let mut taken: Vec<u32> = (0..forced.sinks as u32).collect();
        sample(forced.sinks..last, &mut taken);
        taken.extend(last as u32..visible as u32);
        taken
    }
}

/// The keys of a range that are sampled for the codes of a query.
fn sample_all(tables: &HashTables, query: &[u16], keys: Range<usize>, taken: &mut Vec<u32>) {
    HashTables::segments(keys.end).for_each(|at| tables.sample(at, query, &keys, taken));
}

/// The same for one of few queries: threads share the segments.
fn sample_by_segments(tables: &HashTables, query: &[u16], keys: Range<usize>, taken: &mut Vec<u32>) {
    let mut segments = vec![Vec::new(); HashTables::segments(keys.end).len()];
    for_each_task(
        segments.iter_mut().enumerate(),
        || (),
        |(), (at, sample)| tables.sample(at, query, &keys, sample),
    );
    taken.extend(segments.iter().flatten());
}
