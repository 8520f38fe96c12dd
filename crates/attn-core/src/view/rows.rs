//! The rows of one head.

/// A read-only matrix `[len, width]` whose rows are contiguous and `stride` elements apart.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a, E> {
    data: &'a [E],
    len: usize,
    width: usize,
    stride: usize,
}

impl<'a, E: Copy> Rows<'a, E> {
    /// `data` starts at row 0 and holds at least up to the end of the last row.
    ///
    /// # Panics
    /// If it does not.
    pub fn new(data: &'a [E], len: usize, width: usize, stride: usize) -> Self {
        let needed = if len == 0 || width == 0 { 0 } else { (len - 1) * stride + width };
        assert!(data.len() >= needed, "{len} rows of {width}, {stride} apart, in {} elements", data.len());
        Self { data, len, width, stride }
    }

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

    /// Elements from one row's start to the next one's.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Row `i`.
    ///
    /// # Panics
    /// If there is no such row.
    #[inline(always)]
    pub fn row(&self, i: usize) -> &'a [E] {
        debug_assert!(i < self.len);
        &self.data[i * self.stride..][..self.width]
    }

    /// Rows `range` as a matrix of their own.
    ///
    /// # Panics
    /// If the range does not lie inside.
    #[inline(always)]
    pub fn slice(&self, range: std::ops::Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len, "rows {range:?} of {}", self.len);
        if range.is_empty() || self.width == 0 {
            return Self { data: &[], len: range.len(), width: self.width, stride: 0 };
        }
        let data = &self.data[range.start * self.stride..];
        Self { data, len: range.len(), width: self.width, stride: self.stride }
    }

    /// Everything from the first row's first element on: the buffer that `row i = data[i * stride..]` indexes.
    #[inline(always)]
    pub fn data(&self) -> &'a [E] {
        self.data
    }

    /// The rows one after another.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &'a [E]> + use<'a, E> {
        let rows = *self;
        (0..self.len).map(move |i| rows.row(i))
    }
}
