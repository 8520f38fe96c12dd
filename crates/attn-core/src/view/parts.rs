//! Parts of tensors that are tensors themselves: some heads, every `step`-th row.

use super::{View, ViewMut};
use crate::{Element, OutMut, TensorView};
use std::ops::Range;

/// Where the part starts, and its shape and strides.
fn heads(shape: [usize; 4], strides: [usize; 4], heads: Range<usize>) -> (usize, [usize; 4], [usize; 4]) {
    assert!(heads.start <= heads.end && heads.end <= shape[1], "heads {heads:?} of {shape:?}");
    let part = [shape[0], heads.len(), shape[2], shape[3]];
    (heads.start * strides[1], part, strides)
}

/// Where the part starts, and its shape and strides.
fn every(
    shape: [usize; 4],
    strides: [usize; 4],
    (first, step): (usize, usize),
) -> (usize, [usize; 4], [usize; 4]) {
    assert!(step > 0, "every 0th row");
    let rows = shape[2].saturating_sub(first).div_ceil(step);
    let part = [shape[0], shape[1], rows, shape[3]];
    // A single row is followed by none, so that its stride need not exist.
    let stride = if rows > 1 { strides[2] * step } else { strides[2] };
    (first * strides[2], part, [strides[0], strides[1], stride, strides[3]])
}

impl<'a, E: Copy> View<'a, E> {
    fn part(self, (start, shape, strides): (usize, [usize; 4], [usize; 4])) -> Self {
        let start = if shape.contains(&0) { self.data.len() } else { start };
        Self { data: &self.data[start..], shape, strides }
    }

    /// The same elements with heads `range` only.
    ///
    /// # Panics
    /// If the range does not lie inside the axis.
    #[must_use]
    pub fn heads(&self, range: Range<usize>) -> Self {
        self.part(heads(self.shape, self.strides, range))
    }

    /// Rows `first`, `first + step`, `first + 2 step`, ... of every head; none if `first` lies behind the end.
    ///
    /// # Panics
    /// If `step` is 0.
    #[must_use]
    pub fn every(&self, first: usize, step: usize) -> Self {
        self.part(every(self.shape, self.strides, (first, step)))
    }
}

impl<E: Element> ViewMut<'_, E> {
    fn part(self, (start, shape, strides): (usize, [usize; 4], [usize; 4])) -> Self {
        let start = if shape.contains(&0) { self.data.len() } else { start };
        Self { data: &mut self.data[start..], shape, strides }
    }

    /// [`View::heads`] of an output; what lies between is left alone.
    ///
    /// # Panics
    /// If the range does not lie inside the axis.
    #[must_use]
    pub fn heads(self, range: Range<usize>) -> Self {
        let part = heads(self.shape, self.strides, range);
        self.part(part)
    }

    /// [`View::every`] of an output; what lies between is left alone.
    ///
    /// # Panics
    /// If `step` is 0.
    #[must_use]
    pub fn every(self, first: usize, step: usize) -> Self {
        let part = every(self.shape, self.strides, (first, step));
        self.part(part)
    }
}

impl TensorView<'_> {
    /// [`View::heads`], whatever the dtype.
    ///
    /// # Panics
    /// If the range does not lie inside the axis.
    #[must_use]
    pub fn heads(&self, range: Range<usize>) -> Self {
        match self {
            Self::F32(v) => Self::F32(v.heads(range)),
            Self::Bf16(v) => Self::Bf16(v.heads(range)),
            Self::F16(v) => Self::F16(v.heads(range)),
        }
    }

    /// [`View::every`], whatever the dtype.
    ///
    /// # Panics
    /// If `step` is 0.
    #[must_use]
    pub fn every(&self, first: usize, step: usize) -> Self {
        match self {
            Self::F32(v) => Self::F32(v.every(first, step)),
            Self::Bf16(v) => Self::Bf16(v.every(first, step)),
            Self::F16(v) => Self::F16(v.every(first, step)),
        }
    }
}

impl OutMut<'_> {
    /// [`ViewMut::heads`], whatever the dtype.
    ///
    /// # Panics
    /// If the range does not lie inside the axis.
    #[must_use]
    pub fn heads(self, range: Range<usize>) -> Self {
        match self {
            Self::F32(v) => Self::F32(v.heads(range)),
            Self::Bf16(v) => Self::Bf16(v.heads(range)),
            Self::F16(v) => Self::F16(v.heads(range)),
        }
    }

    /// [`ViewMut::every`], whatever the dtype.
    ///
    /// # Panics
    /// If `step` is 0.
    #[must_use]
    pub fn every(self, first: usize, step: usize) -> Self {
        match self {
            Self::F32(v) => Self::F32(v.every(first, step)),
            Self::Bf16(v) => Self::Bf16(v.every(first, step)),
            Self::F16(v) => Self::F16(v.every(first, step)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_name_the_rows_of_the_whole() {
        let (b, h, n, d) = (2, 3, 7, 2);
        let data: Vec<f32> = (0..b * h * n * d).map(|x| x as f32).collect();
        for strides in [[h * n * d, n * d, d, 1], [h * n * d, d, h * d, 1]] {
            let all = View::new("q", &data, [b, h, n, d], strides).unwrap();
            for (first, step) in [(0, 1), (1, 3), (2, 7), (6, 2), (6, 100), (7, 1), (9, 4)] {
                let part = all.heads(1..3).every(first, step);
                let rows: Vec<usize> = (first..n).step_by(step).collect();
                assert_eq!(part.shape(), [b, 2, rows.len(), d]);
                for (at, row) in rows.into_iter().enumerate() {
                    assert_eq!(part.head(1, 1).row(at), all.head(1, 2).row(row), "{first} {step}");
                }
            }
        }
    }

    #[test]
    fn parts_of_outputs_partition_them() {
        let (b, h, n, d) = (2, 2, 5, 3);
        let mut data = vec![0f32; b * h * n * d];
        let mut all = ViewMut::new("out", &mut data, [b, h, n, d], [n * h * d, d, h * d, 1]).unwrap();
        for head in 0..h {
            for class in 0..3 {
                let part = all.reborrow().heads(head..head + 1).every(class, 3);
                for mut block in part.into_blocks(1) {
                    let mark = (100 * block.batch + 10 * head + class + 3 * block.rows.start) as f32;
                    block.out.row_mut(0).iter_mut().for_each(|x| *x += mark + 1.0);
                }
            }
        }
        for (at, x) in data.iter().enumerate() {
            let (bi, i, hi) = (at / (n * h * d), at / (h * d) % n, at / d % h);
            assert_eq!(*x, (100 * bi + 10 * hi + i + 1) as f32, "element {at}");
        }
    }
}
