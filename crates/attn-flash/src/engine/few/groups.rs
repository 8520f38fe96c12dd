//! How the channels of a row are taken.

use attn_core::simd::{Simd, SimdBase};

/// Channels in groups of four vectors. Where the width is no multiple of a group, the last group ends with the last
/// channel and begins with some that the group before has too: queries hold zeros there, and what the accumulators get
/// there is not used. A head that is narrower than a group is filled up with zeros.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Groups {
    width: usize,
    /// Channels of a group.
    pub(super) step: usize,
    pub(super) len: usize,
}

impl Groups {
    #[inline(always)]
    pub(in crate::engine) fn of<S: Simd>(width: usize) -> Self {
        let step = 4 * S::f32s::LEN;
        Self { width, step, len: width.div_ceil(step) }
    }

    /// [`Self::of`] where the caller knows that there are `LEN` groups: loops over them become straight code, and what
    /// is read again for every key stays in registers. 0 is any number of groups.
    #[inline(always)]
    pub(super) fn known<S: Simd, const LEN: usize>(width: usize) -> Self {
        let groups = Self::of::<S>(width);
        if LEN == 0 { groups } else { Self { len: LEN, ..groups } }
    }

    /// Numbers that all groups hold together.
    pub(in crate::engine) fn numbers(self) -> usize {
        self.len * self.step
    }

    pub(in crate::engine) fn is_narrow(self) -> bool {
        self.width < self.step
    }

    /// First channel of group `g`.
    #[inline(always)]
    pub(super) fn start(self, g: usize) -> usize {
        (g * self.step).min(self.width.saturating_sub(self.step))
    }

    /// Channels of the last group that the group before has too.
    fn overlap(self) -> usize {
        if self.is_narrow() { 0 } else { self.numbers() - self.width }
    }

    /// Where channel `c` lies among the numbers.
    pub(super) fn place(self, c: usize) -> usize {
        if c / self.step + 1 == self.len { c + self.overlap() } else { c }
    }

    /// Brings `[width]` numbers to their places, with zeros in all other ones.
    pub(in crate::engine) fn spread(self, numbers: &mut [f32]) {
        let last = self.numbers().saturating_sub(self.step);
        numbers.copy_within(last..self.width, last + self.overlap());
        numbers[last..last + self.overlap()].fill(0.0);
    }

    /// Brings the numbers back together.
    pub(in crate::engine) fn compact(self, numbers: &mut [f32]) -> &[f32] {
        let last = self.numbers().saturating_sub(self.step);
        numbers.copy_within(last + self.overlap()..last + self.overlap() + self.width - last, last);
        &numbers[..self.width]
    }
}
