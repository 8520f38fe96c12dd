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
mod definition;
mod fading;
mod gradients;
mod head;
mod inputs;
mod lanes;
mod memory;
pub mod naive;
mod options;
mod recurrence;
mod run;
mod scores;
mod step;
#[cfg(test)]
mod tests;
mod variant;
mod weights;

pub use attention::StateAttention;
pub use chunk::{Chunk, Piece};
pub use gradients::Gradients;
pub use inputs::{Extra, Inputs, Per, Sizes, Width};
pub use memory::{Memory, Part};
pub use options::{Decay, Erase, EraseAt, Options, Read};
pub use recurrence::Recurrence;
pub use variant::{Given, Plan, Pull, Reads, StateVariant, Tokens};
pub(crate) use variant::{copy, copy_or};

use attend::{Attend, Scratch};
use attn_core::simd::Isa;
use backward::{BackScratch, Backward};
use step::Steps;

/// Up to this many tokens the recurrent form beats the chunked one.
const RECURRENT_LEN: usize = 2;

/// A thread's workspace for heads with the same options.
pub struct Engine(Scratch, BackScratch);

impl Engine {
    /// For chunks of up to `len` tokens.
    pub fn new(options: &Options, len: usize) -> Self {
        Self(Scratch::new(options, len), BackScratch::default())
    }

    /// Bytes of [`Engine::new`] and of a [`Chunk`] for it.
    pub fn bytes(options: &Options, len: usize) -> usize {
        Scratch::bytes(options, len) + 4 * Chunk::floats(options, len)
    }

    /// Runs the tokens of `chunk`: the state becomes the one after them, and the result is what they read.
    ///
    /// # Panics
    /// If `chunk` or `state` have not the sizes that the options give them, or the chunk is longer than the engine's.
    pub fn run(&mut self, isa: Isa, chunk: Piece<'_>, state: &mut [f32]) -> Reads<'_> {
        let o = self.0.options;
        assert_eq!(state.len(), o.state_len(), "state");
        let scratch = &mut self.0;
        if let Some(recurrence) = o.recurrence {
            recurrence.run(isa, &o, chunk, state, &mut scratch.reads[..chunk.len * o.value_dim]);
        } else if chunk.len <= RECURRENT_LEN && chunk.writes == chunk.len * o.writes {
            isa.run(Steps { chunk, state, scratch });
        } else {
            isa.run(Attend { chunk, state, scratch });
        }
        let norms = if o.norm { &self.0.norms[..chunk.len] } else { &[] };
        Reads { rows: &self.0.reads[..chunk.len * o.value_dim], norms, scale: o.scale }
    }

    /// The gradients of [`Engine::run`] on `chunk` from `state`: `d_reads [len, value_dim]` and, with a norm, `d_norms [len]`
    /// are the gradients of its result as it is told, not scaled; `d_state` that of the state after it and becomes that of the state before it, `grads` becomes those of the
    /// chunk's rows. The gradient of the bonus is added to.
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
        let o = self.0.options;
        assert_eq!((state.len(), d_state.len()), (o.state_len(), o.state_len()), "state");
        assert_eq!(d_reads.len(), chunk.len * o.value_dim, "gradient of the reads");
        if o.norm {
            assert_eq!(d_norms.len(), chunk.len, "gradient of the norms");
        }
        if chunk.len + chunk.writes > 0 {
            let (scratch, back) = (&mut self.0, &mut self.1);
            isa.run(Backward { chunk, state, d_reads, d_norms, d_state, grads, scratch, back });
        }
    }
}
