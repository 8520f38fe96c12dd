//! A panel of rows against the keys of a cell.

use crate::engine::backward::tile::{add_poisoned, score};
use crate::engine::backward::weights::LANES;
use crate::engine::rows::{HeadRows, KeyRows, Wide};
use attn_core::simd::{Select, Simd, SimdBase};
use attn_core::tile::{Lhs, Rhs, Start, TileMut, all_finite, exp2, product, transpose};
use attn_core::view::Rows;
use std::f32::consts::LOG2_E;
use std::ops::{BitOr, Range};

/// Scratch, a cell, and up to [`LANES`] rows.
pub(super) struct Panel {
    widths: [usize; 2],
    /// Keys of the cell.
    keys: Range<usize>,
    /// `[keys, head_dim]` and `[keys, head_dim_v]`.
    k: Vec<f32>,
    v: Vec<f32>,
    bias: Vec<f32>,
    /// No key is NaN or infinite.
    finite_k: bool,
    /// `[LANES, head_dim]`, scaled, and `[LANES, head_dim_v]`.
    q: Vec<f32>,
    grad_out: Vec<f32>,
    /// Their transposes, `[head_dim, LANES]` and `[head_dim_v, LANES]`.
    q_t: Vec<f32>,
    grad_out_t: Vec<f32>,
    /// `lse`, +inf for rows that see nothing; and delta.
    lse: [f32; LANES],
    delta: [f32; LANES],
    /// `[keys, LANES]`.
    scores: Vec<f32>,
    grads: Vec<f32>,
    /// Which lanes see each key, `[keys]`.
    seen: Vec<u64>,
    /// `[LANES, head_dim]`.
    grad_q: Vec<f32>,
    finite: Vec<f32>,
}

impl Panel {
    /// For heads of these widths and cells of `cell` keys.
    pub(super) fn new([head_dim, head_dim_v]: [usize; 2], cell: usize) -> Self {
        let zeros = |len: usize| vec![0.0; len];
        Self {
            widths: [head_dim, head_dim_v],
            keys: 0..0,
            k: zeros(cell * head_dim),
            v: zeros(cell * head_dim_v),
            bias: Vec::new(),
            finite_k: true,
            q: zeros(LANES * head_dim),
            grad_out: zeros(LANES * head_dim_v),
            q_t: zeros(LANES * head_dim),
            grad_out_t: zeros(LANES * head_dim_v),
            lse: [f32::INFINITY; LANES],
            delta: [0.0; LANES],
            scores: zeros(cell * LANES),
            grads: zeros(cell * LANES),
            seen: Vec::new(),
            grad_q: zeros(LANES * head_dim),
            finite: Vec::new(),
        }
    }

    /// The next cell; `bias` is that of all keys of the sequence.
    #[inline(always)]
    pub(super) fn take_cell(&mut self, keys: Range<usize>, [k, v]: [&KeyRows<'_>; 2], bias: Option<&[f32]>) {
        let ranges = std::slice::from_ref(&keys);
        k.copy_to(ranges, &mut self.k);
        v.copy_to(ranges, &mut self.v);
        self.finite_k = all_finite(&self.k[..keys.len() * self.widths[0]]);
        self.bias.clear();
        self.bias.extend_from_slice(bias.map_or(&[], |bias| &bias[keys.clone()]));
        self.keys = keys;
    }

    /// Row `row` of these queries and gradients of outputs stands in `lane`.
    #[inline(always)]
    pub(super) fn take_row(
        &mut self,
        lane: usize,
        [q, grad_out]: [&HeadRows<'_>; 2],
        row: usize,
        (lse, delta): (f32, f32),
        softmax_scale: f32,
    ) {
        let [width, width_v] = self.widths;
        let to = &mut self.q[lane * width..][..width];
        copy(q, row, to);
        to.iter_mut().for_each(|q| *q *= softmax_scale);
        copy(grad_out, row, &mut self.grad_out[lane * width_v..][..width_v]);
        (self.lse[lane], self.delta[lane]) = (reference(lse), delta);
    }

    /// Adds to the gradients of the keys and values of the cell, `[keys, head_dim]` and `[keys, head_dim_v]`, and to those of
    /// their biases, `[keys]` or none; and sets those of the scaled queries: of the first `n` lanes, which list `ranges(lane)`
    /// of the cell.
    #[inline(always)]
    pub(super) fn meet<'l, S: Simd>(
        &mut self,
        simd: S,
        n: usize,
        ranges: impl Fn(usize) -> &'l [(u32, u32)],
        [grad_k, grad_v, sums]: [&mut [f32]; 3],
    ) {
        let ([d, d_v], n_keys) = (self.widths, self.keys.len());
        let lanes = n.next_multiple_of(S::f32s::LEN);
        transpose(simd, Rows::new(&self.q, n, d, d), 1.0, &mut self.q_t, LANES);
        transpose(simd, Rows::new(&self.grad_out, n, d_v, d_v), 1.0, &mut self.grad_out_t, LANES);
        let (scores, grads) = (&mut self.scores[..n_keys * LANES], &mut self.grads[..n_keys * LANES]);
        let (k, v) = (Wide { data: &self.k, stride: d }, Wide { data: &self.v, stride: d_v });
        score(simd, [n_keys, lanes, d], k, &self.q_t, scores);
        score(simd, [n_keys, lanes, d_v], v, &self.grad_out_t, grads);
        for (row, bias) in scores.as_chunks_mut::<LANES>().0.iter_mut().zip(&self.bias) {
            row.iter_mut().for_each(|score| *score += bias);
        }
        let is_full =
            |lane: usize| matches!(ranges(lane), [(start, end)] if (end - start) as usize == n_keys);
        if !(0..n).all(is_full) {
            self.seen.clear();
            self.seen.resize(n_keys, 0);
            for lane in 0..n {
                for &(start, end) in ranges(lane) {
                    let keys = start as usize - self.keys.start..end as usize - self.keys.start;
                    self.seen[keys].iter_mut().for_each(|seen| *seen |= 1 << lane);
                }
            }
            for (row, seen) in scores.as_chunks_mut::<LANES>().0.iter_mut().zip(&self.seen) {
                hide(row, *seen);
            }
        }
        self.lse[n..lanes].fill(f32::INFINITY);
        weigh(simd, [&mut *scores, &mut *grads], lanes, [&self.lse, &self.delta]);
        for (sum, row) in sums.iter_mut().zip(grads.chunks_exact(LANES)) {
            // Row after row.
            row[..n].iter().for_each(|grad| *sum += grad);
        }

        // A weight of 0 times NaN or infinity would leak what the pair must not see.
        let [q, grad_out] = [&self.q[..n * d], &self.grad_out[..n * d_v]];
        let poisoned = !(self.finite_k && all_finite(q) && all_finite(grad_out));
        let finite = &mut self.finite;
        let mut add = |[m, width, depth]: [usize; 3], a: Lhs<'_>, b: &[f32], c: &mut [f32], start: Start| {
            if poisoned {
                if start == Start::Zero {
                    c.fill(0.0);
                }
                return add_poisoned(simd, [m, width, depth], a, Wide { data: b, stride: width }, c, finite);
            }
            let (b, c) = (Rhs { data: b, stride: width }, TileMut { data: c, stride: width });
            product(simd, [m, width, depth], a, b, c, start);
        };
        let by_key = |data| Lhs { data, row_stride: LANES, col_stride: 1 };
        let by_lane = |data| Lhs { data, row_stride: 1, col_stride: LANES };
        add([n_keys, d_v, n], by_key(scores), grad_out, grad_v, Start::Keep);
        add([n_keys, d, n], by_key(grads), q, grad_k, Start::Keep);
        add([n, d, n_keys], by_lane(grads), &self.k, &mut self.grad_q, Start::Zero);
    }

    /// The gradient of the scaled query in a lane.
    #[inline(always)]
    pub(super) fn grad_q(&self, lane: usize) -> &[f32] {
        &self.grad_q[lane * self.widths[0]..][..self.widths[0]]
    }
}

#[inline(always)]
fn copy(rows: &HeadRows<'_>, row: usize, to: &mut [f32]) {
    match rows {
        HeadRows::F32(rows) => to.copy_from_slice(rows.row(row)),
        rows => rows.slice(row..row + 1).copy_to(to),
    }
}

/// `lse` as the panel takes it: a row that sees nothing weighs nothing.
fn reference(lse: f32) -> f32 {
    if lse == f32::NEG_INFINITY { f32::INFINITY } else { lse }
}

/// The scores of lanes that do not see the key become -inf.
#[inline(always)]
fn hide(row: &mut [f32; LANES], seen: u64) {
    if seen == u64::MAX {
        return;
    }
    // On copies of a vector's width: only so does the compiler use vectors.
    for (first, part) in row.as_chunks_mut::<16>().0.iter_mut().enumerate() {
        let (seen, mut hidden) = ((seen >> (16 * first)) as u32, *part);
        for (lane, score) in hidden.iter_mut().enumerate() {
            *score = if seen >> lane & 1 == 1 { *score } else { f32::NEG_INFINITY };
        }
        *part = hidden;
    }
}

/// From scores and `dp` to weights and gradients of scores, in place; exactly 0 where a score is -inf, and for rows
/// whose `lse` is +inf.
#[inline(always)]
fn weigh<S: Simd>(simd: S, [scores, grads]: [&mut [f32]; 2], lanes: usize, [lse, delta]: [&[f32; LANES]; 2]) {
    let width = S::f32s::LEN;
    let (scores, grads) = (scores.as_chunks_mut::<LANES>().0, grads.as_chunks_mut::<LANES>().0);
    let [log2_e, zero, minus_inf, inf] =
        [LOG2_E, 0.0, f32::NEG_INFINITY, f32::INFINITY].map(|x| S::f32s::splat(simd, x));
    for lane in (0..lanes).step_by(width) {
        let column = |row: &[f32]| S::f32s::from_slice(simd, &row[lane..lane + width]);
        let (lse, delta) = (column(lse), column(delta));
        let dead = lse.simd_eq(inf);
        for (scores, grads) in scores.iter_mut().zip(&mut *grads) {
            let score = column(scores);
            let hidden = score.simd_eq(minus_inf).bitor(dead);
            let weight = exp2(simd, (score - lse) * log2_e);
            let grad = weight * (column(grads) - delta);
            hidden.select(zero, weight).store_slice(&mut scores[lane..lane + width]);
            hidden.select(zero, grad).store_slice(&mut grads[lane..lane + width]);
        }
    }
}
