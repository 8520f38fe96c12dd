//! The passes over one head: means of the values and, backwards, gradients by keys, values and biases.
//!
//! With `L_ic = ln sum_j e^(w_ij + k_jc)`, `p_ijc = e^(w_ij + k_jc - L_ic)`, the mean `o_ic = sum_j p_ijc v_jc`, and its gradient
//! `g`:
//!
//! ```text
//! dv_jc = sum_i p_ijc g_ic      dk_jc = sum_i p_ijc g_ic (v_jc - o_ic)      dw_ij = sum_c p_ijc g_ic (v_jc - o_ic)
//! ```
//!
//! Pairs outside the window have `w = 0`: for a block of rows they are whole blocks of the other side, whose sums are formed
//! once ([`Far`]); backwards those of `e^(-L_i) g_i` and `e^(-L_i) g_i o_i`.

use super::Bias;
use super::sums::{Far, Sources, Sums, load, weight};
use crate::scan::cell::{Panel, PanelMut};
use attn_core::parallel::for_each_task;
use attn_core::simd::{Isa, Simd, SimdBase, SimdFloat, SimdOp};
use std::ops::Range;

/// Rows done together.
const BLOCK: usize = 32;

/// Rows of the other side that are read together.
const TILE: usize = 64;

/// Padded rows.
#[derive(Debug, Clone, Default)]
pub(super) struct Rows {
    pub(super) data: Vec<f32>,
    pub(super) stride: usize,
}

impl Rows {
    pub(super) fn new(len: usize, stride: usize) -> Self {
        Self { data: vec![0.0; len * stride], stride }
    }

    pub(super) fn panel(&self) -> Panel<'_> {
        Panel { data: &self.data, stride: self.stride }
    }

    fn blocks(&mut self) -> impl Iterator<Item = PanelMut<'_>> {
        let stride = self.stride;
        self.data.chunks_mut((BLOCK * stride).max(1)).map(move |data| PanelMut { data, stride })
    }
}

/// Which pairs see each other and with which bias.
#[derive(Clone, Copy)]
pub(super) struct Pairs<'a> {
    pub(super) n_q: usize,
    pub(super) n_kv: usize,
    pub(super) causal: bool,
    /// Pairs less than this far apart have a bias.
    pub(super) window: Option<usize>,
    pub(super) bias: Bias<'a>,
    /// Of the output.
    pub(super) head: usize,
}

impl Pairs<'_> {
    #[inline(always)]
    fn bias(&self, i: usize, j: usize) -> f32 {
        let apart = i.abs_diff(j);
        if self.causal && j > i {
            f32::NEG_INFINITY
        } else if self.window.is_some_and(|window| apart >= window) {
            0.0
        } else {
            self.bias.at(self.head, i, j)
        }
    }

    /// The rows among `len` of the other side that a block has to be paired with one by one, from and to a multiple of
    /// [`BLOCK`] unless it is the end.
    fn near(&self, rows: &Range<usize>, len: usize) -> Range<usize> {
        let Some(window) = self.window else { return 0..len };
        let start = (rows.start + 1).saturating_sub(window).min(len) / BLOCK * BLOCK;
        let end = (rows.end.saturating_add(window).saturating_add(BLOCK - 1) / BLOCK * BLOCK).min(len);
        start..end.max(start)
    }
}

/// A mean for every query, and the log-sum-exp of its weights.
pub(super) struct Means {
    pub(super) mean: Rows,
    pub(super) lse: Rows,
}

/// One head forwards.
pub(super) fn means(isa: Isa, pairs: Pairs<'_>, k: &Rows, v: &Rows, with_lse: bool) -> Means {
    let stride = k.stride;
    let mut mean = Rows::new(pairs.n_q, stride);
    let mut lse = Rows::new(if with_lse { pairs.n_q } else { 0 }, stride);
    let from = Sources { x: k.panel(), y: v.panel(), z: None };
    let far = pairs.window.map(|_| isa.run(AllFar { len: pairs.n_kv, stride, from }));
    {
        let lses = lse.blocks().map(Some).chain(std::iter::repeat_with(|| None));
        let tasks = mean.blocks().zip(lses).enumerate();
        let tasks: Vec<_> = tasks.map(|(at, out)| (at * BLOCK, out)).collect();
        let start = || (Sums::new(BLOCK, stride), Vec::new());
        for_each_task(tasks.into_iter(), start, |(sums, bias), (first, (mean, lse))| {
            isa.run(Forward { pairs, from, far: far.as_ref(), first, sums, bias, mean, lse });
        });
    }
    Means { mean, lse }
}

struct AllFar<'a> {
    len: usize,
    stride: usize,
    from: Sources<'a>,
}

impl SimdOp for AllFar<'_> {
    type Output = Far;

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) -> Far {
        Far::new(simd, self.len, BLOCK, self.stride, self.from)
    }
}

/// A block of queries.
struct Forward<'a, 's> {
    pairs: Pairs<'a>,
    from: Sources<'a>,
    far: Option<&'a Far>,
    first: usize,
    sums: &'s mut Sums,
    bias: &'s mut Vec<f32>,
    mean: PanelMut<'s>,
    lse: Option<PanelMut<'s>>,
}

impl SimdOp for Forward<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { pairs, from, far, first, sums, bias, mean, lse } = self;
        let rows = first..pairs.n_q.min(first + BLOCK);
        let near = pairs.near(&rows, pairs.n_kv);
        let nothing = Sums::new(1, sums.stride);
        for row in 0..rows.len() {
            match far {
                Some(far) => sums.copy_row(row, &far.before, near.start / BLOCK),
                None => sums.copy_row(row, &nothing, 0),
            }
        }
        let end = if pairs.causal { near.end.min(rows.end) } else { near.end };
        for tile in tiles(&(near.start..end)) {
            for (row, i) in rows.clone().enumerate() {
                let seen = if pairs.causal { tile.end.min(i + 1) } else { tile.end };
                bias.clear();
                bias.extend((tile.start..seen).map(|j| pairs.bias(i, j)));
                sums.absorb(simd, row, from, tile.start, bias);
            }
        }
        for row in 0..rows.len() {
            if let Some(far) = far.filter(|_| !pairs.causal) {
                sums.merge(simd, row, &far.after, near.end.div_ceil(BLOCK));
            }
            sums.mean_into(row, PanelMut { data: &mut *mean.data, stride: mean.stride }, row);
        }
        if let Some(lse) = lse {
            let all = lse.data.iter_mut().zip(sums.max.iter().zip(&sums.den));
            all.for_each(|(lse, (max, den))| *lse = max + den.ln());
        }
    }
}

fn tiles(range: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let Range { start, end } = *range;
    (start..end).step_by(TILE).map(move |at| at..end.min(at + TILE))
}

/// What the backward pass of one head reads.
pub(super) struct Back<'a> {
    pub(super) pairs: Pairs<'a>,
    pub(super) k: &'a Rows,
    pub(super) v: &'a Rows,
    pub(super) means: &'a Means,
    /// By the means.
    pub(super) grad: &'a Rows,
}

/// Gradients of one head.
pub(super) struct HeadGrads {
    pub(super) k: Rows,
    pub(super) v: Rows,
}

/// One head backwards; adds to `by_bias [n_q, columns]` if there is one.
pub(super) fn gradients(isa: Isa, x: &Back<'_>, by_bias: Option<(&mut [f32], usize)>) -> HeadGrads {
    let (pairs, stride) = (x.pairs, x.k.stride);
    let (mut dk, mut dv) = (Rows::new(pairs.n_kv, stride), Rows::new(pairs.n_kv, stride));
    // e^(-L), e^(-L) g, e^(-L) g o of the queries outside the window.
    let far = pairs.window.map(|_| {
        let minus = Rows { data: x.means.lse.data.iter().map(|l| -l).collect(), stride };
        let product = x.grad.data.iter().zip(&x.means.mean.data).map(|(g, o)| g * o).collect();
        let product = Rows { data: product, stride };
        let from = Sources { x: minus.panel(), y: x.grad.panel(), z: Some(product.panel()) };
        isa.run(AllFar { len: pairs.n_q, stride, from })
    });
    let wants_bias = by_bias.is_some();
    let blocks = pairs.n_kv.div_ceil(BLOCK);
    // By the biases of a block of keys, `[queries near it, BLOCK]`.
    let mut biases = vec![Vec::new(); blocks];
    {
        let tasks = dk.blocks().zip(dv.blocks()).zip(&mut biases).enumerate();
        let tasks: Vec<_> = tasks.collect();
        for_each_task(
            tasks.into_iter(),
            || (),
            |(), (at, ((dk, dv), by_bias))| {
                let by_bias = wants_bias.then_some(by_bias);
                isa.run(Backward { x, far: far.as_ref(), first: at * BLOCK, dk, dv, by_bias });
            },
        );
    }
    if let Some((all, columns)) = by_bias {
        for (at, own) in biases.iter().enumerate() {
            let keys = at * BLOCK..pairs.n_kv.min((at + 1) * BLOCK);
            let near = pairs.near(&keys, pairs.n_q);
            for (i, row) in near.zip(own.chunks_exact(BLOCK)) {
                let to = &mut all[i * columns + keys.start..][..keys.len()];
                to.iter_mut().zip(row).for_each(|(to, x)| *to += x);
            }
        }
    }
    HeadGrads { k: dk, v: dv }
}

/// A block of keys.
struct Backward<'a, 's> {
    x: &'a Back<'a>,
    far: Option<&'a Far>,
    first: usize,
    dk: PanelMut<'s>,
    dv: PanelMut<'s>,
    by_bias: Option<&'s mut Vec<f32>>,
}

impl SimdOp for Backward<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { x, far, first, mut dk, mut dv, mut by_bias } = self;
        let (pairs, stride) = (x.pairs, x.k.stride);
        let keys = first..pairs.n_kv.min(first + BLOCK);
        let near = pairs.near(&keys, pairs.n_q);
        if let Some(by_bias) = &mut by_bias {
            by_bias.resize(near.len() * BLOCK, 0.0);
        }
        let (k, v) = (x.k.panel(), x.v.panel());
        let (mean, lse, grad) = (x.means.mean.panel(), x.means.lse.panel(), x.grad.panel());
        let start = if pairs.causal { near.start.max(keys.start) } else { near.start };
        for tile in tiles(&(start..near.end)) {
            for (row, j) in keys.clone().enumerate() {
                let seeing = if pairs.causal { tile.start.max(j)..tile.end } else { tile.clone() };
                for i in seeing {
                    let w = pairs.bias(i, j);
                    if w == f32::NEG_INFINITY {
                        continue;
                    }
                    let mut along = S::f32s::splat(simd, 0.0);
                    for c in (0..stride).step_by(S::f32s::LEN) {
                        let exponent = load(simd, k.row(j), c) + w - load(simd, lse.row(i), c);
                        let by = weight(simd, exponent) * load(simd, grad.row(i), c);
                        let by_key = by * (load(simd, v.row(j), c) - load(simd, mean.row(i), c));
                        along += by_key;
                        let (dk, dv) = (&mut dk.row(row)[c..], &mut dv.row(row)[c..]);
                        (load(simd, dk, 0) + by_key).store_slice(&mut dk[..S::f32s::LEN]);
                        (load(simd, dv, 0) + by).store_slice(&mut dv[..S::f32s::LEN]);
                    }
                    let windowed = pairs.window.is_some_and(|window| i.abs_diff(j) >= window);
                    if let Some(by_bias) = by_bias.as_mut().filter(|_| !windowed) {
                        by_bias[(i - near.start) * BLOCK + row] += sum(along);
                    }
                }
            }
        }
        let Some(far) = far else { return };
        for (row, j) in keys.enumerate() {
            let sides = [
                (&far.before, near.start / BLOCK, !pairs.causal),
                (&far.after, near.end.div_ceil(BLOCK), true),
            ];
            for (sums, at, _) in sides.into_iter().filter(|side| side.2) {
                for c in (0..stride).step_by(S::f32s::LEN) {
                    let [a, b, m] =
                        [&sums.num, &sums.den, &sums.max].map(|row| load(simd, row, at * stride + c));
                    let e = weight(simd, load(simd, k.row(j), c) + m);
                    let by_key = a.mul_add(load(simd, v.row(j), c), -b) * e;
                    let (dk, dv) = (&mut dk.row(row)[c..], &mut dv.row(row)[c..]);
                    (load(simd, dk, 0) + by_key).store_slice(&mut dk[..S::f32s::LEN]);
                    (load(simd, dv, 0) + a * e).store_slice(&mut dv[..S::f32s::LEN]);
                }
            }
        }
    }
}

/// The lanes of a vector together.
#[inline(always)]
fn sum<S: Simd, V: SimdFloat<S, Element = f32>>(x: V) -> f32 {
    let mut lanes = [0.0; 16];
    x.store_slice(&mut lanes[..V::LEN]);
    lanes.iter().sum()
}
