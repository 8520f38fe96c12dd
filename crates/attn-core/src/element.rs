//! Storage types. Kernels load to f32, accumulate in f32, and round once when they store.

use crate::{OutMut, TensorView, View, ViewMut};
use half::{bf16, f16};
use serde::{Deserialize, Serialize};
use std::fmt;

/// The storage type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// bfloat16: the upper half of an f32.
    Bf16,
    /// IEEE half precision.
    F16,
}

impl DType {
    /// Every storage type, widest first.
    pub const ALL: [DType; 3] = [DType::F32, DType::Bf16, DType::F16];

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::Bf16 | DType::F16 => 2,
        }
    }

    /// Unit roundoff: the relative error of rounding to this type, as a power of two.
    pub fn roundoff(self) -> f64 {
        match self {
            DType::F32 => 2f64.powi(-24),
            DType::F16 => 2f64.powi(-11),
            DType::Bf16 => 2f64.powi(-8),
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
        })
    }
}

impl std::str::FromStr for DType {
    type Err = crate::AttnError;

    fn from_str(s: &str) -> crate::Result<Self> {
        DType::ALL
            .into_iter()
            .find(|d| d.to_string() == s)
            .ok_or_else(|| crate::AttnError::value("dtype", s, "f32, bf16 or f16"))
    }
}

/// A storage type the kernels can read and write.
pub trait Element: Copy + Send + Sync + PartialEq + fmt::Debug + 'static {
    /// Its runtime tag.
    const DTYPE: DType;
    /// Zero.
    const ZERO: Self;

    /// Widens to f32; exact for every storage type.
    fn load(self) -> f32;

    /// Rounds to nearest, ties to even.
    fn store(x: f32) -> Self;

    /// The slice itself where the storage type is f32: kernels then read it in place.
    fn as_f32(slice: &[Self]) -> Option<&[f32]>;

    /// A typed view as a view whose dtype is known at run time.
    fn tag(view: View<'_, Self>) -> TensorView<'_>;

    /// A typed output as an output whose dtype is known at run time.
    fn tag_out(out: ViewMut<'_, Self>) -> OutMut<'_>;

    /// The typed view inside `view`, if it has this dtype.
    fn untag(view: TensorView<'_>) -> Option<View<'_, Self>>;
}

impl Element for f32 {
    const DTYPE: DType = DType::F32;
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn load(self) -> f32 {
        self
    }

    #[inline(always)]
    fn store(x: f32) -> Self {
        x
    }

    #[inline(always)]
    fn as_f32(slice: &[Self]) -> Option<&[f32]> {
        Some(slice)
    }

    fn tag(view: View<'_, Self>) -> TensorView<'_> {
        TensorView::F32(view)
    }

    fn tag_out(out: ViewMut<'_, Self>) -> OutMut<'_> {
        OutMut::F32(out)
    }

    fn untag(view: TensorView<'_>) -> Option<View<'_, Self>> {
        if let TensorView::F32(view) = view { Some(view) } else { None }
    }
}

impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
    const ZERO: Self = bf16::ZERO;

    #[inline(always)]
    fn load(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn store(x: f32) -> Self {
        bf16::from_f32(x)
    }

    #[inline(always)]
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn tag(view: View<'_, Self>) -> TensorView<'_> {
        TensorView::Bf16(view)
    }

    fn tag_out(out: ViewMut<'_, Self>) -> OutMut<'_> {
        OutMut::Bf16(out)
    }

    fn untag(view: TensorView<'_>) -> Option<View<'_, Self>> {
        if let TensorView::Bf16(view) = view { Some(view) } else { None }
    }
}

impl Element for f16 {
    const DTYPE: DType = DType::F16;
    const ZERO: Self = f16::ZERO;

    #[inline(always)]
    fn load(self) -> f32 {
        self.to_f32()
    }

    #[inline(always)]
    fn store(x: f32) -> Self {
        f16::from_f32(x)
    }

    #[inline(always)]
    fn as_f32(_: &[Self]) -> Option<&[f32]> {
        None
    }

    fn tag(view: View<'_, Self>) -> TensorView<'_> {
        TensorView::F16(view)
    }

    fn tag_out(out: ViewMut<'_, Self>) -> OutMut<'_> {
        OutMut::F16(out)
    }

    fn untag(view: TensorView<'_>) -> Option<View<'_, Self>> {
        if let TensorView::F16(view) = view { Some(view) } else { None }
    }
}
