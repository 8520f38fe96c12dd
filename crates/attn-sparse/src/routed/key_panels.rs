//! Rows of keys laid out for scoring: panels of 64 keys, transposed, so that keys stand in the vector lanes.
//!
//! A score row `S[r, ..] = q_r K^T` is then a product with a row-major right side, and its numbers lie as selectors read
//! them. Each score is summed in the order of the channels, so that it has the same bits whether one query is scored
//! (decoding) or many, and however the keys were appended.

use super::numbers::{IndexNumber, Left, Right};
use attn_core::simd::{Simd, SimdOp};
use attn_core::tile::TileMut;
use std::ops::Range;

/// Keys of a panel.
pub(super) const PANEL: usize = 64;

/// Keys that grow at the end; `[panels][units][PANEL]`.
#[derive(Debug, Clone)]
pub(super) struct KeyPanels<U> {
    width: usize,
    len: usize,
    data: Vec<U>,
}

impl<U: IndexNumber> KeyPanels<U> {
    /// No keys yet.
    pub(super) fn new(width: usize) -> Self {
        Self { width, len: 0, data: Vec::new() }
    }

    /// Appends a key, rounded to the storage type.
    pub(super) fn push(&mut self, row: impl Iterator<Item = f32>) {
        let (panel, lane, units) = (self.len / PANEL, self.len % PANEL, self.units());
        if lane == 0 {
            self.data.resize((panel + 1) * units * PANEL, U::default());
        }
        let lanes = self.data[panel * units * PANEL..].iter_mut().skip(lane).step_by(PANEL);
        lanes.zip(U::pack(row)).for_each(|(to, x)| *to = x);
        self.len += 1;
    }

    /// Channels of a key.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Numbers that hold the channels of a key.
    pub(super) fn units(&self) -> usize {
        U::units(self.width)
    }

    /// Keys held.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of memory held.
    pub(super) fn bytes(&self) -> usize {
        self.data.capacity() * size_of::<U>()
    }

    /// A panel, `[units, PANEL]`.
    pub(super) fn panel(&self, panel: usize) -> &[U] {
        &self.data[panel * self.units() * PANEL..][..self.units() * PANEL]
    }
}

/// Every so many keys one is in the sample.
pub(super) const SAMPLING: usize = 16;

/// Keys, and every [`SAMPLING`]th of them once more: scores of the sample say what the largest scores of all will be.
#[derive(Debug, Clone)]
pub(super) struct SampledPanels<U> {
    pub(super) all: KeyPanels<U>,
    /// Key `SAMPLING * t` is the `t`-th.
    pub(super) sample: KeyPanels<U>,
}

impl<U: IndexNumber> SampledPanels<U> {
    /// No keys yet.
    pub(super) fn new(width: usize) -> Self {
        Self { all: KeyPanels::new(width), sample: KeyPanels::new(width) }
    }

    /// Appends a key, rounded to the storage type.
    pub(super) fn push(&mut self, row: impl Iterator<Item = f32> + Clone) {
        if self.all.len.is_multiple_of(SAMPLING) {
            self.sample.push(row.clone());
        }
        self.all.push(row);
    }

    /// Bytes of memory held.
    pub(super) fn bytes(&self) -> usize {
        self.all.bytes() + self.sample.bytes()
    }
}

/// Keys with or without a sample of them.
pub(super) trait Panels: Sync {
    /// How they are stored.
    type Number: IndexNumber;

    /// All keys.
    fn all(&self) -> &KeyPanels<Self::Number>;

    /// Every [`SAMPLING`]th of them.
    fn sample(&self) -> Option<&KeyPanels<Self::Number>>;
}

impl<U: IndexNumber> Panels for KeyPanels<U> {
    type Number = U;

    fn all(&self) -> &Self {
        self
    }

    fn sample(&self) -> Option<&Self> {
        None
    }
}

impl<U: IndexNumber> Panels for SampledPanels<U> {
    type Number = U;

    fn all(&self) -> &KeyPanels<U> {
        &self.all
    }

    fn sample(&self) -> Option<&KeyPanels<U>> {
        Some(&self.sample)
    }
}

/// `scores[r, j] = q_r . k_j` for all rows of `q [rows, units]` and the keys of some panels. Lanes behind the last key get 0.
pub(super) struct ScoreRows<'a, U> {
    pub(super) q: &'a [U],
    pub(super) keys: &'a KeyPanels<U>,
    pub(super) panels: Range<usize>,
    /// Row `r` starts at `r * stride` with the first key of the first panel.
    pub(super) scores: &'a mut [f32],
    pub(super) stride: usize,
    /// Scratch of a product.
    pub(super) wide: &'a mut Vec<f32>,
}

impl<U: IndexNumber> SimdOp for ScoreRows<'_, U> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let units = self.keys.units();
        let rows = self.q.len().checked_div(units).unwrap_or(0);
        for (at, panel) in self.panels.enumerate() {
            let a = Left { data: self.q, row_stride: units, col_stride: 1 };
            let b = Right { data: self.keys.panel(panel), stride: PANEL };
            let c = TileMut { data: &mut self.scores[at * PANEL..], stride: self.stride };
            U::product(simd, [rows, PANEL, units], a, b, c, self.wide);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routed::numbers::PairOfBf16;
    use attn_core::simd::Isa;

    /// A row scored alone, or among few, has the bits that it has among many.
    #[test]
    fn few_rows_are_scored_as_many_are() {
        let number = |x: usize| ((x * 7919 % 1013) as f32 - 500.0) * 0.013;
        for (width, n) in [(1, 5), (7, 64), (16, 130)] {
            let mut keys = KeyPanels::<PairOfBf16>::new(width);
            (0..n).for_each(|key| keys.push((0..width).map(|c| number(key * width + c))));
            let row = |r: usize| PairOfBf16::pack((0..width).map(move |c| number(r * width + c + 17)));
            let (q, units) = ((0..7).flat_map(row).collect::<Vec<_>>(), keys.units());
            let (panels, stride) = (0..n.div_ceil(PANEL), n.next_multiple_of(PANEL));
            for isa in Isa::available() {
                let run = |q: &[PairOfBf16]| {
                    let (mut scores, wide) = (vec![f32::NAN; q.len() / units * stride], &mut Vec::new());
                    let panels = panels.clone();
                    isa.run(ScoreRows { q, keys: &keys, panels, scores: &mut scores, stride, wide });
                    scores
                };
                let all = run(&q);
                for few in 1..=4 {
                    for (at, q) in q.chunks(few * units).enumerate() {
                        let want = &all[at * few * stride..][..q.len() / units * stride];
                        assert_eq!(run(q), want, "{isa} {width} {n} {few}");
                    }
                }
            }
        }
    }
}
