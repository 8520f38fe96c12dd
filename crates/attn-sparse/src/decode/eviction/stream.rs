//! A cache that is held down to its budget while tokens come.

use super::policy::{EvictionPolicy, Importance, Share};
use super::slots::Slots;
use super::step::Walk;
use super::worth::Survivors;
use crate::decode::rows::widen_row;
use attn_core::parallel::for_each_task;
use attn_core::simd::Isa;
use attn_core::{AttnError, OutMut, OutRows, Qkv, Result, StreamShape, StreamState};

/// Keys and values that a policy keeps, in f32 whatever the stream's dtype.
///
/// A new token is added, attends everything held (itself included), and then the cache goes down to the budget: a query
/// sees at most `budget + 1` keys, and the bytes held grow no further once that many tokens have come.
pub struct EvictionStream {
    policy: EvictionPolicy,
    softmax_scale: f32,
    shape: StreamShape,
    /// `[batch * n_heads_kv]`.
    heads: Vec<Slots>,
    len: usize,
}

impl EvictionStream {
    /// An empty one.
    pub(super) fn start(policy: &EvictionPolicy, softmax_scale: f32, shape: StreamShape) -> Result<Self> {
        if shape.n_heads_kv == 0 || !shape.n_heads_q.is_multiple_of(shape.n_heads_kv) {
            let expected = format!("a multiple of {} key/value heads", shape.n_heads_kv);
            return Err(AttnError::shape("q", "n_heads_q", shape.n_heads_q, expected));
        }
        policy.check(shape.n_heads_kv)?;
        let widths = [shape.head_dim, shape.head_dim_v];
        let group = shape.n_heads_q / shape.n_heads_kv;
        let slots = |head: usize| {
            Slots::new(policy, widths, group, policy.most(head % shape.n_heads_kv, shape.n_heads_kv))
        };
        let heads = (0..shape.batch * shape.n_heads_kv).map(slots).collect();
        Ok(Self { policy: policy.clone(), softmax_scale, shape, heads, len: 0 })
    }

    /// Takes over what survives of the prompt `x`.
    pub(super) fn seed(&mut self, x: &Qkv<'_>, survivors: &Survivors) {
        let (mut k, mut v) = (vec![0.0; self.shape.head_dim], vec![0.0; self.shape.head_dim_v]);
        for (at, (slots, kept)) in self.heads.iter_mut().zip(&survivors.positions).enumerate() {
            let head = [at / self.shape.n_heads_kv, at % self.shape.n_heads_kv];
            for &position in kept {
                widen_row(x.k(), [head[0], head[1], position], &mut k);
                widen_row(x.v(), [head[0], head[1], position], &mut v);
                slots.push(self.policy.importance, position, &k, &v);
                let slot = slots.len() - 1;
                match self.policy.importance {
                    Importance::TotalMass | Importance::MeanMass => {
                        slots.memory[slot] = survivors.mass[at][position];
                    }
                    Importance::WindowMass { window, .. } => {
                        // The queries of the prompt's window count as so many of their mean.
                        let mean = survivors.mass[at][position] / window as f64;
                        let rows = slots.ring.chunks_exact_mut(slots.capacity);
                        rows.for_each(|row| row[slot] = mean as f32);
                    }
                    _ => {}
                }
            }
        }
        self.len = x.shape().n_kv;
    }

    /// From now on, the last query that sees each position is remembered: one number a position.
    pub(super) fn remember_deaths(&mut self) {
        self.heads.iter_mut().for_each(|head| head.deaths = Some(Vec::new()));
    }

    /// The last query that sees each position, `[batch * n_heads_kv][n]`.
    pub(super) fn into_deaths(self) -> Vec<Vec<u32>> {
        self.heads.into_iter().map(|head| head.deaths.unwrap_or_default()).collect()
    }

    /// Appends checked tokens.
    pub(super) fn walk(&mut self, x: &Qkv<'_>, out: OutMut<'_>, lse: Option<&mut [f32]>) {
        let s = x.shape();
        if s.rows() == 0 {
            self.len += s.n_q;
            return;
        }
        let together = if self.policy.share == Share::Head { 1 } else { s.n_heads_kv };
        let n_out = together * s.group_size();
        let rows = 0..s.n_q;
        let mut out: Vec<OutRows<'_>> = out.into_cuts(vec![rows]);
        let mut lse: Vec<&mut [f32]> = lse.map(|lse| lse.chunks_mut(s.n_q).collect()).unwrap_or_default();
        let mut tasks = Vec::new();
        for (at, heads) in self.heads.chunks_mut(together).enumerate() {
            let first_head = at * together % s.n_heads_kv;
            tasks.push(Walk {
                policy: &self.policy,
                x,
                softmax_scale: self.softmax_scale,
                batch: at * together / s.n_heads_kv,
                kv_heads: first_head..first_head + together,
                first: self.len,
                heads,
                out: out.drain(..n_out).collect(),
                lse: lse.drain(..n_out.min(lse.len())).collect(),
            });
        }
        let isa = Isa::current();
        for_each_task(tasks.into_iter(), || (), |(), walk| isa.run(walk));
        self.len += s.n_q;
    }

    /// The positions that each key/value head holds, `[batch * n_heads_kv]`, ascending.
    pub fn positions(&self) -> Vec<Vec<usize>> {
        let of = |head: &Slots| head.order.iter().map(|slot| head.positions[*slot]).collect();
        self.heads.iter().map(of).collect()
    }
}

impl StreamState for EvictionStream {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        x.check_out(&out)?;
        self.walk(&x, out, None);
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn bytes(&self) -> usize {
        self.heads.iter().map(Slots::bytes).sum()
    }
}
