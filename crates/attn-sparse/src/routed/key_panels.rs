//! Rows of keys laid out for scoring: panels of 64 keys, transposed, so that keys stand in the vector lanes.
//!
//! A score row `S[r, ..] = q_r K^T` is then a product with a row-major right side, and its numbers lie as selectors read
//! them. Each score is summed in the order of the channels, so that it has the same bits whether one query is scored
//! (decoding) or many, and however the keys were appended.

use attn_core::Element;
use attn_core::simd::{Simd, SimdBase, SimdFloat, SimdOp};
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, Stored, TileMut, product, read_rows};
use attn_core::view::Rows;
use std::ops::Range;

/// Keys of a panel.
pub(super) const PANEL: usize = 64;

/// How keys are stored.
pub(super) trait KeyNumber: Element + Stored {}

impl<E: Element + Stored> KeyNumber for E {}

/// Keys that grow at the end; `[panels][width][PANEL]`.
#[derive(Debug, Clone)]
pub(super) struct KeyPanels<E> {
    width: usize,
    len: usize,
    data: Vec<E>,
}

impl<E: Element> KeyPanels<E> {
    /// No keys yet.
    pub(super) fn new(width: usize) -> Self {
        Self { width, len: 0, data: Vec::new() }
    }

    /// Appends a key, rounded to the storage type.
    pub(super) fn push(&mut self, row: impl Iterator<Item = f32>) {
        let (panel, lane) = (self.len / PANEL, self.len % PANEL);
        if lane == 0 {
            self.data.resize((panel + 1) * self.width * PANEL, E::ZERO);
        }
        let lanes = self.data[panel * self.width * PANEL..].iter_mut().skip(lane).step_by(PANEL);
        lanes.zip(row).for_each(|(to, x)| *to = E::store(x));
        self.len += 1;
    }

    /// Numbers of a key.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Keys held.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Bytes of memory held.
    pub(super) fn bytes(&self) -> usize {
        self.data.capacity() * size_of::<E>()
    }
}

impl<E: KeyNumber> KeyPanels<E> {
    /// A panel, `[width, PANEL]`; `wide` is scratch.
    #[inline(always)]
    pub(super) fn panel<'s, S: Simd>(&'s self, simd: S, panel: usize, wide: &'s mut Vec<f32>) -> &'s [f32] {
        let stored = &self.data[panel * self.width * PANEL..][..self.width * PANEL];
        if let Some(numbers) = E::as_f32(stored) {
            return numbers;
        }
        wide.resize(self.width * PANEL, 0.0);
        read_rows(simd, Rows::new(stored, self.width, PANEL, PANEL), wide);
        wide
    }
}

/// Every so many keys one is in the sample.
pub(super) const SAMPLING: usize = 16;

/// Keys, and every [`SAMPLING`]th of them once more: scores of the sample say what the largest scores of all will be.
#[derive(Debug, Clone)]
pub(super) struct SampledPanels<E> {
    pub(super) all: KeyPanels<E>,
    /// Key `SAMPLING * t` is the `t`-th.
    pub(super) sample: KeyPanels<E>,
}

impl<E: Element> SampledPanels<E> {
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
    type Number: KeyNumber;

    /// All keys.
    fn all(&self) -> &KeyPanels<Self::Number>;

    /// Every [`SAMPLING`]th of them.
    fn sample(&self) -> Option<&KeyPanels<Self::Number>>;
}

impl<E: KeyNumber> Panels for KeyPanels<E> {
    type Number = E;

    fn all(&self) -> &Self {
        self
    }

    fn sample(&self) -> Option<&Self> {
        None
    }
}

impl<E: KeyNumber> Panels for SampledPanels<E> {
    type Number = E;

    fn all(&self) -> &KeyPanels<E> {
        &self.all
    }

    fn sample(&self) -> Option<&KeyPanels<E>> {
        Some(&self.sample)
    }
}

/// `scores[r, j] = q_r . k_j` for all rows of `q [rows, width]` and the keys of some panels. Lanes behind the last key get 0.
pub(super) struct ScoreRows<'a, E> {
    pub(super) q: &'a [f32],
    pub(super) keys: &'a KeyPanels<E>,
    pub(super) panels: Range<usize>,
    /// Row `r` starts at `r * stride` with the first key of the first panel.
    pub(super) scores: &'a mut [f32],
    pub(super) stride: usize,
    /// Scratch of a panel.
    pub(super) wide: &'a mut Vec<f32>,
}

impl<E: KeyNumber> SimdOp for ScoreRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let width = self.keys.width;
        let rows = self.q.len().checked_div(width).unwrap_or(0);
        for (at, panel) in self.panels.enumerate() {
            let stored = &self.keys.data[panel * width * PANEL..][..width * PANEL];
            let are_few = rows == 1 || S::f32s::LEN == MAX_LANES && (1..=4).contains(&rows);
            if are_few && E::as_f32(stored).is_none() {
                let scores = &mut self.scores[at * PANEL..];
                match rows {
                    1 => score_few::<S, E, 1>(simd, self.q, stored, scores, self.stride),
                    2 => score_few::<S, E, 2>(simd, self.q, stored, scores, self.stride),
                    3 => score_few::<S, E, 3>(simd, self.q, stored, scores, self.stride),
                    _ => score_few::<S, E, 4>(simd, self.q, stored, scores, self.stride),
                }
                continue;
            }
            let b = self.keys.panel(simd, panel, self.wide);
            let a = Lhs { data: self.q, row_stride: width, col_stride: 1 };
            let c = TileMut { data: &mut self.scores[at * PANEL..], stride: self.stride };
            product(simd, [rows, PANEL, width], a, Rhs { data: b, stride: PANEL }, c, Start::Zero);
        }
    }
}

/// The scores of `ROWS` rows and a panel, `[width, PANEL]`, whose numbers are widened in registers: the sums of `product`, number
/// for number.
// Indexed by constants once unrolled: then the sums stay in registers.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn score_few<S: Simd, E: Stored, const ROWS: usize>(
    simd: S,
    q: &[f32],
    panel: &[E],
    scores: &mut [f32],
    stride: usize,
) {
    let (lanes, step, width) = (S::f32s::LEN, 4 * S::f32s::LEN, panel.len() / PANEL);
    let rows: [&[f32]; ROWS] = std::array::from_fn(|row| &q[row * width..][..width]);
    for first in (0..PANEL).step_by(step) {
        let mut sums = [[S::f32s::splat(simd, 0.0); 4]; ROWS];
        for (c, keys) in panel.chunks_exact(PANEL).enumerate() {
            let four = E::load4(simd, &keys[first..first + step]);
            for row in 0..ROWS {
                let q = S::f32s::splat(simd, rows[row][c]);
                for v in 0..4 {
                    sums[row][v] = q.mul_add(four[v], sums[row][v]);
                }
            }
        }
        for row in 0..ROWS {
            for v in 0..4 {
                sums[row][v].store_slice(&mut scores[row * stride + first + v * lanes..][..lanes]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::simd::Isa;
    use half::bf16;

    /// A row scored alone, or among few, has the bits that it has among many.
    #[test]
    fn few_rows_are_scored_as_many_are() {
        let number = |x: usize| ((x * 7919 % 1013) as f32 - 500.0) * 0.013;
        for (width, n) in [(1, 5), (7, 64), (16, 130)] {
            let mut keys = KeyPanels::<bf16>::new(width);
            (0..n).for_each(|key| keys.push((0..width).map(|c| number(key * width + c))));
            let q: Vec<f32> = (0..7 * width).map(|x| number(x + 17)).collect();
            let (panels, stride) = (0..n.div_ceil(PANEL), n.next_multiple_of(PANEL));
            for isa in Isa::available() {
                let run = |q: &[f32]| {
                    let (mut scores, wide) = (vec![f32::NAN; q.len() / width * stride], &mut Vec::new());
                    let panels = panels.clone();
                    isa.run(ScoreRows { q, keys: &keys, panels, scores: &mut scores, stride, wide });
                    scores
                };
                let all = run(&q);
                for few in 1..=4 {
                    for (at, q) in q.chunks(few * width).enumerate() {
                        let want = &all[at * few * stride..][..q.len() / width * stride];
                        assert_eq!(run(q), want, "{isa} {width} {n} {few}");
                    }
                }
            }
        }
    }
}
