//! Key/value caches to append to and attend from.
//!
//! - [`KvCache`]: all positions of a batch in one piece a head, growing or of a fixed capacity.
//! - [`PagedKvCache`]: pages shared by many sequences, found through a block table.
//!
//! Both store f32, bf16, f16 or int8 ([`CacheKind`]) whatever the dtype of the rows appended. Attention over an int8 cache is
//! attention over the numbers it stands for: the kernel multiplies a score with the key's scale and a weight with the value's.
//!
//! ```
//! use attn_core::{View, ViewMut};
//! use attn_flash::Flash;
//! use attn_flash::cache::{CacheKind, CacheShape, KvCache};
//!
//! let shape = CacheShape { batch: 1, n_heads_kv: 2, head_dim: 8, head_dim_v: 8 };
//! let mut cache = KvCache::new(shape, CacheKind::Int8)?;
//! let token: Vec<f32> = (0..16).map(|x| (x as f32).sin()).collect();
//! let mut out = [0.0; 16];
//! for _ in 0..3 {
//!     let row = View::contiguous("token", &token, [1, 2, 1, 8])?;
//!     cache.append(row, row)?;
//!     let out = ViewMut::contiguous("out", &mut out, [1, 2, 1, 8])?;
//!     Flash::causal().call().forward(cache.problem(row)?, out.into(), None)?;
//! }
//! assert_eq!(cache.len(), 3);
//! assert!((out[1] - token[1]).abs() < 0.01, "all rows are the same, up to rounding");
//! # Ok::<(), attn_core::AttnError>(())
//! ```

mod contiguous;
mod paged;
mod slabs;

pub use contiguous::{Kept, KvCache};
pub use paged::{BlockTable, PagedKvCache, SequenceId};

use attn_core::{AttnError, DType, Result, StreamShape, TensorView};

/// How a cache stores keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheKind {
    /// Single precision.
    F32,
    /// bfloat16, rounded to nearest even.
    Bf16,
    /// Half precision, rounded to nearest even.
    F16,
    /// A scale for each position and head, `max |x| / 127`, and `x / scale` rounded to the nearest whole number, ties to
    /// even: an error of at most half the scale in each number. A row of zeros has scale 0; a row with NaN or infinity
    /// becomes NaN altogether.
    Int8,
}

impl From<DType> for CacheKind {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::Bf16 => Self::Bf16,
            DType::F16 => Self::F16,
        }
    }
}

/// Sizes of a cache that do not change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CacheShape {
    /// Batch entries.
    pub batch: usize,
    /// Key/value heads.
    pub n_heads_kv: usize,
    /// Width of keys.
    pub head_dim: usize,
    /// Width of values.
    pub head_dim_v: usize,
}

impl From<StreamShape> for CacheShape {
    fn from(s: StreamShape) -> Self {
        Self { batch: s.batch, n_heads_kv: s.n_heads_kv, head_dim: s.head_dim, head_dim_v: s.head_dim_v }
    }
}

impl CacheShape {
    fn check(&self) -> Result<()> {
        let axes =
            [("n_heads_kv", self.n_heads_kv), ("head_dim", self.head_dim), ("head_dim_v", self.head_dim_v)];
        match axes.iter().find(|(_, n)| *n == 0) {
            Some((axis, n)) => Err(AttnError::shape("cache", axis, *n, "at least 1")),
            None => Ok(()),
        }
    }

    /// Checks appended rows; returns how many there are.
    fn check_rows(&self, k: &TensorView<'_>, v: &TensorView<'_>) -> Result<usize> {
        let n = k.shape()[2];
        let expected = |width| [self.batch, self.n_heads_kv, n, width];
        for (tensor, found, expected) in
            [("k", k.shape(), expected(self.head_dim)), ("v", v.shape(), expected(self.head_dim_v))]
        {
            for (a, axis) in ["batch", "n_heads_kv", "length", "width"].into_iter().enumerate() {
                if found[a] != expected[a] {
                    return Err(AttnError::shape(tensor, axis, found[a], expected[a]));
                }
            }
        }
        Ok(n)
    }
}
