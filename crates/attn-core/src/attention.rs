//! The contract of every variant.

use crate::exact::Reference;
use crate::{AttnError, AttnShape, Cost, DType, OutMut, Profile, Qkv, Result, TensorView};
use std::any::Any;
use std::sync::Arc;

/// An attention variant with its configuration.
///
/// A call reads `q (batch, n_heads_q, n_q, head_dim)`, `k (batch, n_heads_kv, n_kv, head_dim)`,
/// `v (batch, n_heads_kv, n_kv, head_dim_v)` and writes `out (batch, n_heads_q, n_q, head_dim_v)`. It runs on the
/// current rayon pool, and gives the same bits for any number of threads.
pub trait Attention: Send + Sync {
    /// Stable kebab-case name: `flash`, `sliding-window`, `retnet`.
    fn name(&self) -> &'static str;

    /// What this configuration promises.
    fn profile(&self) -> Profile;

    /// FLOPs, bytes moved and bytes allocated for a problem, known before running it.
    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost;

    /// Computes the output.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument, with what was found and what is expected; nothing has then been written.
    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()>;

    /// The definition in f64, slow on purpose, sharing no kernel with [`Attention::forward`].
    ///
    /// # Errors
    /// As [`Attention::forward`].
    fn definition(&self, x: &Qkv<'_>) -> Result<Reference>;

    /// The variant as softmax rows, if it has a log-sum-exp.
    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        None
    }

    /// The variant as a stream, if it can decode token by token.
    fn as_streaming(&self) -> Option<&dyn Streaming> {
        None
    }

    /// The variant with its gradients, if it has a backward pass.
    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        None
    }
}

/// A variant whose rows are softmax rows: it also gives their log-sum-exp, so that partial results merge exactly
/// (see [`crate::merge`]).
pub trait SoftmaxAttention: Attention {
    /// As [`Attention::forward`], and writes `lse [batch, n_heads_q, n_q]`: the natural log of the sum of
    /// exponentials, scale included; -inf for a row that sees nothing.
    ///
    /// # Errors
    /// As [`Attention::forward`]; [`AttnError::Shape`] if `lse` has another length.
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()>;
}

/// Checks the length of a log-sum-exp buffer.
///
/// # Errors
/// [`AttnError::Shape`] if it is not one float an output row.
pub fn check_lse(lse: &[f32], shape: &AttnShape) -> Result<()> {
    if lse.len() == shape.rows() {
        return Ok(());
    }
    Err(AttnError::shape("lse", "rows", lse.len(), shape.rows()))
}

/// A variant with a backward pass.
pub trait Differentiable: Attention {
    /// As [`Attention::forward`], and gives what [`Differentiable::backward`] needs besides inputs and output
    /// (log-sum-exps, chunk states): `O(n)` memory, never a score matrix.
    ///
    /// # Errors
    /// As [`Attention::forward`].
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved>;

    /// Writes the gradients of a loss with respect to q, k and v, given its gradient with respect to the output.
    /// `x`, `out` and `saved` are those of one [`Differentiable::forward_saving`] call. Deterministic: the same bits for
    /// any number of threads.
    ///
    /// # Errors
    /// [`AttnError`] naming the argument that does not fit; nothing has then been written.
    fn backward(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()>;
}

/// What a forward pass keeps for the backward pass of the same variant.
pub struct Saved(Box<dyn Any + Send + Sync>);

impl Saved {
    /// Keeps `value`.
    pub fn new<T: Send + Sync + 'static>(value: T) -> Self {
        Self(Box::new(value))
    }

    /// What was kept.
    ///
    /// # Errors
    /// [`AttnError::Value`] if another variant made it.
    pub fn get<T: 'static>(&self) -> Result<&T> {
        self.0.downcast_ref().ok_or_else(|| {
            let expected =
                format!("what this variant's forward_saving gave ({})", std::any::type_name::<T>());
            AttnError::value("saved", "that of another variant", expected)
        })
    }
}

/// Gradients with respect to the three inputs, each of the shape and dtype of its input.
#[derive(Debug)]
pub struct QkvGrads<'a> {
    /// `[batch, n_heads_q, n_q, head_dim]`.
    pub q: OutMut<'a>,
    /// `[batch, n_heads_kv, n_kv, head_dim]`.
    pub k: OutMut<'a>,
    /// `[batch, n_heads_kv, n_kv, head_dim_v]`.
    pub v: OutMut<'a>,
}

impl QkvGrads<'_> {
    /// Checks shapes and dtypes against the inputs.
    ///
    /// # Errors
    /// [`AttnError::Shape`] or [`AttnError::DType`] naming the gradient.
    pub fn check(&self, x: &Qkv<'_>) -> Result<()> {
        let s = x.shape();
        check_like("grad_q", self.q.shape(), self.q.dtype(), x.q(), s.head_dim)?;
        check_like("grad_k", self.k.shape(), self.k.dtype(), x.k(), s.head_dim)?;
        check_like("grad_v", self.v.shape(), self.v.dtype(), x.v(), s.head_dim_v)
    }
}

/// Checks that a tensor called `name` has the shape and dtype of `like`, with rows of `width`.
///
/// # Errors
/// [`AttnError::Shape`] or [`AttnError::DType`] naming what differs.
pub fn check_like(
    name: &str,
    shape: [usize; 4],
    dtype: DType,
    like: &TensorView<'_>,
    width: usize,
) -> Result<()> {
    let [batch, heads, n, _] = like.shape();
    let expected = [batch, heads, n, width];
    for (a, axis) in ["batch", "heads", "length", "width"].into_iter().enumerate() {
        if shape[a] != expected[a] {
            return Err(AttnError::shape(name, axis, shape[a], expected[a]));
        }
    }
    if dtype == like.dtype() {
        return Ok(());
    }
    let (found, expected) = (dtype.to_string(), like.dtype().to_string());
    Err(AttnError::DType { tensor: name.into(), found, expected })
}

/// What stays the same during a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamShape {
    /// Independent streams.
    pub batch: usize,
    /// Query heads.
    pub n_heads_q: usize,
    /// Key/value heads; divides `n_heads_q`.
    pub n_heads_kv: usize,
    /// Width of queries and keys.
    pub head_dim: usize,
    /// Width of values and outputs.
    pub head_dim_v: usize,
    /// Storage type of the inputs, and of a cache of them.
    pub dtype: DType,
}

impl StreamShape {
    /// The stream that appends problems like `x`.
    pub fn of(x: &Qkv<'_>) -> Self {
        let s = x.shape();
        Self {
            batch: s.batch,
            n_heads_q: s.n_heads_q,
            n_heads_kv: s.n_heads_kv,
            head_dim: s.head_dim,
            head_dim_v: s.head_dim_v,
            dtype: x.dtype(),
        }
    }

    /// Checks appended rows: the stream's sizes and dtype, and as many queries as keys.
    ///
    /// # Errors
    /// [`AttnError::Shape`] or [`AttnError::DType`] naming what differs.
    pub fn check(&self, x: &Qkv<'_>) -> Result<()> {
        let s = x.shape();
        let axes = [
            ("q", "batch", s.batch, self.batch),
            ("q", "n_heads_q", s.n_heads_q, self.n_heads_q),
            ("k", "n_heads_kv", s.n_heads_kv, self.n_heads_kv),
            ("k", "n_kv", s.n_kv, s.n_q),
            ("q", "head_dim", s.head_dim, self.head_dim),
            ("v", "head_dim_v", s.head_dim_v, self.head_dim_v),
        ];
        for (tensor, axis, found, expected) in axes {
            if found != expected {
                return Err(AttnError::shape(tensor, axis, found, format!("{expected} in this stream")));
            }
        }
        if x.dtype() != self.dtype {
            let (found, expected) = (x.dtype().to_string(), format!("{} in this stream", self.dtype));
            return Err(AttnError::DType { tensor: "q".into(), found, expected });
        }
        Ok(())
    }
}

/// A variant that can be fed a sequence piece by piece: prefill in chunks, then token by token.
pub trait Streaming: Attention {
    /// An empty stream. Appending a sequence in any pieces gives what one causal [`Attention::forward`] over the
    /// whole would.
    ///
    /// # Errors
    /// [`AttnError`] if the variant cannot stream such heads.
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>>;
}

/// What a stream remembers.
pub trait StreamState: Send {
    /// Appends `x` (as many queries as keys) and writes the outputs of the new positions.
    ///
    /// # Errors
    /// [`AttnError`] if `x` does not fit the stream; the state is then unchanged.
    fn append(&mut self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()>;

    /// Positions appended so far.
    fn len(&self) -> usize;

    /// True before the first position.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes of memory that the state holds.
    fn bytes(&self) -> usize;
}

impl<A: Attention + ?Sized> Attention for Arc<A> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    fn profile(&self) -> Profile {
        (**self).profile()
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        (**self).cost(shape, dtype)
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        (**self).forward(x, out)
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        (**self).definition(x)
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        (**self).as_softmax()
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        (**self).as_streaming()
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        (**self).as_differentiable()
    }
}
