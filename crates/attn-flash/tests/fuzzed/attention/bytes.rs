//! Choices drawn from bytes; when the bytes run out, every choice is its plainest.

use arbitrary::Unstructured;
use std::ops::RangeInclusive;

/// What is left of the bytes.
pub struct Bytes<'a>(Unstructured<'a>);

impl<'a> Bytes<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(Unstructured::new(bytes))
    }

    /// A number of the range; its start when the bytes have run out.
    pub fn within(&mut self, range: RangeInclusive<usize>) -> usize {
        let plainest = *range.start();
        self.0.int_in_range(range).unwrap_or(plainest)
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.within(0..=n - 1) == n - 1
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.within(0..=from.len() - 1)]
    }

    pub fn word(&mut self) -> u64 {
        self.0.arbitrary().unwrap_or(0)
    }

    /// `len`, or rarely another one.
    pub fn about(&mut self, len: usize) -> usize {
        if self.one_in(24) { self.pick(&[len + 1, len.saturating_sub(1), 0, 2 * len]) } else { len }
    }
}
