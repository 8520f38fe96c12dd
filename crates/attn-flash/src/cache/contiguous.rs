//! A cache in one piece a head.

use super::slabs::Slabs;
use super::{CacheKind, CacheShape};
use crate::engine::{KvView, Problem};
use attn_core::{AttnError, Result, TensorView};

/// Which rows a stream keeps once they are attended: the first `sinks` and the last `last` (`None` keeps all).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// Rows kept at the front.
    pub sinks: usize,
    /// Rows kept at the end.
    pub last: Option<usize>,
}

/// Keys and values of a batch, all entries of the same length; see [the module](super).
#[derive(Debug, Clone)]
pub struct KvCache {
    shape: CacheShape,
    kind: CacheKind,
    k: Slabs,
    v: Slabs,
    capacity: usize,
    grows: bool,
    len: usize,
}

impl KvCache {
    /// An empty cache; the capacity doubles when it runs out.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for a size of 0.
    pub fn new(shape: CacheShape, kind: CacheKind) -> Result<Self> {
        Ok(Self { grows: true, ..Self::with_capacity(shape, kind, 0)? })
    }

    /// An empty cache for at most `capacity` positions, all its memory taken at once.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for a size of 0.
    pub fn with_capacity(shape: CacheShape, kind: CacheKind, capacity: usize) -> Result<Self> {
        shape.check()?;
        let slabs = |width| Slabs::new(kind, shape.batch * shape.n_heads_kv, capacity, width);
        let (k, v) = (slabs(shape.head_dim), slabs(shape.head_dim_v));
        Ok(Self { shape, kind, k, v, capacity, grows: false, len: 0 })
    }

    /// Appends `k (batch, n_heads_kv, n, head_dim)` and `v (batch, n_heads_kv, n, head_dim_v)` of any dtype, rounded to the
    /// cache's storage type. How rows are cut into appends makes no difference.
    ///
    /// # Errors
    /// [`AttnError::Shape`] for other sizes; [`AttnError::Value`] if a fixed capacity is exceeded. Nothing is then
    /// appended.
    pub fn append<'a>(&mut self, k: impl Into<TensorView<'a>>, v: impl Into<TensorView<'a>>) -> Result<()> {
        let (k, v) = (k.into(), v.into());
        let n = self.shape.check_rows(&k, &v)?;
        let len = self.len + n;
        if len > self.capacity {
            if !self.grows {
                return Err(AttnError::value(
                    "length",
                    len,
                    format!("at most the capacity {}", self.capacity),
                ));
            }
            self.capacity = len.max(2 * self.capacity);
            self.k.set_capacity(self.capacity, self.len);
            self.v.set_capacity(self.capacity, self.len);
        }
        for slab in 0..self.shape.batch * self.shape.n_heads_kv {
            let head = [slab / self.shape.n_heads_kv, slab % self.shape.n_heads_kv];
            self.k.write(slab, self.len, &k, head, 0..n);
            self.v.write(slab, self.len, &v, head, 0..n);
        }
        self.len = len;
        Ok(())
    }

    /// Forgets all positions from `len` on; the memory is kept.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Forgets all positions; the memory is kept.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Drops what `kept` does not keep; later positions move forward.
    pub fn keep(&mut self, kept: Kept) {
        let Some(last) = kept.last else { return };
        let sinks = kept.sinks.min(self.len);
        let first_kept = self.len.saturating_sub(last).max(sinks);
        if first_kept > sinks {
            self.k.move_rows(first_kept..self.len, sinks);
            self.v.move_rows(first_kept..self.len, sinks);
            self.len -= first_kept - sinks;
        }
    }

    /// Positions held.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True without positions.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Positions that fit before memory is taken, or at all.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How numbers are stored.
    pub fn kind(&self) -> CacheKind {
        self.kind
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.k.bytes() + self.v.bytes()
    }

    /// Keys and values, `(batch, n_heads_kv, len, width)`.
    ///
    /// # Errors
    /// Never for a cache that was made by this type.
    pub fn views(&self) -> Result<(KvView<'_>, KvView<'_>)> {
        let axes = [self.shape.batch, self.shape.n_heads_kv, self.len];
        Ok((self.k.view("k", axes)?, self.v.view("v", axes)?))
    }

    /// `q (batch, n_heads_q, n_q, head_dim)` against all that is cached: for [`crate::FlashCall::forward`] or
    /// [`crate::engine::attend`].
    ///
    /// # Errors
    /// [`AttnError::Shape`] if the queries do not fit.
    pub fn problem<'a>(&'a self, q: impl Into<TensorView<'a>>) -> Result<Problem<'a>> {
        let (k, v) = self.views()?;
        Problem::cached(q, k, v, None)
    }
}
