//! Rows of keys and values in whatever storage, read as f32.

use super::problem::KvView;
use attn_core::simd::{Isa, Simd, SimdOp};
use attn_core::tile::{prefetch, read_rows};
use attn_core::view::Rows;
use half::{bf16, f16};
use std::ops::Range;

/// The rows of one head.
#[derive(Debug, Clone, Copy)]
pub(crate) enum HeadRows<'a> {
    F32(Rows<'a, f32>),
    Bf16(Rows<'a, bf16>),
    F16(Rows<'a, f16>),
    /// Row `i` is `rows[i] * scales[(first + i) / block]`.
    Int8 {
        rows: Rows<'a, i8>,
        scales: Rows<'a, f32>,
        block: usize,
        first: usize,
    },
}

/// f32 rows: `row i = data[i * stride..]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wide<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
}

impl<'a> Wide<'a> {
    #[inline(always)]
    pub(crate) fn skip(self, row: usize) -> Self {
        Self { data: &self.data[row * self.stride..], ..self }
    }

    #[inline(always)]
    pub(crate) fn row(self, row: usize, width: usize) -> &'a [f32] {
        &self.data[row * self.stride..][..width]
    }
}

struct Copy<'a, 'o> {
    rows: HeadRows<'a>,
    out: &'o mut [f32],
}

impl SimdOp for Copy<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        read(simd, self.rows, self.out);
    }
}

/// Row-major f32 copies in `out [len, width]`.
#[inline(always)]
fn read<S: Simd>(simd: S, rows: HeadRows<'_>, out: &mut [f32]) {
    match rows {
        HeadRows::F32(rows) => {
            let (len, width) = (rows.len(), rows.width());
            if rows.stride() == width {
                out[..len * width].copy_from_slice(&rows.data()[..len * width]);
            } else {
                (0..len).for_each(|i| out[i * width..][..width].copy_from_slice(rows.row(i)));
            }
        }
        HeadRows::Bf16(rows) => read_rows(simd, rows, out),
        HeadRows::F16(rows) => read_rows(simd, rows, out),
        HeadRows::Int8 { rows, scales, block, first } => {
            read_rows(simd, rows, out);
            for (i, out) in out.chunks_exact_mut(rows.width().max(1)).take(rows.len()).enumerate() {
                let scale = scales.row((first + i) / block)[0];
                out.iter_mut().for_each(|x| *x *= scale);
            }
        }
    }
}

/// Keys that lie apart, brought side by side, `stride` numbers from one to the next.
struct Gather<'a, 'o> {
    rows: &'o KeyRows<'a>,
    ranges: &'o [Range<usize>],
    out: &'o mut [f32],
    stride: usize,
}

/// Ranges between the one that is copied and the one that is asked for.
const AHEAD: usize = 8;

impl SimdOp for Gather<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn eval<S: Simd>(self, simd: S) {
        let Self { rows, ranges, out, stride } = self;
        let (width, mut at) = (rows.width(), 0);
        for (r, range) in ranges.iter().enumerate() {
            if let (KeyRows::Strided(HeadRows::F32(rows)), Some(next)) = (rows, ranges.get(r + AHEAD)) {
                prefetch(rows.row(next.start));
            }
            let mut keys = range.clone();
            while !keys.is_empty() {
                let piece = rows.piece(keys.clone());
                if stride == width {
                    read(simd, piece, &mut out[at * width..]);
                } else {
                    for i in 0..piece.len() {
                        read(simd, piece.slice(i..i + 1), &mut out[(at + i) * stride..][..width]);
                    }
                }
                at += piece.len();
                keys.start += piece.len();
            }
        }
    }
}

impl<'a> HeadRows<'a> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Self::F32(rows) => rows.len(),
            Self::Bf16(rows) => rows.len(),
            Self::F16(rows) => rows.len(),
            Self::Int8 { rows, .. } => rows.len(),
        }
    }

    pub(crate) fn width(&self) -> usize {
        match self {
            Self::F32(rows) => rows.width(),
            Self::Bf16(rows) => rows.width(),
            Self::F16(rows) => rows.width(),
            Self::Int8 { rows, .. } => rows.width(),
        }
    }

    #[inline]
    pub(crate) fn slice(&self, range: Range<usize>) -> Self {
        match self {
            Self::F32(rows) => Self::F32(rows.slice(range)),
            Self::Bf16(rows) => Self::Bf16(rows.slice(range)),
            Self::F16(rows) => Self::F16(rows.slice(range)),
            Self::Int8 { rows, scales, block, first } => {
                let first = first + range.start;
                Self::Int8 { rows: rows.slice(range), scales: *scales, block: *block, first }
            }
        }
    }

    /// Row-major f32 copies in `out [len, width]`. Exact, hence the same on every instruction set.
    pub(crate) fn copy_to(&self, out: &mut [f32]) {
        Isa::current().run(Copy { rows: *self, out });
    }

    /// The rows in place where they are f32 already, else widened into `scratch`.
    #[inline(always)]
    pub(crate) fn wide<'s>(self, scratch: &'s mut [f32]) -> Wide<'s>
    where
        'a: 's,
    {
        if let Self::F32(rows) = self {
            return Wide { data: rows.data(), stride: rows.stride() };
        }
        self.copy_to(scratch);
        Wide { data: scratch, stride: self.width() }
    }
}

/// Keys or values of one head of a sequence.
#[derive(Debug, Clone, Copy)]
pub(crate) enum KeyRows<'a> {
    Strided(HeadRows<'a>),
    /// Key `j` is row `j % page_size` of page `pages[j / page_size]`.
    Paged {
        view: KvView<'a>,
        kv_head: usize,
        pages: &'a [i32],
        page_size: usize,
    },
}

impl<'a> KeyRows<'a> {
    pub(crate) fn width(&self) -> usize {
        match self {
            Self::Strided(rows) => rows.width(),
            Self::Paged { view, .. } => view.shape()[3],
        }
    }

    /// Consecutive keys that lie in one piece, from `keys.start` on.
    #[inline]
    pub(crate) fn piece(&self, keys: Range<usize>) -> HeadRows<'a> {
        match self {
            Self::Strided(rows) => rows.slice(keys),
            Self::Paged { view, kv_head, pages, page_size } => {
                let (page, slot) = (keys.start / page_size, keys.start % page_size);
                view.page(pages[page], *kv_head).slice(slot..(slot + keys.len()).min(*page_size))
            }
        }
    }

    /// The keys of all `ranges`, one after another: in place if they are one piece of f32 rows, else gathered into
    /// `scratch [keys, width]`.
    #[inline]
    pub(crate) fn wide<'s>(&self, ranges: &[Range<usize>], scratch: &'s mut [f32]) -> Wide<'s>
    where
        'a: 's,
    {
        if let [range] = ranges {
            let piece = self.piece(range.clone());
            if piece.len() == range.len() {
                return piece.wide(scratch);
            }
        }
        self.copy_to(ranges, scratch);
        Wide { data: scratch, stride: self.width() }
    }

    /// Copies the keys of all `ranges`, one after another, to `out [keys, width]`; gives their number.
    #[inline]
    pub(crate) fn copy_to(&self, ranges: &[Range<usize>], out: &mut [f32]) -> usize {
        self.spread_to(ranges, out, self.width());
        ranges.iter().map(Range::len).sum()
    }

    /// [`KeyRows::copy_to`] with `stride` numbers, at least the width, from one row to the next; those between are left alone.
    #[inline]
    pub(crate) fn spread_to(&self, ranges: &[Range<usize>], out: &mut [f32], stride: usize) {
        Isa::current().run(Gather { rows: self, ranges, out, stride });
    }

    /// Whether keys are read where they are.
    pub(crate) fn is_in_place(&self) -> bool {
        matches!(self, Self::Strided(HeadRows::F32(_)))
    }
}
