//! A sequence fed piece by piece: the state is all there is to remember.

use super::{Spec, State, StateShape};
use attn_core::{AttnError, OutMut, Qkv, Result, StreamShape, StreamState};

impl Spec {
    /// An empty stream. Appending many tokens runs the chunked form, few of them the recurrent one.
    ///
    /// # Errors
    /// [`AttnError`] without `causal`, for heads that do not divide, and as [`Spec::check`].
    pub fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        if !self.causal {
            return Err(AttnError::unsupported(self.name, "streaming without `causal`"));
        }
        let divides = shape.n_heads_kv > 0 && shape.n_heads_q.is_multiple_of(shape.n_heads_kv);
        if !divides {
            let expected = format!("a multiple of {} key/value heads", shape.n_heads_kv);
            return Err(AttnError::shape("q", "n_heads_q", shape.n_heads_q, expected));
        }
        self.check(shape.n_heads_q)?;
        let state = StateShape {
            batch: shape.batch,
            heads: shape.n_heads_q,
            key_dim: self.key_dim(shape.head_dim),
            value_dim: shape.head_dim_v,
        };
        let state = State::zero(state, self.has_normaliser());
        Ok(Box::new(Stream { spec: self.clone(), shape, state, len: 0 }))
    }
}

struct Stream {
    spec: Spec,
    shape: StreamShape,
    state: State,
    len: usize,
}

impl StreamState for Stream {
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        self.shape.check(&x)?;
        self.spec.forward(x, out, Some(&mut self.state))?;
        self.len += x.shape().n_q;
        Ok(())
    }

    fn len(&self) -> usize {
        self.len
    }

    fn bytes(&self) -> usize {
        self.state.bytes()
    }
}
