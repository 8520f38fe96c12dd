//! Scores inside a chunk: decay-weighted inner products of readers with the writes before them.
//!
//! `out_ij = sum_c x_ic y_jc 2^(E_ic - G_jc)` for the writes `j` that reader `i` sees, 0 for the others, where `E_i = G_at`
//! is the cumulative decay the reader stands at. Where all channels decay alike, the weight is that of the whole score.
//! Else readers near the start of the chunk (see [`super::fading`]) are one product of `x o down` with `y o up`; the others
//! are done pair by pair.

use super::attend::Ahead;
use super::fading::{Fading, weigh};
use attn_core::simd::{Simd, SimdBase, SimdFloat};
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, TileMut, exp2, product, transpose};
use attn_core::view::Rows;

/// Rows of a triangle done together.
pub(super) const BLOCK: usize = MAX_LANES;

/// Who reads: a matrix of rows, and where each stands.
pub(super) struct Readers<'a> {
    /// `x [rows, key_dim]`.
    pub(super) plain: &'a [f32],
    /// `x o down` of where they stand, if every channel has its own decay.
    pub(super) faded: &'a [f32],
    /// The write whose decay a reader stands at; `None` is the chunk's start.
    pub(super) at: &'a dyn Fn(usize) -> Option<usize>,
    /// The writes it sees.
    pub(super) seen: &'a dyn Fn(usize) -> usize,
    pub(super) rows: usize,
    /// Whether somebody looks at scores with what a reader does not see: they are to be 0.
    pub(super) zeros: bool,
}

/// What is read: the writes' vectors as columns, `stride` apart.
pub(super) struct Columns {
    /// `y^T [key_dim, stride]`.
    plain: Vec<f32>,
    /// `(y o up)^T`; empty unless every channel has its own decay.
    up: Vec<f32>,
    stride: usize,
    key_dim: usize,
}

impl Columns {
    pub(super) fn new(key_dim: usize, writes: usize, decays: bool) -> Self {
        let stride = writes.next_multiple_of(MAX_LANES);
        let all = vec![0.0; key_dim * stride];
        Self { up: if decays { all.clone() } else { Vec::new() }, plain: all, stride, key_dim }
    }

    /// Floats of [`Columns::new`].
    pub(super) fn floats(key_dim: usize, writes: usize, decays: bool) -> usize {
        key_dim * writes.next_multiple_of(MAX_LANES) * (1 + usize::from(decays))
    }

    /// Takes the rows `y [writes, key_dim]`; `weighed` is scratch for as many.
    #[inline(always)]
    pub(super) fn set<S: Simd>(&mut self, simd: S, rows: &[f32], fading: &Fading, weighed: &mut [f32]) {
        let (key_dim, writes) = (self.key_dim, rows.len() / self.key_dim);
        // Without pairs the plain columns are never read.
        if self.up.is_empty() || fading.near < writes {
            transpose(simd, Rows::new(rows, writes, key_dim, key_dim), 1.0, &mut self.plain, self.stride);
        }
        if !self.up.is_empty() {
            weigh(rows, key_dim, &fading.up, fading.key_width, weighed);
            let weighed = Rows::new(weighed, writes, key_dim, key_dim);
            transpose(simd, weighed, 1.0, &mut self.up, self.stride);
        }
    }

    /// What readers near the start multiply with.
    #[inline(always)]
    fn near(&self) -> &[f32] {
        if self.up.is_empty() { &self.plain } else { &self.up }
    }
}

/// Fills `out [rows, stride]`, of a block of rows the columns that its last row sees, in whole vectors; beyond these it must
/// be zero.
#[inline(always)]
pub(super) fn scores<S: Simd>(
    simd: S,
    readers: &Readers<'_>,
    columns: &Columns,
    fading: &Fading,
    out: &mut [f32],
    ahead: Ahead<'_>,
) {
    let (stride, key_dim) = (columns.stride, columns.key_dim);
    for first in (0..readers.rows).step_by(BLOCK) {
        let rows = BLOCK.min(readers.rows - first);
        let width = ((readers.seen)(first + rows - 1)).next_multiple_of(MAX_LANES).min(stride);
        let alike = fading.key_width <= 1;
        let near = (first..first + rows).take_while(|i| alike || fading.is_near((readers.at)(*i))).count();
        let mut multiply = |x: &[f32], y: &[f32], from: usize, rows: usize| {
            product(
                simd,
                [rows, width, key_dim],
                Lhs { data: &x[(from * key_dim).min(x.len())..], row_stride: key_dim, col_stride: 1 },
                Rhs { data: y, stride },
                TileMut { data: &mut out[from * stride..], stride },
                Start::Zero,
            );
        };
        multiply(if alike { readers.plain } else { readers.faded }, columns.near(), first, near);
        for i in first..first + rows {
            let (at, seen) = ((readers.at)(i), (readers.seen)(i));
            let row = &mut out[i * stride..][..stride];
            if i >= first + near {
                let x = &readers.plain[i * key_dim..][..key_dim];
                pairs(simd, x, at, columns, fading, &mut row[..width]);
            }
            fading.weigh_scores(simd, at, &mut row[..seen]);
            if readers.zeros {
                // Not left to a weight of 0: it would keep a NaN.
                row[seen..width].fill(0.0);
            }
        }
        ahead();
    }
}

/// One reader's scores with whole vectors of writes, every channel with its own decay.
#[inline(always)]
fn pairs<S: Simd>(
    simd: S,
    x: &[f32],
    at: Option<usize>,
    columns: &Columns,
    fading: &Fading,
    out: &mut [f32],
) {
    let lanes = S::f32s::LEN;
    for (from, out) in out.chunks_exact_mut(lanes).enumerate().map(|(v, out)| (v * lanes, out)) {
        let mut sum = S::f32s::splat(simd, 0.0);
        for (c, x) in x.iter().enumerate() {
            let reader = at.map_or(0.0, |at| fading.sums[at * fading.width + c]);
            let sums = &fading.transposed[c * fading.lanes + from..][..lanes];
            let mut exponents = [0.0f32; MAX_LANES];
            exponents.iter_mut().zip(sums).for_each(|(e, g)| *e = (reader - g) as f32);
            let weights = exp2(simd, S::f32s::from_slice(simd, &exponents[..lanes]));
            let y = S::f32s::from_slice(simd, &columns.plain[c * columns.stride + from..][..lanes]);
            sum = (y * weights).mul_add(S::f32s::splat(simd, *x), sum);
        }
        sum.store_slice(out);
    }
}

/// A lower triangle of scores `[rows, stride]`: row `i` is zero from `seen(i)` on.
pub(super) struct Triangle<'a> {
    pub(super) data: &'a [f32],
    pub(super) stride: usize,
    pub(super) seen: &'a dyn Fn(usize) -> usize,
}

impl Triangle<'_> {
    /// Rows `rows` of `out += triangle values`, with rows of values `[.., width]`. A score of 0 times a value of NaN reaches no row
    /// that does not see it, if `finite` says truly whether all values are.
    #[inline(always)]
    pub(super) fn multiply<S: Simd>(
        &self,
        simd: S,
        rows: std::ops::Range<usize>,
        values: Rhs<'_>,
        width: usize,
        finite: bool,
        out: &mut [f32],
    ) {
        let mut multiply = |rows: std::ops::Range<usize>, columns: usize| {
            product(
                simd,
                [rows.len(), width, columns],
                Lhs { data: &self.data[rows.start * self.stride..], row_stride: self.stride, col_stride: 1 },
                values,
                TileMut { data: &mut out[rows.start * width..], stride: width },
                Start::Keep,
            );
        };
        if rows.is_empty() {
        } else if finite {
            let columns = (self.seen)(rows.end - 1);
            multiply(rows, columns);
        } else {
            rows.for_each(|i| multiply(i..i + 1, (self.seen)(i)));
        }
    }
}
