//! A cache in pages that many sequences share.

use super::slabs::Slabs;
use super::{CacheKind, CacheShape};
use crate::engine::{PagedKv, Problem};
use attn_core::{AttnError, Result, TensorView};

/// A sequence of a [`PagedKvCache`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId {
    slot: usize,
    /// Which of the sequences that had this slot.
    generation: u64,
}

#[derive(Debug, Clone, Default)]
struct Sequence {
    pages: Vec<i32>,
    len: usize,
    generation: u64,
    removed: bool,
}

/// Pages and lengths of chosen sequences; made by [`PagedKvCache::table`].
#[derive(Debug, Clone)]
pub struct BlockTable {
    pages: Vec<i32>,
    lens: Vec<i32>,
}

/// Keys and values of many sequences in pages of `page_size` positions, taken when a sequence grows and given back when it
/// is removed. A page holds all heads of its positions. Source: Kwon et al. 2023 (PagedAttention).
///
/// ```
/// use attn_core::{View, ViewMut};
/// use attn_flash::Flash;
/// use attn_flash::cache::{CacheKind, CacheShape, PagedKvCache};
///
/// let shape = CacheShape { batch: 1, n_heads_kv: 1, head_dim: 4, head_dim_v: 4 };
/// let mut cache = PagedKvCache::new(shape, CacheKind::F32, 16)?;
/// let (a, b) = (cache.add(), cache.add());
/// let rows: Vec<f32> = (0..20 * 4).map(|x| x as f32).collect();
/// let all = View::contiguous("rows", &rows, [1, 1, 20, 4])?;
/// cache.append(a, all, all)?;
/// cache.append(b, all.narrow(3..4), all.narrow(3..4))?;
/// let (q, mut out) = ([0.0; 8], [0.0; 8]);
/// let table = cache.table(&[b, a])?;
/// let problem = cache.problem(View::contiguous("q", &q, [2, 1, 1, 4])?, &table)?;
/// Flash::causal().call().forward(problem, ViewMut::contiguous("out", &mut out, [2, 1, 1, 4])?.into(), None)?;
/// assert_eq!(out[0], 12.0, "sequence b holds the row 12..16 alone");
/// assert!((out[4] - 38.0).abs() < 1e-4, "zero queries average over all rows of a");
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone)]
pub struct PagedKvCache {
    shape: CacheShape,
    page_size: usize,
    k: Slabs,
    v: Slabs,
    n_pages: usize,
    most_pages: Option<usize>,
    free: Vec<i32>,
    sequences: Vec<Sequence>,
}

impl PagedKvCache {
    /// No pages yet; their number doubles when they run out. `shape.batch` is not used.
    ///
    /// # Errors
    /// [`AttnError`] for a size of 0.
    pub fn new(shape: CacheShape, kind: CacheKind, page_size: usize) -> Result<Self> {
        // What is appended is one sequence.
        let shape = CacheShape { batch: 1, ..shape };
        shape.check()?;
        if page_size == 0 {
            return Err(AttnError::value("page_size", 0, "at least 1"));
        }
        let slabs = |width| Slabs::new(kind, 0, page_size, width);
        let (k, v) = (slabs(shape.head_dim), slabs(shape.head_dim_v));
        Ok(Self {
            shape,
            page_size,
            k,
            v,
            n_pages: 0,
            most_pages: None,
            free: Vec::new(),
            sequences: Vec::new(),
        })
    }

    /// A fixed number of pages, all their memory taken at once.
    ///
    /// # Errors
    /// [`AttnError`] for a size of 0 or more pages than a block table can name.
    pub fn with_pages(shape: CacheShape, kind: CacheKind, page_size: usize, pages: usize) -> Result<Self> {
        if i32::try_from(pages).is_err() {
            return Err(AttnError::value("pages", pages, "at most 2147483647"));
        }
        let mut cache = Self::new(shape, kind, page_size)?;
        cache.grow(pages);
        cache.most_pages = Some(pages);
        Ok(cache)
    }

    fn grow(&mut self, n_pages: usize) {
        self.k.set_slabs(n_pages * self.shape.n_heads_kv);
        self.v.set_slabs(n_pages * self.shape.n_heads_kv);
        self.free.splice(0..0, (self.n_pages as i32..n_pages as i32).rev());
        self.n_pages = n_pages;
    }

    /// A new, empty sequence.
    pub fn add(&mut self) -> SequenceId {
        let slot = self.sequences.iter().position(|s| s.removed).unwrap_or(self.sequences.len());
        match self.sequences.get_mut(slot) {
            Some(sequence) => sequence.removed = false,
            None => self.sequences.push(Sequence::default()),
        }
        SequenceId { slot, generation: self.sequences[slot].generation }
    }

    /// Forgets a sequence and gives its pages back.
    ///
    /// # Errors
    /// [`AttnError::Value`] if it has been removed already.
    pub fn remove(&mut self, id: SequenceId) -> Result<()> {
        self.truncate(id, 0)?;
        let sequence = &mut self.sequences[id.slot];
        sequence.removed = true;
        sequence.generation += 1;
        Ok(())
    }

    /// Forgets the positions of a sequence from `len` on and gives back the pages that become empty.
    ///
    /// # Errors
    /// [`AttnError::Value`] if the sequence has been removed.
    pub fn truncate(&mut self, id: SequenceId, len: usize) -> Result<()> {
        self.sequence(id)?;
        let sequence = &mut self.sequences[id.slot];
        sequence.len = sequence.len.min(len);
        let used = sequence.len.div_ceil(self.page_size);
        self.free.extend(sequence.pages.drain(used..).rev());
        Ok(())
    }

    fn sequence(&self, id: SequenceId) -> Result<&Sequence> {
        let found = self.sequences.get(id.slot).filter(|s| !s.removed && s.generation == id.generation);
        found.ok_or_else(|| AttnError::value("sequence", format!("{id:?}"), "one of this cache, not removed"))
    }

    /// Positions of a sequence.
    ///
    /// # Errors
    /// [`AttnError::Value`] if it has been removed.
    pub fn len(&self, id: SequenceId) -> Result<usize> {
        Ok(self.sequence(id)?.len)
    }

    /// True without sequences.
    pub fn is_empty(&self) -> bool {
        self.sequences.iter().all(|s| s.removed)
    }

    /// Pages that no sequence holds.
    pub fn free_pages(&self) -> usize {
        self.free.len()
    }

    /// Bytes of memory held.
    pub fn bytes(&self) -> usize {
        self.k.bytes() + self.v.bytes()
    }

    /// Appends `k (1, n_heads_kv, n, head_dim)` and `v (1, n_heads_kv, n, head_dim_v)` of any dtype to a sequence.
    ///
    /// # Errors
    /// [`AttnError`] for other sizes, a removed sequence, or if a fixed number of pages runs out. Nothing is then
    /// appended.
    pub fn append<'a>(
        &mut self,
        id: SequenceId,
        k: impl Into<TensorView<'a>>,
        v: impl Into<TensorView<'a>>,
    ) -> Result<()> {
        let (k, v) = (k.into(), v.into());
        let n = self.shape.check_rows(&k, &v)?;
        let sequence = self.sequence(id)?;
        let (start, len) = (sequence.len, sequence.len + n);
        let needed = len.div_ceil(self.page_size) - sequence.pages.len();
        if needed > self.free.len() {
            let wanted = self.n_pages + needed - self.free.len();
            let fits = i32::try_from(wanted.max(2 * self.n_pages)).is_ok() && i32::try_from(len).is_ok();
            if self.most_pages.is_some() || !fits {
                let expected = format!("at most the {} free", self.free.len());
                return Err(AttnError::value("pages needed", needed, expected));
            }
            self.grow(wanted.max(2 * self.n_pages));
        }
        let pages = self.free.split_off(self.free.len() - needed);
        let sequence = &mut self.sequences[id.slot];
        sequence.pages.extend(pages.into_iter().rev());
        sequence.len = len;
        let mut at = start;
        while at < len {
            let (page, slot) = (sequence.pages[at / self.page_size] as usize, at % self.page_size);
            let end = len.min(at - slot + self.page_size);
            for head in 0..self.shape.n_heads_kv {
                let slab = page * self.shape.n_heads_kv + head;
                self.k.write(slab, slot, &k, [0, head], at - start..end - start);
                self.v.write(slab, slot, &v, [0, head], at - start..end - start);
            }
            at = end;
        }
        Ok(())
    }

    /// Pages and lengths of `sequences`, which become the batch entries of a problem in this order. Good until the cache
    /// is changed.
    ///
    /// # Errors
    /// [`AttnError::Value`] for a removed sequence.
    pub fn table(&self, sequences: &[SequenceId]) -> Result<BlockTable> {
        let rows = sequences.iter().map(|id| self.sequence(*id)).collect::<Result<Vec<_>>>()?;
        let columns = rows.iter().map(|s| s.pages.len()).max().unwrap_or(0);
        let pad = |s: &Sequence| std::iter::repeat_n(-1, columns - s.pages.len());
        Ok(BlockTable {
            pages: rows.iter().flat_map(|s| s.pages.iter().copied().chain(pad(s))).collect(),
            lens: rows.iter().map(|s| s.len as i32).collect(),
        })
    }

    /// `q (sequences, n_heads_q, n_q, head_dim)` against the sequences of `table`.
    ///
    /// # Errors
    /// [`AttnError`] if the queries do not fit or the table names pages that this cache does not have.
    pub fn problem<'a>(&'a self, q: impl Into<TensorView<'a>>, table: &'a BlockTable) -> Result<Problem<'a>> {
        let axes = [self.n_pages, self.shape.n_heads_kv, self.page_size];
        let (k, v) = (self.k.view("k_cache", axes)?, self.v.view("v_cache", axes)?);
        Problem::paged(q, PagedKv { k, v, block_table: &table.pages, lens: &table.lens })
    }
}
