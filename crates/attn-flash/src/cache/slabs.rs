//! Rows in slabs of equal capacity, in any storage type: one slab a head (contiguous) or one a page and head (paged).

use super::CacheKind;
use crate::engine::KvView;
use attn_core::{Element, LargeVec, Result, TensorView, View};
use bytemuck::Pod;
use half::{bf16, f16};
use std::ops::Range;

#[derive(Debug, Clone)]
enum Numbers {
    F32(LargeVec<f32>),
    Bf16(LargeVec<bf16>),
    F16(LargeVec<f16>),
    /// With a scale for each row.
    Int8(LargeVec<i8>, LargeVec<f32>),
}

/// Row `t` of slab `s` starts at `(s * capacity + t) * width`.
#[derive(Debug, Clone)]
pub(super) struct Slabs {
    numbers: Numbers,
    n_slabs: usize,
    capacity: usize,
    width: usize,
}

impl Slabs {
    pub(super) fn new(kind: CacheKind, n_slabs: usize, capacity: usize, width: usize) -> Self {
        let n = n_slabs * capacity * width;
        let numbers = match kind {
            CacheKind::F32 => Numbers::F32(LargeVec::zeroed(n)),
            CacheKind::Bf16 => Numbers::Bf16(LargeVec::zeroed(n)),
            CacheKind::F16 => Numbers::F16(LargeVec::zeroed(n)),
            CacheKind::Int8 => Numbers::Int8(LargeVec::zeroed(n), LargeVec::zeroed(n_slabs * capacity)),
        };
        Self { numbers, n_slabs, capacity, width }
    }

    pub(super) fn bytes(&self) -> usize {
        match &self.numbers {
            Numbers::F32(x) => size_of_val(&**x),
            Numbers::Bf16(x) => size_of_val(&**x),
            Numbers::F16(x) => size_of_val(&**x),
            Numbers::Int8(x, scales) => size_of_val(&**x) + size_of_val(&**scales),
        }
    }

    /// Room for `capacity` rows a slab, of which the first `len` are kept.
    pub(super) fn set_capacity(&mut self, capacity: usize, len: usize) {
        let (n_slabs, old, width) = (self.n_slabs, self.capacity, self.width);
        fn moved<T: Pod>(x: &[T], n_slabs: usize, slabs: [usize; 2], kept: usize) -> LargeVec<T> {
            let [old, new] = slabs;
            let mut to = LargeVec::zeroed(n_slabs * new);
            for s in 0..n_slabs {
                to[s * new..][..kept].copy_from_slice(&x[s * old..][..kept]);
            }
            to
        }
        let slabs = [old * width, capacity * width];
        match &mut self.numbers {
            Numbers::F32(x) => *x = moved(x, n_slabs, slabs, len * width),
            Numbers::Bf16(x) => *x = moved(x, n_slabs, slabs, len * width),
            Numbers::F16(x) => *x = moved(x, n_slabs, slabs, len * width),
            Numbers::Int8(x, scales) => {
                *x = moved(x, n_slabs, slabs, len * width);
                *scales = moved(scales, n_slabs, [old, capacity], len);
            }
        }
        self.capacity = capacity;
    }

    /// More slabs behind the others.
    pub(super) fn set_slabs(&mut self, n_slabs: usize) {
        let n = n_slabs * self.capacity * self.width;
        match &mut self.numbers {
            Numbers::F32(x) => x.resize(n),
            Numbers::Bf16(x) => x.resize(n),
            Numbers::F16(x) => x.resize(n),
            Numbers::Int8(x, scales) => {
                x.resize(n);
                scales.resize(n_slabs * self.capacity);
            }
        }
        self.n_slabs = n_slabs;
    }

    /// Writes rows `rows` of a head of `from` to row `to` of a slab and the following.
    pub(super) fn write(
        &mut self,
        slab: usize,
        to: usize,
        from: &TensorView<'_>,
        head: [usize; 2],
        rows: Range<usize>,
    ) {
        match from {
            TensorView::F32(view) => self.write_rows(slab, to, view, head, rows),
            TensorView::Bf16(view) => self.write_rows(slab, to, view, head, rows),
            TensorView::F16(view) => self.write_rows(slab, to, view, head, rows),
        }
    }

    fn write_rows<E: Element>(
        &mut self,
        slab: usize,
        to: usize,
        from: &View<'_, E>,
        [batch, head]: [usize; 2],
        rows: Range<usize>,
    ) {
        let first = slab * self.capacity + to;
        let (width, rows) = (self.width, from.head(batch, head).slice(rows));
        fn round<E: Element, T: Element>(to: &mut [T], from: attn_core::view::Rows<'_, E>) {
            for (to, from) in to.chunks_exact_mut(from.width()).zip(from.iter()) {
                to.iter_mut().zip(from).for_each(|(to, x)| *to = T::store(x.load()));
            }
        }
        let place = first * width..(first + rows.len()) * width;
        match &mut self.numbers {
            Numbers::F32(x) => round(&mut x[place], rows),
            Numbers::Bf16(x) => round(&mut x[place], rows),
            Numbers::F16(x) => round(&mut x[place], rows),
            Numbers::Int8(x, scales) => {
                let scales = &mut scales[first..];
                for ((to, scale), from) in x[place].chunks_exact_mut(width).zip(scales).zip(rows.iter()) {
                    *scale = quantise(from, to);
                }
            }
        }
    }

    /// Moves rows inside every slab.
    pub(super) fn move_rows(&mut self, from: Range<usize>, to: usize) {
        for first in (0..self.n_slabs).map(|s| s * self.capacity) {
            let (rows, place) = (first + from.start..first + from.end, first + to);
            let (places, at) = (rows.start * self.width..rows.end * self.width, place * self.width);
            match &mut self.numbers {
                Numbers::F32(x) => x.copy_within(places, at),
                Numbers::Bf16(x) => x.copy_within(places, at),
                Numbers::F16(x) => x.copy_within(places, at),
                Numbers::Int8(x, scales) => {
                    x.copy_within(places, at);
                    scales.copy_within(rows, place);
                }
            }
        }
    }

    /// The slabs as `(batch, heads, len, width)`.
    pub(super) fn view(&self, tensor: &str, [batch, heads, len]: [usize; 3]) -> Result<KvView<'_>> {
        let (shape, row) = ([batch, heads, len, self.width], self.width);
        let strides = [heads * self.capacity * row, self.capacity * row, row, 1];
        Ok(match &self.numbers {
            Numbers::F32(x) => View::new(tensor, x, shape, strides)?.into(),
            Numbers::Bf16(x) => View::new(tensor, x, shape, strides)?.into(),
            Numbers::F16(x) => View::new(tensor, x, shape, strides)?.into(),
            Numbers::Int8(x, scales) => {
                let scale_strides = [heads * self.capacity, self.capacity, 1, 1];
                KvView::Int8 {
                    data: View::new(tensor, x, shape, strides)?,
                    scales: View::new(tensor, scales, [batch, heads, len, 1], scale_strides)?,
                    block: 1,
                }
            }
        })
    }
}

/// Writes `round(x / scale)` and returns `scale = max |x| / 127`.
fn quantise<E: Element>(row: &[E], to: &mut [i8]) -> f32 {
    if row.iter().any(|x| !x.load().is_finite()) {
        to.fill(1);
        return f32::NAN;
    }
    let scale = row.iter().fold(0.0, |max: f32, x| max.max(x.load().abs())) / 127.0;
    if scale == 0.0 {
        to.fill(0);
        return 0.0;
    }
    // Divided, not multiplied with the inverse, which overflows for tiny rows.
    to.iter_mut().zip(row).for_each(|(to, x)| *to = (x.load() / scale).round_ties_even() as i8);
    scale
}
