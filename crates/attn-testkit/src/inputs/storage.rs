//! Tensors in the storage orders and types that callers have.

use attn_core::{Element, Qkv, Result, View, ViewMut};

/// How a tensor `(batch, heads, length, width)` lies in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `(batch, heads, length, width)`, contiguous.
    HeadsFirst,
    /// `(batch, length, heads, width)`, contiguous.
    LengthFirst,
    /// `(batch, heads, length, width)` with gaps behind rows and heads. The gaps of inputs hold NaN.
    Padded,
}

impl Layout {
    /// Every layout.
    pub const ALL: [Layout; 3] = [Layout::HeadsFirst, Layout::LengthFirst, Layout::Padded];

    /// Element strides of a tensor of this shape.
    pub fn strides(self, [_, heads, n, width]: [usize; 4]) -> [usize; 4] {
        match self {
            Self::HeadsFirst => [heads * n * width, n * width, width, 1],
            Self::LengthFirst => [n * heads * width, width, heads * width, 1],
            Self::Padded => {
                let row = width + 3;
                let head = n * row + 5;
                [heads * head, head, row, 1]
            }
        }
    }
}

/// A tensor that owns its numbers in some layout and type.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTensor<E> {
    data: Vec<E>,
    shape: [usize; 4],
    strides: [usize; 4],
}

impl<E: Element> StoredTensor<E> {
    /// Every element, gaps included, holds `value`.
    pub fn filled(shape: [usize; 4], layout: Layout, value: f32) -> Self {
        let strides = layout.strides(shape);
        Self { data: vec![E::store(value); shape[0] * strides[0]], shape, strides }
    }

    /// The numbers of `rows`, row-major, rounded to nearest; gaps hold NaN.
    ///
    /// # Panics
    /// If `rows` does not hold `shape`.
    pub fn from_rows(rows: &[f32], shape: [usize; 4], layout: Layout) -> Self {
        assert_eq!(rows.len(), shape.iter().product::<usize>(), "numbers for {shape:?}");
        let mut tensor = Self::filled(shape, layout, f32::NAN);
        for (at, row) in tensor.row_starts().zip(rows.chunks_exact(shape[3].max(1))) {
            tensor.data[at..][..row.len()].iter_mut().zip(row).for_each(|(to, from)| *to = E::store(*from));
        }
        tensor
    }

    /// The numbers in row-major order `(batch, heads, length, width)`.
    pub fn to_rows(&self) -> Vec<f32> {
        self.row_starts().flat_map(|at| &self.data[at..][..self.shape[3]]).map(|x| x.load()).collect()
    }

    /// Whether every element that belongs to no row still holds `value`.
    pub fn gaps_hold(&self, value: f32) -> bool {
        let mut in_row = vec![false; self.data.len()];
        self.row_starts().for_each(|at| in_row[at..][..self.shape[3]].fill(true));
        let is_value = |x: &E| x.load() == value || (x.load().is_nan() && value.is_nan());
        self.data.iter().zip(in_row).all(|(x, in_row)| in_row || is_value(x))
    }

    /// The tensor, to be read.
    ///
    /// # Errors
    /// Those of [`View::new`]; a layout of this module has none.
    pub fn view(&self, name: &str) -> Result<View<'_, E>> {
        View::new(name, &self.data, self.shape, self.strides)
    }

    /// The tensor, to be written.
    ///
    /// # Errors
    /// Those of [`ViewMut::new`]; a layout of this module has none.
    pub fn view_mut(&mut self, name: &str) -> Result<ViewMut<'_, E>> {
        ViewMut::new(name, &mut self.data, self.shape, self.strides)
    }

    /// Where rows start, in the order batch, head, row.
    fn row_starts(&self) -> impl Iterator<Item = usize> + use<E> {
        let ([batch, heads, n, _], s) = (self.shape, self.strides);
        (0..batch * heads * n).map(move |r| r / n / heads * s[0] + r / n % heads * s[1] + r % n * s[2])
    }
}

/// The inputs of one call in some layout and type.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredProblem<E> {
    /// `[batch, n_heads_q, n_q, head_dim]`.
    pub q: StoredTensor<E>,
    /// `[batch, n_heads_kv, n_kv, head_dim]`.
    pub k: StoredTensor<E>,
    /// `[batch, n_heads_kv, n_kv, head_dim_v]`.
    pub v: StoredTensor<E>,
}

impl<E: Element> StoredProblem<E> {
    /// The inputs, to be read.
    ///
    /// # Errors
    /// Those of [`Qkv::new`]; what [`super::Problem::store`] makes has none.
    pub fn qkv(&self) -> Result<Qkv<'_>> {
        Qkv::new(self.q.view("q")?, self.k.view("k")?, self.v.view("v")?)
    }
}
