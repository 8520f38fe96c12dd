//! What the heads remember.

use super::inputs::Sizes;
use super::variant::Plan;
use attn_core::registry::{NamedTensor, NamedTensors};
use attn_core::{AttnError, Result};

/// A named piece of a head's memory: `rows` rows of `width` numbers, `stride` apart.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Part {
    /// What it is called when given; empty if it cannot be.
    pub initial: &'static str,
    /// What it is called afterwards; empty if it is not told.
    pub after: &'static str,
    offset: usize,
    rows: usize,
    width: usize,
    stride: usize,
    axes: usize,
    /// Its numbers when none are given.
    start: f32,
}

impl Part {
    /// A matrix `[rows, width]` at `offset`.
    pub fn matrix(
        initial: &'static str,
        after: &'static str,
        offset: usize,
        rows: usize,
        width: usize,
    ) -> Self {
        Self { initial, after, offset, rows, width, stride: width, axes: 2, start: 0.0 }
    }

    /// A row `[width]` at `offset`; a single number without an axis if `width` is 0.
    pub fn row(initial: &'static str, after: &'static str, offset: usize, width: usize) -> Self {
        let (axes, width) = (usize::from(width > 0), width.max(1));
        Self { initial, after, offset, rows: 1, width, stride: width, axes, start: 0.0 }
    }

    /// Columns `from..from + width` of a matrix of `stride` columns at `offset`.
    #[must_use]
    pub fn columns(self, from: usize, width: usize, stride: usize) -> Self {
        Self { offset: self.offset + from, width, stride, ..self }
    }

    /// A column, one number a row, told as a row.
    #[must_use]
    pub fn as_row(self) -> Self {
        Self { axes: 1, ..self }
    }

    /// With another number than 0 where none are given.
    #[must_use]
    pub fn starting_at(self, start: f32) -> Self {
        Self { start, ..self }
    }

    pub(super) fn end(&self) -> usize {
        self.offset + (self.rows - 1) * self.stride + self.width
    }

    fn shape(&self, sizes: &Sizes) -> Vec<usize> {
        let axes: &[usize] = match self.axes {
            0 => &[],
            1 => &[self.rows * self.width],
            _ => &[self.rows, self.width],
        };
        [&[sizes.batch, sizes.heads], axes].concat()
    }

    fn rows_of<'a>(&self, head: &'a [f32]) -> impl Iterator<Item = &'a [f32]> {
        let Self { offset, rows, width, stride, .. } = *self;
        (0..rows).map(move |r| &head[offset + r * stride..][..width])
    }
}

/// The memory of all heads, f32 whatever the inputs' dtype: the engine's matrices and what the front end carries.
#[derive(Debug, Clone, PartialEq)]
pub struct Memory {
    batch: usize,
    heads: usize,
    parts: Vec<Part>,
    len: usize,
    data: Vec<f32>,
}

impl Memory {
    /// A memory of nothing.
    pub fn new(plan: &Plan, sizes: &Sizes) -> Self {
        let len = plan.memory_len();
        let mut one = vec![0.0; len];
        for part in &plan.parts {
            for r in 0..part.rows {
                one[part.offset + r * part.stride..][..part.width].fill(part.start);
            }
        }
        let data = one.repeat(sizes.batch * sizes.heads);
        Self { batch: sizes.batch, heads: sizes.heads, parts: plan.parts.clone(), len, data }
    }

    /// The memory given by tensors called as the parts are: all of them or none.
    ///
    /// # Errors
    /// [`AttnError`] naming a part that is missing or has another shape.
    pub fn of(plan: &Plan, sizes: &Sizes, tensors: &NamedTensors) -> Result<Self> {
        let mut memory = Self::new(plan, sizes);
        let named = || plan.parts.iter().filter(|part| !part.initial.is_empty());
        if named().all(|part| tensors.get(part.initial).is_none()) {
            return Ok(memory);
        }
        named().try_for_each(|part| memory.set(part, part.initial, sizes, tensors))?;
        Ok(memory)
    }

    /// The gradient by the memory after the last token, from `grad_NAME` of the parts that are told; those that are not given are
    /// zero, `None` if none is.
    pub(super) fn gradient(plan: &Plan, sizes: &Sizes, tensors: &NamedTensors) -> Result<Option<Self>> {
        let mut memory = Self::new(plan, sizes);
        memory.data.fill(0.0);
        let told = plan.parts.iter().filter(|part| !part.after.is_empty());
        let given = told.map(|part| (part, format!("grad_{}", part.after)));
        let given: Vec<_> = given.filter(|(_, name)| tensors.get(name).is_some()).collect();
        given.iter().try_for_each(|(part, name)| memory.set(part, name, sizes, tensors))?;
        Ok(if given.is_empty() { None } else { Some(memory) })
    }

    /// Sets a part from the tensor `name`.
    fn set(&mut self, part: &Part, name: &str, sizes: &Sizes, tensors: &NamedTensors) -> Result<()> {
        tensors.require(name)?;
        let (shape, data) = tensors.f32(name)?.unwrap_or((&[], &[]));
        let wanted = part.shape(sizes);
        if shape != wanted {
            return Err(AttnError::value(
                format!("{name}'s shape"),
                format!("{shape:?}"),
                format!("{wanted:?}"),
            ));
        }
        let mut rows = data.chunks_exact(part.width);
        for head in self.data.chunks_exact_mut(self.len) {
            for r in 0..part.rows {
                let to = &mut head[part.offset + r * part.stride..][..part.width];
                to.copy_from_slice(rows.next().unwrap_or_default());
            }
        }
        Ok(())
    }

    /// The parts that are told, by name.
    ///
    /// # Errors
    /// Never for a memory of the plan's.
    pub fn tensors(&self, sizes: &Sizes) -> Result<NamedTensors> {
        self.named(sizes, &self.data, |part| part.after)
    }

    /// The parts of other numbers of this layout, called as they are when given.
    pub(super) fn initial_parts(&self, sizes: &Sizes, numbers: &[f32]) -> Result<NamedTensors> {
        self.named(sizes, numbers, |part| part.initial)
    }

    fn named(&self, sizes: &Sizes, data: &[f32], name: fn(&Part) -> &'static str) -> Result<NamedTensors> {
        let mut all = NamedTensors::default();
        for (part, name) in
            self.parts.iter().map(|part| (part, name(part))).filter(|(_, name)| !name.is_empty())
        {
            let heads = data.chunks_exact(self.len.max(1));
            let data =
                heads.flat_map(|head| part.rows_of(head).flatten().copied().collect::<Vec<_>>()).collect();
            all.0.insert(name.into(), NamedTensor::f32(name, &part.shape(sizes), data)?);
        }
        Ok(all)
    }

    /// The memory of every `n`-th batch entry from `first` on: that of one of `n` packed sequences.
    pub(super) fn of_sequence(&self, first: usize, n: usize) -> Self {
        let entry = (self.heads * self.len).max(1);
        let data = self.data.chunks_exact(entry).skip(first).step_by(n).flatten().copied().collect();
        Self { batch: self.batch / n, parts: self.parts.clone(), data, ..*self }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.data[..])
    }

    /// Numbers of all heads, `[batch, heads, memory]`: the matrices, row-major, then what is carried.
    pub fn numbers(&self) -> &[f32] {
        &self.data
    }

    pub(super) fn heads_mut(&mut self) -> impl Iterator<Item = &mut [f32]> {
        self.data.chunks_exact_mut(self.len.max(1))
    }

    pub(super) fn check(&self, plan: &Plan, sizes: &Sizes) -> Result<()> {
        let axes = [
            ("batch", self.batch, sizes.batch),
            ("heads", self.heads, sizes.heads),
            ("numbers a head", self.len, plan.memory_len()),
        ];
        for (axis, found, expected) in axes {
            if found != expected {
                return Err(AttnError::shape("state", axis, found, expected));
            }
        }
        Ok(())
    }
}
