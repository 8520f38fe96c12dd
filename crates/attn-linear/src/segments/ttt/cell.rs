//! The steps of TTT-linear, forwards and backwards.

use super::TttLinear;
use crate::elementwise::front_panels as panels;
use crate::scan::cell::{Cell, PanelMut, Piece, PieceGrads};
use crate::scan::gemm::{outer, pad, rows, turned};
use attn_core::simd::Simd;
use attn_core::tile::Start;

/// Reads `q, k, v` and step sizes unless they are constant.
#[derive(Debug, Clone)]
pub struct TttCell {
    pub(super) options: TttLinear,
    pub(super) scale: f32,
    pub(super) width: usize,
    pub(super) eta: Option<f32>,
    /// `a`, `b`, `[heads, width]`.
    pub(super) norm: (Vec<f32>, Vec<f32>),
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
