//! Exact attention by the textbook, in f32: what the tiled kernel is compared with.
//!
//! ```text
//! s_j = softmax_scale * q . k_j      p = softmax(s)      out = sum_j p_j v_j
//! ```
//!
//! One query row at a time, with its whole row of scores in memory.

use attn_core::exact::{Exact, Reference};
use attn_core::mask::{Align, Band, Head, Mask, SeeAll};
use attn_core::parallel::for_each_task;
use attn_core::{
    Attention, AttnShape, Causality, Cost, DType, Element, Family, Growth, OutMut, Profile, Qkv, Result,
    SoftmaxAttention, Target, TypedOp, TypedQkv, ViewMut, band_pairs, check_lse, softmax_flops,
    softmax_scale_or_default,
};

/// Exact attention row by row in plain f32 loops: `O(n_kv)` memory a thread, no tiles, no SIMD of ours.
///
/// Source: Vaswani et al. 2017.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Naive {
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
    /// A query sees no key after its own position (the last query stands at the last key).
    pub causal: bool,
}

impl Naive {
    fn band(&self, shape: &AttnShape) -> Option<Band> {
        self.causal.then(|| Band::causal(shape, Align::BottomRight))
    }
}

impl Attention for Naive {
    fn name(&self) -> &'static str {
        "naive"
    }

    fn profile(&self) -> Profile {
        Profile {
            family: Family::Exact,
            target: Target::Softmax,
            causality: if self.causal { Causality::Strict } else { Causality::Bidirectional },
            convex: true,
            key_order_free: !self.causal,
            cross_lengths: true,
            grouped_heads: true,
            dtypes: &DType::ALL,
            max_error: 1e-5,
            time: Growth::Quadratic,
            memory: Growth::Linear,
        }
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let all = shape.n_q as u64 * shape.n_kv as u64;
        let pairs = self.band(shape).map_or(all, |band| band_pairs(shape, &band));
        let heads = (shape.batch * shape.n_heads_q) as u64;
        let row = 4 * (shape.n_kv + shape.head_dim_v) * rayon::current_num_threads();
        Cost::of(shape, dtype, heads * softmax_flops(pairs, shape), row as u64)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        x.with_out(out, Rows { naive: self, lse: None })
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        let band = self.band(&x.shape());
        let mask = band.as_ref().map_or(&SeeAll as &dyn Mask, |b| b);
        Exact { softmax_scale: self.softmax_scale.map(f64::from), mask, ..Exact::default() }.all(x)
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        Some(self)
    }
}

impl SoftmaxAttention for Naive {
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        x.with_out(out, Rows { naive: self, lse: Some(lse) })
    }
}

struct Rows<'a> {
    naive: &'a Naive,
    lse: Option<&'a mut [f32]>,
}

impl TypedOp for Rows<'_> {
    type Output = ();

    fn run<E: Element>(self, x: TypedQkv<'_, E>, out: ViewMut<'_, E>) -> Result<()> {
        let shape = x.shape;
        let softmax_scale = softmax_scale_or_default(self.naive.softmax_scale, shape.head_dim)?;
        if let Some(lse) = &self.lse {
            check_lse(lse, &shape)?;
        }
        let band = self.naive.band(&shape);
        let mut lse = self.lse.map(|lse| lse.iter_mut());
        let rows: Vec<_> =
            out.into_blocks(1).map(|row| (row, lse.as_mut().and_then(Iterator::next))).collect();
        let scratch = || (vec![0.0f32; shape.n_kv], vec![0.0f32; shape.head_dim_v]);
        for_each_task(rows.into_iter(), scratch, |(scores, acc), (mut block, lse)| {
            let (batch, head, i) = (block.batch, block.head, block.rows.start);
            let kv_head = shape.kv_head(head);
            let q = x.q.head(batch, head).row(i);
            let (k, v) = (x.k.head(batch, kv_head), x.v.head(batch, kv_head));
            let whole = 0..shape.n_kv;
            let at = Head { batch, head };
            // The keys a row sees are one range: all, or those up to its position.
            let keys = band.map_or(whole, |b| b.spans(at, i..i + 1, shape.n_kv).pop().unwrap_or(0..0));
            let scores = &mut scores[keys.clone()];

            for (score, j) in scores.iter_mut().zip(keys.clone()) {
                let dot: f32 = q.iter().zip(k.row(j)).map(|(q, k)| q.load() * k.load()).sum();
                *score = softmax_scale * dot;
            }
            let max = scores.iter().fold(f32::NEG_INFINITY, |max, s| max.max(*s));
            let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
            let mut sum = 0.0;
            acc.fill(0.0);
            for (score, j) in scores.iter().zip(keys) {
                let weight = (score - max).exp();
                sum += weight;
                acc.iter_mut().zip(v.row(j)).for_each(|(a, v)| *a += weight * v.load());
            }
            let inverse = if sum == 0.0 { 0.0 } else { 1.0 / sum };
            block.out.row_mut(0).iter_mut().zip(&*acc).for_each(|(o, a)| *o = E::store(a * inverse));
            if let Some(lse) = lse {
                *lse = max + sum.ln();
            }
        });
        Ok(())
    }
}
