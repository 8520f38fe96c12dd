//! A pattern in parts as an [`Attention`].

use super::{Part, Parted, backward, forward};
use crate::SparseAttention;
use crate::store::store;
use attn_core::exact::Reference;
use attn_core::{
    Attention, AttnError, AttnShape, Cost, DType, Differentiable, OutMut, Profile, Qkv, QkvGrads, Result,
    Saved, SoftmaxAttention, StreamShape, StreamState, Streaming, TensorView, check_like, check_lse,
    softmax_scale_or_default,
};
use attn_flash::stream::CachedStream;

/// Fewer query rows than this are attended in the order of the sequence: they share no tile worth sorting for.
const FEW: usize = 32;

/// Softmax attention over the pairs of a [`Parted`] pattern: the same as [`SparseAttention`], part by part.
#[derive(Debug, Clone)]
pub struct PartedAttention<P> {
    /// The pattern in the order of the sequence; no sinks and no score rule, which the parts do not know.
    whole: SparseAttention<P>,
}

/// Log-sum-exps of the merged rows.
struct MergedLse(Vec<f32>);

impl<P: Parted> PartedAttention<P> {
    /// The pattern with the default scale.
    pub fn new(pattern: P) -> Self {
        Self { whole: SparseAttention::new(pattern) }
    }

    /// With another scale; `None` is `1/sqrt(head_dim)`.
    #[must_use]
    pub fn with_scale(self, softmax_scale: Option<f32>) -> Self {
        Self { whole: SparseAttention { softmax_scale, ..self.whole } }
    }

    /// The parts of a problem that is worth cutting.
    fn parts(&self, shape: &AttnShape) -> Result<Option<Vec<Part>>> {
        if shape.n_q < FEW || shape.n_kv == 0 {
            return Ok(None);
        }
        let parts = self.whole.decider.parts(shape)?;
        Ok((!parts.is_empty()).then_some(parts))
    }

    fn scale(&self, shape: &AttnShape) -> Result<f32> {
        softmax_scale_or_default(self.whole.softmax_scale, shape.head_dim)
    }

    /// Writes the output and gives the log-sum-exps.
    fn attend(&self, x: Qkv<'_>, out: OutMut<'_>, parts: &[Part]) -> Result<Vec<f32>> {
        x.check_out(&out)?;
        let merged = forward(&[x], parts, self.scale(&x.shape())?)?;
        store(out, &merged.out)?;
        Ok(merged.lse)
    }
}

impl<P: Parted> Attention for PartedAttention<P> {
    fn name(&self) -> &'static str {
        <P as crate::Pattern>::NAME
    }

    fn profile(&self) -> Profile {
        self.whole.profile()
    }

    fn cost(&self, shape: &AttnShape, dtype: DType) -> Cost {
        let cost = self.whole.cost(shape, dtype);
        // Gathered inputs, the part's rows and the merged ones, in f32.
        let rows = 4 * (shape.rows() * (shape.head_dim_v + 2)) as u64;
        let bytes_allocated = cost.bytes_allocated + shape.io_bytes(DType::F32) + rows;
        Cost { bytes_allocated, ..cost }
    }

    fn forward(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<()> {
        match self.parts(&x.shape())? {
            None => self.whole.forward(x, out),
            Some(parts) => self.attend(x, out, &parts).map(drop),
        }
    }

    fn definition(&self, x: &Qkv<'_>) -> Result<Reference> {
        self.whole.definition(x)
    }

    fn as_softmax(&self) -> Option<&dyn SoftmaxAttention> {
        Some(self)
    }

    fn as_streaming(&self) -> Option<&dyn Streaming> {
        self.whole.as_streaming().map(|_| self as &dyn Streaming)
    }

    fn as_differentiable(&self) -> Option<&dyn Differentiable> {
        Some(self)
    }
}

impl<P: Parted> SoftmaxAttention for PartedAttention<P> {
    fn forward_with_lse(&self, x: Qkv<'_>, out: OutMut<'_>, lse: &mut [f32]) -> Result<()> {
        match self.parts(&x.shape())? {
            None => self.whole.forward_with_lse(x, out, lse),
            Some(parts) => {
                check_lse(lse, &x.shape())?;
                lse.copy_from_slice(&self.attend(x, out, &parts)?);
                Ok(())
            }
        }
    }
}

impl<P: Parted> Differentiable for PartedAttention<P> {
    fn forward_saving(&self, x: Qkv<'_>, out: OutMut<'_>) -> Result<Saved> {
        match self.parts(&x.shape())? {
            None => self.whole.forward_saving(x, out),
            Some(parts) => Ok(Saved::new(MergedLse(self.attend(x, out, &parts)?))),
        }
    }

    fn backward(
        &self,
        x: Qkv<'_>,
        out: TensorView<'_>,
        saved: &Saved,
        grad_out: TensorView<'_>,
        grads: QkvGrads<'_>,
    ) -> Result<()> {
        let shape = x.shape();
        let Some(parts) = self.parts(&shape)? else {
            return self.whole.backward(x, out, saved, grad_out, grads);
        };
        grads.check(&x)?;
        check_like("out", out.shape(), out.dtype(), x.q(), shape.head_dim_v)?;
        check_like("grad_out", grad_out.shape(), x.dtype(), x.q(), shape.head_dim_v)?;
        let MergedLse(lse) = saved.get()?;
        check_lse(lse, &shape)?;
        let [sums] = backward(&[x], &parts, self.scale(&shape)?, (out, lse), grad_out)?;
        store(grads.q, &sums.q)?;
        store(grads.k, &sums.k)?;
        store(grads.v, &sums.v)?;
        Ok(())
    }
}

impl<P: Parted> Streaming for PartedAttention<P> {
    fn start(&self, shape: StreamShape) -> Result<Box<dyn StreamState>> {
        match crate::Decider::promises(&self.whole.decider).kept {
            Some(kept) => CachedStream::start(self.clone(), shape, kept),
            None => {
                Err(AttnError::unsupported(<P as crate::Pattern>::NAME, "streaming in this configuration"))
            }
        }
    }
}
