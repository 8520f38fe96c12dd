//! Rows of keys laid out for scoring: panels of 64 keys, transposed, so that keys stand in the vector lanes.
//!
//! A score row `S[r, ..] = q_r K^T` is then a product with a row-major right side, and its numbers lie as selectors read
//! them. Each score is summed in the order of the channels, so that it has the same bits whether one query is scored
//! (decoding) or many, and however the keys were appended.

use attn_core::Element;
use attn_core::simd::{Simd, SimdOp};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, product};
use std::ops::Range;

/// Keys of a panel.
pub(super) const PANEL: usize = 64;

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
    type Number: Element;

    /// All keys.
    fn all(&self) -> &KeyPanels<Self::Number>;

    /// Every [`SAMPLING`]th of them.
    fn sample(&self) -> Option<&KeyPanels<Self::Number>>;
}

impl<E: Element> Panels for KeyPanels<E> {
    type Number = E;

    fn all(&self) -> &Self {
        self
    }

    fn sample(&self) -> Option<&Self> {
        None
    }
}

impl<E: Element> Panels for SampledPanels<E> {
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

impl<E: Element> SimdOp for ScoreRows<'_, E> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let width = self.keys.width;
        let rows = self.q.len().checked_div(width).unwrap_or(0);
        for (at, panel) in self.panels.enumerate() {
            let stored = &self.keys.data[panel * width * PANEL..][..width * PANEL];
            let b = match E::as_f32(stored) {
                Some(numbers) => numbers,
                None => {
                    self.wide.resize(width * PANEL, 0.0);
                    self.wide.iter_mut().zip(stored).for_each(|(wide, x)| *wide = x.load());
                    &*self.wide
                }
            };
            let a = Lhs { data: self.q, row_stride: width, col_stride: 1 };
            let c = TileMut { data: &mut self.scores[at * PANEL..], stride: self.stride };
            product(simd, [rows, PANEL, width], a, Rhs { data: b, stride: PANEL }, c, Start::Zero);
        }
    }
}
