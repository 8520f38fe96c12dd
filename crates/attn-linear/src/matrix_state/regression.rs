//! Gradients of a regression that is solved at every token.
//!
//! With the state `[H | G]`, written by `beta k` with the value row `[k, v]`, and `(H_i + Lambda) x_i = q_i`, `o_i = G_i^T x_i`:
//!
//! ```text
//! (H_i + Lambda) y_i = G_i do_i      dq_i = y_i      dLambda = -sum_i y_i o x_i      dG_i += x_i do_i^T      dH_i += -y_i x_i^T
//! ```
//!
//! so that `x` reads `G` and `y` reads `H` as queries of a sum of writes do, whose gradients those of the state are.

use super::recurrence::{absorb, factorise, solve};
use super::{Chunk, Engine, Options, Piece};
use attn_core::simd::{Isa, Simd, SimdOp};

/// A thread's buffers.
pub(super) struct Regression {
    options: Options,
    sums: Box<Engine>,
    /// `x`, `y [len, key_dim]`.
    read: Vec<f32>,
    adjoint: Vec<f32>,
    grads: Chunk,
}

impl Regression {
    pub(super) fn new(o: &Options, len: usize) -> Self {
        let sums = Box::new(Engine::new(&Options { recurrence: None, ..*o }, len));
        Self { options: *o, sums, read: Vec::new(), adjoint: Vec::new(), grads: Chunk::default() }
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
        let o = &self.options;
        let (n, width) = (o.key_dim, o.value_dim);
        let Self { sums, read, adjoint, .. } = self;
        isa.run(Solutions { o, x, state: state.to_vec(), d_reads, read, adjoint });
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

/// `x` and `y` of every token.
struct Solutions<'a> {
    o: &'a Options,
    x: Piece<'a>,
    state: Vec<f32>,
    d_reads: &'a [f32],
    read: &'a mut Vec<f32>,
    adjoint: &'a mut Vec<f32>,
}

impl SimdOp for Solutions<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, _: S) {
        let Self { o, x, mut state, d_reads, read, adjoint } = self;
        let (n, width) = (o.key_dim, o.value_dim);
        let mut factor = vec![0.0; n * n];
        read.clear();
        read.extend_from_slice(x.q);
        adjoint.clear();
        adjoint.resize(x.q.len(), 0.0);
        let rows = read.chunks_exact_mut(n).zip(adjoint.chunks_exact_mut(n));
        for (i, ((own, adjoint), d)) in rows.zip(d_reads.chunks_exact(width)).enumerate() {
            absorb(o, &x, i, &mut state);
            factorise(o, x.bonus, &state, &mut factor);
            solve(n, &factor, own);
            for (y, row) in adjoint.iter_mut().zip(state.chunks_exact(width)) {
                *y = row[n..].iter().zip(&d[n..]).map(|(s, d)| s * d).sum();
            }
            solve(n, &factor, adjoint);
        }
    }
}
