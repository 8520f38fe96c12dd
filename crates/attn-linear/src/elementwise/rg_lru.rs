//! RG-LRU: the real-gated linear recurrent unit of Griffin.
//!
//! ```text
//! r_t = sigmoid(a_t)      i_t = sigmoid(b_t)      log d_t = -8 r_t softplus(Lambda)
//! h_t = d_t h_(t-1) + sqrt(1 - d_t^2) i_t x_t                  at the first token of all: h = i x
//! ```
//!
//! The pre-activations are block-diagonal maps of the input, `a = x W_r + b_r` and `b = x W_i + b_i`: a block is a head here. As
//! attention they are given instead: `a = k`, `b = q`, `x = v`, and `Lambda` is what Griffin starts training with, so that `d`
//! lies between 0.9 and 0.999 at `r = 1`; with `head_dim_v > head_dim` queries and keys start over from their first channel.
//!
//! Source: De et al. 2024 (Griffin: Mixing Gated Linear Recurrences with Local Attention), equations 1 to 4.

use super::front::{Channels, ElementCell, Front, panels, reborrow};
use crate::scan::cell::{Cell, PanelMut, Piece, PieceGrads};
use crate::scan::math::{loss, sigmoid, sigmoid64, softplus};
use crate::scan::{HeadInputs, ScanState, ScanVariant, Tokens, backward, forward, sequences_of};
use attn_core::simd::{Simd, SimdBase, SimdFloat};
use attn_core::tile::{Lhs, MAX_LANES, Rhs, Start, TileMut, product};
use attn_core::{AttnError, OutMut, Result, TensorView};

/// `c` of the paper.
const SHARPNESS: f32 = 8.0;

/// RG-LRU, see the [module](self).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct RgLru;

/// Token rows `(batch, heads, length, width)`, a head being a block of channels, and the weights of its gates.
#[derive(Debug, Clone, Copy)]
pub struct RgLruInputs<'a> {
    /// What is written.
    pub x: TensorView<'a>,
    /// `Lambda [heads, width]`.
    pub lambda: &'a [f32],
    /// `W_i [heads, width, width]`, from the input's channel to the gate's.
    pub input_weight: &'a [f32],
    /// `b_i [heads, width]`.
    pub input_bias: &'a [f32],
    /// `W_r [heads, width, width]`.
    pub recurrence_weight: &'a [f32],
    /// `b_r [heads, width]`.
    pub recurrence_bias: &'a [f32],
    /// Prefix sums of the lengths of sequences packed one behind the other, from 0 to all tokens: each is a run of its own, and has
    /// a batch entry of its own in states.
    pub cu_seqlens: Option<&'a [usize]>,
}

/// Gradients by [`RgLruInputs`], of their shapes, and by the initial state `[batch, heads, width]`.
#[derive(Debug, Clone, PartialEq)]
pub struct RgLruGrads {
    /// By `x`.
    pub x: Vec<f32>,
    /// By `lambda`.
    pub lambda: Vec<f32>,
    /// By `input_weight`.
    pub input_weight: Vec<f32>,
    /// By `input_bias`.
    pub input_bias: Vec<f32>,
    /// By `recurrence_weight`.
    pub recurrence_weight: Vec<f32>,
    /// By `recurrence_bias`.
    pub recurrence_bias: Vec<f32>,
    /// By the initial state.
    pub state: Vec<f32>,
}

impl<'a> RgLruInputs<'a> {
    fn cell(&self) -> Result<RgLruCell> {
        let [_, heads, _, width] = self.x.shape();
        let all = [
            ("lambda", self.lambda, 1),
            ("input_weight", self.input_weight, width),
            ("input_bias", self.input_bias, 1),
            ("recurrence_weight", self.recurrence_weight, width),
            ("recurrence_bias", self.recurrence_bias, 1),
        ];
        for (name, data, rows) in all {
            if data.len() != heads * width * rows {
                return Err(AttnError::shape(name, "elements", data.len(), heads * width * rows));
            }
        }
        let gate = |weight: &[f32], bias: &[f32]| Gate {
            weight: weight.to_vec(),
            transposed: crate::named::transpose(weight, width, width),
            bias: bias.to_vec(),
        };
        Ok(RgLruCell {
            inner: cell(width, false, heads, |h, c| self.lambda[h * width + c]),
            gates: [
                gate(self.input_weight, self.input_bias),
                gate(self.recurrence_weight, self.recurrence_bias),
            ],
        })
    }

    fn tokens(&self, cell: &RgLruCell) -> Result<Tokens<'a>> {
        Tokens::new(cell, &[("x", self.x)])?.packed(self.cu_seqlens)
    }
}

impl RgLru {
    /// The state before the first token: part 0 is `h [batch, heads, 1, width]`.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for weights of another length.
    pub fn state(inputs: &RgLruInputs<'_>) -> Result<ScanState> {
        let [batch, heads, ..] = inputs.x.shape();
        Ok(ScanState::new(&inputs.cell()?, sequences_of(inputs.cu_seqlens, batch), heads))
    }

    /// Writes all `h_t` to `out (batch, heads, length, width)`; `state` moves to the end.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward(inputs: &RgLruInputs<'_>, out: OutMut<'_>, state: Option<&mut ScanState>) -> Result<()> {
        let cell = inputs.cell()?;
        forward(&cell, &inputs.tokens(&cell)?, out, state)
    }

    /// Gradients, given those by the output; `state` is the one before the first token.
    ///
    /// # Errors
    /// As [`RgLru::forward`].
    pub fn backward(
        inputs: &RgLruInputs<'_>,
        state: Option<&ScanState>,
        grad_out: &TensorView<'_>,
    ) -> Result<RgLruGrads> {
        let cell = inputs.cell()?;
        let mut all = backward(&cell, &inputs.tokens(&cell)?, state, grad_out, None)?;
        let [_, heads, _, width] = inputs.x.shape();
        // [softplus(Lambda), W_i, b_i, W_r, b_r], summed over the batch.
        let sizes = [width, width * width, width, width * width, width];
        let mut sums = sizes.map(|size| vec![0.0; heads * size]);
        for (memory, params) in all.params.iter().enumerate() {
            let (lambda, gates) = params.split_at(cell.inner.params());
            let parts = std::iter::once(&lambda[..width]).chain([
                &gates[..sizes[1]],
                &gates[sizes[1]..][..width],
                &gates[sizes[1] + width..][..sizes[1]],
                &gates[2 * sizes[1] + width..],
            ]);
            for ((sum, part), size) in sums.iter_mut().zip(parts).zip(sizes) {
                let to = &mut sum[memory % heads * size..][..size];
                to.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
            }
        }
        let [mut lambda, input_weight, input_bias, recurrence_weight, recurrence_bias] = sums;
        // d softplus(x) = sigmoid(x) dx
        let slopes = inputs.lambda.iter().map(|x| sigmoid64(f64::from(*x)) as f32);
        lambda.iter_mut().zip(slopes).for_each(|(by, slope)| *by *= slope);
        Ok(RgLruGrads {
            x: all.inputs.pop().unwrap_or_default(),
            lambda,
            input_weight,
            input_bias,
            recurrence_weight,
            recurrence_bias,
            state: all.state.part(0),
        })
    }

    /// The definition of one token of one channel in f64, from pre-activations: moves `h`.
    pub fn naive_step(first: bool, [input, recurrence, x]: [f64; 3], lambda: f64, h: &mut f64) -> f64 {
        let log_decay = -f64::from(SHARPNESS) * sigmoid64(recurrence) * softplus(lambda);
        let multiplier = if first { 1.0 } else { (-(2.0 * log_decay).exp_m1()).sqrt() };
        *h = log_decay.exp() * *h + multiplier * sigmoid64(input) * x;
        *h
    }

    /// `Lambda` of channel `c` of `width` in the form on q, k and v: `e^(-8 softplus(Lambda))` runs from 0.9 to 0.999.
    fn start(c: usize, width: usize) -> f32 {
        let decay = 0.9 + 0.099 * c as f64 / (width.max(2) - 1) as f64;
        (decay.powf(-1.0 / f64::from(SHARPNESS)) - 1.0).ln() as f32
    }
}

/// The front: reads pre-activations `b, a` and `x`; the parameter is `softplus(Lambda)`.
#[derive(Debug, Clone, Copy)]
pub struct RealGates;

impl Front for RealGates {
    const INPUTS: usize = 3;

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        first: bool,
        param: S::f32s,
        [b, a, x]: Channels<S::f32s>,
    ) -> (S::f32s, S::f32s) {
        let log_decay = sigmoid(simd, a) * param * -SHARPNESS;
        let multiplier = if first { S::f32s::splat(simd, 1.0) } else { loss(simd, log_decay * 2.0).sqrt() };
        (loss(simd, log_decay), multiplier * sigmoid(simd, b) * x)
    }

    #[inline(always)]
    fn backward<S: Simd>(
        &self,
        simd: S,
        first: bool,
        param: S::f32s,
        [b, a, x]: Channels<S::f32s>,
        (dloss, dx): (S::f32s, S::f32s),
    ) -> (Channels<S::f32s>, S::f32s) {
        let one = S::f32s::splat(simd, 1.0);
        let (r, i) = (sigmoid(simd, a), sigmoid(simd, b));
        let log_decay = r * param * -SHARPNESS;
        let multiplier = if first { one } else { loss(simd, log_decay * 2.0).sqrt() };
        // d(1 - e^g) = -e^g dg, and d sqrt(1 - e^2g) = -e^2g / sqrt(1 - e^2g) dg
        let decay = one - loss(simd, log_decay);
        let by_multiplier = dx * i * x;
        let mut by_log = -dloss * decay;
        if !first {
            by_log -= by_multiplier * decay * decay / multiplier;
        }
        let by_r = by_log * param * -SHARPNESS;
        let by_i = dx * multiplier * x;
        ([by_i * i * (one - i), by_r * r * (one - r), dx * multiplier * i], by_log * r * -SHARPNESS)
    }
}

fn cell(
    width: usize,
    gated: bool,
    heads: usize,
    lambda: impl Fn(usize, usize) -> f32,
) -> ElementCell<RealGates> {
    let stride = width.next_multiple_of(MAX_LANES);
    let mut params = vec![0.0; heads * stride];
    for (h, row) in params.chunks_exact_mut(stride).enumerate() {
        let row = row[..width].iter_mut().enumerate();
        row.for_each(|(c, x)| *x = softplus(f64::from(lambda(h, c))) as f32);
    }
    ElementCell { front: RealGates, width, gated, params }
}

/// Weights of one gate of all heads.
#[derive(Debug, Clone)]
struct Gate {
    /// `[heads, width, width]`.
    weight: Vec<f32>,
    transposed: Vec<f32>,
    /// `[heads, width]`.
    bias: Vec<f32>,
}

/// Gates by block-diagonal maps of the input, then the recurrence. Parameters: `softplus(Lambda)` padded to whole vectors, then
/// `W_i, b_i, W_r, b_r`.
#[derive(Debug, Clone)]
struct RgLruCell {
    inner: ElementCell<RealGates>,
    gates: [Gate; 2],
}

impl RgLruCell {
    fn stride(&self) -> usize {
        self.inner.width.next_multiple_of(MAX_LANES)
    }

    /// Pre-activations of both gates.
    #[inline(always)]
    fn activate<S: Simd>(&self, simd: S, piece: Piece<'_>, outs: [&mut PanelMut<'_>; 2]) {
        let (width, x) = (self.inner.width, piece.inputs[0]);
        for (gate, out) in self.gates.iter().zip(outs) {
            let weight = &gate.weight[piece.head * width * width..][..width * width];
            let bias = &gate.bias[piece.head * width..][..width];
            (0..piece.len).for_each(|t| {
                out.row(t).fill(0.0);
                out.row(t)[..width].copy_from_slice(bias);
            });
            product(
                simd,
                [piece.len, width, width],
                Lhs { data: x.data, row_stride: x.stride, col_stride: 1 },
                Rhs { data: weight, stride: width },
                TileMut { data: &mut *out.data, stride: out.stride },
                Start::Keep,
            );
        }
    }
}

impl Cell for RgLruCell {
    fn inputs(&self) -> Vec<usize> {
        vec![self.inner.width]
    }

    fn out_width(&self) -> usize {
        self.inner.width
    }

    fn state(&self) -> Vec<[usize; 2]> {
        self.inner.state()
    }

    fn params(&self) -> usize {
        self.inner.params() + 2 * self.inner.width * (self.inner.width + 1)
    }

    fn scratch(&self, len: usize) -> usize {
        5 * len * self.stride() + self.inner.scratch(len)
    }

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        out: PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        let (scratch, rest) = scratch.split_at_mut(5 * piece.len * self.stride());
        let [mut b, mut a] = panels(scratch, piece.len, self.stride());
        self.activate(simd, piece, [&mut b, &mut a]);
        let inputs = [b.as_panel(), a.as_panel(), piece.inputs[0]];
        self.inner.forward(simd, Piece { inputs: &inputs, ..piece }, state, out, rest);
    }

    #[inline(always)]
    fn backward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &[&[f32]],
        grads: PieceGrads<'_, '_>,
        scratch: &mut [f32],
    ) {
        let (len, stride, width) = (piece.len, self.stride(), self.inner.width);
        let (scratch, rest) = scratch.split_at_mut(5 * len * stride);
        let [mut b, mut a, mut db, mut da, mut dx] = panels(scratch, len, stride);
        self.activate(simd, piece, [&mut b, &mut a]);
        let x = piece.inputs[0];
        let inputs = [b.as_panel(), a.as_panel(), x];
        let (lambda, weights) = grads.params.split_at_mut(self.inner.params());
        let mut inner = [reborrow(&mut db), reborrow(&mut da), reborrow(&mut dx)];
        let mut state_grad = [&mut *grads.state[0]];
        let by = PieceGrads { out: grads.out, state: &mut state_grad, inputs: &mut inner, params: lambda };
        self.inner.backward(simd, Piece { inputs: &inputs, ..piece }, state, by, rest);
        let out = &mut grads.inputs[0];
        out.data[..len * stride].copy_from_slice(&dx.data[..len * stride]);
        let per_gate = weights.chunks_exact_mut(width * (width + 1));
        for ((gate, by), weights) in self.gates.iter().zip([db.as_panel(), da.as_panel()]).zip(per_gate) {
            let (dw, dbias) = weights.split_at_mut(width * width);
            let (rows, rhs) = ([width, width, len], Rhs { data: by.data, stride });
            let lhs = Lhs { data: x.data, row_stride: 1, col_stride: stride };
            product(simd, rows, lhs, rhs, TileMut { data: dw, stride: width }, Start::Keep);
            (0..len).for_each(|t| dbias.iter_mut().zip(by.row(t)).for_each(|(sum, by)| *sum += by));
            product(
                simd,
                [len, width, width],
                Lhs { data: by.data, row_stride: stride, col_stride: 1 },
                Rhs { data: &gate.transposed[piece.head * width * width..], stride: width },
                TileMut { data: &mut *out.data, stride },
                Start::Keep,
            );
        }
    }
}

impl ScanVariant for RgLru {
    const NAME: &'static str = "rglru";
    type Cell = ElementCell<RealGates>;

    fn cell(&self, n_heads_q: usize, _: usize, head_dim_v: usize) -> Result<Self::Cell> {
        Ok(cell(head_dim_v, false, n_heads_q, |_, c| Self::start(c, head_dim_v)))
    }

    fn define(&self, head: HeadInputs<'_>) -> Vec<f64> {
        let mut h = vec![0.0; head.head_dim_v];
        let mut out = Vec::with_capacity(head.v.len());
        for t in 0..head.len() {
            for (c, h) in h.iter_mut().enumerate() {
                let [q, k, v] = head.channel(t, c);
                let lambda = f64::from(Self::start(c, head.head_dim_v));
                out.push(Self::naive_step(t == 0, [q, k, v], lambda, h));
            }
        }
        out
    }

    fn flops(&self, _: usize, head_dim_v: usize) -> usize {
        12 * head_dim_v
    }
}
