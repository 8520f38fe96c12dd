//! Disjoint mutable blocks of rows, so that threads can write one strided output without copies or locks.
//!
//! The only `unsafe` of the views: a block keeps a pointer to its first row, because the rows of two blocks of
//! a `(b, n, h, d)` buffer interleave and no pair of slices could describe them.
#![allow(unsafe_code)]

use crate::Element;
use std::any::TypeId;
use std::marker::PhantomData;
use std::ops::Range;

/// A mutable matrix `[len, width]`, the only access to its rows.
#[derive(Debug)]
pub struct RowsMut<'a, E> {
    first: *mut E,
    len: usize,
    width: usize,
    stride: usize,
    owner: PhantomData<&'a mut [E]>,
}

// SAFETY: a `RowsMut` is the only access to its rows (`blocks` hands every row to exactly one of them), so
// sending it to another thread is like sending `&mut [E]`, and `E: Element` is `Send`.
unsafe impl<E: Element> Send for RowsMut<'_, E> {}

impl<E: Element> RowsMut<'_, E> {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without rows.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub fn row_mut(&mut self, i: usize) -> &mut [E] {
        assert!(i < self.len, "row {i} of {}", self.len);
        // SAFETY: row `i < len` lies inside the buffer (checked by `ViewMut::new`), overlaps no other row of any
        // block (the same check), and is borrowed from `self` alone for as long as the slice lives.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(i * self.stride), self.width) }
    }

    /// Rows `range`.
    ///
    /// # Panics
    /// If there are no such rows.
    #[inline(always)]
    pub fn rows_mut(&mut self, range: Range<usize>) -> RowsMut<'_, E> {
        assert!(range.start <= range.end && range.end <= self.len, "rows {range:?} of {}", self.len);
        // Without rows the pointer is never followed, wherever it points.
        let first = self.first.wrapping_add(range.start * self.stride);
        RowsMut { first, len: range.len(), width: self.width, stride: self.stride, owner: PhantomData }
    }

    /// The same rows where the storage type is f32: kernels then write them in place.
    #[inline(always)]
    pub fn as_f32(&mut self) -> Option<RowsMut<'_, f32>> {
        let Self { first, len, width, stride, .. } = *self;
        let same = TypeId::of::<E>() == TypeId::of::<f32>();
        same.then(|| RowsMut { first: first.cast(), len, width, stride, owner: PhantomData })
    }
}

impl<'a, E: Element> RowsMut<'a, E> {
    /// The rows of `width` numbers, `stride` apart, that fit into `data`.
    ///
    /// # Panics
    /// If rows would overlap.
    #[inline(always)]
    pub fn new(data: &'a mut [E], width: usize, stride: usize) -> Self {
        assert!(width > 0 && stride >= width, "rows of {width}, {stride} apart");
        let len = if data.len() < width { 0 } else { (data.len() - width) / stride + 1 };
        Self { first: data.as_mut_ptr(), len, width, stride, owner: PhantomData }
    }

    /// The first `at` rows and the others.
    ///
    /// # Panics
    /// If there are fewer.
    #[inline(always)]
    pub fn split_at(self, at: usize) -> (Self, Self) {
        assert!(at <= self.len, "{at} of {} rows", self.len);
        // Without rows the pointer is never followed, wherever it points.
        let first = self.first.wrapping_add(at * self.stride);
        (Self { len: at, ..self }, Self { first, len: self.len - at, ..self })
    }

    /// The same rows cut into columns: the columns of `cuts`, one after another from the first on.
    ///
    /// # Panics
    /// If the cuts are not sorted, disjoint and inside the rows.
    pub fn into_columns(self, cuts: &[Range<usize>]) -> impl Iterator<Item = Self> {
        let Self { first, len, width, stride, .. } = self;
        let sorted = cuts.windows(2).all(|pair| pair[0].end <= pair[1].start);
        let inside = cuts.iter().all(|cut| cut.start <= cut.end && cut.end <= width);
        assert!(sorted && inside, "cuts {cuts:?} of {width} columns");
        // No two of them hold the same number. Without rows the pointer is never followed.
        cuts.iter().map(move |cut| Self {
            first: first.wrapping_add(cut.start),
            len,
            width: cut.len(),
            stride,
            owner: PhantomData,
        })
    }

    /// Where the first row starts, and how far it is to the next.
    #[inline(always)]
    pub(crate) fn as_mut_ptr(&mut self) -> (*mut E, usize) {
        (self.first, self.stride)
    }
}

/// Some consecutive rows of one head of an output.
#[derive(Debug)]
pub struct BlockMut<'a, E> {
    /// Which batch entry.
    pub batch: usize,
    /// Which head.
    pub head: usize,
    /// Which rows of the head; `out` holds exactly these.
    pub rows: Range<usize>,
    /// The rows themselves.
    pub out: RowsMut<'a, E>,
}

/// Cuts every head of a checked, non-overlapping layout (see `ViewMut::new`) into blocks of the rows `cuts`.
///
/// # Panics
/// If the cuts are not sorted, disjoint and inside the length axis.
pub(super) fn blocks<'a, E: Element>(
    data: &'a mut [E],
    shape: [usize; 4],
    strides: [usize; 4],
    cuts: Vec<Range<usize>>,
) -> impl Iterator<Item = BlockMut<'a, E>> {
    let [n_batch, n_heads, n, width] = shape;
    let sorted = cuts.windows(2).all(|pair| pair[0].end <= pair[1].start);
    let inside = cuts.iter().all(|cut| cut.start <= cut.end && cut.end <= n);
    assert!(sorted && inside, "cuts {cuts:?} of {n} rows");
    let base = data.as_mut_ptr();
    let n_heads_total = if n == 0 || width == 0 { 0 } else { n_batch * n_heads };
    (0..n_heads_total * cuts.len()).map(move |at| {
        let (head, rows) = (at / cuts.len(), cuts[at % cuts.len()].clone());
        let (batch, head) = (head / n_heads, head % n_heads);
        let offset = batch * strides[0] + head * strides[1] + rows.start.min(n - 1) * strides[2];
        // SAFETY: `offset` is the index of an element of the checked layout, hence inside `data`.
        let first = unsafe { base.add(offset) };
        let out = RowsMut { first, len: rows.len(), width, stride: strides[2], owner: PhantomData };
        BlockMut { batch, head, rows, out }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_rows_and_columns_of_the_whole() {
        let mut data: Vec<f32> = (0..23).map(|x| x as f32).collect();
        let mut rows = RowsMut::new(&mut data, 3, 5);
        assert_eq!((rows.len(), rows.width()), (5, 3));
        assert_eq!(rows.rows_mut(1..4).row_mut(2), [15.0, 16.0, 17.0]);
        assert!(rows.rows_mut(5..5).is_empty());
        rows.as_f32().expect("f32").row_mut(0)[1] = -1.0;
        let (first, second) = rows.split_at(2);
        assert_eq!((first.len(), second.len()), (2, 3));
        let mut columns: Vec<_> = second.into_columns(&[0..1, 1..3]).collect();
        columns[1].row_mut(2)[0] = -2.0;
        assert_eq!(columns[0].row_mut(2), [20.0]);
        assert_eq!((data[1], data[21]), (-1.0, -2.0));
        let mut halves = [half::bf16::ZERO; 4];
        assert!(RowsMut::new(&mut halves, 2, 2).as_f32().is_none());
    }

    #[test]
    #[should_panic(expected = "of 3 columns")]
    fn columns_that_overlap_are_refused() {
        let mut data = [0.0f32; 6];
        let _ = RowsMut::new(&mut data, 3, 3).into_columns(&[0..2, 1..3]).count();
    }
}
