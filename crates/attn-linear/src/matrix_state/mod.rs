//! The matrix-state engine: a state a head that fades, is read along chosen directions, corrected and written.
//!
//! For one head, with a state `S [key_dim, value_dim]` and the vectors of token `t`:
//!
//! ```text
//! S~_t = diag(e^gk_t) S_(t-1) diag(e^gv_t)
//! S_t  = S~_t + b_t (a_t^T S)^T + k_t v_t^T          S the faded or the previous state
//! o_t  = scale q_t^T S_t                             or  scale q_t^T (S_(t-1) + diag(u) k_t v_t^T)
//! ```
//!
//! A variant is a row of [`Options`] and a front end that fills a [`Chunk`] from its own inputs. The forms, which must
//! agree:
//!
//! | form | work | used for |
//! |---|---|---|
//! | [`naive`]: recurrence and quadratic form in f64 | `O(n)` and `O(n^2)` | the truth |
//! | chunked: a chunk of tokens by its quadratic form, the past through the state | `O(n)`, matrix products | prefill, training |
//! | recurrent: token by token | `O(n)` | decoding |
//!
//! Every weight is `2` to a difference of sums of decays, so strong decays underflow to 0 and nothing else.

mod attend;
mod attention;
mod backward;
mod chunk;
mod columns;
mod definition;
mod fading;
mod gradients;
mod head;
mod inputs;
mod lanes;
mod memory;
mod momentum;
pub mod naive;
mod named;
mod oja;
mod options;
mod packed;
mod read;
mod recurrence;
mod regression;
mod run;
mod scores;
mod scratch;
mod solve;
mod step;
mod sums;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod thread_tests;
mod turns;
mod variant;
mod weights;
mod write;

pub use attention::StateAttention;
pub use chunk::{Chunk, Piece};
pub use gradients::Gradients;
pub use inputs::{Extra, Inputs, Per, Sizes, Width};
pub use memory::{Memory, Part};
pub use options::{Decay, Erase, EraseAt, Options, Read};
pub use recurrence::Recurrence;
pub(crate) use run::sequences;
pub use variant::{Given, Plan, Pull, Reads, StateVariant, Tokens};
pub(crate) use variant::{copy, copy_or};

use attend::{Ahead, Attend, Direct, Solve};
use attn_core::simd::Isa;
use backward::{BackScratch, Backward};
use head::Wanted;
use momentum::Momentum;
use oja::Oja;
use regression::Regression;
use scratch::{Prepared, Scratch};
use step::Steps;

/// Up to this many tokens the recurrent form beats the chunked one.
const RECURRENT_LEN: usize = 2;

/// A thread's workspace for heads with the same options.
pub struct Engine {
    scratch: Scratch,
    back: BackScratch,
    other: Other,
    /// From a state to the one that is run next, if that is known; else 0.
    to_next: usize,
}

/// What takes the place of the engine's own chunks, [`Options::recurrence`].
enum Other {
    None,
    Oja(Box<Oja>),
    Momentum(Box<Momentum>),
    Regression(Box<Regression>),
}

impl Engine {
    /// For chunks of up to `len` tokens.
    pub fn new(options: &Options, len: usize) -> Self {
        let other = match options.recurrence {
            None => Other::None,
            Some(Recurrence::Oja) => Other::Oja(Box::new(Oja::new(options, len))),
            Some(Recurrence::Momentum) => Other::Momentum(Box::default()),
            Some(Recurrence::Regression) => Other::Regression(Box::new(Regression::new(options, len))),
        };
        Self { scratch: Scratch::new(options, len), back: BackScratch::default(), other, to_next: 0 }
    }

    /// Bytes of [`Engine::new`] and of a [`Chunk`] for it.
    pub fn bytes(options: &Options, len: usize) -> usize {
        let other = match options.recurrence {
            None => 0,
            Some(Recurrence::Oja) => Oja::bytes(options, len),
            Some(Recurrence::Momentum) => Momentum::bytes(options, len),
            Some(Recurrence::Regression) => Regression::bytes(options, len),
        };
        Scratch::bytes(options, len) + 4 * Chunk::floats(options, len) + other
    }

    /// Runs the tokens of `chunk`: the state becomes the one after them, and the result is what they read.
    ///
    /// # Panics
    /// If `chunk` or `state` have not the sizes that the options give them, or the chunk is longer than the engine's.
    pub fn run(&mut self, isa: Isa, chunk: Piece<'_>, state: &mut [f32]) -> Reads<'_> {
        self.run_wanted(isa, chunk, state, Wanted::Reads, None, &mut || {})
    }

    /// [`Engine::run`] for what is wanted. Where there are products it calls `ahead` between them, with reads at least
    /// [`attend::pauses`] times. Rows that have been stored directly are not told again.
    fn run_wanted(
        &mut self,
        isa: Isa,
        chunk: Piece<'_>,
        state: &mut [f32],
        wanted: Wanted,
        direct: Option<Direct<'_>>,
        ahead: Ahead<'_>,
    ) -> Reads<'_> {
        let o = self.scratch.options;
        assert_eq!(state.len(), o.state_len(), "state");
        let scratch = &mut self.scratch;
        let mut reads = chunk.len * o.value_dim;
        match &mut self.other {
            Other::Oja(oja) => return oja.run(isa, chunk, state),
            Other::Regression(regression) => return regression.run(isa, chunk, state),
            Other::Momentum(momentum) => {
                let reads = &mut scratch.read.rows[..reads];
                isa.run(momentum::Forward { o: &o, chunk, state, reads, scratch: momentum });
            }
            Other::None
                if matches!(wanted, Wanted::Reads | Wanted::State)
                    && chunk.len <= RECURRENT_LEN
                    && chunk.writes == chunk.len * o.writes =>
            {
                isa.run(Steps { chunk, state, scratch, to_next: self.to_next });
            }
            Other::None => {
                if direct.is_some() {
                    reads = 0;
                }
                isa.run(Attend { chunk, state, scratch, wanted, direct, ahead });
            }
        }
        let norms = if o.norm { &self.scratch.read.norms[..chunk.len] } else { &[] };
        Reads { rows: &self.scratch.read.rows[..reads], norms, scale: o.scale }
    }

    /// What the tokens of `chunk` are to one another, into `to`; the state is not needed for it.
    fn prepare(&mut self, isa: Isa, chunk: Piece<'_>, to: &mut Prepared, ahead: Ahead<'_>) {
        std::mem::swap(&mut self.scratch.prepared, to);
        let (scratch, wanted) = (&mut self.scratch, Wanted::Nothing);
        isa.run(Attend { chunk, state: &mut [], scratch, wanted, direct: None, ahead });
        std::mem::swap(&mut self.scratch.prepared, to);
    }

    /// What a tied erase writes, `U [writes, value_dim]`, from a state that stays as it is.
    fn written(&mut self, isa: Isa, chunk: Piece<'_>, state: &[f32]) -> &[f32] {
        isa.run(Solve { chunk, state, scratch: &mut self.scratch });
        &self.scratch.work.solved[..chunk.v.len()]
    }

    /// The gradients of [`Engine::run`] on `chunk` from `state`: `d_reads [len, value_dim]` and, with a norm, `d_norms [len]`
    /// are the gradients of its result as it is told, not scaled; `d_state` that of the state after it and becomes that of the
    /// state before it, `grads` becomes those of the chunk's rows. The gradient of the bonus is added to.
    ///
    /// # Panics
    /// As [`Engine::run`].
    pub fn backward(
        &mut self,
        isa: Isa,
        chunk: Piece<'_>,
        state: &[f32],
        [d_reads, d_norms]: [&[f32]; 2],
        d_state: &mut [f32],
        grads: &mut Chunk,
    ) {
        let o = self.scratch.options;
        assert_eq!((state.len(), d_state.len()), (o.state_len(), o.state_len()), "state");
        assert_eq!(d_reads.len(), chunk.len * o.value_dim, "gradient of the reads");
        if o.norm {
            assert_eq!(d_norms.len(), chunk.len, "gradient of the norms");
        }
        match &mut self.other {
            Other::Oja(oja) => oja.backward(isa, chunk, state, d_reads, d_state, grads),
            Other::Momentum(scratch) => {
                let o = &o;
                isa.run(momentum::Backward { o, chunk, state, d_reads, d_state, grads, scratch });
            }
            Other::Regression(regression) => {
                regression.backward(isa, chunk, state, d_reads, d_state, grads);
            }
            Other::None => {
                let (scratch, back) = (&mut self.scratch, &mut self.back);
                let d_writes = &[];
                isa.run(Backward { chunk, state, d_reads, d_norms, d_writes, d_state, grads, scratch, back });
            }
        }
    }

    /// As [`Engine::backward`] for [`Engine::written`], whose gradient is `d_writes`; that of the state is added to.
    fn backward_written(
        &mut self,
        isa: Isa,
        chunk: Piece<'_>,
        state: &[f32],
        d_writes: &[f32],
        d_state: &mut [f32],
        grads: &mut Chunk,
    ) {
        let (scratch, back) = (&mut self.scratch, &mut self.back);
        let (d_reads, d_norms) = (&[], &[]);
        isa.run(Backward { chunk, state, d_reads, d_norms, d_writes, d_state, grads, scratch, back });
    }
}
