//! Keys and values of a stream.

use attn_core::{Element, Result, StreamShape, View};
use std::ops::Range;

/// Which rows a stream keeps once they are attended: the first `sinks` and the last `last` (`None` keeps all).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// Rows kept at the front.
    pub sinks: usize,
    /// Rows kept at the end.
    pub last: Option<usize>,
}

/// Rows of all heads with room to grow: head `h`, row `t` starts at `(h * capacity + t) * width`.
#[derive(Debug, Clone)]
pub(crate) struct RowCache<E> {
    data: Vec<E>,
    batch: usize,
    heads: usize,
    width: usize,
    capacity: usize,
    len: usize,
}

impl<E: Element> RowCache<E> {
    fn new(batch: usize, heads: usize, width: usize) -> Self {
        Self { data: Vec::new(), batch, heads, width, capacity: 0, len: 0 }
    }

    /// Where rows `rows` of head `at` (batch and head counted together) lie.
    fn place(&self, at: usize, rows: Range<usize>) -> Range<usize> {
        let start = at * self.capacity * self.width;
        start + rows.start * self.width..start + rows.end * self.width
    }

    /// Appends the rows of `x (batch, heads, n, width)`; the capacity doubles when it runs out.
    fn append(&mut self, x: &View<'_, E>) {
        let len = self.len + x.shape()[2];
        if len > self.capacity {
            let old = self.clone();
            self.capacity = len.max(2 * self.capacity);
            self.data = vec![E::ZERO; self.batch * self.heads * self.capacity * self.width];
            for at in 0..self.batch * self.heads {
                let to = self.place(at, 0..self.len);
                self.data[to].copy_from_slice(&old.data[old.place(at, 0..old.len)]);
            }
        }
        for at in 0..self.batch * self.heads {
            let to = self.place(at, self.len..len);
            let rows = self.data[to].chunks_exact_mut(self.width);
            rows.zip(x.head(at / self.heads, at % self.heads).iter())
                .for_each(|(to, from)| to.copy_from_slice(from));
        }
        self.len = len;
    }

    /// Drops what `kept` does not keep.
    fn keep(&mut self, kept: Kept) {
        let Some(last) = kept.last else { return };
        let sinks = kept.sinks.min(self.len);
        let first_kept = self.len.saturating_sub(last).max(sinks);
        if first_kept == sinks {
            return;
        }
        for at in 0..self.batch * self.heads {
            let (from, to) = (self.place(at, first_kept..self.len), self.place(at, sinks..sinks).start);
            self.data.copy_within(from, to);
        }
        self.len -= first_kept - sinks;
    }

    fn view(&self, tensor: &str) -> Result<View<'_, E>> {
        let head = self.capacity * self.width;
        let shape = [self.batch, self.heads, self.len, self.width];
        View::new(tensor, &self.data, shape, [self.heads * head, head, self.width, 1])
    }
}

/// Keys and values of all kept positions.
#[derive(Debug, Clone)]
pub(crate) struct KvCache<E> {
    k: RowCache<E>,
    v: RowCache<E>,
}

impl<E: Element> KvCache<E> {
    pub(crate) fn new(shape: StreamShape) -> Self {
        let rows = |width| RowCache::new(shape.batch, shape.n_heads_kv, width);
        Self { k: rows(shape.head_dim), v: rows(shape.head_dim_v) }
    }

    pub(crate) fn append(&mut self, k: &View<'_, E>, v: &View<'_, E>) {
        self.k.append(k);
        self.v.append(v);
    }

    pub(crate) fn keep(&mut self, kept: Kept) {
        self.k.keep(kept);
        self.v.keep(kept);
    }

    pub(crate) fn views(&self) -> Result<(View<'_, E>, View<'_, E>)> {
        Ok((self.k.view("k")?, self.v.view("v")?))
    }

    pub(crate) fn bytes(&self) -> usize {
        (self.k.data.len() + self.v.data.len()) * size_of::<E>()
    }
}
