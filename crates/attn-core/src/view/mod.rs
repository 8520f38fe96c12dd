//! Strided views in the logical layout `(batch, heads, length, width)`.
//!
//! Any strides with a contiguous last axis are accepted, so that `(b, h, n, d)` and `(b, n, h, d)` storage
//! are both read and written without a copy.

mod parts;
mod rows;
mod rows_mut;

pub use rows::Rows;
pub use rows_mut::{BlockMut, RowsMut};

use crate::{AttnError, Element, Result};
use std::ops::Range;

/// The four axes' names, for error messages.
const AXES: [&str; 4] = ["batch", "heads", "length", "width"];

/// Element strides of a row-major buffer of this shape.
pub fn contiguous_strides(shape: [usize; 4]) -> [usize; 4] {
    // An empty tensor may have axes of any length; its strides are never used.
    let row = shape[3];
    let head = row.saturating_mul(shape[2]);
    [head.saturating_mul(shape[1]), head, row, 1]
}

/// Elements of a tensor of this shape, if that is a number.
fn n_elements(shape: [usize; 4]) -> Option<usize> {
    if shape.contains(&0) { Some(0) } else { shape.iter().try_fold(1, |n: usize, axis| n.checked_mul(*axis)) }
}

/// Checks that every element lies inside a buffer of `len` elements and that rows are contiguous.
fn check_layout(tensor: &str, len: usize, shape: [usize; 4], strides: [usize; 4]) -> Result<()> {
    let fail = |reason: String| Err(AttnError::Layout { tensor: tensor.into(), reason });
    if shape.contains(&0) {
        return Ok(());
    }
    if shape[3] > 1 && strides[3] != 1 {
        return fail(format!(
            "the last axis has stride {}, expected 1 (make the tensor contiguous)",
            strides[3]
        ));
    }
    let last = (0..4).try_fold(0usize, |at, a| (shape[a] - 1).checked_mul(strides[a])?.checked_add(at));
    match last {
        Some(last) if last < len => Ok(()),
        _ => {
            fail(format!("shape {shape:?} with strides {strides:?} needs more than the {len} elements given"))
        }
    }
}

/// A read-only strided view `(batch, heads, length, width)`.
#[derive(Debug, Clone, Copy)]
pub struct View<'a, E> {
    data: &'a [E],
    shape: [usize; 4],
    strides: [usize; 4],
}

impl<'a, E: Copy> View<'a, E> {
    /// A view of `data`; `strides` are in elements. A stride of 0 repeats (broadcasts) an axis.
    ///
    /// # Errors
    /// [`AttnError::Layout`] if an element would lie outside `data` or the last axis is not contiguous.
    pub fn new(tensor: &str, data: &'a [E], shape: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        check_layout(tensor, data.len(), shape, strides)?;
        Ok(Self { data, shape, strides })
    }

    /// A view of a row-major buffer that holds exactly this shape.
    ///
    /// # Errors
    /// [`AttnError::Layout`] if the buffer has another length.
    pub fn contiguous(tensor: &str, data: &'a [E], shape: [usize; 4]) -> Result<Self> {
        let wanted = n_elements(shape);
        if Some(data.len()) != wanted {
            let wanted = wanted.map_or("too many".into(), |n| n.to_string());
            let reason = format!("shape {shape:?} has {wanted} elements, found {}", data.len());
            return Err(AttnError::Layout { tensor: tensor.into(), reason });
        }
        Self::new(tensor, data, shape, contiguous_strides(shape))
    }

    /// `[batch, heads, length, width]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The rows of one head, `[length, width]`.
    #[inline]
    pub fn head(&self, batch: usize, head: usize) -> Rows<'a, E> {
        assert!(batch < self.shape[0] && head < self.shape[1], "head ({batch}, {head}) of {:?}", self.shape);
        let (n, width) = (self.shape[2], self.shape[3]);
        if n == 0 || width == 0 {
            return Rows::new(&[], n, width, 0);
        }
        let start = batch * self.strides[0] + head * self.strides[1];
        Rows::new(
            &self.data[start..=start + (n - 1) * self.strides[2] + width - 1],
            n,
            width,
            self.strides[2],
        )
    }

    /// The same elements with rows `range` of the length axis only.
    ///
    /// # Panics
    /// If the range does not lie inside the axis.
    pub fn narrow(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.shape[2], "rows {range:?} of {:?}", self.shape);
        let mut shape = self.shape;
        shape[2] = range.len();
        let skip = if shape.contains(&0) { self.data.len() } else { range.start * self.strides[2] };
        Self { data: &self.data[skip..], shape, strides: self.strides }
    }
}

/// A mutable strided view `(batch, heads, length, width)` whose rows do not overlap.
#[derive(Debug)]
pub struct ViewMut<'a, E> {
    data: &'a mut [E],
    shape: [usize; 4],
    strides: [usize; 4],
}

impl<'a, E: Element> ViewMut<'a, E> {
    /// A view of `data`; `strides` are in elements.
    ///
    /// # Errors
    /// [`AttnError::Layout`] if an element would lie outside `data`, the last axis is not contiguous, or two
    /// rows would overlap.
    pub fn new(tensor: &str, data: &'a mut [E], shape: [usize; 4], strides: [usize; 4]) -> Result<Self> {
        check_layout(tensor, data.len(), shape, strides)?;
        check_disjoint(tensor, shape, strides)?;
        Ok(Self { data, shape, strides })
    }

    /// A view of a row-major buffer that holds exactly this shape.
    ///
    /// # Errors
    /// [`AttnError::Layout`] if the buffer has another length.
    pub fn contiguous(tensor: &str, data: &'a mut [E], shape: [usize; 4]) -> Result<Self> {
        View::contiguous(tensor, &*data, shape)?;
        Ok(Self { data, shape, strides: contiguous_strides(shape) })
    }

    /// `[batch, heads, length, width]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// The same view for a shorter time: the caller keeps its own.
    pub fn reborrow(&mut self) -> ViewMut<'_, E> {
        ViewMut { data: &mut *self.data, shape: self.shape, strides: self.strides }
    }

    /// Its numbers, if they lie row-major one behind the other.
    ///
    /// # Errors
    /// The view itself, if they do not.
    pub fn into_slice(self) -> std::result::Result<&'a mut [E], Self> {
        let len = self.shape.iter().product();
        let dense = self.shape.contains(&0)
            || (0..4).all(|axis| {
                self.shape[axis] == 1 || self.strides[axis] == contiguous_strides(self.shape)[axis]
            });
        if dense { Ok(&mut self.data[..len]) } else { Err(self) }
    }

    /// Cuts the view into disjoint blocks of at most `block` rows of one head each, ready to be written by
    /// different threads. Order: batch, head, row.
    pub fn into_blocks(self, block: usize) -> impl Iterator<Item = BlockMut<'a, E>> {
        // An empty output has no rows, whatever its length says.
        let n = if self.shape.contains(&0) { 0 } else { self.shape[2] };
        let block = block.clamp(1, n.max(1));
        let cuts = (0..n.div_ceil(block)).map(|t| t * block..((t + 1) * block).min(n)).collect();
        rows_mut::blocks(self.data, self.shape, self.strides, cuts)
    }

    /// Cuts every head at the same ranges of rows; rows outside all of them are left alone. Order: batch, head, cut.
    ///
    /// # Panics
    /// If the ranges are not sorted, disjoint and inside the length axis.
    pub fn into_cuts(self, cuts: Vec<Range<usize>>) -> impl Iterator<Item = BlockMut<'a, E>> {
        rows_mut::blocks(self.data, self.shape, self.strides, cuts)
    }

    /// Sets every element to zero.
    pub fn fill_zero(&mut self) {
        for mut block in self.reborrow().into_blocks(usize::MAX) {
            for i in 0..block.out.len() {
                block.out.row_mut(i).fill(E::ZERO);
            }
        }
    }
}

/// Rows are disjoint if, sorted by stride, each axis steps over everything the finer axes span.
fn check_disjoint(tensor: &str, shape: [usize; 4], strides: [usize; 4]) -> Result<()> {
    if shape.contains(&0) {
        return Ok(());
    }
    let mut axes = [0, 1, 2, 3];
    axes.sort_by_key(|&a| strides[a]);
    let mut span = 1; // elements from the first to the last of the axes so far, both included
    for a in axes {
        if shape[a] > 1 && strides[a] < span {
            let reason = format!(
                "axis `{}` with stride {} overlaps itself: {span} elements lie inside",
                AXES[a], strides[a]
            );
            return Err(AttnError::Layout { tensor: tensor.into(), reason });
        }
        span += (shape[a] - 1) * strides[a];
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_storage_orders_read_the_same_rows() {
        let (b, h, n, d) = (2, 3, 5, 4);
        let data: Vec<f32> = (0..b * h * n * d).map(|x| x as f32).collect();
        // (b, n, h, d) storage seen as (b, h, n, d)
        let view = View::new("q", &data, [b, h, n, d], [n * h * d, d, h * d, 1]).unwrap();
        let row = view.head(1, 2).row(3);
        assert_eq!(row, &data[n * h * d + 3 * h * d + 2 * d..][..d]);
        assert_eq!(view.narrow(3..5).head(1, 2).row(0), row);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_numbers() {
        let data = [0f32; 24];
        let short = View::contiguous("k", &data, [1, 2, 3, 5]).unwrap_err().to_string();
        assert!(short.contains("k:") && short.contains("30") && short.contains("24"), "{short}");
        assert!(View::new("k", &data, [1, 2, 3, 4], [24, 12, 5, 1]).is_err(), "out of the buffer");
        assert!(View::new("k", &data, [1, 2, 3, 4], [24, 12, 1, 3]).is_err(), "last axis strided");
        assert!(
            View::new("k", &data, [1, 2, 3, 4], [usize::MAX, 12, 4, 1]).is_ok(),
            "an axis of 1 never steps"
        );
        assert!(View::new("k", &data, [3, 2, 3, 4], [usize::MAX, 12, 4, 1]).is_err(), "overflow");
        let wraps = View::contiguous("k", &data, [1 << 62, 4, 6, 4]).unwrap_err().to_string();
        assert!(wraps.contains("too many elements"), "{wraps}");
    }

    #[test]
    fn a_dense_output_is_a_slice() {
        let mut data = [0f32; 64];
        let dense = ViewMut::contiguous("out", &mut data, [1, 2, 4, 8]).unwrap();
        assert_eq!(dense.into_slice().map(|x| x.len()).ok(), Some(64));
        let part = ViewMut::new("out", &mut data, [1, 1, 4, 8], [7, 7, 8, 1]).unwrap();
        assert_eq!(part.into_slice().map(|x| x.len()).ok(), Some(32));
        let strided = ViewMut::new("out", &mut data, [1, 2, 4, 8], [64, 8, 16, 1]).unwrap();
        assert_eq!(strided.into_slice().map_err(|view| view.shape()), Err([1, 2, 4, 8]));
        let none = ViewMut::new("out", &mut data, [1, 2, 0, 8], [64, 8, 16, 1]).unwrap();
        assert_eq!(none.into_slice().map(|x| x.len()).ok(), Some(0));
    }

    #[test]
    fn overlapping_outputs_are_refused() {
        let mut data = [0f32; 64];
        assert!(ViewMut::new("out", &mut data, [1, 2, 4, 8], [64, 8, 16, 1]).is_ok(), "(b, n, h, d)");
        assert!(ViewMut::new("out", &mut data, [1, 2, 4, 8], [64, 4, 16, 1]).is_err(), "heads overlap");
        assert!(ViewMut::new("out", &mut data, [1, 2, 4, 8], [64, 0, 8, 1]).is_err(), "broadcast");
    }

    #[test]
    fn blocks_cover_every_row_once() {
        let (b, h, n, d) = (2, 2, 7, 3);
        let mut data = vec![0f32; b * h * n * d];
        let view = ViewMut::new("out", &mut data, [b, h, n, d], [n * h * d, d, h * d, 1]).unwrap();
        for mut block in view.into_blocks(3) {
            for i in 0..block.out.len() {
                let mark = (100 * block.batch + 10 * block.head + block.rows.start + i) as f32;
                block.out.row_mut(i).iter_mut().for_each(|x| *x += mark + 1.0);
            }
        }
        for (at, x) in data.iter().enumerate() {
            let (bi, i, hi) = (at / (n * h * d), at / (h * d) % n, at / d % h);
            assert_eq!(*x, (100 * bi + 10 * hi + i + 1) as f32, "element {at}");
        }
    }

    #[test]
    fn empty_axes_are_fine() {
        let mut none: [f32; 0] = [];
        assert_eq!(View::contiguous("q", &none, [1, 2, 0, 4]).unwrap().head(0, 1).len(), 0);
        assert_eq!(ViewMut::contiguous("out", &mut none, [0, 2, 3, 4]).unwrap().into_blocks(2).count(), 0);
        let any = [0, usize::MAX, usize::MAX, 2];
        assert_eq!(View::contiguous("q", &none, any).unwrap().shape(), any);
        assert_eq!(ViewMut::contiguous("out", &mut none, any).unwrap().into_blocks(2).count(), 0);
    }
}
