//! Tensors of any storage type and layout, also of layouts that do not fit.

use super::bytes::Bytes;
use super::numbers::numbers;
use attn_core::{DType, Element, OutMut, Result, TensorView, View, ViewMut};
use half::{bf16, f16};

/// A bit pattern that no computation gives: what is still there was not written.
pub trait Canary: Element {
    const CANARY: Self;
    fn bits(self) -> u32;
}

/// The canary of log-sum-exps.
pub const LSE_CANARY: f32 = f32::CANARY;

impl Canary for f32 {
    const CANARY: Self = f32::from_bits(0x7fe5_5a5a);
    fn bits(self) -> u32 {
        self.to_bits()
    }
}

impl Canary for bf16 {
    const CANARY: Self = bf16::from_bits(0x7fe5);
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

impl Canary for f16 {
    const CANARY: Self = f16::from_bits(0x7fe5);
    fn bits(self) -> u32 {
        self.to_bits().into()
    }
}

/// `(batch, heads, length, width)` in a buffer that may be too short for it.
#[derive(Debug, Clone)]
pub struct Layout {
    pub shape: [usize; 4],
    pub strides: [usize; 4],
    pub len: usize,
}

impl Layout {
    /// Any layout of `shape`, rarely one that does not fit; `repeats` allows strides of 0.
    pub fn of(bytes: &mut Bytes<'_>, shape: [usize; 4], repeats: bool) -> Self {
        let [_, heads, n, width] = shape.map(|axis| axis.min(1 << 12));
        let (mut strides, kind) = ([heads * n * width, n * width, width, 1], bytes.within(0..=7));
        match kind {
            4 => strides = [n * heads * width, width, heads * width, 1],
            5 => {
                let row = width + bytes.within(0..=5);
                let head = n * row + bytes.within(0..=5);
                strides = [heads * head + bytes.within(0..=5), head, row, 1];
            }
            6 if repeats => strides[bytes.within(0..=2)] = 0,
            7 if bytes.one_in(3) => {
                for stride in &mut strides {
                    *stride = bytes.pick(&[*stride, 0, 1, 2, width, usize::MAX, 1 << 62]);
                }
            }
            _ => {}
        }
        let last = (0..4)
            .fold(0usize, |at, a| at.saturating_add(shape[a].saturating_sub(1).saturating_mul(strides[a])));
        let needed = if shape.contains(&0) { 0 } else { last.saturating_add(1) };
        let len = if needed > 1 << 18 { 64 } else { bytes.about(needed) + bytes.pick(&[0, 0, 3]) };
        Self { shape, strides, len }
    }

    /// Where an element lies.
    pub fn place(&self, at: [usize; 4]) -> usize {
        (0..4).map(|a| at[a] * self.strides[a]).sum()
    }

    /// Every element's place; only for layouts that fit.
    pub fn places(&self) -> impl Iterator<Item = usize> + '_ {
        let [b, h, n, d] = self.shape;
        let total = if self.shape.contains(&0) { 0 } else { b * h * n * d };
        (0..total).map(move |x| self.place([x / d / n / h, x / d / n % h, x / d % n, x % d]))
    }

    /// Whether [`Layout::places`] can be asked.
    fn fits(&self) -> bool {
        let axis =
            |at: usize, a: usize| (self.shape[a].max(1) - 1).checked_mul(self.strides[a])?.checked_add(at);
        self.shape.contains(&0) || (0..4).try_fold(0, axis).is_some_and(|last| last < self.len)
    }
}

/// A tensor of one storage type.
#[derive(Clone)]
pub struct Stored<E> {
    pub layout: Layout,
    pub data: Vec<E>,
}

impl<E> std::fmt::Debug for Stored<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.layout.fmt(f)
    }
}

impl<E: Canary> Stored<E> {
    /// Numbers in the elements, NaN between them.
    fn filled(bytes: &mut Bytes<'_>, layout: Layout) -> Self {
        let mut data = vec![E::store(f32::NAN); layout.len];
        let numbers = numbers(bytes, layout.len);
        if layout.fits() {
            layout.places().for_each(|at| data[at] = E::store(numbers[at]));
        }
        Self { layout, data }
    }

    fn untouched(layout: Layout) -> Self {
        Self { data: vec![E::CANARY; layout.len], layout }
    }

    /// True if every element was written and nothing between them was.
    fn written_exactly(&self) -> bool {
        let mut inside = vec![false; self.data.len()];
        self.layout.places().for_each(|at| inside[at] = true);
        self.data.iter().zip(inside).all(|(x, inside)| inside != (x.bits() == E::CANARY.bits()))
    }
}

/// A tensor whose storage type was drawn.
#[derive(Debug, Clone)]
pub enum Tensor {
    F32(Stored<f32>),
    Bf16(Stored<bf16>),
    F16(Stored<f16>),
}

macro_rules! each {
    ($tensor:expr, $stored:ident => $result:expr) => {
        match $tensor {
            Tensor::F32($stored) => $result,
            Tensor::Bf16($stored) => $result,
            Tensor::F16($stored) => $result,
        }
    };
}

impl Tensor {
    pub fn filled(bytes: &mut Bytes<'_>, dtype: DType, layout: Layout) -> Self {
        match dtype {
            DType::F32 => Self::F32(Stored::filled(bytes, layout)),
            DType::Bf16 => Self::Bf16(Stored::filled(bytes, layout)),
            DType::F16 => Self::F16(Stored::filled(bytes, layout)),
        }
    }

    /// An output that nobody has written.
    pub fn untouched(dtype: DType, layout: Layout) -> Self {
        match dtype {
            DType::F32 => Self::F32(Stored::untouched(layout)),
            DType::Bf16 => Self::Bf16(Stored::untouched(layout)),
            DType::F16 => Self::F16(Stored::untouched(layout)),
        }
    }

    pub fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::Bf16(_) => DType::Bf16,
            Self::F16(_) => DType::F16,
        }
    }

    pub fn layout(&self) -> &Layout {
        each!(self, stored => &stored.layout)
    }

    pub fn view(&self, name: &str) -> Result<TensorView<'_>> {
        fn view<'a, E: Element>(name: &str, stored: &'a Stored<E>) -> Result<TensorView<'a>> {
            Ok(View::new(name, &stored.data, stored.layout.shape, stored.layout.strides)?.into())
        }
        each!(self, stored => view(name, stored))
    }

    pub fn view_mut(&mut self, name: &str) -> Result<OutMut<'_>> {
        fn view<'a, E: Element>(name: &str, stored: &'a mut Stored<E>) -> Result<OutMut<'a>> {
            Ok(ViewMut::new(name, &mut stored.data, stored.layout.shape, stored.layout.strides)?.into())
        }
        each!(self, stored => view(name, stored))
    }

    pub fn row(&self, batch: usize, head: usize, i: usize) -> Vec<f32> {
        let columns = 0..self.layout().shape[3];
        let place = |c| self.layout().place([batch, head, i, c]);
        each!(self, stored => columns.map(|c| stored.data[place(c)].load()).collect())
    }

    pub fn bits(&self) -> Vec<u32> {
        each!(self, stored => stored.data.iter().map(|x| x.bits()).collect())
    }

    pub fn written_exactly(&self) -> bool {
        each!(self, stored => stored.written_exactly())
    }
}
