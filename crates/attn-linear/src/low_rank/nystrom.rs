//! Nystromformer: softmax attention through landmarks, by the Nystrom approximation of its score matrix.
//!
//! ```text
//! O = softmax(s Q Kl^T) pinv(softmax(s Ql Kl^T)) softmax(s Ql K^T) V  (+ conv(V))
//! ```
//!
//! Landmarks `Ql`, `Kl` are means of `ceil(n / landmarks)` consecutive rows; zeros stand before the first row so that this
//! divides the length, and are keys like any other (with a score of 0 and a value of 0). The pseudo-inverse is
//! iterative, in six steps. `conv` is a convolution of the values along the length, one kernel a head.
//!
//! Source: Xiong, Zeng, Chakraborty, Tan, Fung, Li, Singh 2021 (Nystromformer).

use super::attention::{Compose, Head64, LowRank};
use super::pseudo_inverse::{back as inverse_back, iterates, largest_column};
use super::tensor::{Segments, Tensor, attend, attend64, matmul};
use crate::named::transpose;
use attn_core::tile::Start;
use attn_core::{AttnError, AttnShape, Qkv, Result, TensorView, softmax_scale_or_default};

/// Nystromformer, see the [module](self).
#[derive(Debug, Clone, PartialEq)]
pub struct Nystrom {
    /// Landmarks.
    pub landmarks: usize,
    /// Steps of the pseudo-inverse.
    pub steps: usize,
    /// The first iterate is scaled by the largest column sum of all heads of all batch entries, as in the reference code: results
    /// then depend on one another.
    pub shared_init: bool,
    /// Multiplies raw dot products; `None` is `1/sqrt(head_dim)`.
    pub softmax_scale: Option<f32>,
    /// `[n_heads_q, kernel]`, an odd kernel, added as a convolution of the values.
    pub conv: Option<Vec<f32>>,
}

impl Default for Nystrom {
    fn default() -> Self {
        Self { landmarks: 64, steps: 6, shared_init: false, softmax_scale: None, conv: None }
    }
}

/// Gradients by all inputs.
#[derive(Debug, Clone, PartialEq)]
pub struct NystromGrads {
    /// By `q`, of its shape.
    pub q: Vec<f32>,
    /// By `k`, of its shape.
    pub k: Vec<f32>,
    /// By `v`, of its shape.
    pub v: Vec<f32>,
    /// By `conv`; empty without.
    pub conv: Vec<f32>,
}

/// Everything between the inputs and the output.
struct Middle {
    segments: Segments,
    pad: usize,
    /// Landmarks of queries and of keys, the latter for each query head.
    queries: Tensor,
    keys: Tensor,
    /// Inputs with their zeros.
    k: Tensor,
    v: Tensor,
    gathered: super::tensor::Attended,
    /// `softmax(s Ql Kl^T)`, its iterates, and what they started from.
    scores: Vec<Vec<f32>>,
    iterates: Vec<Vec<Vec<f32>>>,
    starts: Vec<(f32, usize)>,
    /// `pinv(..) gathered`.
    values: Tensor,
}

impl Nystrom {
    fn scale(&self, head_dim: usize) -> Result<f32> {
        softmax_scale_or_default(self.softmax_scale, head_dim)
    }

    fn middle(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Middle> {
        let ([batch, heads, n, d], scale) = (q.axes, self.scale(q.axes[3])?);
        let m = self.landmarks.min(n);
        let (segments, pad) = Segments::padded(n, m);
        let group = heads / k.axes[1];
        let (queries, keys) = (segments.pool(q), segments.pool(k).repeated(group));
        let (k, v) = (k.padded(pad), v.padded(pad));
        let gathered = attend(&queries, &k, &v, scale)?;
        let memories = batch * heads;
        let mut scores = Vec::with_capacity(memories);
        for at in 0..memories {
            let mut x = vec![0.0; m * m];
            let turned = transpose(keys.head(at), m, d);
            matmul([m, m, d], (queries.head(at), d, 1), &turned, &mut x, Start::Zero);
            x.chunks_exact_mut(m).for_each(|row| softmax(row, scale));
            scores.push(x);
        }
        let mut starts: Vec<(f32, usize)> = scores.iter().map(|x| largest_column(x, m)).collect();
        if self.shared_init {
            let most = starts.iter().fold(f32::NEG_INFINITY, |a, b| a.max(b.0));
            starts.iter_mut().for_each(|start| start.0 = most);
        }
        let all: Vec<_> =
            scores.iter().zip(&starts).map(|(x, (c, _))| iterates(x, m, *c, self.steps)).collect();
        let width = v.axes[3];
        let mut values = Tensor::zeros([batch, heads, m, width]);
        for (at, z) in all.iter().enumerate() {
            if let Some(z) = z.last() {
                matmul([m, width, m], (z, m, 1), gathered.out.head(at), values.head_mut(at), Start::Zero);
            }
        }
        Ok(Middle { segments, pad, queries, keys, k, v, gathered, scores, iterates: all, starts, values })
    }

    /// Gradients by all inputs, given those by the output.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit.
    pub fn gradients(&self, x: &Qkv<'_>, grad_out: &TensorView<'_>) -> Result<NystromGrads> {
        self.check(&x.shape())?;
        attn_core::check_like("grad_out", grad_out.shape(), x.dtype(), x.q(), x.shape().head_dim_v)?;
        let [q, k, v] = [x.q(), x.k(), x.v()].map(Tensor::of);
        let by = Tensor::of(grad_out);
        let conv = self.conv_back(&v, &by);
        let [q, k, v] = self.run_back([&q, &k, &v], &by)?;
        Ok(NystromGrads { q: q.data, k: k.data, v: v.data, conv })
    }

    /// `(kernel, half of it)`, if there is one.
    fn kernel(&self, heads: usize) -> Option<(&[f32], usize)> {
        self.conv.as_deref().map(|conv| (conv, conv.len() / heads.max(1)))
    }

    /// Adds the convolution of the values of each query head.
    fn convolve(&self, v: &Tensor, out: &mut Tensor) {
        let [_, heads, n, width] = out.axes;
        let Some((conv, len)) = self.kernel(heads) else { return };
        let group = heads / v.axes[1];
        for at in 0..out.axes[0] * heads {
            let (kernel, v) = (&conv[at % heads * len..][..len], v.head(at / group));
            for (t, row) in out.head_mut(at).chunks_exact_mut(width).enumerate() {
                for (j, w) in kernel.iter().enumerate() {
                    if let Some(from) = (t + j).checked_sub(len / 2).filter(|from| *from < n) {
                        row.iter_mut().zip(&v[from * width..]).for_each(|(o, v)| *o += w * v);
                    }
                }
            }
        }
    }

    /// The gradient of [`Nystrom::convolve`] by the kernels.
    fn conv_back(&self, v: &Tensor, by: &Tensor) -> Vec<f32> {
        let [_, heads, n, width] = by.axes;
        let Some((conv, len)) = self.kernel(heads) else { return Vec::new() };
        let group = heads / v.axes[1];
        let mut sums = vec![0.0; conv.len()];
        for at in 0..by.axes[0] * heads {
            let v = v.head(at / group);
            for (t, by) in by.head(at).chunks_exact(width).enumerate() {
                for (j, sum) in sums[at % heads * len..][..len].iter_mut().enumerate() {
                    if let Some(from) = (t + j).checked_sub(len / 2).filter(|from| *from < n) {
                        *sum += by.iter().zip(&v[from * width..]).map(|(b, v)| b * v).sum::<f32>();
                    }
                }
            }
        }
        sums
    }

    /// The gradient of [`Nystrom::convolve`] by the values, added.
    fn conv_values_back(&self, by: &Tensor, dv: &mut Tensor) {
        let [_, heads, n, width] = by.axes;
        let Some((conv, len)) = self.kernel(heads) else { return };
        let group = heads / dv.axes[1];
        for at in 0..by.axes[0] * heads {
            let (kernel, dv) = (&conv[at % heads * len..][..len], dv.head_mut(at / group));
            for (t, by) in by.head(at).chunks_exact(width).enumerate() {
                for (j, w) in kernel.iter().enumerate() {
                    if let Some(from) = (t + j).checked_sub(len / 2).filter(|from| *from < n) {
                        let to = dv[from * width..][..width].iter_mut();
                        to.zip(by).for_each(|(d, b)| *d += w * b);
                    }
                }
            }
        }
    }
}

fn softmax(row: &mut [f32], scale: f32) {
    row.iter_mut().for_each(|x| *x *= scale);
    let max = row.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    row.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f32 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

impl LowRank for Nystrom {
    const NAME: &'static str = "nystromformer";
    const CALLS: u64 = 2;
    const CROSS_LENGTHS: bool = false;
    const CONVEX: bool = false;

    fn rank(&self, s: &AttnShape) -> usize {
        self.landmarks.min(s.n_q)
    }

    /// Six steps from far away multiply roundings.
    fn max_error(&self) -> f64 {
        1e-3
    }

    fn check(&self, s: &AttnShape) -> Result<()> {
        self.scale(s.head_dim)?;
        if self.landmarks == 0 {
            return Err(AttnError::value("landmarks", 0, "at least 1"));
        }
        if let Some(conv) = &self.conv
            && (!conv.len().is_multiple_of(s.n_heads_q.max(1))
                || (conv.len() / s.n_heads_q.max(1)).is_multiple_of(2))
        {
            let expected = format!("an odd kernel for each of {} heads", s.n_heads_q);
            return Err(AttnError::shape("conv", "elements", conv.len(), expected));
        }
        Ok(())
    }

    fn define(&self, h: Head64<'_>) -> Vec<f64> {
        let (d, width, n) = (h.head_dim, h.head_dim_v, h.q.len() / h.head_dim);
        let m = self.landmarks.min(n);
        let len = n.div_ceil(m);
        let pad = len * m - n;
        let padded = |x: &[f64], width: usize| [vec![0.0; pad * width], x.to_vec()].concat();
        let means = |x: &[f64]| -> Vec<f64> {
            let x = padded(x, d);
            let mean =
                |a: usize, c: usize| (0..len).map(|t| x[(a * len + t) * d + c]).sum::<f64>() / len as f64;
            (0..m * d).map(|at| mean(at / d, at % d)).collect()
        };
        let scale = self.softmax_scale.map_or(1.0 / (d as f64).sqrt(), f64::from);
        let (queries, keys) = (means(h.q), means(h.k));
        let unit: Vec<f64> = (0..m * m).map(|at| f64::from(u8::from(at / m == at % m))).collect();
        let x = attend64(&queries, &keys, &unit, (d, m), scale);
        let times = |a: &[f64], b: &[f64], columns: usize| -> Vec<f64> {
            let mut c = vec![0.0; a.len() / m * columns];
            for (a, c) in a.chunks_exact(m).zip(c.chunks_exact_mut(columns)) {
                for (a, b) in a.iter().zip(b.chunks_exact(columns)) {
                    c.iter_mut().zip(b).for_each(|(c, b)| *c += a * b);
                }
            }
            c
        };
        let less = |f: f64, a: Vec<f64>| -> Vec<f64> { unit.iter().zip(a).map(|(u, a)| f * u - a).collect() };
        let column = |c: usize| x.iter().skip(c).step_by(m).sum::<f64>();
        let most = (0..m).map(column).fold(f64::NEG_INFINITY, f64::max);
        let mut z: Vec<f64> = (0..m * m).map(|at| x[at % m * m + at / m] / most).collect();
        for _ in 0..self.steps {
            let p = times(&x, &z, m);
            let inner = less(15.0, times(&p, &less(7.0, p.clone()), m));
            z = times(&z, &less(13.0, times(&p, &inner, m)), m).into_iter().map(|x| x / 4.0).collect();
        }
        let gathered = attend64(&queries, &padded(h.k, d), &padded(h.v, width), (d, width), scale);
        attend64(h.q, &keys, &times(&z, &gathered, width), (d, width), scale)
    }
}

impl Compose for Nystrom {
    fn run(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let middle = self.middle(q, k, v)?;
        let mut out = attend(q, &middle.keys, &middle.values, self.scale(q.axes[3])?)?.out;
        self.convolve(v, &mut out);
        Ok(out)
    }

    fn run_back(&self, [q, k, v]: [&Tensor; 3], by: &Tensor) -> Result<[Tensor; 3]> {
        let Middle {
            segments,
            pad,
            queries,
            keys,
            k: padded_k,
            v: padded_v,
            gathered,
            scores,
            iterates,
            starts,
            values,
        } = self.middle(q, k, v)?;
        let ([_, heads, _, d], scale, m) = (q.axes, self.scale(q.axes[3])?, queries.axes[2]);
        let (group, width) = (heads / k.axes[1], v.axes[3]);
        let read = attend(q, &keys, &values, scale)?;
        let [mut dq, mut dkeys, dvalues] = read.back(q, &keys, &values, by)?;
        let mut by_gathered = Tensor::zeros(gathered.out.axes);
        let mut by_scores = Vec::with_capacity(scores.len());
        for (at, x) in scores.iter().enumerate() {
            let Some(z) = iterates[at].last() else { continue };
            let by = dvalues.head(at);
            matmul([m, width, m], (z, 1, m), by, by_gathered.head_mut(at), Start::Zero);
            let mut dz = vec![0.0; m * m];
            let turned = transpose(gathered.out.head(at), m, width);
            matmul([m, m, width], (by, width, 1), &turned, &mut dz, Start::Zero);
            by_scores.push(inverse_back(x, m, starts[at].0, &iterates[at], dz));
        }
        // The start belongs to the column that gave it: each matrix's own, or the largest of all.
        if self.shared_init {
            let total: f32 = by_scores.iter().map(|(_, by)| by).sum();
            let sums = scores.iter().map(|x| largest_column(x, m).0).enumerate();
            let most = sums.fold((0, f32::NEG_INFINITY), |a, b| if b.1 > a.1 { b } else { a }).0;
            by_scores.iter_mut().enumerate().for_each(|(at, by)| by.1 = if at == most { total } else { 0.0 });
        }
        let mut dqueries = Tensor::zeros(queries.axes);
        for (at, (mut dx, dc)) in by_scores.into_iter().enumerate() {
            dx.iter_mut().skip(starts[at].1).step_by(m).for_each(|x| *x += dc);
            for (dx, x) in dx.chunks_exact_mut(m).zip(scores[at].chunks_exact(m)) {
                let mean: f32 = dx.iter().zip(x).map(|(d, x)| d * x).sum();
                dx.iter_mut().zip(x).for_each(|(d, x)| *d = scale * x * (*d - mean));
            }
            matmul([m, d, m], (&dx, m, 1), keys.head(at), dqueries.head_mut(at), Start::Zero);
            matmul([m, d, m], (&dx, 1, m), queries.head(at), dkeys.head_mut(at), Start::Keep);
        }
        let [more, dk, dv] = gathered.back(&queries, &padded_k, &padded_v, &by_gathered)?;
        dqueries.add(&more);
        let (mut dk, mut dv) = (dk.without(pad), dv.without(pad));
        segments.pool_back(&dqueries, &mut dq);
        segments.pool_back(&dkeys.folded(group), &mut dk);
        self.conv_values_back(by, &mut dv);
        Ok([dq, dk, dv])
    }
}
