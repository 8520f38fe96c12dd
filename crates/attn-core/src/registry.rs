//! Variants by name: what the conformance suite, the benches and the `attn` program are driven by.
//!
//! A variant crate exports `registry() -> Vec<Entry>`. An [`Entry`] knows the variant's options with their
//! defaults, builds it from `key=value` pairs, and runs it on named tensors (so that gates, masks and weights can
//! come from a file).

use crate::{Attention, AttnError, DType, Family, OutMut, Qkv, Result, View, ViewMut};
use half::{bf16, f16};
use std::collections::BTreeMap;

/// One option of a variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct OptionSpec {
    /// Its key.
    pub name: &'static str,
    /// Its value when not given, as it would be written; empty for "none".
    pub default: &'static str,
    /// One line of help.
    pub help: &'static str,
}

impl OptionSpec {
    /// `causal`, off unless given.
    pub const CAUSAL: Self = Self {
        name: "causal",
        default: "false",
        help: "a query sees no key after its position (true|false)",
    };

    /// `scale` of softmax scores.
    pub const SCALE: Self =
        Self { name: "scale", default: "", help: "multiplies raw dot products; default 1/sqrt(head_dim)" };
}

/// A registered variant.
#[derive(Clone, Copy)]
pub struct Entry {
    /// Stable kebab-case name.
    pub name: &'static str,
    /// Its family.
    pub family: Family,
    /// One line: what it does, and from which paper.
    pub summary: &'static str,
    /// Its options.
    pub options: &'static [OptionSpec],
    /// Builds the variant. Called through [`Entry::build`], which has checked the names of the options.
    pub constructor: fn(&Options) -> Result<Box<dyn Attention>>,
    /// Runs it on named tensors; [`run_qkv`] for variants whose inputs are q, k and v alone.
    pub runner: fn(&Entry, &Options, &NamedTensors) -> Result<NamedTensors>,
}

impl Entry {
    /// The variant configured by `options`.
    ///
    /// # Errors
    /// [`AttnError::Value`] for an option that the variant does not have (naming those it has) or a value that
    /// cannot be read.
    pub fn build(&self, options: &Options) -> Result<Box<dyn Attention>> {
        self.check(options)?;
        (self.constructor)(options)
    }

    /// Runs the variant on `q`, `k`, `v` and what else it knows, returns `o` and what else it gives (`lse`, `sT`).
    ///
    /// # Errors
    /// As [`Entry::build`]; [`AttnError::Missing`] for a tensor that is not there.
    pub fn run(&self, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
        self.check(options)?;
        (self.runner)(self, options, tensors)
    }

    /// The options with their defaults filled in.
    pub fn defaults(&self) -> Options {
        let given = self.options.iter().filter(|o| !o.default.is_empty());
        Options(given.map(|o| (o.name.to_string(), o.default.to_string())).collect())
    }

    fn check(&self, options: &Options) -> Result<()> {
        let unknown = options.0.keys().find(|key| !self.options.iter().any(|o| o.name == **key));
        let Some(key) = unknown else { return Ok(()) };
        let known: Vec<&str> = self.options.iter().map(|o| o.name).collect();
        Err(AttnError::value(
            format!("option `{key}` of {}", self.name),
            "unknown",
            format!("one of: {}", known.join(", ")),
        ))
    }
}

/// Finds an entry by name.
///
/// # Errors
/// [`AttnError::Value`] that lists the known names.
pub fn find<'a>(entries: &'a [Entry], name: &str) -> Result<&'a Entry> {
    entries.iter().find(|e| e.name == name).ok_or_else(|| {
        let known: Vec<&str> = entries.iter().map(|e| e.name).collect();
        AttnError::value("variant", name, format!("one of: {}", known.join(", ")))
    })
}

/// `key=value` options, as given.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Options(pub BTreeMap<String, String>);

impl Options {
    /// No options: all defaults.
    pub fn new() -> Self {
        Self::default()
    }

    /// Parses `key=value` pairs.
    ///
    /// # Errors
    /// [`AttnError::Value`] for a pair without `=` or a key given twice.
    pub fn parse<'a>(pairs: impl IntoIterator<Item = &'a str>) -> Result<Self> {
        let mut options = Self::new();
        for pair in pairs {
            let (key, value) =
                pair.split_once('=').ok_or_else(|| AttnError::value("option", pair, "key=value"))?;
            if options.0.insert(key.trim().into(), value.trim().into()).is_some() {
                return Err(AttnError::value(format!("option `{key}`"), "given twice", "once"));
            }
        }
        Ok(options)
    }

    /// With one more option; an existing value is replaced.
    #[must_use]
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.0.insert(key.into(), value.to_string());
        self
    }

    /// The value of `key`, or `None` if it is absent, empty or `none`.
    ///
    /// # Errors
    /// [`AttnError::Value`] naming the option and what it should look like.
    pub fn get<T: std::str::FromStr>(&self, key: &str) -> Result<Option<T>> {
        match self.0.get(key).map(String::as_str) {
            None | Some("" | "none") => Ok(None),
            Some(text) => text.parse().map(Some).map_err(|_| {
                let wanted = std::any::type_name::<T>().rsplit("::").next().unwrap_or("value");
                AttnError::value(format!("option `{key}`"), format!("`{text}`"), format!("a {wanted}"))
            }),
        }
    }

    /// The value of `key`, or `default`.
    ///
    /// # Errors
    /// As [`Options::get`].
    pub fn get_or<T: std::str::FromStr>(&self, key: &str, default: T) -> Result<T> {
        Ok(self.get(key)?.unwrap_or(default))
    }
}

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
        fn view<'a, E: crate::Element>(name: &str, shape: &[usize], data: &'a [E]) -> Result<View<'a, E>> {
            let axes = shape.try_into().map_err(|_| {
                let expected = "(batch, heads, length, width)";
                AttnError::value(format!("{name}'s shape"), format!("{shape:?}"), expected)
            })?;
            View::contiguous(name, data, axes)
        }
        let tensor = |name: &str| -> Result<crate::TensorView<'_>> {
            let t = self.require(name)?;
            match &t.data {
                TensorData::F32(d) => Ok(view(name, &t.shape, d)?.into()),
                TensorData::Bf16(d) => Ok(view(name, &t.shape, d)?.into()),
                TensorData::F16(d) => Ok(view(name, &t.shape, d)?.into()),
                TensorData::I32(_) | TensorData::U8(_) => Err(AttnError::DType {
                    tensor: name.into(),
                    found: "an integer type".into(),
                    expected: "f32, bf16 or f16".into(),
                }),
            }
        };
        Qkv::new(tensor("q")?, tensor("k")?, tensor("v")?)
    }
}

/// An output buffer of a problem's shape and dtype, filled with NaN so that a row nobody wrote is seen.
pub fn output_like(x: &Qkv<'_>) -> NamedTensor {
    let shape = x.shape().out();
    let len = shape.iter().product();
    let data = match x.dtype() {
        DType::F32 => TensorData::F32(vec![f32::NAN; len]),
        DType::Bf16 => TensorData::Bf16(vec![bf16::NAN; len]),
        DType::F16 => TensorData::F16(vec![f16::NAN; len]),
    };
    NamedTensor { shape: shape.to_vec(), data }
}

impl NamedTensor {
    /// The tensor as an output; its four axes are `(batch, heads, length, width)`.
    ///
    /// # Errors
    /// [`AttnError::Value`] for another rank, [`AttnError::DType`] for integers.
    pub fn as_out(&mut self) -> Result<OutMut<'_>> {
        let shape: [usize; 4] = self.shape.as_slice().try_into().map_err(|_| {
            AttnError::value("out's shape", format!("{:?}", self.shape), "(batch, heads, length, width)")
        })?;
        match &mut self.data {
            TensorData::F32(d) => Ok(ViewMut::contiguous("out", d, shape)?.into()),
            TensorData::Bf16(d) => Ok(ViewMut::contiguous("out", d, shape)?.into()),
            TensorData::F16(d) => Ok(ViewMut::contiguous("out", d, shape)?.into()),
            TensorData::I32(_) | TensorData::U8(_) => Err(AttnError::DType {
                tensor: "out".into(),
                found: "integers".into(),
                expected: "floats".into(),
            }),
        }
    }
}

/// Runs a variant whose inputs are `q`, `k`, `v` alone: gives `o`, and `lse` where its rows are softmax rows.
///
/// # Errors
/// Those of the inputs and of the variant; [`AttnError::Unsupported`] for any other tensor.
pub fn run_qkv(entry: &Entry, options: &Options, tensors: &NamedTensors) -> Result<NamedTensors> {
    tensors.only(entry.name, &["q", "k", "v"])?;
    let attention = entry.build(options)?;
    let x = tensors.qkv()?;
    let mut given = NamedTensors::default();
    let mut out = output_like(&x);
    if let Some(softmax) = attention.as_softmax() {
        let mut lse = vec![f32::NAN; x.shape().rows()];
        softmax.forward_with_lse(x, out.as_out()?, &mut lse)?;
        let [batch, heads, n_q, _] = x.shape().out();
        given.0.insert("lse".into(), NamedTensor::f32("lse", &[batch, heads, n_q], lse)?);
    } else {
        attention.forward(x, out.as_out()?)?;
    }
    given.0.insert("o".into(), out);
    Ok(given)
}
