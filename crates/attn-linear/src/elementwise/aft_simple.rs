//! AFT-simple: attention whose weights do not depend on the query.
//!
//! ```text
//! o_i = sigmoid(q_i) o  sum_j e^(k_j) v_j / sum_j e^(k_j)          channel by channel, over the keys seen
//! ```
//!
//! With `head_dim_v > head_dim` queries and keys start over from their first channel.
//!
//! Source: Zhai et al. 2021 (An Attention Free Transformer), equation 3.

use super::log_sum_cell::LogSumCell;
use super::read_mean::ReadMean;
use crate::recomputed::{Recomputed, differentiable};
use crate::scan::math::sigmoid64;
use crate::scan::{
    HeadInputs, ScanAttention, ScanState, ScanVariant, Tokens, absorb, backward, forward, workspace_bytes,
};
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnShape, Causality, Cost, DType, Differentiable, OutMut, Profile, Qkv, Result, Streaming,
    TensorView,
};

/// AFT-simple, see the [module](self). Without `causal` the numbers of queries and keys may differ.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct AftSimple {
    /// A query sees no key after its own position.
    pub causal: bool,
}

/// The causal form is a scan.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CausalAft;

const CAUSAL: ScanAttention<CausalAft> = ScanAttention { variant: CausalAft };

impl ScanVariant for CausalAft {
    const NAME: &'static str = "aft-simple";
    type Cell = LogSumCell;

    fn cell(&self, n_heads_q: usize, _: usize, head_dim_v: usize) -> Result<LogSumCell> {
        Ok(LogSumCell::new(head_dim_v, true, n_heads_q, |_, _| 0.0, |_, _| 0.0))
    }

    fn define(&self, head: HeadInputs<'_>) -> Vec<f64> {
        let mut sums = vec![(0.0, 0.0); head.head_dim_v];
        let mut out = Vec::with_capacity(head.v.len());
        for t in 0..head.len() {
            for (c, (num, den)) in sums.iter_mut().enumerate() {
                let [q, k, v] = head.channel(t, c);
                *num += k.exp() * v;
                *den += k.exp();
                out.push(sigmoid64(q) * *num / *den);
            }
        }
        out
    }

    fn flops(&self, _: usize, head_dim_v: usize) -> usize {
        8 * head_dim_v
    }
}

/// What all queries read, when they see all keys: the state of each key/value head, and the means.
struct Whole {
    cell: LogSumCell,
    state: ScanState,
    /// For each query head.
    means: ScanState,
    read: ReadMean,
}

fn whole(x: &Qkv<'_>) -> Result<Whole> {
    let s = x.shape();
    let width = s.head_dim_v;
    let cell = LogSumCell::new(width, false, s.n_heads_kv, |_, _| 0.0, |_, _| 0.0);
    let mut state = ScanState::new(&cell, s.batch, s.n_heads_kv);
    absorb(&cell, &keys(x)?, &mut state)?;
    let read = ReadMean { width };
    let mut means = ScanState::new(&read, s.batch, s.n_heads_q);
    let (num, den) = (state.part(0), state.part(1));
    let mut all = Vec::with_capacity(s.batch * s.n_heads_q * width);
    for batch in 0..s.batch {
        for head in 0..s.n_heads_q {
            let at = (batch * s.n_heads_kv + s.kv_head(head)) * width;
            // Without keys nothing is read: zeros.
            let mean = |(n, d): (&f32, &f32)| if *d > 0.0 || d.is_nan() { n / d } else { 0.0 };
            all.extend(num[at..at + width].iter().zip(&den[at..at + width]).map(mean));
        }
    }
    means.set_part(0, "means", &all)?;
    Ok(Whole { cell, state, means, read })
}

fn keys<'a>(x: &Qkv<'a>) -> Result<Tokens<'a>> {
    Tokens::of_any_width(&[("k", *x.k()), ("v", *x.v())])
}

impl Attention for AftSimple {
    fn name(&self) -> &'static str {
        CausalAft::NAME
    }

    fn profile(&self) -> Profile {
        let profile = CAUSAL.profile();
        if self.causal {
            return profile;
        }
        Profile { causality: Causality::Bidirectional, key_order_free: true, cross_lengths: true, ..profile }
    }

    fn cost(&self, s: &AttnShape, dtype: DType) -> Cost {
        if self.causal {
            return CAUSAL.cost(s, dtype);
        }
        let flops = s.batch * (s.n_heads_kv * s.n_kv * 6 + s.n_heads_q * s.n_q * 2) * s.head_dim_v;
        let bytes = CausalAft.cell(1, s.head_dim, s.head_dim_v).map(|cell| {
            let states = 4 * s.batch * (s.n_heads_q + 3 * s.n_heads_kv) * s.head_dim_v;
            rayon::current_num_threads() as u64 * workspace_bytes(&cell, s.n_q.max(s.n_kv)) + states as u64
        });
        Cost::of(s, dtype, flops as u64, bytes.unwrap_or(0))
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        if self.causal {
            return CAUSAL.forward(x, out);
        }
        x.check_out(&out)?;
        let mut whole = whole(&x)?;
        let queries = Tokens::of_any_width(&[("q", *x.q())])?;
        forward(&whole.read, &queries, out, Some(&mut whole.means))
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        if self.causal {
            return CAUSAL.definition(x);
        }
        let s = x.shape();
        let mut out = Vec::with_capacity(s.out().iter().product());
        for batch in 0..s.batch {
            for head in 0..s.n_heads_q {
                let kv = s.kv_head(head);
                let (q, k) = (x.q().head_f64(batch, head), x.k().head_f64(batch, kv));
                let v = x.v().head_f64(batch, kv);
                let mean = |c: usize| {
                    let weight = |j: usize| k[j * s.head_dim + c % s.head_dim].exp();
                    let num: f64 = (0..s.n_kv).map(|j| weight(j) * v[j * s.head_dim_v + c]).sum();
                    if s.n_kv == 0 { 0.0 } else { num / (0..s.n_kv).map(weight).sum::<f64>() }
                };
                let means: Vec<f64> = (0..s.head_dim_v).map(mean).collect();
                for i in 0..s.n_q {
                    let gate = |c: usize| sigmoid64(q[i * s.head_dim + c % s.head_dim]);
                    out.extend(means.iter().enumerate().map(|(c, mean)| gate(c) * mean));
                }
            }
        }
        Ok(Reference { out, lse: None })
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        if self.causal { CAUSAL_REF.as_streaming() } else { None }
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

static CAUSAL_REF: &ScanAttention<CausalAft> = &CAUSAL;

differentiable!(impl for AftSimple);

impl Recomputed for AftSimple {
    fn qkv_gradients(&self, x: Qkv<'_>, grad_out: TensorView<'_>) -> Result<[Vec<f32>; 3]> {
        if self.causal {
            return CAUSAL.qkv_gradients(x, grad_out);
        }
        let s = x.shape();
        let Whole { cell, state, means, read } = whole(&x)?;
        let queries = Tokens::of_any_width(&[("q", *x.q())])?;
        let by_read = backward(&read, &queries, Some(&means), &grad_out, None)?;
        // By the mean N/D of a key/value head: those of its query heads together.
        let (mut by_mean, width) = (vec![0.0; s.batch * s.n_heads_kv * s.head_dim_v], s.head_dim_v);
        for (memory, row) in by_read.state.part(0).chunks_exact(width).enumerate() {
            let at = memory / s.n_heads_q * s.n_heads_kv + s.kv_head(memory % s.n_heads_q);
            by_mean[at * width..][..width].iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        }
        let [num, den, max] = [0, 1, 2].map(|part| state.part(part));
        let a: Vec<f32> = by_mean.iter().zip(&den).map(|(by, den)| by / den).collect();
        let b: Vec<f32> = a.iter().zip(num.iter().zip(&den)).map(|(a, (n, d))| -a * n / d).collect();
        let p: Vec<f32> = max.iter().map(|max| -max).collect();
        let mut by_state = ScanState::no_grad(&cell, s.batch, s.n_heads_kv);
        for (part, data) in [a, b, p].iter().enumerate() {
            by_state.set_part(part, "grad", data)?;
        }
        let zeros = vec![0.0f32; s.v().iter().product()];
        let zeros = attn_core::View::contiguous("grad_out", &zeros, s.v())?;
        let by_keys = backward(&cell, &keys(&x)?, None, &zeros.into(), Some(&by_state))?;
        let mut all = by_read.inputs.into_iter().take(1).chain(by_keys.inputs);
        Ok(std::array::from_fn(|_| all.next().unwrap_or_default()))
    }
}
