//! Tensors by name, and as what kernels read and write.

use crate::{AttnError, DType, Element, OutMut, Qkv, Result, TensorView, View, ViewMut};
use half::{bf16, f16};
use std::collections::BTreeMap;

/// Numbers of a named tensor.
#[derive(Debug, Clone, PartialEq)]
pub enum TensorData {
    /// Single precision.
    F32(Vec<f32>),
    /// bfloat16.
    Bf16(Vec<bf16>),
    /// Half precision.
    F16(Vec<f16>),
    /// Indices.
    I32(Vec<i32>),
    /// Masks: 0 is false.
    U8(Vec<u8>),
}

impl TensorData {
    /// The storage type, if these are floats.
    pub fn dtype(&self) -> Option<DType> {
        match self {
            Self::F32(_) => Some(DType::F32),
            Self::Bf16(_) => Some(DType::Bf16),
            Self::F16(_) => Some(DType::F16),
            Self::I32(_) | Self::U8(_) => None,
        }
    }

    /// The numbers as f64.
    pub fn to_f64(&self) -> Vec<f64> {
        match self {
            Self::F32(data) => data.iter().map(|x| f64::from(*x)).collect(),
            Self::Bf16(data) => data.iter().map(|x| x.to_f64()).collect(),
            Self::F16(data) => data.iter().map(|x| x.to_f64()).collect(),
            Self::I32(data) => data.iter().map(|x| f64::from(*x)).collect(),
            Self::U8(data) => data.iter().map(|x| f64::from(*x)).collect(),
        }
    }
}

/// A tensor with its shape, row-major.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedTensor {
    /// Lengths of the axes.
    pub shape: Vec<usize>,
    /// The numbers, row-major.
    pub data: TensorData,
}

impl NamedTensor {
    /// A row-major f32 tensor.
    ///
    /// # Errors
    /// [`AttnError::Layout`] if the number of elements is not that of the shape.
    pub fn f32(name: &str, shape: &[usize], data: Vec<f32>) -> Result<Self> {
        let wanted: usize = shape.iter().product();
        if data.len() != wanted {
            let reason = format!("shape {shape:?} has {wanted} elements, found {}", data.len());
            return Err(AttnError::Layout { tensor: name.into(), reason });
        }
        Ok(Self { shape: shape.to_vec(), data: TensorData::F32(data) })
    }
}

/// Tensors by name: `q`, `k`, `v`, `mask`, `log_decay`, `initial_state`, ... in; `o`, `lse`, `sT`, ... out.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct NamedTensors(pub BTreeMap<String, NamedTensor>);

impl NamedTensors {
    /// The tensor called `name`, if there is one.
    pub fn get(&self, name: &str) -> Option<&NamedTensor> {
        self.0.get(name)
    }

    /// The tensor called `name`.
    ///
    /// # Errors
    /// [`AttnError::Missing`] that lists the names that are there.
    pub fn require(&self, name: &str) -> Result<&NamedTensor> {
        self.get(name).ok_or_else(|| AttnError::Missing {
            name: name.into(),
            found: self.0.keys().cloned().collect::<Vec<_>>().join(", "),
        })
    }

    /// Checks that every tensor is one of `known`: a tensor that a variant does not read is an error, never ignored.
    ///
    /// # Errors
    /// [`AttnError::Unsupported`] naming the first other tensor and those that are known.
    pub fn only(&self, variant: &str, known: &[&str]) -> Result<()> {
        match self.0.keys().find(|name| !known.contains(&name.as_str())) {
            None => Ok(()),
            Some(name) => {
                let known = known.join(", ");
                Err(AttnError::unsupported(variant, format!("a tensor `{name}`; it reads: {known}")))
            }
        }
    }

    /// The numbers of an f32 tensor.
    ///
    /// # Errors
    /// [`AttnError::DType`] if it holds something else.
    pub fn f32(&self, name: &str) -> Result<Option<(&[usize], &[f32])>> {
        let Some(tensor) = self.get(name) else { return Ok(None) };
        match &tensor.data {
            TensorData::F32(data) => Ok(Some((&tensor.shape, data))),
            _ => {
                Err(AttnError::DType { tensor: name.into(), found: "another".into(), expected: "f32".into() })
            }
        }
    }

    /// The three inputs as views; each must have the four axes `(batch, heads, length, width)`.
    ///
    /// # Errors
    /// [`AttnError::Missing`], [`AttnError::Value`] for another rank, and those of [`Qkv::new`].
    pub fn qkv(&self) -> Result<Qkv<'_>> {
        let tensor = |name: &str| self.require(name)?.view(name);
        Qkv::new(tensor("q")?, tensor("k")?, tensor("v")?)
    }
}

impl NamedTensor {
    /// A float tensor as a view; its four axes are `(batch, heads, length, width)`. `name` is for messages.
    ///
    /// # Errors
    /// [`AttnError::Value`] for another rank, [`AttnError::DType`] for integers.
    pub fn view(&self, name: &str) -> Result<TensorView<'_>> {
        let shape = self.four_axes(name)?;
        match &self.data {
            TensorData::F32(d) => Ok(View::contiguous(name, d, shape)?.into()),
            TensorData::Bf16(d) => Ok(View::contiguous(name, d, shape)?.into()),
            TensorData::F16(d) => Ok(View::contiguous(name, d, shape)?.into()),
            TensorData::I32(_) | TensorData::U8(_) => Err(integers(name)),
        }
    }

    /// The tensor as an output; its four axes are `(batch, heads, length, width)`.
    ///
    /// # Errors
    /// [`AttnError::Value`] for another rank, [`AttnError::DType`] for integers.
    pub fn as_out(&mut self) -> Result<OutMut<'_>> {
        let shape = self.four_axes("out")?;
        match &mut self.data {
            TensorData::F32(d) => Ok(ViewMut::contiguous("out", d, shape)?.into()),
            TensorData::Bf16(d) => Ok(ViewMut::contiguous("out", d, shape)?.into()),
            TensorData::F16(d) => Ok(ViewMut::contiguous("out", d, shape)?.into()),
            TensorData::I32(_) | TensorData::U8(_) => Err(integers("out")),
        }
    }

    /// An f32 tensor rounded to another storage type; others stay as they are.
    #[must_use]
    pub fn rounded(&self, dtype: DType) -> Self {
        let data = match (&self.data, dtype) {
            (TensorData::F32(from), DType::Bf16) => {
                TensorData::Bf16(from.iter().map(|x| bf16::store(*x)).collect())
            }
            (TensorData::F32(from), DType::F16) => {
                TensorData::F16(from.iter().map(|x| f16::store(*x)).collect())
            }
            (other, _) => other.clone(),
        };
        Self { shape: self.shape.clone(), data }
    }

    /// Multiplies every float.
    pub fn scale(&mut self, factor: f32) {
        fn each<E: Element>(data: &mut [E], factor: f32) {
            data.iter_mut().for_each(|x| *x = E::store(x.load() * factor));
        }
        match &mut self.data {
            TensorData::F32(data) => each(data, factor),
            TensorData::Bf16(data) => each(data, factor),
            TensorData::F16(data) => each(data, factor),
            TensorData::I32(_) | TensorData::U8(_) => {}
        }
    }

    /// A float buffer filled with NaN, so that an element nobody wrote is seen.
    pub fn unwritten(shape: &[usize], dtype: DType) -> Self {
        let len = shape.iter().product();
        let data = match dtype {
            DType::F32 => TensorData::F32(vec![f32::NAN; len]),
            DType::Bf16 => TensorData::Bf16(vec![bf16::NAN; len]),
            DType::F16 => TensorData::F16(vec![f16::NAN; len]),
        };
        Self { shape: shape.to_vec(), data }
    }

    fn four_axes(&self, name: &str) -> Result<[usize; 4]> {
        self.shape.as_slice().try_into().map_err(|_| {
            let expected = "(batch, heads, length, width)";
            AttnError::value(format!("{name}'s shape"), format!("{:?}", self.shape), expected)
        })
    }
}

fn integers(name: &str) -> AttnError {
    let (found, expected) = ("an integer type".into(), "f32, bf16 or f16".into());
    AttnError::DType { tensor: name.into(), found, expected }
}

/// An output buffer of a problem's shape and dtype, filled with NaN so that a row nobody wrote is seen.
pub fn output_like(x: &Qkv<'_>) -> NamedTensor {
    NamedTensor::unwritten(&x.shape().out(), x.dtype())
}
