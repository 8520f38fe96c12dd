//! What is attended: where the queries, keys and values of every sequence lie.
//!
//! | problem | queries | keys and values |
//! |---|---|---|
//! | [`Problem::batch`] | `(batch, n_heads_q, n_q, head_dim)` | `(batch, n_heads_kv, n_kv, width)` |
//! | [`Problem::packed`] | sequence `s` has rows `cu_q[s]..cu_q[s + 1]` of batch entry 0 | rows `cu_kv[s]..cu_kv[s + 1]` |
//! | [`Problem::cached`] | as `batch` | any storage type, also int8; a length for each batch entry |
//! | [`Problem::paged`] | as `batch` | pages found through a block table; a length for each batch entry |
//!
//! A sequence is what masks call a batch entry: rows and keys are counted from its own start.

use super::rows::{HeadRows, KeyRows};
use attn_core::view::View;
use attn_core::{AttnError, AttnShape, Element, Qkv, Result, TensorView};
use half::{bf16, f16};
use std::ops::Range;

/// Keys or values in the storage of a cache.
#[derive(Debug, Clone, Copy)]
pub enum KvView<'a> {
    /// Single precision.
    F32(View<'a, f32>),
    /// bfloat16.
    Bf16(View<'a, bf16>),
    /// Half precision.
    F16(View<'a, f16>),
    /// Whole numbers times a scale for every `block` consecutive rows of a head:
    /// `scales (batch, heads, ceil(length / block), 1)`.
    Int8 {
        /// `(batch, heads, length, width)`.
        data: View<'a, i8>,
        /// `(batch, heads, ceil(length / block), 1)`.
        scales: View<'a, f32>,
        /// Rows that share a scale.
        block: usize,
    },
}

impl<'a> KvView<'a> {
    /// `[batch, heads, length, width]`.
    pub fn shape(&self) -> [usize; 4] {
        match self {
            Self::F32(view) => view.shape(),
            Self::Bf16(view) => view.shape(),
            Self::F16(view) => view.shape(),
            Self::Int8 { data, .. } => data.shape(),
        }
    }

    pub(super) fn head(&self, batch: usize, head: usize) -> HeadRows<'a> {
        match self {
            Self::F32(view) => HeadRows::F32(view.head(batch, head)),
            Self::Bf16(view) => HeadRows::Bf16(view.head(batch, head)),
            Self::F16(view) => HeadRows::F16(view.head(batch, head)),
            Self::Int8 { data, scales, block } => {
                let (rows, scales) = (data.head(batch, head), scales.head(batch, head));
                HeadRows::Int8 { rows, scales, block: *block, first: 0 }
            }
        }
    }

    fn check(&self, tensor: &str) -> Result<()> {
        let Self::Int8 { data, scales, block } = self else { return Ok(()) };
        if *block == 0 {
            return Err(AttnError::value(format!("{tensor}'s scale block"), 0, "at least 1"));
        }
        let [batch, heads, n, _] = data.shape();
        let (found, expected) = (scales.shape(), [batch, heads, n.div_ceil(*block), 1]);
        for (a, axis) in ["batch", "heads", "length", "width"].into_iter().enumerate() {
            if found[a] != expected[a] {
                return Err(AttnError::shape(format!("{tensor}'s scales"), axis, found[a], expected[a]));
            }
        }
        Ok(())
    }
}

impl<'a> From<TensorView<'a>> for KvView<'a> {
    fn from(view: TensorView<'a>) -> Self {
        match view {
            TensorView::F32(view) => Self::F32(view),
            TensorView::Bf16(view) => Self::Bf16(view),
            TensorView::F16(view) => Self::F16(view),
        }
    }
}

impl<'a, E: Element> From<View<'a, E>> for KvView<'a> {
    fn from(view: View<'a, E>) -> Self {
        TensorView::from(view).into()
    }
}

/// Pages of keys and values, and which pages hold which sequence.
#[derive(Debug, Clone, Copy)]
pub struct PagedKv<'a> {
    /// `(pages, n_heads_kv, page_size, head_dim)`: a cache stored `[pages, page_size, n_heads_kv, width]` is a strided
    /// view of this shape.
    pub k: KvView<'a>,
    /// `(pages, n_heads_kv, page_size, head_dim_v)`.
    pub v: KvView<'a>,
    /// `[batch, max_pages]`: the page that holds keys `t * page_size ..` of a sequence; entries beyond its length are
    /// not read (by convention -1).
    pub block_table: &'a [i32],
    /// Keys of each sequence, `[batch]`.
    pub lens: &'a [i32],
}

#[derive(Debug, Clone, Copy)]
enum Sequences<'a> {
    Batch,
    Packed { q: &'a [i32], kv: &'a [i32] },
}

#[derive(Debug, Clone, Copy)]
enum Keys<'a> {
    Whole,
    Lens(&'a [i32]),
    Paged { block_table: &'a [i32], lens: &'a [i32], page_size: usize },
}

/// Queries, keys and values of all sequences: checked, borrowed.
#[derive(Debug, Clone, Copy)]
pub struct Problem<'a> {
    q: TensorView<'a>,
    k: KvView<'a>,
    v: KvView<'a>,
    shape: AttnShape,
    sequences: Sequences<'a>,
    keys: Keys<'a>,
}

impl<'a> From<Qkv<'a>> for Problem<'a> {
    fn from(x: Qkv<'a>) -> Self {
        Self::batch(x)
    }
}

impl<'a> Problem<'a> {
    /// One sequence a batch entry, all of the same lengths.
    pub fn batch(x: Qkv<'a>) -> Self {
        let (k, v) = ((*x.k()).into(), (*x.v()).into());
        Self { q: *x.q(), k, v, shape: x.shape(), sequences: Sequences::Batch, keys: Keys::Whole }
    }

    /// Sequences one after another along the length axis of a batch of 1; `cu_seqlens_q` and `cu_seqlens_kv` are
    /// prefix sums of their lengths, each starting with 0 and ending with the total. Empty sequences are legal.
    ///
    /// # Errors
    /// [`AttnError::Shape`] or [`AttnError::Value`] for a batch other than 1 or malformed prefix sums.
    pub fn packed(x: Qkv<'a>, cu_seqlens_q: &'a [i32], cu_seqlens_kv: &'a [i32]) -> Result<Self> {
        let shape = x.shape();
        if shape.batch != 1 {
            return Err(AttnError::shape("q", "batch", shape.batch, "1 (packed sequences)"));
        }
        check_prefix_sums("cu_seqlens_q", cu_seqlens_q, shape.n_q)?;
        check_prefix_sums("cu_seqlens_kv", cu_seqlens_kv, shape.n_kv)?;
        if cu_seqlens_q.len() != cu_seqlens_kv.len() {
            let expected = format!("{} (as cu_seqlens_q)", cu_seqlens_q.len());
            return Err(AttnError::shape("cu_seqlens_kv", "entries", cu_seqlens_kv.len(), expected));
        }
        let sequences = Sequences::Packed { q: cu_seqlens_q, kv: cu_seqlens_kv };
        Ok(Self { sequences, ..Self::batch(x) })
    }

    /// Keys and values as a cache stores them, in any storage type whatever the queries' is. `lens [batch]` says how
    /// many rows of each batch entry are filled (the others are never read); `None` is all.
    ///
    /// # Errors
    /// [`AttnError::Shape`] as for a batch; [`AttnError::Value`] for a length outside the cache.
    pub fn cached(
        q: impl Into<TensorView<'a>>,
        k: impl Into<KvView<'a>>,
        v: impl Into<KvView<'a>>,
        lens: Option<&'a [i32]>,
    ) -> Result<Self> {
        let (q, k, v) = (q.into(), k.into(), v.into());
        k.check("k")?;
        v.check("v")?;
        let shape = AttnShape::from_tensors(q.shape(), k.shape(), v.shape())?;
        if let Some(lens) = lens {
            check_lens("lens", lens, shape.batch, shape.n_kv)?;
        }
        let keys = lens.map_or(Keys::Whole, Keys::Lens);
        Ok(Self { q, k, v, shape, sequences: Sequences::Batch, keys })
    }

    /// Keys and values in pages.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for tensors that do not fit each other; [`AttnError::Value`] for a length that the table's
    /// rows cannot hold or a page number that does not exist.
    pub fn paged(q: impl Into<TensorView<'a>>, kv: PagedKv<'a>) -> Result<Self> {
        let (q, PagedKv { k, v, block_table, lens }) = (q.into(), kv);
        k.check("k_cache")?;
        v.check("v_cache")?;
        let ([batch, ..], [pages, heads, page_size, head_dim], v_shape) = (q.shape(), k.shape(), v.shape());
        let v_axes = [("pages", pages), ("n_heads_kv", heads), ("page_size", page_size)];
        for (a, (axis, expected)) in v_axes.into_iter().enumerate() {
            if v_shape[a] != expected {
                let expected = format!("{expected} (as in k_cache)");
                return Err(AttnError::shape("v_cache", axis, v_shape[a], expected));
            }
        }
        let columns = block_table.len().checked_div(batch).unwrap_or(0);
        if columns * batch != block_table.len() {
            let expected = format!("a multiple of {batch} (one row a batch entry)");
            return Err(AttnError::shape("block_table", "entries", block_table.len(), expected));
        }
        let n_kv = columns.saturating_mul(page_size);
        check_lens("lens", lens, batch, n_kv)?;
        for (row, &len) in lens.iter().enumerate() {
            let used = (len as usize).div_ceil(page_size.max(1));
            let bad = block_table[row * columns..][..used].iter().find(|p| **p < 0 || **p as usize >= pages);
            if let Some(page) = bad {
                let argument = format!("block_table, row {row}");
                return Err(AttnError::value(argument, page, format!("page numbers below {pages}")));
            }
        }
        let kv_shape = |width| [batch, heads, n_kv, width];
        let shape = AttnShape::from_tensors(q.shape(), kv_shape(head_dim), kv_shape(v_shape[3]))?;
        let keys = Keys::Paged { block_table, lens, page_size };
        Ok(Self { q, k, v, shape, sequences: Sequences::Batch, keys })
    }

    /// Sizes of the whole: `n_kv` is the longest that a sequence can be.
    pub fn shape(&self) -> AttnShape {
        self.shape
    }

    /// Queries.
    pub fn q(&self) -> &TensorView<'a> {
        &self.q
    }

    /// True if queries, keys and values are all stored as bf16.
    pub(super) fn is_bf16(&self) -> bool {
        matches!((&self.q, &self.k, &self.v), (TensorView::Bf16(_), KvView::Bf16(_), KvView::Bf16(_)))
    }

    /// True if keys and values are stored in one type.
    pub(super) fn has_one_kv_type(&self) -> bool {
        std::mem::discriminant(&self.k) == std::mem::discriminant(&self.v)
    }

    /// How many sequences there are.
    pub fn n_sequences(&self) -> usize {
        match self.sequences {
            Sequences::Batch => self.shape.batch,
            Sequences::Packed { q, .. } => q.len() - 1,
        }
    }

    /// Query rows of sequence `s` on the length axis of `q`.
    pub fn q_range(&self, s: usize) -> Range<usize> {
        match self.sequences {
            Sequences::Batch => 0..self.shape.n_q,
            Sequences::Packed { q, .. } => q[s] as usize..q[s + 1] as usize,
        }
    }

    /// Key rows of sequence `s` on the length axis of `k`.
    pub fn kv_range(&self, s: usize) -> Range<usize> {
        match (self.sequences, self.keys) {
            (Sequences::Packed { kv, .. }, _) => kv[s] as usize..kv[s + 1] as usize,
            (_, Keys::Whole) => 0..self.shape.n_kv,
            (_, Keys::Lens(lens) | Keys::Paged { lens, .. }) => 0..lens[s] as usize,
        }
    }

    /// Batch entry of the tensors that holds sequence `s`.
    pub fn batch_of(&self, s: usize) -> usize {
        match self.sequences {
            Sequences::Batch => s,
            Sequences::Packed { .. } => 0,
        }
    }

    /// Queries of one head of sequence `s`.
    pub(crate) fn q_rows(&self, s: usize, head: usize) -> HeadRows<'a> {
        KvView::from(self.q).head(self.batch_of(s), head).slice(self.q_range(s))
    }

    /// Keys and values of one head of sequence `s`.
    pub(crate) fn kv_rows(&self, s: usize, kv_head: usize) -> (KeyRows<'a>, KeyRows<'a>) {
        match self.keys {
            Keys::Whole | Keys::Lens(_) => {
                let (batch, range) = (self.batch_of(s), self.kv_range(s));
                let rows =
                    |view: &KvView<'a>| KeyRows::Strided(view.head(batch, kv_head).slice(range.clone()));
                (rows(&self.k), rows(&self.v))
            }
            Keys::Paged { block_table, page_size, .. } => {
                let columns = block_table.len() / self.shape.batch;
                let pages = &block_table[s * columns..][..columns];
                let rows = |view: &KvView<'a>| KeyRows::Paged { view: *view, kv_head, pages, page_size };
                (rows(&self.k), rows(&self.v))
            }
        }
    }

    /// True if the tensors are plain (no cache, no pages): what the backward pass takes.
    pub(crate) fn is_plain(&self) -> bool {
        matches!(self.keys, Keys::Whole) && !matches!(self.k, KvView::Int8 { .. })
    }
}

impl<'a> KvView<'a> {
    /// The rows of page `page` of a head.
    #[inline]
    pub(super) fn page(&self, page: i32, kv_head: usize) -> HeadRows<'a> {
        self.head(page as usize, kv_head)
    }
}

fn check_prefix_sums(argument: &str, sums: &[i32], total: usize) -> Result<()> {
    let fail = |found: String, expected: String| Err(AttnError::value(argument, found, expected));
    match (sums.first(), sums.last()) {
        (None, _) | (_, None) => fail("empty".into(), "one entry more than sequences".into()),
        (Some(first), _) if *first != 0 => fail(format!("first entry {first}"), "0".into()),
        (_, Some(last)) if usize::try_from(*last) != Ok(total) => {
            fail(format!("last entry {last}"), format!("{total}, the packed length"))
        }
        _ => match sums.windows(2).position(|w| w[1] < w[0]) {
            Some(at) => {
                fail(format!("{} after {}", sums[at + 1], sums[at]), "entries that do not decrease".into())
            }
            None => Ok(()),
        },
    }
}

fn check_lens(argument: &str, lens: &[i32], batch: usize, most: usize) -> Result<()> {
    if lens.len() != batch {
        return Err(AttnError::shape(argument, "batch", lens.len(), batch));
    }
    match lens.iter().find(|len| !usize::try_from(**len).is_ok_and(|len| len <= most)) {
        Some(len) => Err(AttnError::value(argument, len, format!("lengths from 0 to {most}"))),
        None => Ok(()),
    }
}
