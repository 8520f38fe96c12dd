//! f32 tensors `(batch, heads, length, width)` between the calls of a composition.

use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, product};
use attn_core::{Differentiable, Qkv, QkvGrads, Result, Saved, TensorView, View, ViewMut};
use attn_flash::Flash;
use std::ops::Range;

/// Row-major numbers with their axes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Tensor {
    pub(crate) axes: [usize; 4],
    pub(crate) data: Vec<f32>,
}

impl Tensor {
    pub(crate) fn zeros(axes: [usize; 4]) -> Self {
        Self { axes, data: vec![0.0; axes.iter().product()] }
    }

    /// A copy, widened.
    pub(crate) fn of(view: &TensorView<'_>) -> Self {
        fn rows<E: attn_core::Element>(view: &View<'_, E>, data: &mut Vec<f32>) {
            let [batch, heads, ..] = view.shape();
            for at in 0..batch * heads {
                for row in view.head(at / heads, at % heads).iter() {
                    match E::as_f32(row) {
                        Some(row) => data.extend_from_slice(row),
                        None => data.extend(row.iter().map(|x| x.load())),
                    }
                }
            }
        }
        let axes = view.shape();
        let mut data = Vec::with_capacity(axes.iter().product());
        match view {
            TensorView::F32(view) => rows(view, &mut data),
            TensorView::Bf16(view) => rows(view, &mut data),
            TensorView::F16(view) => rows(view, &mut data),
        }
        Self { axes, data }
    }

    pub(crate) fn view(&self, name: &str) -> Result<View<'_, f32>> {
        View::contiguous(name, &self.data, self.axes)
    }

    /// Floats of a head.
    fn head_len(&self) -> usize {
        self.axes[2] * self.axes[3]
    }

    /// Head `at` of all heads, batch by batch.
    pub(crate) fn head(&self, at: usize) -> &[f32] {
        &self.data[at * self.head_len()..][..self.head_len()]
    }

    pub(crate) fn head_mut(&mut self, at: usize) -> &mut [f32] {
        let len = self.head_len();
        &mut self.data[at * len..][..len]
    }

    /// Adds `other`.
    pub(crate) fn add(&mut self, other: &Tensor) {
        self.data.iter_mut().zip(&other.data).for_each(|(x, y)| *x += y);
    }

    /// Each head `group` times: what query heads read.
    pub(crate) fn repeated(&self, group: usize) -> Self {
        let [batch, heads, n, width] = self.axes;
        let all = (0..batch * heads * group).flat_map(|at| self.head(at / group)).copied().collect();
        Self { axes: [batch, heads * group, n, width], data: all }
    }

    /// The gradient of [`Tensor::repeated`].
    pub(crate) fn folded(&self, group: usize) -> Self {
        let [batch, heads, n, width] = self.axes;
        let mut sums = Self::zeros([batch, heads / group.max(1), n, width]);
        for at in 0..batch * heads {
            let to = sums.head_mut(at / group);
            to.iter_mut().zip(self.head(at)).for_each(|(sum, x)| *sum += x);
        }
        sums
    }

    /// With `rows` rows of zeros before each head's own.
    pub(crate) fn padded(&self, rows: usize) -> Self {
        let [batch, heads, n, width] = self.axes;
        let mut all = Self::zeros([batch, heads, n + rows, width]);
        for at in 0..batch * heads {
            all.head_mut(at)[rows * width..].copy_from_slice(self.head(at));
        }
        all
    }

    /// Without the first `rows` rows of each head.
    pub(crate) fn without(&self, rows: usize) -> Self {
        let [batch, heads, n, width] = self.axes;
        let all = (0..batch * heads).flat_map(|at| &self.head(at)[rows * width..]).copied().collect();
        Self { axes: [batch, heads, n - rows, width], data: all }
    }
}

/// Consecutive rows that are averaged.
#[derive(Debug, Clone)]
pub(crate) struct Segments {
    /// Which rows, and one over what their sum is divided by.
    parts: Vec<(Range<usize>, f32)>,
}

impl Segments {
    /// `count` segments of `n >= count` rows, as equal as can be.
    pub(crate) fn even(n: usize, count: usize) -> Self {
        let bound = |at: usize| (at * n).div_ceil(count);
        let part = |at: usize| (bound(at)..bound(at + 1), 1.0 / (bound(at + 1) - bound(at)) as f32);
        Self { parts: (0..count).map(part).collect() }
    }

    /// `count` segments of `ceil(n / count)` rows each: rows of zeros stand before the first. Also how many.
    pub(crate) fn padded(n: usize, count: usize) -> (Self, usize) {
        let len = n.div_ceil(count);
        let pad = len * count - n;
        let row = |at: usize| (at * len).max(pad) - pad;
        let parts = (0..count).map(|at| (row(at)..row(at + 1), 1.0 / len as f32)).collect();
        (Self { parts }, pad)
    }

    /// The averages.
    pub(crate) fn pool(&self, x: &Tensor) -> Tensor {
        let [batch, heads, _, width] = x.axes;
        let mut means = Tensor::zeros([batch, heads, self.parts.len(), width]);
        for at in 0..batch * heads {
            let head = x.head(at);
            for (mean, (rows, inverse)) in means.head_mut(at).chunks_exact_mut(width).zip(&self.parts) {
                for row in head[rows.start * width..rows.end * width].chunks_exact(width) {
                    mean.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
                }
                mean.iter_mut().for_each(|x| *x *= inverse);
            }
        }
        means
    }

    /// Adds the gradient by the rows of their averages.
    pub(crate) fn pool_back(&self, by: &Tensor, dx: &mut Tensor) {
        let [batch, heads, _, width] = dx.axes;
        for at in 0..batch * heads {
            let head = dx.head_mut(at);
            for (by, (rows, inverse)) in by.head(at).chunks_exact(width).zip(&self.parts) {
                for row in head[rows.start * width..rows.end * width].chunks_exact_mut(width) {
                    row.iter_mut().zip(by).for_each(|(dx, by)| *dx += by * inverse);
                }
            }
        }
    }
}

/// `C (+)= A B` with `A [m, k]` of any strides, `B [k, n]`, `C [m, n]` row-major.
pub(crate) fn matmul(
    [m, n, k]: [usize; 3],
    (a, row, col): (&[f32], usize, usize),
    b: &[f32],
    c: &mut [f32],
    start: Start,
) {
    struct MatMul<'a>([usize; 3], Lhs<'a>, Rhs<'a>, TileMut<'a>, Start);
    impl SimdOp for MatMul<'_> {
        type Output = ();

        #[inline(always)]
        fn eval<S: Simd>(self, simd: S) {
            product(simd, self.0, self.1, self.2, self.3, self.4);
        }
    }
    let lhs = Lhs { data: a, row_stride: row, col_stride: col };
    Isa::current().run(MatMul(
        [m, n, k],
        lhs,
        Rhs { data: b, stride: n },
        TileMut { data: c, stride: n },
        start,
    ));
}

/// Softmax attention of the engine, kept for its gradients.
pub(crate) struct Attended {
    flash: Flash,
    saved: Saved,
    pub(crate) out: Tensor,
}

/// `softmax(scale q k^T) v`.
pub(crate) fn attend(q: &Tensor, k: &Tensor, v: &Tensor, scale: f32) -> Result<Attended> {
    let flash = Flash { softmax_scale: Some(scale), ..Flash::full() };
    let x = Qkv::new(q.view("q")?, k.view("k")?, v.view("v")?)?;
    let mut out = Tensor::zeros(x.shape().out());
    let saved = flash.forward_saving(x, ViewMut::contiguous("out", &mut out.data, out.axes)?.into())?;
    Ok(Attended { flash, saved, out })
}

impl Attended {
    /// Gradients by q, k and v.
    pub(crate) fn back(&self, q: &Tensor, k: &Tensor, v: &Tensor, by: &Tensor) -> Result<[Tensor; 3]> {
        let x = Qkv::new(q.view("q")?, k.view("k")?, v.view("v")?)?;
        let mut all = [Tensor::zeros(q.axes), Tensor::zeros(k.axes), Tensor::zeros(v.axes)];
        let [dq, dk, dv] = &mut all;
        let grads = QkvGrads {
            q: ViewMut::contiguous("grad_q", &mut dq.data, q.axes)?.into(),
            k: ViewMut::contiguous("grad_k", &mut dk.data, k.axes)?.into(),
            v: ViewMut::contiguous("grad_v", &mut dv.data, v.axes)?.into(),
        };
        let (out, by) = (self.out.view("out")?, by.view("grad_out")?);
        self.flash.backward(x, out.into(), &self.saved, by.into(), grads)?;
        Ok(all)
    }
}

/// The definition's softmax attention of one head, f64: `q [n_q, d]`, `k [n_kv, d]`, `v [n_kv, width]`.
pub(crate) fn attend64(q: &[f64], k: &[f64], v: &[f64], (d, width): (usize, usize), scale: f64) -> Vec<f64> {
    let mut out = Vec::with_capacity(q.len() / d * width);
    for q in q.chunks_exact(d) {
        let dot = |k: &[f64]| scale * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
        let scores: Vec<f64> = k.chunks_exact(d).map(dot).collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |m, s| m.max(*s));
        let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
        let sum: f64 = weights.iter().sum();
        let column =
            |c: usize| weights.iter().zip(v.iter().skip(c).step_by(width)).map(|(w, v)| w * v).sum::<f64>();
        out.extend((0..width).map(|c| column(c) / sum));
    }
    out
}
