//! Tensors by name, and as what kernels read and write.

use crate::{AttnError, DType, Element, OutMut, Qkv, Result, TensorView, View, ViewMut};
use half::{bf16, f16};
use std::collections::BTreeMap;

/// What a view of a tensor reads.
const FLOATS: &str = "f32, bf16 or f16";

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

    /// The name of the storage type: `f32`, `bf16`, `f16`, `i32` or `u8`.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::F32(_) => "f32",
            Self::Bf16(_) => "bf16",
            Self::F16(_) => "f16",
            Self::I32(_) => "i32",
            Self::U8(_) => "u8",
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
            _ => Err(tensor.other_type(name, "f32")),
        }
    }

    /// The shape and the numbers of an i32 tensor, if it is there.
    ///
    /// # Errors
    /// [`AttnError::DType`] if it holds something else.
    pub fn i32(&self, name: &str) -> Result<Option<(&[usize], &[i32])>> {
        let Some(tensor) = self.get(name) else { return Ok(None) };
        Ok(Some((&tensor.shape, tensor.integers(name)?)))
    }

    /// The shape and the values of a tensor of booleans, if it is there; see [`NamedTensor::booleans`].
    ///
    /// # Errors
    /// [`AttnError::DType`] if it holds floats.
    pub fn booleans(&self, name: &str) -> Result<Option<(&[usize], Vec<bool>)>> {
        let Some(tensor) = self.get(name) else { return Ok(None) };
        Ok(Some((&tensor.shape, tensor.booleans(name)?)))
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
            TensorData::I32(_) | TensorData::U8(_) => Err(self.other_type(name, FLOATS)),
        }
    }

    /// The numbers of an i32 tensor, row-major. `name` is for messages.
    ///
    /// # Errors
    /// [`AttnError::DType`] if it holds something else.
    pub fn integers(&self, name: &str) -> Result<&[i32]> {
        match &self.data {
            TensorData::I32(data) => Ok(data),
            _ => Err(self.other_type(name, "i32")),
        }
    }

    /// The values of a tensor of booleans, row-major: u8 or i32, of which 0 is false. `name` is for messages.
    ///
    /// # Errors
    /// [`AttnError::DType`] if it holds floats.
    pub fn booleans(&self, name: &str) -> Result<Vec<bool>> {
        match &self.data {
            TensorData::U8(data) => Ok(data.iter().map(|x| *x != 0).collect()),
            TensorData::I32(data) => Ok(data.iter().map(|x| *x != 0).collect()),
            _ => Err(self.other_type(name, "u8 or i32 (0 is false)")),
        }
    }

    /// The tensor as an output; its four axes are `(batch, heads, length, width)`.
    ///
    /// # Errors
    /// [`AttnError::Value`] for another rank, [`AttnError::DType`] for integers.
    pub fn as_out(&mut self) -> Result<OutMut<'_>> {
        let (shape, other) = (self.four_axes("out")?, self.other_type("out", FLOATS));
        match &mut self.data {
            TensorData::F32(d) => Ok(ViewMut::contiguous("out", d, shape)?.into()),
            TensorData::Bf16(d) => Ok(ViewMut::contiguous("out", d, shape)?.into()),
            TensorData::F16(d) => Ok(ViewMut::contiguous("out", d, shape)?.into()),
            TensorData::I32(_) | TensorData::U8(_) => Err(other),
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

    /// The error of a tensor `name` that should hold something else.
    fn other_type(&self, name: &str, expected: &str) -> AttnError {
        let (found, expected) = (self.data.type_name().into(), expected.into());
        AttnError::DType { tensor: name.into(), found, expected }
    }

    fn four_axes(&self, name: &str) -> Result<[usize; 4]> {
        self.shape.as_slice().try_into().map_err(|_| {
            let expected = "(batch, heads, length, width)";
            AttnError::value(format!("{name}'s shape"), format!("{:?}", self.shape), expected)
        })
    }
}

/// An output buffer of a problem's shape and dtype, filled with NaN so that a row nobody wrote is seen.
pub fn output_like(x: &Qkv<'_>) -> NamedTensor {
    NamedTensor::unwritten(&x.shape().out(), x.dtype())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> NamedTensors {
        let tensor = |data| NamedTensor { shape: vec![1, 3], data };
        let all = [
            ("floats", TensorData::F32(vec![0.0, 1.5, -2.0])),
            ("indices", TensorData::I32(vec![0, -7, 1 << 24 | 1])),
            ("flags", TensorData::U8(vec![0, 1, 255])),
            ("halves", TensorData::F16(vec![f16::ONE; 3])),
        ];
        NamedTensors(all.into_iter().map(|(name, data)| (name.into(), tensor(data))).collect())
    }

    #[test]
    fn integers_and_booleans_are_read_with_their_shapes() {
        let tensors = tensors();
        assert_eq!(tensors.i32("indices").unwrap(), Some((&[1, 3][..], &[0, -7, 1 << 24 | 1][..])));
        let seen = Some((&[1, 3][..], vec![false, true, true]));
        assert_eq!(tensors.booleans("flags").unwrap(), seen);
        assert_eq!(tensors.booleans("indices").unwrap(), seen);
        assert_eq!(tensors.f32("floats").unwrap(), Some((&[1, 3][..], &[0.0, 1.5, -2.0][..])));
        assert_eq!(tensors.i32("nothing"), Ok(None));
        assert_eq!(tensors.booleans("nothing"), Ok(None));
    }

    #[test]
    fn another_type_is_refused_by_name() {
        let tensors = tensors();
        let cases = [
            (tensors.i32("flags").unwrap_err(), "flags: dtype is u8, expected i32"),
            (tensors.i32("halves").unwrap_err(), "halves: dtype is f16, expected i32"),
            (
                tensors.booleans("floats").unwrap_err(),
                "floats: dtype is f32, expected u8 or i32 (0 is false)",
            ),
            (tensors.f32("indices").unwrap_err(), "indices: dtype is i32, expected f32"),
        ];
        for (error, message) in cases {
            assert_eq!(error.to_string(), message);
        }
    }
}
