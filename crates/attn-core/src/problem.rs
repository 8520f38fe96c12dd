//! One attention call: dtype-tagged views of q, k, v and of the output.

use crate::view::{BlockMut, RowsMut, View, ViewMut};
use crate::{AttnError, AttnShape, DType, Element, Result};
use half::{bf16, f16};
use std::ops::Range;

/// A read-only view whose dtype is known at run time.
#[derive(Debug, Clone, Copy)]
pub enum TensorView<'a> {
    /// Single precision.
    F32(View<'a, f32>),
    /// bfloat16.
    Bf16(View<'a, bf16>),
    /// Half precision.
    F16(View<'a, f16>),
}

impl<'a> TensorView<'a> {
    /// `[batch, heads, length, width]`.
    pub fn shape(&self) -> [usize; 4] {
        match self {
            Self::F32(v) => v.shape(),
            Self::Bf16(v) => v.shape(),
            Self::F16(v) => v.shape(),
        }
    }

    /// Storage type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::Bf16(_) => DType::Bf16,
            Self::F16(_) => DType::F16,
        }
    }

    /// Copies row `i` of a head into `row`, widened to f64. Slow; for definitions and measurements.
    ///
    /// # Panics
    /// If there is no such row or `row` has another width.
    pub fn read_row(&self, batch: usize, head: usize, i: usize, row: &mut [f64]) {
        fn copy<E: Element>(from: &[E], to: &mut [f64]) {
            assert_eq!(from.len(), to.len(), "row width");
            to.iter_mut().zip(from).for_each(|(t, f)| *t = f64::from(f.load()));
        }
        match self {
            Self::F32(v) => copy(v.head(batch, head).row(i), row),
            Self::Bf16(v) => copy(v.head(batch, head).row(i), row),
            Self::F16(v) => copy(v.head(batch, head).row(i), row),
        }
    }

    /// The rows of one head as f64, row-major.
    pub fn head_f64(&self, batch: usize, head: usize) -> Vec<f64> {
        let [_, _, n, width] = self.shape();
        let mut all = vec![0.0; n * width];
        for (i, row) in all.chunks_exact_mut(width.max(1)).enumerate() {
            self.read_row(batch, head, i, row);
        }
        all
    }

    /// The same tensor with rows `range` of the length axis only.
    ///
    /// # Panics
    /// If the range does not lie inside the axis.
    pub fn narrow(&self, range: Range<usize>) -> Self {
        match self {
            Self::F32(v) => Self::F32(v.narrow(range)),
            Self::Bf16(v) => Self::Bf16(v.narrow(range)),
            Self::F16(v) => Self::F16(v.narrow(range)),
        }
    }
}

impl<'a, E: Element> From<View<'a, E>> for TensorView<'a> {
    fn from(view: View<'a, E>) -> Self {
        E::tag(view)
    }
}

/// The inputs of a call: shapes agree and the dtypes are equal, checked once here.
#[derive(Debug, Clone, Copy)]
pub struct Qkv<'a> {
    q: TensorView<'a>,
    k: TensorView<'a>,
    v: TensorView<'a>,
    shape: AttnShape,
}

impl<'a> Qkv<'a> {
    /// Checks and groups the three inputs.
    ///
    /// Shapes: `q [batch, n_heads_q, n_q, head_dim]`, `k [batch, n_heads_kv, n_kv, head_dim]`,
    /// `v [batch, n_heads_kv, n_kv, head_dim_v]`.
    ///
    /// # Errors
    /// [`AttnError::Shape`] as in [`AttnShape::from_tensors`]; [`AttnError::DType`] if the dtypes differ.
    pub fn new(
        q: impl Into<TensorView<'a>>,
        k: impl Into<TensorView<'a>>,
        v: impl Into<TensorView<'a>>,
    ) -> Result<Self> {
        let (q, k, v) = (q.into(), k.into(), v.into());
        let shape = AttnShape::from_tensors(q.shape(), k.shape(), v.shape())?;
        for (tensor, view) in [("k", &k), ("v", &v)] {
            if view.dtype() != q.dtype() {
                return Err(AttnError::DType {
                    tensor: tensor.into(),
                    found: view.dtype().to_string(),
                    expected: format!("{} (as in q)", q.dtype()),
                });
            }
        }
        Ok(Self { q, k, v, shape })
    }

    /// Queries.
    pub fn q(&self) -> &TensorView<'a> {
        &self.q
    }

    /// Keys.
    pub fn k(&self) -> &TensorView<'a> {
        &self.k
    }

    /// Values.
    pub fn v(&self) -> &TensorView<'a> {
        &self.v
    }

    /// Sizes.
    pub fn shape(&self) -> AttnShape {
        self.shape
    }

    /// The dtype shared by q, k and v.
    pub fn dtype(&self) -> DType {
        self.q.dtype()
    }

    /// Checks that `out` has the output's shape and the inputs' dtype.
    ///
    /// # Errors
    /// [`AttnError::Shape`] or [`AttnError::DType`] naming what differs.
    pub fn check_out(&self, out: &OutMut<'_>) -> Result<()> {
        let (found, expected) = (out.shape(), self.shape.out());
        for (a, axis) in ["batch", "n_heads_q", "n_q", "head_dim_v"].into_iter().enumerate() {
            if found[a] != expected[a] {
                return Err(AttnError::shape("out", axis, found[a], expected[a]));
            }
        }
        if out.dtype() != self.dtype() {
            let (found, expected) = (out.dtype().to_string(), format!("{} (as in q)", self.dtype()));
            return Err(AttnError::DType { tensor: "out".into(), found, expected });
        }
        Ok(())
    }

    /// Matches the dtype once and runs `op` on typed views.
    ///
    /// # Errors
    /// As [`Qkv::check_out`]; what `op` returns.
    pub fn with_out<Op: TypedOp>(self, out: OutMut<'_>, op: Op) -> Result<Op::Output> {
        self.check_out(&out)?;
        match out {
            OutMut::F32(out) => self.typed(out, op),
            OutMut::Bf16(out) => self.typed(out, op),
            OutMut::F16(out) => self.typed(out, op),
        }
    }

    fn typed<E: Element, Op: TypedOp>(self, out: ViewMut<'_, E>, op: Op) -> Result<Op::Output> {
        let view = |tensor: &str, view: TensorView<'a>| {
            E::untag(view).ok_or_else(|| AttnError::DType {
                tensor: tensor.into(),
                found: view.dtype().to_string(),
                expected: E::DTYPE.to_string(),
            })
        };
        let (q, k, v) = (view("q", self.q)?, view("k", self.k)?, view("v", self.v)?);
        op.run(TypedQkv { q, k, v, shape: self.shape }, out)
    }
}

/// [`Qkv`] with its dtype as a type: what engines are generic over.
#[derive(Debug, Clone, Copy)]
pub struct TypedQkv<'a, E> {
    /// Queries.
    pub q: View<'a, E>,
    /// Keys.
    pub k: View<'a, E>,
    /// Values.
    pub v: View<'a, E>,
    /// Sizes, checked.
    pub shape: AttnShape,
}

/// Work that is generic over the storage type; see [`Qkv::with_out`].
pub trait TypedOp {
    /// What it returns.
    type Output;

    /// Runs on typed views; shapes have been checked.
    ///
    /// # Errors
    /// Those of the operation.
    fn run<E: Element>(self, x: TypedQkv<'_, E>, out: ViewMut<'_, E>) -> Result<Self::Output>;
}

/// A mutable output whose dtype is known at run time.
#[derive(Debug)]
pub enum OutMut<'a> {
    /// Single precision.
    F32(ViewMut<'a, f32>),
    /// bfloat16.
    Bf16(ViewMut<'a, bf16>),
    /// Half precision.
    F16(ViewMut<'a, f16>),
}

impl OutMut<'_> {
    /// `[batch, heads, length, width]`.
    pub fn shape(&self) -> [usize; 4] {
        match self {
            Self::F32(v) => v.shape(),
            Self::Bf16(v) => v.shape(),
            Self::F16(v) => v.shape(),
        }
    }

    /// Sets every element to zero.
    pub fn fill_zero(&mut self) {
        match self {
            Self::F32(view) => view.fill_zero(),
            Self::Bf16(view) => view.fill_zero(),
            Self::F16(view) => view.fill_zero(),
        }
    }

    /// Storage type.
    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::Bf16(_) => DType::Bf16,
            Self::F16(_) => DType::F16,
        }
    }

    /// The same output for a shorter time: what several passes write, one after the other.
    pub fn reborrow(&mut self) -> OutMut<'_> {
        match self {
            Self::F32(v) => OutMut::F32(v.reborrow()),
            Self::Bf16(v) => OutMut::Bf16(v.reborrow()),
            Self::F16(v) => OutMut::F16(v.reborrow()),
        }
    }
}

impl<'a> OutMut<'a> {
    /// [`ViewMut::into_cuts`], whatever the dtype.
    ///
    /// # Panics
    /// If the ranges are not sorted, disjoint and inside the length axis.
    pub fn into_cuts(self, cuts: Vec<Range<usize>>) -> Vec<OutRows<'a>> {
        fn tagged<'a, E: Element>(
            out: ViewMut<'a, E>,
            cuts: Vec<Range<usize>>,
            tag: fn(RowsMut<'a, E>) -> OutRows<'a>,
        ) -> Vec<OutRows<'a>> {
            out.into_cuts(cuts).map(|BlockMut { out, .. }| tag(out)).collect()
        }
        match self {
            Self::F32(out) => tagged(out, cuts, OutRows::F32),
            Self::Bf16(out) => tagged(out, cuts, OutRows::Bf16),
            Self::F16(out) => tagged(out, cuts, OutRows::F16),
        }
    }
}

/// Some rows of one head of an output whose dtype is known at run time.
#[derive(Debug)]
pub enum OutRows<'a> {
    /// Single precision.
    F32(RowsMut<'a, f32>),
    /// bfloat16.
    Bf16(RowsMut<'a, bf16>),
    /// Half precision.
    F16(RowsMut<'a, f16>),
}

impl OutRows<'_> {
    /// Rounds `row` to the dtype and stores it as row `i`; numbers beyond the shorter of the two are left alone.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub fn store(&mut self, i: usize, row: impl Iterator<Item = f32>) {
        #[inline(always)]
        fn typed<E: Element>(out: &mut RowsMut<'_, E>, i: usize, row: impl Iterator<Item = f32>) {
            out.row_mut(i).iter_mut().zip(row).for_each(|(o, x)| *o = E::store(x));
        }
        match self {
            Self::F32(out) => typed(out, i, row),
            Self::Bf16(out) => typed(out, i, row),
            Self::F16(out) => typed(out, i, row),
        }
    }
}

impl<'a, E: Element> From<ViewMut<'a, E>> for OutMut<'a> {
    fn from(view: ViewMut<'a, E>) -> Self {
        E::tag_out(view)
    }
}
