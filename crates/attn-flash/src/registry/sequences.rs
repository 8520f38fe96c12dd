//! Where the queries, keys and values of a call lie, from the names of its tensors.
//!
//! | tensors | meaning |
//! |---|---|
//! | `q`, `k`, `v` | `(batch, heads, length, width)` |
//! | the same, `kv_lens [batch]` | only so many keys of each batch entry are there |
//! | `q`, `k`, `v` as `[total, heads, width]`, `cu_seqlens_q`, `cu_seqlens_k` | packed sequences |
//! | `q`, `k_cache`, `v_cache [pages, page_size, heads, width]`, `block_table [batch, max_pages]`, `seqlens_k [batch]` | pages |

use crate::engine::{PagedKv, Problem};
use attn_core::registry::{NamedTensor, NamedTensors, TensorData};
use attn_core::{AttnError, Element, OutMut, Qkv, Result, TensorView, View, ViewMut};

/// The names of one way to give queries, keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Layout {
    Batch,
    Cached,
    Packed,
    Paged,
}

impl Layout {
    /// What the tensors' names say.
    pub(super) fn of(tensors: &NamedTensors) -> Self {
        let given = |name| tensors.get(name).is_some();
        match () {
            () if given("cu_seqlens_q") || given("cu_seqlens_k") => Self::Packed,
            () if given("k_cache") || given("v_cache") => Self::Paged,
            () if given("kv_lens") => Self::Cached,
            () => Self::Batch,
        }
    }

    /// The tensors that it is made of.
    pub(super) fn tensors(self) -> &'static [&'static str] {
        match self {
            Self::Batch => &["q", "k", "v"],
            Self::Cached => &["q", "k", "v", "kv_lens"],
            Self::Packed => &["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"],
            Self::Paged => &["q", "k_cache", "v_cache", "block_table", "seqlens_k"],
        }
    }

    /// The problem.
    ///
    /// # Errors
    /// [`AttnError`] naming the tensor that is missing or does not fit.
    pub(super) fn problem(self, tensors: &NamedTensors) -> Result<Problem<'_>> {
        let list = |name: &str| {
            let tensor = tensors.require(name)?;
            Ok::<_, AttnError>((tensor.shape.as_slice(), tensor.integers(name)?))
        };
        match self {
            Self::Batch => Ok(tensors.qkv()?.into()),
            Self::Cached => {
                let x = tensors.qkv()?;
                Problem::cached(*x.q(), *x.k(), *x.v(), Some(list("kv_lens")?.1))
            }
            Self::Packed => {
                let view =
                    |name: &str| view(name, tensors.require(name)?, self.axes(name, tensors.require(name)?)?);
                let x = Qkv::new(view("q")?, view("k")?, view("v")?)?;
                Problem::packed(x, list("cu_seqlens_q")?.1, list("cu_seqlens_k")?.1)
            }
            Self::Paged => {
                let page = |name: &str| {
                    let tensor = tensors.require(name)?;
                    let [pages, size, heads, width] = four(name, tensor, "[pages, page_size, heads, width]")?;
                    let strides = [size * heads * width, width, heads * width, 1];
                    view(name, tensor, ([pages, heads, size, width], strides))
                };
                let (k, v) = (page("k_cache")?.into(), page("v_cache")?.into());
                let ((table_shape, block_table), (_, lens)) = (list("block_table")?, list("seqlens_k")?);
                let q = tensors.require("q")?.view("q")?;
                if table_shape.len() != 2 || table_shape[0] != q.shape()[0] {
                    let expected = format!("[{}, max_pages]", q.shape()[0]);
                    return Err(AttnError::value(
                        "block_table's shape",
                        format!("{table_shape:?}"),
                        expected,
                    ));
                }
                Problem::paged(q, PagedKv { k, v, block_table, lens })
            }
        }
    }

    /// The shape `(batch, heads, length, width)` of a tensor and its strides.
    fn axes(self, name: &str, tensor: &NamedTensor) -> Result<([usize; 4], [usize; 4])> {
        match (self, tensor.shape.as_slice()) {
            (Self::Packed, &[total, heads, width]) => {
                Ok(([1, heads, total, width], [total * heads * width, width, heads * width, 1]))
            }
            (Self::Packed, other) => {
                let expected = "[total, heads, width] (packed sequences)";
                Err(AttnError::value(format!("{name}'s shape"), format!("{other:?}"), expected))
            }
            (_, _) => {
                let shape = four(name, tensor, "(batch, heads, length, width)")?;
                Ok((shape, attn_core::view::contiguous_strides(shape)))
            }
        }
    }

    /// A buffer in the queries' dtype for the output of `problem`.
    pub(super) fn output(self, problem: &Problem<'_>) -> NamedTensor {
        let shape = problem.shape();
        let (batch, heads, n, width) = (shape.batch, shape.n_heads_q, shape.n_q, shape.head_dim_v);
        let dtype = problem.q().dtype();
        match self {
            Self::Packed => NamedTensor::unwritten(&[n, heads, width], dtype),
            _ => NamedTensor::unwritten(&[batch, heads, n, width], dtype),
        }
    }

    /// A tensor of this layout, to read.
    pub(super) fn view<'a>(self, name: &str, tensor: &'a NamedTensor) -> Result<TensorView<'a>> {
        view(name, tensor, self.axes(name, tensor)?)
    }

    /// A tensor of this layout, to write.
    pub(super) fn view_mut<'a>(self, name: &str, tensor: &'a mut NamedTensor) -> Result<OutMut<'a>> {
        fn typed<'a, E: Element>(
            name: &str,
            data: &'a mut [E],
            (shape, strides): ([usize; 4], [usize; 4]),
        ) -> Result<OutMut<'a>> {
            Ok(ViewMut::new(name, data, shape, strides)?.into())
        }
        let axes = self.axes(name, tensor)?;
        match &mut tensor.data {
            TensorData::F32(data) => typed(name, data, axes),
            TensorData::Bf16(data) => typed(name, data, axes),
            TensorData::F16(data) => typed(name, data, axes),
            TensorData::I32(_) | TensorData::U8(_) => Err(other_type(name, "floats")),
        }
    }

    /// Log-sum-exps as the kernel gives them, in the layout of the outputs without the width.
    pub(super) fn lse(self, problem: &Problem<'_>, lse: Vec<f32>) -> Result<NamedTensor> {
        let shape = problem.shape();
        let (batch, heads, n) = (shape.batch, shape.n_heads_q, shape.n_q);
        match self {
            Self::Packed => {
                let turned = (0..n * heads).map(|at| lse[at % heads * n + at / heads]).collect();
                NamedTensor::f32("lse", &[n, heads], turned)
            }
            _ => NamedTensor::f32("lse", &[batch, heads, n], lse),
        }
    }
}

fn view<'a>(
    name: &str,
    tensor: &'a NamedTensor,
    (shape, strides): ([usize; 4], [usize; 4]),
) -> Result<TensorView<'a>> {
    match &tensor.data {
        TensorData::F32(data) => Ok(View::new(name, data, shape, strides)?.into()),
        TensorData::Bf16(data) => Ok(View::new(name, data, shape, strides)?.into()),
        TensorData::F16(data) => Ok(View::new(name, data, shape, strides)?.into()),
        TensorData::I32(_) | TensorData::U8(_) => Err(other_type(name, "floats")),
    }
}

fn four(name: &str, tensor: &NamedTensor, expected: &str) -> Result<[usize; 4]> {
    let wrong = |_| AttnError::value(format!("{name}'s shape"), format!("{:?}", tensor.shape), expected);
    tensor.shape.as_slice().try_into().map_err(wrong)
}

fn other_type(name: &str, expected: &str) -> AttnError {
    AttnError::DType { tensor: name.into(), found: "another".into(), expected: expected.into() }
}
