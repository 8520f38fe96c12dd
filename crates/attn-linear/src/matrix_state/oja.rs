//! Oja's rule in chunks: the delta rule of the transposed state gives what is written, a sum of writes reads it.
//!
//! ```text
//! S~ = S diag(e^g)      S' = S~ + (k - beta S~ v) v^T      o = q^T S'            k already times beta
//! ```
//!
//! Transposed, `S'^T = (I - beta v v^T) diag(e^g) S^T + v k^T`: the engine's tied erase with `v` as the key and `k` as the
//! value, whose triangular system gives the rows `U` that are written. With these `S' = S~ + U v^T`, a sum of writes with
//! decays of the value channels, which is read as one. Backwards the same two steps in the other order.

use super::{Chunk, Decay, Engine, Erase, EraseAt, Options, Piece, Reads};
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::transpose;
use attn_core::view::Rows;

/// The two engines of Oja's rule.
pub(super) struct Oja {
    options: Options,
    /// Of the transposed state.
    solves: Box<Engine>,
    reads: Box<Engine>,
    /// `-beta v`.
    erased: Vec<f32>,
    written: Vec<f32>,
    turned: Vec<f32>,
    d_turned: Vec<f32>,
    grads: Chunk,
}

impl Oja {
    pub(super) fn new(o: &Options, len: usize) -> Self {
        let (solving, reading) = parts(o);
        Self {
            options: *o,
            solves: Box::new(Engine::new(&solving, len)),
            reads: Box::new(Engine::new(&reading, len)),
            erased: Vec::new(),
            written: Vec::new(),
            turned: vec![0.0; o.state_len()],
            d_turned: vec![0.0; o.state_len()],
            grads: Chunk::default(),
        }
    }

    /// Bytes of [`Oja::new`] but for the buffers of one chunk.
    pub(super) fn bytes(o: &Options, len: usize) -> usize {
        let (solving, reading) = parts(o);
        Engine::bytes(&solving, len) + Engine::bytes(&reading, len) + 8 * o.state_len()
    }

    /// As [`Engine::run`].
    pub(super) fn run(&mut self, isa: Isa, x: Piece<'_>, state: &mut [f32]) -> Reads<'_> {
        self.solve(isa, x, state);
        self.reads.run(isa, Piece { k: &self.written, ..x }, state)
    }

    /// `U` into `written`, and what it takes: `erased`, `turned`.
    fn solve(&mut self, isa: Isa, x: Piece<'_>, state: &[f32]) {
        let o = self.options;
        isa.run(Turn { rows: Rows::new(state, o.key_dim, o.value_dim, o.value_dim), out: &mut self.turned });
        self.erased.clear();
        let rows = x.v.chunks_exact(o.value_dim).zip(x.notes);
        self.erased.extend(rows.flat_map(|(v, beta)| v.iter().map(move |v| -beta * v)));
        let solved = self.solves.written(isa, transposed(x, &self.erased), &self.turned);
        self.written.clear();
        self.written.extend_from_slice(solved);
    }

    /// As [`Engine::backward`]; the gradients of `beta` are those of the notes.
    pub(super) fn backward(
        &mut self,
        isa: Isa,
        x: Piece<'_>,
        state: &[f32],
        d_reads: &[f32],
        d_state: &mut [f32],
        grads: &mut Chunk,
    ) {
        let o = self.options;
        self.solve(isa, x, state);
        self.reads.backward(isa, Piece { k: &self.written, ..x }, state, [d_reads, &[]], d_state, grads);
        self.d_turned.fill(0.0);
        self.solves.backward_written(
            isa,
            transposed(x, &self.erased),
            &self.turned,
            &grads.k,
            &mut self.d_turned,
            &mut self.grads,
        );
        let by = &self.grads;
        grads.k.copy_from_slice(&by.v);
        grads.log_decay.iter_mut().zip(&by.log_decay).for_each(|(d, more)| *d += more);
        grads.notes.clear();
        let rows = x.v.chunks_exact(o.value_dim).zip(by.a.chunks_exact(o.value_dim));
        grads.notes.extend(rows.map(|(v, d)| -v.iter().zip(d).map(|(v, d)| v * d).sum::<f32>()));
        let betas = x.notes.iter().flat_map(|beta| std::iter::repeat_n(beta, o.value_dim));
        let more = by.k.iter().zip(&by.a).zip(betas);
        grads.v.iter_mut().zip(more).for_each(|(d, ((by_key, erased), beta))| *d += by_key - beta * erased);
        let turned = Rows::new(&self.d_turned, o.value_dim, o.key_dim, o.key_dim);
        isa.run(Turn { rows: turned, out: &mut self.turned });
        d_state.iter_mut().zip(&self.turned).for_each(|(d, more)| *d += more);
    }
}

/// The options of the two engines.
fn parts(o: &Options) -> (Options, Options) {
    let solving = Options {
        decay: Decay::Key,
        erase: Erase::Tied,
        erase_at: EraseAt::After,
        ..Options::new(o.name, o.value_dim, o.key_dim)
    };
    (solving, Options { recurrence: None, ..*o })
}

/// The writes of the transposed state, that nobody reads.
fn transposed<'a>(x: Piece<'a>, erased: &'a [f32]) -> Piece<'a> {
    Piece { len: 0, q: &[], k: x.v, v: x.k, a: erased, ..x }
}

/// A matrix transposed.
struct Turn<'a> {
    rows: Rows<'a, f32>,
    out: &'a mut [f32],
}

impl SimdOp for Turn<'_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        transpose(simd, self.rows, 1.0, self.out, self.rows.len());
    }
}
