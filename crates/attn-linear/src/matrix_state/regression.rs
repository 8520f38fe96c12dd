//! A regression that is solved at every token, in chunks, and its gradients.
//!
//! The state is `[H | G]`, written by `beta k` with the value row `[k, v]`; `(H_i + Lambda) x_i = q_i`, `o_i = G_i^T x_i`. All `x`
//! of a chunk are found together by conjugate gradients, preconditioned by `Lambda`: the products `H_i p_i` are what the
//! queries `p` read from a sum of writes. A row that has arrived is left alone, so that its bits do not depend on the others;
//! one that has not after [`STEPS`] is solved by Cholesky's factor. Then `x` reads `G`.
//!
//! Backwards:
//!
//! ```text
//! (H_i + Lambda) y_i = G_i do_i      dq_i = y_i      dLambda = -sum_i y_i o x_i      dG_i += x_i do_i^T      dH_i += -y_i x_i^T
//! ```
//!
//! so that `x` reads `G` and `y` reads `H` as queries of a sum of writes do, whose gradients those of the state are. The right
//! sides `G_i do_i` are what the queries `do` read from `G^T`, the sum of the same writes with keys and values exchanged.

use super::attend::{On, prepare};
use super::head::Wanted;
use super::read::read;
use super::recurrence::{absorb, factorise, solve};
use super::scratch::Scratch;
use super::{Chunk, Engine, Options, Piece, Reads};
use attn_core::simd::{Isa, Simd, SimdOp};

/// Steps after which a row is given up; a well conditioned one takes about ten.
const STEPS: usize = 40;

/// A residual, as a share of the first one, at which a row has arrived; squared.
const ARRIVED: f32 = 4e-14;

/// A thread's buffers.
pub(super) struct Regression {
    options: Options,
    sums: Box<Engine>,
    /// Of `G^T` alone.
    turned: Box<Engine>,
    /// Of `H` alone.
    matrix: Scratch,
    h: Vec<f32>,
    keys: Vec<f32>,
    /// Residuals and directions `[len, key_dim]`.
    residuals: Vec<f32>,
    directions: Vec<f32>,
    /// `x`, `y [len, key_dim]`.
    read: Vec<f32>,
    adjoint: Vec<f32>,
    grads: Chunk,
}

impl Regression {
    pub(super) fn new(o: &Options, len: usize) -> Self {
        let sums = Box::new(Engine::new(&Options { recurrence: None, ..*o }, len));
        let turned = Box::new(Engine::new(&Self::turned(o), len));
        let matrix = Scratch::new(&Self::matrix(o), len);
        let [h, keys, residuals, directions, read, adjoint] = [const { Vec::new() }; 6];
        Self {
            options: *o,
            sums,
            turned,
            matrix,
            h,
            keys,
            residuals,
            directions,
            read,
            adjoint,
            grads: Chunk::default(),
        }
    }

    /// Bytes of [`Regression::new`] and what a chunk takes.
    pub(super) fn bytes(o: &Options, len: usize) -> usize {
        let rows = 4 * len * o.key_dim;
        Engine::bytes(&Options { recurrence: None, ..*o }, len)
            + Engine::bytes(&Self::turned(o), len)
            + Scratch::bytes(&Self::matrix(o), len)
            + 4 * (o.key_dim * o.key_dim + rows)
    }

    fn matrix(o: &Options) -> Options {
        Options { value_dim: o.key_dim, recurrence: None, ..*o }
    }

    /// Without values there is a column all the same.
    fn turned(o: &Options) -> Options {
        let values = (o.value_dim - o.key_dim).max(1);
        Options { key_dim: values, value_dim: o.key_dim, recurrence: None, ..*o }
    }

    /// As [`Engine::run`].
    pub(super) fn run(&mut self, isa: Isa, x: Piece<'_>, state: &mut [f32]) -> Reads<'_> {
        self.solve(isa, x, state);
        self.sums.run(isa, Piece { q: &self.read, bonus: &[], ..x }, state)
    }

    /// `(H_i + Lambda)^-1 q_i` of every token into `read`.
    fn solve(&mut self, isa: Isa, x: Piece<'_>, state: &[f32]) {
        let (n, width) = (self.options.key_dim, self.options.value_dim);
        self.h.clear();
        self.h.extend(state.chunks_exact(width).flat_map(|row| &row[..n]));
        self.keys.clear();
        self.keys.extend(x.v.chunks_exact(width).flat_map(|row| &row[..n]));
        let Self { matrix, h, keys, residuals, directions, read, .. } = self;
        let lambda = x.bonus;
        let piece = Piece { v: keys, bonus: &[], ..x };
        let mut arrived = vec![false; x.len];
        isa.run(Descend { piece, lambda, h, matrix, residuals, directions, x: read, arrived: &mut arrived });
        if arrived.contains(&false) {
            isa.run(Factorise { o: &self.options, x, state: state.to_vec(), read, arrived: &arrived });
        }
    }

    /// `G_i do_i` of every token.
    fn right_sides(&mut self, isa: Isa, x: Piece<'_>, state: &[f32], d_reads: &[f32]) -> Vec<f32> {
        let (n, width) = (self.options.key_dim, self.options.value_dim);
        if width == n {
            return vec![0.0; x.q.len()];
        }
        let values = |rows: &[f32]| -> Vec<f32> {
            rows.chunks_exact(width).flat_map(|row| &row[n..]).copied().collect()
        };
        let (d, v) = (values(d_reads), values(x.v));
        let columns = (n..width).flat_map(|c| state.iter().skip(c).step_by(width));
        let mut turned: Vec<f32> = columns.copied().collect();
        let piece = Piece { q: &d, k: &v, v: x.k, bonus: &[], ..x };
        self.turned.run(isa, piece, &mut turned).rows.to_vec()
    }

    /// As [`Engine::backward`]; the gradients of `Lambda` are those of the bonus.
    pub(super) fn backward(
        &mut self,
        isa: Isa,
        x: Piece<'_>,
        state: &[f32],
        d_reads: &[f32],
        d_state: &mut [f32],
        grads: &mut Chunk,
    ) {
        let (n, width) = (self.options.key_dim, self.options.value_dim);
        let right = self.right_sides(isa, x, state, d_reads);
        self.solve(isa, Piece { q: &right, ..x }, state);
        std::mem::swap(&mut self.read, &mut self.adjoint);
        self.solve(isa, x, state);
        let Self { sums, read, adjoint, .. } = self;
        let bonus = (0..n).map(|c| {
            let all = read.iter().zip(&*adjoint).skip(c).step_by(n);
            -all.map(|(x, y)| x * y).sum::<f32>()
        });
        let bonus: Vec<f32> = bonus.collect();
        // `x` reads the columns of `G`, `y` those of `H`.
        let mut by = vec![0.0; d_reads.len()];
        for (by, d) in by.chunks_exact_mut(width).zip(d_reads.chunks_exact(width)) {
            by[n..].copy_from_slice(&d[n..]);
        }
        sums.backward(isa, Piece { q: read, bonus: &[], ..x }, state, [&by, &[]], d_state, grads);
        by.fill(0.0);
        for (by, x) in by.chunks_exact_mut(width).zip(read.chunks_exact(n)) {
            by[..n].iter_mut().zip(x).for_each(|(by, x)| *by = -x);
        }
        let mut d_more = vec![0.0; d_state.len()];
        let queries = Piece { q: adjoint, bonus: &[], ..x };
        sums.backward(isa, queries, state, [&by, &[]], &mut d_more, &mut self.grads);
        let more = &self.grads;
        let sums = [
            (&mut grads.k[..], &more.k[..]),
            (&mut grads.v, &more.v),
            (&mut grads.log_decay, &more.log_decay),
            (d_state, &d_more),
        ];
        sums.into_iter().for_each(|(d, more)| d.iter_mut().zip(more).for_each(|(d, more)| *d += more));
        grads.q.copy_from_slice(&self.adjoint);
        grads.bonus = bonus;
    }
}

/// Conjugate gradients for all rows of a chunk.
struct Descend<'a> {
    /// Its values are keys; the queries are the right sides.
    piece: Piece<'a>,
    lambda: &'a [f32],
    h: &'a [f32],
    matrix: &'a mut Scratch,
    residuals: &'a mut Vec<f32>,
    directions: &'a mut Vec<f32>,
    x: &'a mut Vec<f32>,
    arrived: &'a mut [bool],
}

impl SimdOp for Descend<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { piece, lambda, h, matrix, residuals, directions, x, arrived } = self;
        let n = lambda.len();
        // `r . Lambda^-1 r`, in partial sums that vectors can hold.
        let size = |r: &[f32]| -> f32 {
            let mut lanes = [0.0f32; 16];
            for (r, lambda) in r.chunks(16).zip(lambda.chunks(16)) {
                lanes.iter_mut().zip(r).zip(lambda).for_each(|((sum, r), lambda)| *sum += r * r / lambda);
            }
            lanes.iter().sum()
        };
        x.clear();
        x.resize(piece.q.len(), 0.0);
        residuals.clear();
        residuals.extend_from_slice(piece.q);
        directions.clear();
        let scaled = piece.q.chunks_exact(n).flat_map(|q| q.iter().zip(lambda).map(|(q, lambda)| q / lambda));
        directions.extend(scaled);
        let first: Vec<f32> = residuals.chunks_exact(n).map(&size).collect();
        let mut sizes = first.clone();
        arrived.iter_mut().zip(&sizes).for_each(|(arrived, size)| *arrived = *size == 0.0);
        for _ in 0..STEPS {
            if !arrived.contains(&false) {
                return;
            }
            let queries = Piece { q: directions, ..piece };
            prepare(simd, &queries, matrix, Wanted::Reads, false, &mut || {});
            let Scratch { options, prepared, work, read: to, .. } = &mut *matrix;
            let values = queries.values(options.value_dim);
            let on = On { o: options, chunk: &queries, values, prepared };
            read(simd, &on, h, work, [&mut to.rows, &mut to.norms], None, &mut || {});
            let rows = x.chunks_exact_mut(n).zip(residuals.chunks_exact_mut(n));
            let rows = rows.zip(directions.chunks_exact_mut(n)).zip(to.rows.chunks_exact_mut(n));
            for (i, (((x, r), p), product)) in rows.enumerate() {
                if arrived[i] {
                    continue;
                }
                let mut lanes = [0.0f32; 16];
                for ((product, p), lambda) in product.chunks_mut(16).zip(p.chunks(16)).zip(lambda.chunks(16))
                {
                    let all = lanes.iter_mut().zip(product).zip(p).zip(lambda);
                    all.for_each(|(((sum, product), p), lambda)| {
                        *product += lambda * p;
                        *sum += *product * p;
                    });
                }
                let step = sizes[i] / lanes.iter().sum::<f32>();
                x.iter_mut().zip(&*p).for_each(|(x, p)| *x += step * p);
                r.iter_mut().zip(&*product).for_each(|(r, product)| *r -= step * product);
                let next = size(r);
                let turn = next / sizes[i];
                sizes[i] = next;
                arrived[i] = next <= ARRIVED * first[i];
                p.iter_mut().zip(&*r).zip(lambda).for_each(|((p, r), lambda)| *p = r / lambda + turn * *p);
            }
        }
    }
}

/// `x` of the tokens that have not arrived.
struct Factorise<'a> {
    o: &'a Options,
    x: Piece<'a>,
    state: Vec<f32>,
    read: &'a mut [f32],
    arrived: &'a [bool],
}

impl SimdOp for Factorise<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, _: S) {
        let Self { o, x, mut state, read, arrived } = self;
        let n = o.key_dim;
        let mut factor = vec![0.0; n * n];
        for (i, (own, arrived)) in read.chunks_exact_mut(n).zip(arrived).enumerate() {
            absorb(o, &x, i, &mut state);
            if !arrived {
                factorise(o, x.bonus, &state, &mut factor);
                own.copy_from_slice(&x.q[i * n..][..n]);
                solve(n, &factor, own);
            }
        }
    }
}
