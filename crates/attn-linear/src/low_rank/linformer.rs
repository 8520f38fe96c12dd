//! Linformer: keys and values are projected along the length to few rows.
//!
//! ```text
//! O = softmax(scale Q (E^T K)^T) F^T V          E, F [n, rank], learned
//! ```
//!
//! A shorter problem takes the first rows of `E` and `F`. Without projections as given rows are averaged in `rank` segments of
//! equal length, which for `n <= rank` is softmax attention itself.
//!
//! Source: Wang, Li, Khabsa, Fang, Ma 2020 (Linformer: Self-Attention with Linear Complexity), equation 7.

use super::attention::{Compose, Head64, LowRank};
use super::tensor::{Segments, Tensor, attend, attend64, matmul};
use attn_core::tile::Start;
use attn_core::{AttnError, AttnShape, Qkv, Result, TensorView, softmax_scale_or_default};
use std::sync::Arc;

/// Linformer, see the [module](self).
#[derive(Debug, Clone, PartialEq)]
pub struct Linformer {
    /// Rows that keys and values are projected to, where there is no projection.
    pub rank: usize,
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
    /// Learned projections.
    pub projection: Option<Arc<Projection>>,
}

impl Default for Linformer {
    fn default() -> Self {
        Self { rank: 256, softmax_scale: None, projection: None }
    }
}

/// Learned projections along the length.
#[derive(Debug, Clone, PartialEq)]
pub struct Projection {
    /// `E [max_len, rank]`, of keys.
    keys: Vec<f32>,
    /// `F [max_len, rank]`, of values; `None` takes `E`.
    values: Option<Vec<f32>>,
    rank: usize,
}

impl Projection {
    /// `E [max_len, rank]` and `F` of the same shape, or one for both.
    ///
    /// # Errors
    /// [`AttnError::Shape`] unless they hold equally many whole rows.
    pub fn new(keys: Vec<f32>, values: Option<Vec<f32>>, rank: usize) -> Result<Self> {
        if rank == 0 || !keys.len().is_multiple_of(rank) {
            return Err(AttnError::shape("E", "elements", keys.len(), format!("rows of {rank}")));
        }
        if let Some(values) = &values
            && values.len() != keys.len()
        {
            return Err(AttnError::shape("F", "elements", values.len(), keys.len()));
        }
        Ok(Self { keys, values, rank })
    }

    fn values(&self) -> &[f32] {
        self.values.as_deref().unwrap_or(&self.keys)
    }
}

/// Gradients of Linformer with learned projections.
#[derive(Debug, Clone, PartialEq)]
pub struct LinformerGrads {
    /// By `q`, of its shape.
    pub q: Vec<f32>,
    /// By `k`, of its shape.
    pub k: Vec<f32>,
    /// By `v`, of its shape.
    pub v: Vec<f32>,
    /// By `E`; with one projection for both, that of both.
    pub keys: Vec<f32>,
    /// By `F`, if there is one.
    pub values: Option<Vec<f32>>,
}

/// `E^T x` of every head.
fn project(e: &[f32], rank: usize, x: &Tensor) -> Tensor {
    let [batch, heads, n, width] = x.axes;
    let mut rows = Tensor::zeros([batch, heads, rank, width]);
    for at in 0..batch * heads {
        matmul([rank, width, n], (e, 1, rank), x.head(at), rows.head_mut(at), Start::Zero);
    }
    rows
}

/// The gradient of [`project`] by `x`; adds to that by `e`.
fn project_back(e: &[f32], rank: usize, x: &Tensor, by: &Tensor, de: &mut [f32]) -> Tensor {
    let [batch, heads, n, width] = x.axes;
    let mut dx = Tensor::zeros(x.axes);
    for at in 0..batch * heads {
        matmul([n, width, rank], (e, rank, 1), by.head(at), dx.head_mut(at), Start::Zero);
        let turned = crate::named::transpose(by.head(at), rank, width);
        matmul([n, rank, width], (x.head(at), width, 1), &turned, de, Start::Keep);
    }
    dx
}

impl Linformer {
    fn scale(&self, head_dim: usize) -> Result<f32> {
        softmax_scale_or_default(self.softmax_scale, head_dim)
    }

    fn segments(&self, n: usize) -> Segments {
        Segments::even(n, self.rank.min(n))
    }

    /// Gradients by all inputs, given those by the output.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; [`AttnError::Unsupported`] without a projection.
    pub fn gradients(&self, x: &Qkv<'_>, grad_out: &TensorView<'_>) -> Result<LinformerGrads> {
        let Some(p) = &self.projection else {
            return Err(AttnError::unsupported(Self::NAME, "gradients by projections that are not given"));
        };
        self.check(&x.shape())?;
        attn_core::check_like("grad_out", grad_out.shape(), x.dtype(), x.q(), x.shape().head_dim_v)?;
        let [q, k, v] = [x.q(), x.k(), x.v()].map(Tensor::of);
        let (mut keys, mut values) = (vec![0.0; p.keys.len()], vec![0.0; p.keys.len()]);
        let [q, k, v] =
            self.learned_back(p, [&q, &k, &v], &Tensor::of(grad_out), (&mut keys, &mut values))?;
        let values = if p.values.is_some() {
            Some(values)
        } else {
            keys.iter_mut().zip(values).for_each(|(sum, x)| *sum += x);
            None
        };
        Ok(LinformerGrads { q: q.data, k: k.data, v: v.data, keys, values })
    }

    fn learned_back(
        &self,
        p: &Projection,
        [q, k, v]: [&Tensor; 3],
        by: &Tensor,
        (de, df): (&mut [f32], &mut [f32]),
    ) -> Result<[Tensor; 3]> {
        let (keys, values) = (project(&p.keys, p.rank, k), project(p.values(), p.rank, v));
        let attended = attend(q, &keys, &values, self.scale(q.axes[3])?)?;
        let [dq, dkeys, dvalues] = attended.back(q, &keys, &values, by)?;
        let dk = project_back(&p.keys, p.rank, k, &dkeys, de);
        let dv = project_back(p.values(), p.rank, v, &dvalues, df);
        Ok([dq, dk, dv])
    }
}

impl LowRank for Linformer {
    const NAME: &'static str = "linformer";
    const CALLS: u64 = 1;
    const CROSS_LENGTHS: bool = true;
    const CONVEX: bool = true;

    fn rank(&self, s: &AttnShape) -> usize {
        self.projection.as_ref().map_or(self.rank.min(s.n_kv), |p| p.rank)
    }

    fn check(&self, s: &AttnShape) -> Result<()> {
        self.scale(s.head_dim)?;
        match &self.projection {
            Some(p) if p.keys.len() / p.rank < s.n_kv => {
                Err(AttnError::shape("E", "length", p.keys.len() / p.rank, format!("at least {}", s.n_kv)))
            }
            None if self.rank == 0 => Err(AttnError::value("rank", 0, "at least 1")),
            _ => Ok(()),
        }
    }

    fn define(&self, h: Head64<'_>) -> Vec<f64> {
        let n = h.k.len() / h.head_dim;
        let by = |weight: &dyn Fn(usize, usize) -> f64, rank: usize, x: &[f64], width: usize| -> Vec<f64> {
            let mut rows = vec![0.0; rank * width];
            for (t, x) in x.chunks_exact(width).enumerate() {
                for (c, row) in rows.chunks_exact_mut(width).enumerate() {
                    row.iter_mut().zip(x).for_each(|(sum, x)| *sum += weight(t, c) * x);
                }
            }
            rows
        };
        let (k, v) = match &self.projection {
            Some(p) => {
                let of = |e: &[f32]| {
                    let e = e.to_vec();
                    move |t: usize, c: usize| f64::from(e[t * p.rank + c])
                };
                (by(&of(&p.keys), p.rank, h.k, h.head_dim), by(&of(p.values()), p.rank, h.v, h.head_dim_v))
            }
            None => {
                let rank = self.rank.min(n);
                let size = |c: usize| ((c + 1) * n).div_ceil(rank) - (c * n).div_ceil(rank);
                let segment = |t: usize| t * rank / n;
                let weight = |t: usize, c: usize| if segment(t) == c { 1.0 / size(c) as f64 } else { 0.0 };
                (by(&weight, rank, h.k, h.head_dim), by(&weight, rank, h.v, h.head_dim_v))
            }
        };
        let scale = self.softmax_scale.map_or(1.0 / (h.head_dim as f64).sqrt(), f64::from);
        attend64(h.q, &k, &v, (h.head_dim, h.head_dim_v), scale)
    }
}

impl Compose for Linformer {
    fn run(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let scale = self.scale(q.axes[3])?;
        let (k, v) = match &self.projection {
            Some(p) => (project(&p.keys, p.rank, k), project(p.values(), p.rank, v)),
            None => {
                let segments = self.segments(k.axes[2]);
                (segments.pool(k), segments.pool(v))
            }
        };
        Ok(attend(q, &k, &v, scale)?.out)
    }

    fn run_back(&self, [q, k, v]: [&Tensor; 3], by: &Tensor) -> Result<[Tensor; 3]> {
        if let Some(p) = &self.projection {
            let (mut de, mut df) = (vec![0.0; p.keys.len()], vec![0.0; p.keys.len()]);
            return self.learned_back(p, [q, k, v], by, (&mut de, &mut df));
        }
        let segments = self.segments(k.axes[2]);
        let (keys, values) = (segments.pool(k), segments.pool(v));
        let attended = attend(q, &keys, &values, self.scale(q.axes[3])?)?;
        let [dq, dkeys, dvalues] = attended.back(q, &keys, &values, by)?;
        let (mut dk, mut dv) = (Tensor::zeros(k.axes), Tensor::zeros(v.axes));
        segments.pool_back(&dkeys, &mut dk);
        segments.pool_back(&dvalues, &mut dv);
        Ok([dq, dk, dv])
    }
}
