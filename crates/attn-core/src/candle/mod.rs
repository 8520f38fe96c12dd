//! Attention on candle tensors.
//!
//! [`CandleAttention`] gives every [`Attention`] methods on tensors: [`CandleAttention::forward_t`] for
//! `(batch, heads, length, width)` and [`CandleAttention::forward_bnhd_t`] for `(batch, length, heads, width)`. Strided
//! tensors are read where they are, as long as the last axis is contiguous; f32, bf16 and f16 are taken as they come.
//! [`CandleStream`] decodes. Work runs on the rayon pool that candle itself is running in.
//!
//! A call is one node of candle's graph. A variant that has no backward pass fails in `loss.backward()` with an error
//! that names it; gradients are never dropped silently.

use crate::{
    Attention, AttnError, DType, Element, OutMut, Qkv, StreamShape, StreamState, TensorView, View, ViewMut,
};
use candle_core::{CpuStorage, CustomOp3, DType as CandleDType, Layout, Result, Shape, Tensor};
use half::{bf16, f16};

pub use candle_core;

impl From<AttnError> for candle_core::Error {
    fn from(error: AttnError) -> Self {
        candle_core::Error::Msg(error.to_string()).bt()
    }
}

/// Methods on tensors for every variant that can be cloned; `Arc<dyn Attention>` can.
pub trait CandleAttention: Attention + Clone + 'static {
    /// `q (batch, n_heads_q, n_q, head_dim)`, `k (batch, n_heads_kv, n_kv, head_dim)`,
    /// `v (batch, n_heads_kv, n_kv, head_dim_v)` -> `(batch, n_heads_q, n_q, head_dim_v)`, contiguous.
    ///
    /// # Errors
    /// A tensor off the CPU, of another dtype or rank, or with a strided last axis; those of [`Attention::forward`].
    fn forward_t(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        q.apply_op3(k, v, Op(self.clone()))
    }

    /// [`CandleAttention::forward_t`] for tensors `(batch, length, heads, width)`, without copying the inputs.
    ///
    /// # Errors
    /// As [`CandleAttention::forward_t`].
    fn forward_bnhd_t(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let swap = |t: &Tensor| t.transpose(1, 2);
        self.forward_t(&swap(q)?, &swap(k)?, &swap(v)?)?.transpose(1, 2)
    }

    /// An empty stream of this variant for tensors like `q`, `k`, `v` (layout as [`CandleAttention::forward_t`]; the
    /// lengths do not matter).
    ///
    /// # Errors
    /// A variant that cannot stream; tensors that [`CandleAttention::forward_t`] would refuse.
    fn stream_t(&self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<CandleStream> {
        let (q_axes, k_axes, v_axes) = (q.dims4()?, k.dims4()?, v.dims4()?);
        let shape = StreamShape {
            batch: q_axes.0,
            n_heads_q: q_axes.1,
            n_heads_kv: k_axes.1,
            head_dim: q_axes.3,
            head_dim_v: v_axes.3,
            dtype: dtype(q.dtype())?,
        };
        let stream = self.as_streaming().ok_or_else(|| AttnError::unsupported(self.name(), "streaming"))?;
        Ok(CandleStream { state: stream.start(shape)? })
    }
}

impl<A: Attention + Clone + 'static> CandleAttention for A {}

/// A stream on tensors. Its outputs carry no gradients: it is for decoding.
pub struct CandleStream {
    state: Box<dyn StreamState>,
}

impl CandleStream {
    /// Appends `n` positions and returns their outputs; layout as [`CandleAttention::forward_t`] with `n_q = n_kv = n`.
    ///
    /// # Errors
    /// Tensors that do not fit the stream; the stream is then unchanged.
    pub fn append_t(&mut self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (q_data, q_layout) = q.storage_and_layout();
        let (k_data, k_layout) = k.storage_and_layout();
        let (v_data, v_layout) = v.storage_and_layout();
        let (q, k, v) = (cpu("q", &q_data)?, cpu("k", &k_data)?, cpu("v", &v_data)?);
        let x = qkv((q, q_layout), (k, k_layout), (v, v_layout))?;
        let (storage, shape) = run(x, |x, out| self.state.append(x, out))?;
        let device = candle_core::Device::Cpu;
        match storage {
            CpuStorage::F32(data) => Tensor::from_vec(data, shape, &device),
            CpuStorage::BF16(data) => Tensor::from_vec(data, shape, &device),
            CpuStorage::F16(data) => Tensor::from_vec(data, shape, &device),
            _ => candle_core::bail!("a stream gives f32, bf16 or f16"),
        }
    }

    /// The state underneath: its length and the bytes it holds.
    pub fn state(&self) -> &dyn StreamState {
        &*self.state
    }
}

/// One call in candle's graph.
struct Op<A>(A);

impl<A: Attention> CustomOp3 for Op<A> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let x = qkv((q, q_layout), (k, k_layout), (v, v_layout))?;
        run(x, |x, out| self.0.forward(x, out))
    }
}

/// Allocates the output, runs `work` and hands the output over.
fn run(
    x: Qkv<'_>,
    work: impl FnOnce(Qkv<'_>, OutMut<'_>) -> crate::Result<()>,
) -> Result<(CpuStorage, Shape)> {
    fn typed<E: Element>(
        x: Qkv<'_>,
        work: impl FnOnce(Qkv<'_>, OutMut<'_>) -> crate::Result<()>,
    ) -> crate::Result<Vec<E>> {
        let shape = x.shape().out();
        let mut out = vec![E::ZERO; shape.iter().product()];
        work(x, ViewMut::contiguous("out", &mut out, shape)?.into())?;
        Ok(out)
    }
    let shape = Shape::from(x.shape().out().to_vec());
    let storage = match x.dtype() {
        DType::F32 => CpuStorage::F32(typed::<f32>(x, work)?),
        DType::Bf16 => CpuStorage::BF16(typed::<bf16>(x, work)?),
        DType::F16 => CpuStorage::F16(typed::<f16>(x, work)?),
    };
    Ok((storage, shape))
}

fn dtype(dtype: CandleDType) -> Result<DType> {
    match dtype {
        CandleDType::F32 => Ok(DType::F32),
        CandleDType::BF16 => Ok(DType::Bf16),
        CandleDType::F16 => Ok(DType::F16),
        other => candle_core::bail!("q: dtype is {other:?}, expected f32, bf16 or f16"),
    }
}

fn cpu<'a>(tensor: &str, storage: &'a candle_core::Storage) -> Result<&'a CpuStorage> {
    match storage {
        candle_core::Storage::Cpu(storage) => Ok(storage),
        _ => candle_core::bail!("{tensor}: device is not the CPU; attention runs on CPU tensors"),
    }
}

fn qkv<'a>(
    q: (&'a CpuStorage, &Layout),
    k: (&'a CpuStorage, &Layout),
    v: (&'a CpuStorage, &Layout),
) -> Result<Qkv<'a>> {
    Ok(Qkv::new(view("q", q)?, view("k", k)?, view("v", v)?)?)
}

fn view<'a>(tensor: &str, (storage, layout): (&'a CpuStorage, &Layout)) -> Result<TensorView<'a>> {
    fn typed<'a, E: Element>(tensor: &str, data: &'a [E], layout: &Layout) -> Result<TensorView<'a>> {
        let axes = |x: &[usize]| -> Result<[usize; 4]> {
            x.try_into().map_err(|_| {
                let expected = "(batch, heads, length, width)";
                AttnError::value(format!("{tensor}'s shape"), format!("{:?}", layout.dims()), expected).into()
            })
        };
        let data = &data[layout.start_offset()..];
        Ok(View::new(tensor, data, axes(layout.dims())?, axes(layout.stride())?)?.into())
    }
    match storage {
        CpuStorage::F32(data) => typed(tensor, data, layout),
        CpuStorage::BF16(data) => typed(tensor, data, layout),
        CpuStorage::F16(data) => typed(tensor, data, layout),
        other => {
            let found = format!("{:?}", candle_core::backend::BackendStorage::dtype(other));
            Err(AttnError::DType { tensor: tensor.into(), found, expected: "f32, bf16 or f16".into() }.into())
        }
    }
}
