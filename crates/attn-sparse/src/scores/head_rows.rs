//! The rows of one head in any storage type, read as f32.

use attn_core::TensorView;
use attn_core::simd::Simd;
use attn_core::tile::{Lhs, read_rows, transpose};
use attn_core::view::Rows;
use half::{bf16, f16};
use std::ops::Range;

/// The rows of one head.
#[derive(Debug, Clone, Copy)]
pub(crate) enum HeadRows<'a> {
    F32(Rows<'a, f32>),
    Bf16(Rows<'a, bf16>),
    F16(Rows<'a, f16>),
}

impl<'a> HeadRows<'a> {
    /// Those of a head of a tensor.
    pub(crate) fn of(tensor: &TensorView<'a>, batch: usize, head: usize) -> Self {
        match tensor {
            TensorView::F32(view) => Self::F32(view.head(batch, head)),
            TensorView::Bf16(view) => Self::Bf16(view.head(batch, head)),
            TensorView::F16(view) => Self::F16(view.head(batch, head)),
        }
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(rows) => rows.len(),
            Self::Bf16(rows) => rows.len(),
            Self::F16(rows) => rows.len(),
        }
    }

    pub(crate) fn width(&self) -> usize {
        match self {
            Self::F32(rows) => rows.width(),
            Self::Bf16(rows) => rows.width(),
            Self::F16(rows) => rows.width(),
        }
    }

    /// Every `step`-th row, from the first on.
    pub(crate) fn every(&self, step: usize) -> Self {
        fn of<'a, E: Copy>(rows: &Rows<'a, E>, step: usize) -> Rows<'a, E> {
            Rows::new(rows.data(), rows.len().div_ceil(step), rows.width(), rows.stride() * step)
        }
        match self {
            Self::F32(rows) => Self::F32(of(rows, step)),
            Self::Bf16(rows) => Self::Bf16(of(rows, step)),
            Self::F16(rows) => Self::F16(of(rows, step)),
        }
    }

    /// Row-major copies in `out [range.len(), width]`.
    #[inline(always)]
    pub(crate) fn read<S: Simd>(&self, simd: S, range: Range<usize>, out: &mut [f32]) {
        match self {
            Self::F32(rows) => read_rows(simd, rows.slice(range), out),
            Self::Bf16(rows) => read_rows(simd, rows.slice(range), out),
            Self::F16(rows) => read_rows(simd, rows.slice(range), out),
        }
    }

    /// The left factor of a product, one row of it a row: in place where the rows are f32, else widened into `scratch`.
    #[inline(always)]
    pub(crate) fn lhs<'s, S: Simd>(&self, simd: S, range: Range<usize>, scratch: &'s mut Vec<f32>) -> Lhs<'s>
    where
        'a: 's,
    {
        if let Self::F32(rows) = self {
            let rows = rows.slice(range);
            return Lhs { data: rows.data(), row_stride: rows.stride(), col_stride: 1 };
        }
        let width = self.width();
        scratch.resize(range.len() * width, 0.0);
        self.read(simd, range, scratch);
        Lhs { data: scratch, row_stride: width, col_stride: 1 }
    }

    /// `scale * rows^T` in `out [width, stride]`, zeros beyond the rows.
    #[inline(always)]
    pub(crate) fn turn<S: Simd>(
        &self,
        simd: S,
        range: Range<usize>,
        scale: f32,
        out: &mut [f32],
        stride: usize,
    ) {
        match self {
            Self::F32(rows) => transpose(simd, rows.slice(range), scale, out, stride),
            Self::Bf16(rows) => transpose(simd, rows.slice(range), scale, out, stride),
            Self::F16(rows) => transpose(simd, rows.slice(range), scale, out, stride),
        }
    }
}
