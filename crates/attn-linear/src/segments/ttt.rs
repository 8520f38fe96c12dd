//! TTT-linear: the state is a linear model, trained on every mini-batch of tokens by one step of gradient descent.
//!
//! With the model `y = k W + c` at the start of a mini-batch, the normalisation `LN(x) = a n(x) + b`,
//! `n(x) = (x - mean x) / s`, `s^2 = var x + eps`, and `G_j` the gradient of `|LN(y_j) - (v_j - k_j)|^2 / 2` by `y_j`:
//!
//! ```text
//! e_j = a o (LN(y_j) - v_j + k_j)      G_j = (e_j - mean e_j - n(y_j) mean(e_j o n(y_j))) / s_j
//! r_i = q_i W + c - eta_i sum_(j <= i) (q_i . k_j + 1) G_j          over the mini-batch;  o_i = r_i + LN(r_i)
//! W <- W - eta sum_j k_j^T G_j      c <- c - eta sum_j G_j          at its end, eta that of its last token
//! ```
//!
//! Queries are scaled first. As attention `a = 1`, `b = 0`, `eta = 1 / (mini_batch head_dim_v)`; with other widths than
//! `head_dim_v` queries and keys start over from their first channel, or are cut.
//!
//! Source: Sun et al. 2024 (Learning to (Learn at Test Time)), sections 2.4 and 2.5.

use crate::elementwise::front_panels as panels;
use crate::scan::cell::{Cell, PanelMut, Piece, PieceGrads};
use crate::scan::gemm::{outer, pad, rows, turned};
use crate::scan::{HeadInputs, ScanState, ScanVariant, Tokens, backward, forward, sequences_of};
use attn_core::simd::Simd;
use attn_core::tile::Start;
use attn_core::{AttnError, OutMut, Result, TensorView};

/// TTT-linear, see the [module](self).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TttLinear {
    /// Tokens of a mini-batch.
    pub mini_batch: usize,
    /// Multiplies queries; `None` is `1/sqrt(head_dim_v)`.
    pub scale: Option<f32>,
    /// Added to variances.
    pub eps: f32,
}

impl Default for TttLinear {
    fn default() -> Self {
        Self { mini_batch: 16, scale: None, eps: 1e-6 }
    }
}

/// Token rows `(batch, heads, length, width)` and what the normalisation learned.
#[derive(Debug, Clone, Copy)]
pub struct TttInputs<'a> {
    /// Queries.
    pub q: TensorView<'a>,
    /// Keys.
    pub k: TensorView<'a>,
    /// Values.
    pub v: TensorView<'a>,
    /// Step sizes, `(batch, heads, length, 1)`.
    pub eta: TensorView<'a>,
    /// `a [heads, width]`.
    pub norm_weight: &'a [f32],
    /// `b [heads, width]`.
    pub norm_bias: &'a [f32],
    /// Prefix sums of the lengths of sequences packed one behind the other, from 0 to all tokens: each is a run of its own, and has
    /// a batch entry of its own in states.
    pub cu_seqlens: Option<&'a [usize]>,
}

/// Gradients by [`TttInputs`], of their shapes, and by the initial state.
#[derive(Debug, Clone, PartialEq)]
pub struct TttGrads {
    /// By `q`.
    pub q: Vec<f32>,
    /// By `k`.
    pub k: Vec<f32>,
    /// By `v`.
    pub v: Vec<f32>,
    /// By `eta`.
    pub eta: Vec<f32>,
    /// By `norm_weight`.
    pub norm_weight: Vec<f32>,
    /// By `norm_bias`.
    pub norm_bias: Vec<f32>,
    /// Parts 0 and 1 are those by `W` and `c`.
    pub state: ScanState,
}

impl TttLinear {
    fn cell_of(&self, inputs: &TttInputs<'_>) -> Result<TttCell> {
        let [_, heads, _, width] = inputs.v.shape();
        for (name, data) in [("norm_weight", inputs.norm_weight), ("norm_bias", inputs.norm_bias)] {
            if data.len() != heads * width {
                return Err(AttnError::shape(name, "elements", data.len(), heads * width));
            }
        }
        let norm = (inputs.norm_weight.to_vec(), inputs.norm_bias.to_vec());
        Ok(TttCell { options: *self, scale: self.check(width)?, width, eta: None, norm })
    }

    fn check(&self, width: usize) -> Result<f32> {
        if self.mini_batch == 0 {
            return Err(AttnError::value("mini_batch", 0, "at least 1"));
        }
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return Err(AttnError::value("eps", self.eps, "a finite number above 0"));
        }
        attn_core::softmax_scale_or_default(self.scale, width)
    }

    /// The state before the first token: parts `W [batch, heads, width, width]`, `c [batch, heads, 1, width]`, and the sums of the
    /// present mini-batch that will change them.
    ///
    /// # Errors
    /// [`AttnError`] naming the option or parameter that does not fit.
    pub fn state(&self, inputs: &TttInputs<'_>) -> Result<ScanState> {
        let [batch, heads, ..] = inputs.v.shape();
        Ok(ScanState::new(&self.cell_of(inputs)?, sequences_of(inputs.cu_seqlens, batch), heads))
    }

    /// Writes `out (batch, heads, length, width)`; `state` moves to the end.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    pub fn forward(
        &self,
        inputs: &TttInputs<'_>,
        out: OutMut<'_>,
        state: Option<&mut ScanState>,
    ) -> Result<()> {
        let cell = self.cell_of(inputs)?;
        forward(&cell, &inputs.tokens(&cell)?, out, state)
    }

    /// Gradients, given those by the output; `state` is the one before the first token.
    ///
    /// # Errors
    /// As [`TttLinear::forward`].
    pub fn backward(
        &self,
        inputs: &TttInputs<'_>,
        state: Option<&ScanState>,
        grad_out: &TensorView<'_>,
    ) -> Result<TttGrads> {
        let cell = self.cell_of(inputs)?;
        let all = backward(&cell, &inputs.tokens(&cell)?, state, grad_out, None)?;
        let [_, heads, _, width] = inputs.v.shape();
        let (mut norm_weight, mut norm_bias) = (vec![0.0; heads * width], vec![0.0; heads * width]);
        for (memory, params) in all.params.iter().enumerate() {
            let at = memory % heads * width;
            let (weight, bias) = params.split_at(width);
            norm_weight[at..at + width].iter_mut().zip(weight).for_each(|(sum, x)| *sum += x);
            norm_bias[at..at + width].iter_mut().zip(bias).for_each(|(sum, x)| *sum += x);
        }
        let mut by = all.inputs.into_iter();
        let mut next = || by.next().unwrap_or_default();
        let (q, k, v, eta) = (next(), next(), next(), next());
        Ok(TttGrads { q, k, v, eta, norm_weight, norm_bias, state: all.state })
    }
}

impl<'a> TttInputs<'a> {
    fn tokens(&self, cell: &TttCell) -> Result<Tokens<'a>> {
        Tokens::new(cell, &[("q", self.q), ("k", self.k), ("v", self.v), ("eta", self.eta)])?
            .packed(self.cu_seqlens)
    }
}

/// Reads `q, k, v` and step sizes unless they are constant.
#[derive(Debug, Clone)]
pub struct TttCell {
    options: TttLinear,
    scale: f32,
    width: usize,
    eta: Option<f32>,
    /// `a`, `b`, `[heads, width]`.
    norm: (Vec<f32>, Vec<f32>),
}

/// `n(x)` into `out`; one over `s`.
#[inline(always)]
fn normalise(x: &[f32], eps: f32, out: &mut [f32]) -> f32 {
    let n = x.len() as f32;
    let mean = x.iter().sum::<f32>() / n;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f32>() / n;
    let inverse = 1.0 / (variance + eps).sqrt();
    out.iter_mut().zip(x).for_each(|(o, x)| *o = (x - mean) * inverse);
    inverse
}

/// `(e - mean e - n mean(e o n)) / s` in place: the gradient of `n(x)` by `x`.
#[inline(always)]
fn normalise_back(e: &mut [f32], normal: &[f32], inverse: f32) {
    let n = e.len() as f32;
    let mean = e.iter().sum::<f32>() / n;
    let along = e.iter().zip(normal).map(|(e, n)| e * n).sum::<f32>() / n;
    e.iter_mut().zip(normal).for_each(|(e, n)| *e = (*e - mean - n * along) * inverse);
}

impl TttCell {
    fn eta(&self, piece: Piece<'_>, t: usize) -> f32 {
        self.eta.unwrap_or_else(|| piece.inputs[3].row(t)[0])
    }

    fn norm_of(&self, head: usize) -> (&[f32], &[f32]) {
        let range = head * self.width..(head + 1) * self.width;
        (&self.norm.0[range.clone()], &self.norm.1[range])
    }

    fn ends(&self, piece: Piece<'_>) -> bool {
        (piece.first + piece.len).is_multiple_of(self.options.mini_batch)
    }

    /// `scale q`, `G`, `sum (q . k + 1) G` (earlier sums included), `r`, and `q . k + 1` below the diagonal.
    #[inline(always)]
    fn learn<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: [&[f32]; 4],
        to: Learned<'_>,
        turn: &mut [f32],
    ) {
        let Learned { q, g, sums, r, weights } = to;
        let (len, d, k) = (piece.len, self.width, piece.inputs[1]);
        let (a, b) = self.norm_of(piece.head);
        let [model, bias, pending, pending_bias] = state;
        for t in 0..len {
            q.row(t).iter_mut().zip(piece.inputs[0].row(t)).for_each(|(q, x)| *q = self.scale * x);
            r.row(t)[..d].copy_from_slice(&bias[..d]);
            g.row(t)[..d].copy_from_slice(&bias[..d]);
            sums.row(t)[..d].copy_from_slice(&pending_bias[..d]);
        }
        rows(simd, [len, d, d], k, model, g, Start::Keep);
        let normal = &mut turn[..d];
        for t in 0..len {
            let g = &mut g.row(t)[..d];
            let inverse = normalise(g, self.options.eps, normal);
            let (k, v) = (piece.inputs[1].row(t), piece.inputs[2].row(t));
            for c in 0..d {
                g[c] = a[c] * (a[c] * normal[c] + b[c] - v[c] + k[c]);
            }
            normalise_back(g, normal, inverse);
        }
        let keys = turned(simd, (k.data, len, d), turn);
        rows(simd, [len, len, d], q.as_panel(), keys, weights, Start::Zero);
        for t in 0..len {
            let row = weights.row(t);
            row[..=t].iter_mut().for_each(|x| *x += 1.0);
            row[t + 1..].fill(0.0);
        }
        rows(simd, [len, d, d], q.as_panel(), pending, sums, Start::Keep);
        rows(simd, [len, d, len], weights.as_panel(), g.data, sums, Start::Keep);
        rows(simd, [len, d, d], q.as_panel(), model, r, Start::Keep);
        for t in 0..len {
            let eta = self.eta(piece, t);
            r.row(t)[..d].iter_mut().zip(sums.row(t)).for_each(|(r, s)| *r -= eta * *s);
        }
    }
}

/// Where [`TttCell::learn`] writes.
struct Learned<'a> {
    q: &'a mut PanelMut<'a>,
    g: &'a mut PanelMut<'a>,
    sums: &'a mut PanelMut<'a>,
    r: &'a mut PanelMut<'a>,
    weights: &'a mut PanelMut<'a>,
}

impl Cell for TttCell {
    fn inputs(&self) -> Vec<usize> {
        let mut widths = vec![self.width; 3];
        widths.extend(self.eta.is_none().then_some(1));
        widths
    }

    fn out_width(&self) -> usize {
        self.width
    }

    /// `W`, `c`, and the sums of `k^T G` and `G` of the present mini-batch.
    fn state(&self) -> Vec<[usize; 2]> {
        vec![[self.width, self.width], [1, self.width], [self.width, self.width], [1, self.width]]
    }

    /// By `a`, then by `b`.
    fn params(&self) -> usize {
        2 * self.width
    }

    fn piece_len(&self) -> usize {
        self.options.mini_batch
    }

    fn scratch(&self, len: usize) -> usize {
        let d = pad(self.width);
        len * (7 * d + 2 * pad(len)) + self.width * d.max(pad(len)) + 3 * d
    }

    #[inline(always)]
    fn forward<S: Simd>(
        &self,
        simd: S,
        piece: Piece<'_>,
        state: &mut [&mut [f32]],
        mut out: PanelMut<'_>,
        scratch: &mut [f32],
    ) {
        let (len, d) = (piece.len, self.width);
        let (sums, scratch) = scratch.split_at_mut(4 * len * pad(d));
        let (weights, turn) = scratch.split_at_mut(len * pad(len));
        let [q, mut g, h, mut r] = panels(sums, len, pad(d));
        let [weights] = panels(weights, len, pad(len));
        let [model, bias, pending, pending_bias] = state else { return };
        {
            let to = Learned {
                q: &mut PanelMut { data: &mut *q.data, stride: q.stride },
                g: &mut PanelMut { data: &mut *g.data, stride: g.stride },
                sums: &mut PanelMut { data: &mut *h.data, stride: h.stride },
                r: &mut PanelMut { data: &mut *r.data, stride: r.stride },
                weights: &mut PanelMut { data: &mut *weights.data, stride: weights.stride },
            };
            self.learn(simd, piece, [&**model, &**bias, &**pending, &**pending_bias], to, turn);
        }
        let (a, b) = self.norm_of(piece.head);
        for t in 0..len {
            let (r, out) = (&r.row(t)[..d], &mut out.row(t)[..d]);
            normalise(r, self.options.eps, out);
            for c in 0..d {
                out[c] = r[c] + a[c] * out[c] + b[c];
            }
        }
        outer(simd, [d, d, len], (piece.inputs[1], g.as_panel()), (&mut **pending, pad(d)), Start::Keep);
        (0..len).for_each(|t| pending_bias.iter_mut().zip(&*g.row(t)).take(d).for_each(|(s, g)| *s += g));
        if self.ends(piece) {
            let eta = self.eta(piece, len - 1);
            for (to, sums) in [(model, pending), (bias, pending_bias)] {
                to.iter_mut().zip(&**sums).for_each(|(w, s)| *w -= eta * s);
                sums.fill(0.0);
            }
        }
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
        let (len, d, eps) = (piece.len, self.width, self.options.eps);
        let (sums, scratch) = scratch.split_at_mut(7 * len * pad(d));
        let (weights, scratch) = scratch.split_at_mut(2 * len * pad(len));
        let (lines, turn) = scratch.split_at_mut(3 * pad(d));
        let [q, mut g, mut h, mut r, mut dr, mut dg, mut dy] = panels(sums, len, pad(d));
        let [weights, mut dweights] = panels(weights, len, pad(len));
        {
            let to = Learned {
                q: &mut PanelMut { data: &mut *q.data, stride: q.stride },
                g: &mut PanelMut { data: &mut *g.data, stride: g.stride },
                sums: &mut PanelMut { data: &mut *h.data, stride: h.stride },
                r: &mut PanelMut { data: &mut *r.data, stride: r.stride },
                weights: &mut PanelMut { data: &mut *weights.data, stride: weights.stride },
            };
            self.learn(simd, piece, [state[0], state[1], state[2], state[3]], to, turn);
        }
        let (a, b) = self.norm_of(piece.head);
        let (k, v) = (piece.inputs[1], piece.inputs[2]);
        let PieceGrads { out, state: by_state, inputs, params } = grads;
        let ([by_model, by_bias, by_pending, by_pending_bias], [dq, dk, dv, deta @ ..]) = (by_state, inputs)
        else {
            return;
        };
        let (da, db) = params.split_at_mut(d);
        let (normal, line) = lines.split_at_mut(pad(d));
        (0..len).for_each(|t| deta.iter_mut().for_each(|deta| deta.row(t).fill(0.0)));

        // o = r + LN(r), then r = q W + c - eta sums.
        for t in 0..len {
            let (by, r, dr) = (&out.row(t)[..d], &r.row(t)[..d], &mut dr.row(t)[..d]);
            let normal = &mut normal[..d];
            let inverse = normalise(r, eps, normal);
            for c in 0..d {
                da[c] += by[c] * normal[c];
                db[c] += by[c];
                dr[c] = by[c] * a[c];
            }
            normalise_back(dr, normal, inverse);
            dr.iter_mut().zip(by).for_each(|(dr, by)| *dr += by);
            let eta = self.eta(piece, t);
            if let [deta] = &mut *deta {
                deta.row(t)[0] -= dr.iter().zip(&*h.row(t)).map(|(dr, h)| dr * h).sum::<f32>();
            }
            // What `sums` gets, in the place of `sums`.
            h.row(t)[..d].iter_mut().zip(&*dr).for_each(|(h, dr)| *h = -eta * dr);
        }
        // The end of the mini-batch: W - eta (pending + k^T G).
        if self.ends(piece) {
            let eta = self.eta(piece, len - 1);
            let mut by_eta = 0.0;
            let full = &mut turn[..d * pad(d)];
            full.copy_from_slice(&state[2][..d * pad(d)]);
            outer(simd, [d, d, len], (k, g.as_panel()), (&mut *full, pad(d)), Start::Keep);
            for (full, by) in full.chunks_exact(pad(d)).zip(by_model.chunks_exact(pad(d))) {
                by_eta -= full[..d].iter().zip(by).map(|(p, by)| p * by).sum::<f32>();
            }
            for c in 0..d {
                let sum: f32 = (0..len).map(|t| g.row(t)[c]).sum();
                by_eta -= (state[3][c] + sum) * by_bias[c];
            }
            if let [deta] = &mut *deta {
                deta.row(len - 1)[0] += by_eta;
            }
            by_pending.iter_mut().zip(&**by_model).for_each(|(p, w)| *p = -eta * w);
            by_pending_bias.iter_mut().zip(&**by_bias).for_each(|(p, c)| *p = -eta * c);
        }
        // By G: from the sums of later tokens, and from the state.
        outer(simd, [len, d, len], (weights.as_panel(), h.as_panel()), (&mut *dg.data, pad(d)), Start::Zero);
        for t in 0..len {
            dg.row(t)[..d].iter_mut().zip(&**by_pending_bias).for_each(|(g, by)| *g += by);
        }
        rows(simd, [len, d, d], k, by_pending, &mut dg, Start::Keep);
        // dk from k^T G, dq and dk from q . k.
        let by = turned(simd, (by_pending, d, d), turn);
        rows(simd, [len, d, d], g.as_panel(), by, dk, Start::Zero);
        let by = turned(simd, (g.data, len, d), turn);
        rows(simd, [len, len, d], h.as_panel(), by, &mut dweights, Start::Zero);
        (0..len).for_each(|t| dweights.row(t)[t + 1..].fill(0.0));
        rows(simd, [len, d, len], dweights.as_panel(), k.data, dq, Start::Zero);
        outer(simd, [len, d, len], (dweights.as_panel(), q.as_panel()), (&mut *dk.data, pad(d)), Start::Keep);
        // q W and q pending.
        let by = turned(simd, (state[0], d, d), turn);
        rows(simd, [len, d, d], dr.as_panel(), by, dq, Start::Keep);
        let by = turned(simd, (state[2], d, d), turn);
        rows(simd, [len, d, d], h.as_panel(), by, dq, Start::Keep);
        outer(simd, [d, d, len], (q.as_panel(), dr.as_panel()), (&mut **by_model, pad(d)), Start::Keep);
        outer(simd, [d, d, len], (q.as_panel(), h.as_panel()), (&mut **by_pending, pad(d)), Start::Keep);
        for t in 0..len {
            by_bias.iter_mut().zip(&*dr.row(t)).take(d).for_each(|(s, x)| *s += x);
            by_pending_bias.iter_mut().zip(&*h.row(t)).take(d).for_each(|(s, x)| *s += x);
            dq.row(t)[..d].iter_mut().for_each(|x| *x *= self.scale);
        }
        // Through G to y = k W + c, and to what it is compared with.
        (0..len).for_each(|t| dy.row(t)[..d].copy_from_slice(&state[1][..d]));
        rows(simd, [len, d, d], k, state[0], &mut dy, Start::Keep);
        for t in 0..len {
            let (dy, dg, g) = (&mut dy.row(t)[..d], &dg.row(t)[..d], &g.row(t)[..d]);
            let (normal, line) = (&mut normal[..d], &mut line[..d]);
            let inverse = normalise(dy, eps, normal);
            let (k, v, dk, dv) = (k.row(t), v.row(t), dk.row(t), dv.row(t));
            let n = d as f32;
            // u = s G; by s: -(dG . G) / s.
            let by_s = -dg.iter().zip(g).map(|(d, g)| d * g).sum::<f32>() * inverse;
            let error = |c: usize, normal: &[f32]| a[c] * normal[c] + b[c] - v[c] + k[c];
            let m = (0..d).map(|c| a[c] * error(c, normal) * normal[c]).sum::<f32>() / n;
            let along = dg.iter().zip(&*normal).map(|(d, n)| d * n).sum::<f32>() * inverse / n;
            line.copy_from_slice(dg);
            normalise_back(line, normal, inverse);
            // `line` is by e; by n: -dG m / s - e mean(dG o n) / s + a^2 de.
            for c in 0..d {
                let e = a[c] * error(c, normal);
                dy[c] = -dg[c] * inverse * m - e * along + a[c] * a[c] * line[c];
                da[c] += line[c] * (error(c, normal) + a[c] * normal[c]);
                db[c] += line[c] * a[c];
                dv[c] = -a[c] * line[c];
                dk[c] += a[c] * line[c];
            }
            normalise_back(dy, normal, inverse);
            dy.iter_mut().zip(&*normal).for_each(|(dy, x)| *dy += by_s * x / n);
            by_bias.iter_mut().zip(&*dy).for_each(|(sum, x)| *sum += x);
        }
        let by = turned(simd, (state[0], d, d), turn);
        rows(simd, [len, d, d], dy.as_panel(), by, dk, Start::Keep);
        outer(simd, [d, d, len], (k, dy.as_panel()), (&mut **by_model, pad(d)), Start::Keep);
    }
}

impl ScanVariant for TttLinear {
    const NAME: &'static str = "ttt-linear";
    type Cell = TttCell;

    fn cell(&self, n_heads_q: usize, _: usize, head_dim_v: usize) -> Result<TttCell> {
        let scale = self.check(head_dim_v)?;
        let norm = (vec![1.0; n_heads_q * head_dim_v], vec![0.0; n_heads_q * head_dim_v]);
        let eta = Some(1.0 / (self.mini_batch * head_dim_v) as f32);
        Ok(TttCell { options: *self, scale, width: head_dim_v, eta, norm })
    }

    fn define(&self, head: HeadInputs<'_>) -> Vec<f64> {
        let d = head.head_dim_v;
        let (n, eps) = (d as f64, f64::from(self.eps));
        let scale = self.scale.map_or(1.0 / n.sqrt(), f64::from);
        let eta = f64::from(1.0 / (self.mini_batch * d) as f32);
        let norm = |x: &[f64]| -> (Vec<f64>, f64) {
            let mean = x.iter().sum::<f64>() / n;
            let s = (x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n + eps).sqrt();
            (x.iter().map(|x| (x - mean) / s).collect(), s)
        };
        let (mut w, mut c) = (vec![0.0; d * d], vec![0.0; d]);
        let apply = |x: &[f64], w: &[f64], c: &[f64]| -> Vec<f64> {
            (0..d).map(|j| c[j] + (0..d).map(|i| x[i] * w[i * d + j]).sum::<f64>()).collect()
        };
        let mut out = Vec::with_capacity(head.v.len());
        let all: Vec<usize> = (0..head.len()).collect();
        for batch in all.chunks(self.mini_batch) {
            let (mut dw, mut dc) = (vec![0.0; d * d], vec![0.0; d]);
            for &t in batch {
                let row: Vec<[f64; 3]> = (0..d).map(|c| head.channel(t, c)).collect();
                let k: Vec<f64> = row.iter().map(|[_, k, _]| *k).collect();
                let q: Vec<f64> = row.iter().map(|[q, ..]| scale * q).collect();
                let (normal, s) = norm(&apply(&k, &w, &c));
                let e: Vec<f64> = (0..d).map(|i| normal[i] - row[i][2] + k[i]).collect();
                let mean = e.iter().sum::<f64>() / n;
                let along = e.iter().zip(&normal).map(|(e, x)| e * x).sum::<f64>() / n;
                for j in 0..d {
                    let g = (e[j] - mean - normal[j] * along) / s;
                    dc[j] += g;
                    (0..d).for_each(|i| dw[i * d + j] += k[i] * g);
                }
                let stepped: Vec<f64> = w.iter().zip(&dw).map(|(w, d)| w - eta * d).collect();
                let bias: Vec<f64> = c.iter().zip(&dc).map(|(c, d)| c - eta * d).collect();
                let r = apply(&q, &stepped, &bias);
                out.extend(norm(&r).0.iter().zip(&r).map(|(x, r)| x + r));
            }
            w.iter_mut().zip(&dw).for_each(|(w, d)| *w -= eta * d);
            c.iter_mut().zip(&dc).for_each(|(c, d)| *c -= eta * d);
        }
        out
    }

    fn flops(&self, _: usize, head_dim_v: usize) -> usize {
        2 * head_dim_v * (4 * head_dim_v + 2 * self.mini_batch)
    }

    /// Normalising a row of nearly equal numbers divides by their spread.
    fn max_error(&self) -> f64 {
        1e-3
    }
}
