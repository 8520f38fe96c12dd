//! Sums over tokens with exponential weights, channel by channel.
//!
//! ```text
//! N_c = sum_s e^(b_s + x_sc) y_sc      D_c = sum_s e^(b_s + x_sc) z_sc          kept as N = n e^m, D = d e^m
//! ```
//!
//! with `m` the largest exponent so far: no exponential overflows, and the largest term is not lost.

use crate::scan::cell::{Panel, PanelMut};
use crate::scan::log_sum::NO_MAX;
use crate::scan::math::exp;
use attn_core::simd::{Select, Simd, SimdBase, SimdFloat};

/// `e^x` for `x` that is at most 0 but for its rounding; exactly 1 at 0.
#[inline(always)]
pub(super) fn weight<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = S::f32s::splat(simd, 1.0);
    x.simd_ge(S::f32s::splat(simd, 0.0)).select(one, exp(simd, x))
}

#[inline(always)]
pub(super) fn load<S: Simd>(simd: S, row: &[f32], c: usize) -> S::f32s {
    S::f32s::from_slice(simd, &row[c..c + S::f32s::LEN])
}

/// Rows that are summed.
#[derive(Clone, Copy)]
pub(super) struct Sources<'a> {
    /// Exponents.
    pub(super) x: Panel<'a>,
    pub(super) y: Panel<'a>,
    /// Ones if there are none.
    pub(super) z: Option<Panel<'a>>,
}

/// `n`, `d` and `m` of some rows, each `[rows, stride]`.
#[derive(Debug, Clone, Default)]
pub(super) struct Sums {
    pub(super) num: Vec<f32>,
    pub(super) den: Vec<f32>,
    pub(super) max: Vec<f32>,
    pub(super) stride: usize,
}

impl Sums {
    /// Of nothing.
    pub(super) fn new(rows: usize, stride: usize) -> Self {
        let len = rows * stride;
        Self { num: vec![0.0; len], den: vec![0.0; len], max: vec![NO_MAX; len], stride }
    }

    /// Row `from` of other sums into row `to`.
    pub(super) fn copy_row(&mut self, to: usize, other: &Self, from: usize) {
        let (to, from) = (to * self.stride..(to + 1) * self.stride, from * self.stride);
        let from = from..from + self.stride;
        self.num[to.clone()].copy_from_slice(&other.num[from.clone()]);
        self.den[to.clone()].copy_from_slice(&other.den[from.clone()]);
        self.max[to].copy_from_slice(&other.max[from]);
    }

    /// Adds the sources `first..first + bias.len()` to row `row`; a bias of -inf leaves its source out.
    #[inline(always)]
    pub(super) fn absorb<S: Simd>(
        &mut self,
        simd: S,
        row: usize,
        from: Sources<'_>,
        first: usize,
        bias: &[f32],
    ) {
        let hidden = f32::NEG_INFINITY;
        for c in (0..self.stride).step_by(S::f32s::LEN) {
            let at = row * self.stride + c;
            let before = load(simd, &self.max, at);
            let mut max = before;
            for (s, &b) in bias.iter().enumerate().filter(|(_, b)| **b != hidden) {
                max = max.max(load(simd, from.x.row(first + s), c) + b);
            }
            let kept = weight(simd, before - max);
            let (mut num, mut den) = (load(simd, &self.num, at) * kept, load(simd, &self.den, at) * kept);
            for (s, &b) in bias.iter().enumerate().filter(|(_, b)| **b != hidden) {
                let e = weight(simd, load(simd, from.x.row(first + s), c) + b - max);
                num = e.mul_add(load(simd, from.y.row(first + s), c), num);
                den = match from.z {
                    Some(z) => e.mul_add(load(simd, z.row(first + s), c), den),
                    None => den + e,
                };
            }
            num.store_slice(&mut self.num[at..at + S::f32s::LEN]);
            den.store_slice(&mut self.den[at..at + S::f32s::LEN]);
            max.store_slice(&mut self.max[at..at + S::f32s::LEN]);
        }
    }

    /// Adds row `other_row` of other sums, all of whose exponents count as they are, to row `row`.
    #[inline(always)]
    pub(super) fn merge<S: Simd>(&mut self, simd: S, row: usize, other: &Self, other_row: usize) {
        for c in (0..self.stride).step_by(S::f32s::LEN) {
            let (at, from) = (row * self.stride + c, other_row * self.stride + c);
            let (mine, theirs) = (load(simd, &self.max, at), load(simd, &other.max, from));
            let max = mine.max(theirs);
            let (a, b) = (weight(simd, mine - max), weight(simd, theirs - max));
            let num = (load(simd, &self.num, at) * a) + load(simd, &other.num, from) * b;
            let den = (load(simd, &self.den, at) * a) + load(simd, &other.den, from) * b;
            num.store_slice(&mut self.num[at..at + S::f32s::LEN]);
            den.store_slice(&mut self.den[at..at + S::f32s::LEN]);
            max.store_slice(&mut self.max[at..at + S::f32s::LEN]);
        }
    }
}

/// Sums up to, and from, every block of `block` rows: `before[b]` those of the rows ahead of block `b`, `after[b]` those of
/// block `b` and all behind it.
pub(super) struct Far {
    pub(super) before: Sums,
    pub(super) after: Sums,
}

impl Far {
    /// Over `len` sources.
    #[inline(always)]
    pub(super) fn new<S: Simd>(simd: S, len: usize, block: usize, stride: usize, from: Sources<'_>) -> Self {
        let blocks = len.div_ceil(block);
        let (mut before, mut after) = (Sums::new(blocks + 1, stride), Sums::new(blocks + 1, stride));
        let zeros = vec![0.0; block];
        for b in 0..blocks {
            let rows = b * block..len.min((b + 1) * block);
            let copy = before.clone_row(b);
            before.copy_row(b + 1, &copy, 0);
            before.absorb(simd, b + 1, from, rows.start, &zeros[..rows.len()]);
        }
        for b in (0..blocks).rev() {
            let rows = b * block..len.min((b + 1) * block);
            let copy = after.clone_row(b + 1);
            after.copy_row(b, &copy, 0);
            after.absorb(simd, b, from, rows.start, &zeros[..rows.len()]);
        }
        Self { before, after }
    }
}

impl Sums {
    fn clone_row(&self, row: usize) -> Self {
        let mut one = Self::new(1, self.stride);
        one.copy_row(0, self, row);
        one
    }

    pub(super) fn mean_into(&self, row: usize, mut out: PanelMut<'_>, to: usize) {
        let range = row * self.stride..(row + 1) * self.stride;
        let pairs = self.num[range.clone()].iter().zip(&self.den[range]);
        // Nothing seen: zeros.
        out.row(to).iter_mut().zip(pairs).for_each(|(o, (n, d))| *o = if *d == 0.0 { 0.0 } else { n / d });
    }
}
