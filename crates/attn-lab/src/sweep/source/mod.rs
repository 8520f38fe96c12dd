//! Where q, k and v come from. Every row of the results names its source.
//!
//! - [`lm`](LmText): the global layer of the shipped byte-level language model reading a text. The default.
//! - [`file`](FileTensors): the user's own tensors.
//! - [`planted`](Planted): a sink, a local band and needles, put where we know them.
//! - [`gauss`](Gauss): independent normal numbers, the control.

mod file;
mod gauss;
mod lm;
mod planted;

pub use file::FileTensors;
pub use gauss::Gauss;
pub use lm::LmText;
pub use planted::{BAND, NEEDLE_EVERY, Planted, SINK_WEIGHT};

use crate::{LabError, Result};
use attn_core::registry::{NamedTensor, NamedTensors, TensorData};
use attn_core::{AttnShape, DType, Element};
use half::{bf16, f16};
use std::fmt;

/// The kinds of sources.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum SourceKind {
    /// The shipped byte-level language model, reading a text
    Lm,
    /// Tensors q, k, v (batch, heads, n, head_dim) from --input
    File,
    /// A sink, a local band and needles
    Planted,
    /// Independent normal numbers
    Gauss,
}

impl fmt::Display for SourceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Lm => "lm",
            Self::File => "file",
            Self::Planted => "planted",
            Self::Gauss => "gauss",
        })
    }
}

/// A source of inputs of any length up to its end. The inputs of a length depend on nothing but the source and it.
pub trait Source: Sync {
    /// Its kind.
    fn kind(&self) -> SourceKind;

    /// The source in words, for tables.
    fn describe(&self) -> String;

    /// Sizes of the problem of length `n`.
    fn shape(&self, n: usize) -> AttnShape;

    /// Hash of all that the inputs of length `n` are made from.
    ///
    /// # Errors
    /// [`LabError`] if the source ends before `n`.
    fn hash(&self, n: usize) -> Result<String>;

    /// `q`, `k` and `v` of length `n` in f32.
    ///
    /// # Errors
    /// [`LabError`] if the source ends before `n` or cannot be read.
    fn inputs(&self, n: usize) -> Result<NamedTensors>;
}

/// Rounds every tensor to `dtype`.
///
/// # Errors
/// [`LabError::Argument`] for integers.
pub fn convert(tensors: NamedTensors, dtype: DType) -> Result<NamedTensors> {
    let convert = |(name, tensor): (String, NamedTensor)| {
        let data = match (tensor.data, dtype) {
            (same @ TensorData::F32(_), DType::F32) => same,
            (data, dtype) => {
                let wide = to_f32(&name, data)?;
                match dtype {
                    DType::F32 => TensorData::F32(wide),
                    DType::Bf16 => TensorData::Bf16(wide.into_iter().map(<bf16 as Element>::store).collect()),
                    DType::F16 => TensorData::F16(wide.into_iter().map(<f16 as Element>::store).collect()),
                }
            }
        };
        Ok((name, NamedTensor { shape: tensor.shape, data }))
    };
    Ok(NamedTensors(tensors.0.into_iter().map(convert).collect::<Result<_>>()?))
}

fn to_f32(name: &str, data: TensorData) -> Result<Vec<f32>> {
    match data {
        TensorData::F32(data) => Ok(data),
        TensorData::Bf16(data) => Ok(data.into_iter().map(Element::load).collect()),
        TensorData::F16(data) => Ok(data.into_iter().map(Element::load).collect()),
        TensorData::I32(_) | TensorData::U8(_) => Err(LabError::Argument(format!(
            "tensor `{name}` holds integers; expected floating-point numbers"
        ))),
    }
}

/// `q`, `k`, `v` of a problem as named tensors.
fn named(shape: &AttnShape, q: Vec<f32>, k: Vec<f32>, v: Vec<f32>) -> Result<NamedTensors> {
    let tensor = |name: &str, axes: [usize; 4], data| {
        Result::Ok((name.to_string(), NamedTensor::f32(name, &axes, data)?))
    };
    let all = [tensor("q", shape.q(), q)?, tensor("k", shape.k(), k)?, tensor("v", shape.v(), v)?];
    Ok(NamedTensors(all.into()))
}

/// FNV-1a in 64 bits over several pieces: names inputs, defends against nobody.
#[derive(Debug, Clone, Copy)]
pub(super) struct Fnv(u64);

impl Fnv {
    pub(super) fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    pub(super) fn with(self, bytes: &[u8]) -> Self {
        Self(bytes.iter().fold(self.0, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3)))
    }

    pub(super) fn hex(self) -> String {
        format!("{:016x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn conversion_rounds_and_refuses_integers() {
        let q = NamedTensor::f32("q", &[1, 1, 1, 2], vec![1.0, 1.001]).unwrap();
        let tensors = NamedTensors([("q".to_string(), q)].into());
        let rounded = convert(tensors.clone(), DType::Bf16).unwrap();
        assert_eq!(rounded.get("q").unwrap().data, TensorData::Bf16(vec![bf16::ONE, bf16::ONE]));
        assert_eq!(convert(tensors.clone(), DType::F32).unwrap(), tensors);
        let widened = convert(rounded, DType::F32).unwrap();
        assert_eq!(widened.get("q").unwrap().data, TensorData::F32(vec![1.0, 1.0]));
        let integers = NamedTensor { shape: vec![1], data: TensorData::I32(vec![1]) };
        assert!(convert(NamedTensors([("q".to_string(), integers)].into()), DType::F32).is_err());
    }

    #[test]
    fn the_hash_is_fnv_1a() {
        assert_eq!(Fnv::new().with(b"foobar").hex(), "85944171f73967e8");
        assert_eq!(Fnv::new().with(b"foo").with(b"bar").hex(), "85944171f73967e8");
    }
}
