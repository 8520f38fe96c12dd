//! Pages of keys, scored by what is noted of them: selection while decoding, one engine for several scorers.
//!
//! ```text
//! score(i, P) = ask(q_i) . note(keys of page P)
//! A(i)        = the first pages, the last ones, and those with the largest scores: n_pages in all, up to the query
//! ```
//!
//! | scorer | page | note | asks |
//! |---|---|---|---|
//! | [`ArkVale`] | some keys | a box or a ball around them | the largest score in it |
//! | [`DoubleSparsity`] | one key | its channels of largest magnitude | the same channels |
//! | [`Loki`] | one key | its coordinates along the principal axes of the keys | the same coordinates |
//! | [`InfLlmMemory`] | some keys | the sum of its representative keys | the query |
//!
//! [`Quest`](crate::Quest) is the same with bounds of the page that the query stands in, too.
//!
//! Only complete pages are scored; the page of the query itself is among the last ones, which every query takes, unless pages
//! have one key. So notes never change, the choice is strictly causal, and a stream makes the same one. What a scorer
//! learns from the keys (channels, axes) it learns from the first [`calibration_len`](PageScorer::calibration_len) ones;
//! queries that see no more than those attend all of them. Each query head chooses for itself.

mod ark_vale;
mod double_sparsity;
mod infllm_memory;
mod loki;
mod notes;
mod principal_axes;
mod selector;

pub use ark_vale::{ArkVale, Volume};
pub use double_sparsity::DoubleSparsity;
pub use infllm_memory::{InfLlmMemory, Representatives};
pub use loki::Loki;
pub use notes::PageNotes;

use super::block_indexer::blocks;
use super::dsa::tokens;
use super::indexer::{IndexQueries, select};
use super::router::{Router, causal_pairs, list_bytes, pairs_up_to};
use super::rows::rows_f32;
use crate::BlockMask;
use crate::block_mask::lists::{Lists, wide};
use crate::decider::Work;
use attn_core::parallel::for_each_task;
use attn_core::{AttnError, AttnShape, Growth, Result, StreamShape, TensorView};
use selector::TopPages;
use std::fmt;

/// Which pages a query takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Keys of a page.
    pub page_len: usize,
    /// Pages that a query takes.
    pub n_pages: usize,
    /// First pages, taken by every query.
    pub first: usize,
    /// Last pages, taken by every query, the one that it stands in included; at least 1 unless pages have one key.
    pub last: usize,
}

impl Pages {
    /// Checks that the forced pages fit.
    ///
    /// # Errors
    /// [`AttnError::Value`] for pages without keys, too few of them, or a query's own page that is not taken.
    pub fn check(&self) -> Result<()> {
        let Self { page_len, n_pages, first, last } = *self;
        if page_len == 0 {
            return Err(AttnError::value("page_len", 0, "at least 1"));
        }
        if page_len > 1 && last == 0 {
            return Err(AttnError::value("last pages", 0, "at least 1, that of the query"));
        }
        let forced = first.saturating_add(last).max(1);
        if n_pages < forced {
            let expected = format!("at least {forced}, with the {first} first and the {last} last pages");
            return Err(AttnError::value("pages that a query takes", n_pages, expected));
        }
        Ok(())
    }

    /// Keys that a query takes at most.
    pub fn keys(&self) -> usize {
        self.n_pages.saturating_mul(self.page_len)
    }
}

/// Scores pages of keys by products of what is noted of a page with what is asked by a query; see the crate's table for
/// those there are.
///
/// ```
/// use attn_core::{Result, Attention};
/// use attn_sparse::{PageScorer, Pages, Routed};
///
/// /// The score of the mean key.
/// #[derive(Debug, Clone)]
/// struct Means;
///
/// impl PageScorer for Means {
///     const NAME: &'static str = "means";
///     type Sketch = ();
///     fn pages(&self) -> Pages {
///         Pages { page_len: 16, n_pages: 32, first: 1, last: 2 }
///     }
///     fn width(&self, head_dim: usize) -> Result<usize> {
///         Ok(head_dim)
///     }
///     fn sketch(&self, _: usize, _: &[f32], _: usize) {}
///     fn note(&self, _: &(), page: &[f32], note: &mut [f32]) {
///         note.fill(0.0);
///         for key in page.chunks_exact(note.len()) {
///             note.iter_mut().zip(key).for_each(|(sum, x)| *sum += x / 16.0);
///         }
///     }
///     fn ask(&self, _: &(), q: &[f32], question: &mut [f32]) {
///         question.copy_from_slice(q);
///     }
/// }
///
/// let attention = Routed::new(Means);
/// assert!(attention.as_streaming().is_some() && attention.as_differentiable().is_some());
/// ```
pub trait PageScorer: Clone + fmt::Debug + Send + Sync + 'static {
    /// Stable kebab-case name.
    const NAME: &'static str;

    /// What is learned of the first keys of a key/value head.
    type Sketch: Send + Sync + 'static;

    /// Which pages a query takes.
    fn pages(&self) -> Pages;

    /// Numbers of a note, for keys of width `head_dim`.
    ///
    /// # Errors
    /// [`AttnError`] for settings that do not fit.
    fn width(&self, head_dim: usize) -> Result<usize>;

    /// Checks settings against the number of key/value heads.
    ///
    /// # Errors
    /// [`AttnError`] for settings that do not fit.
    fn check_heads(&self, n_heads_kv: usize, head_dim: usize) -> Result<()> {
        let _ = (n_heads_kv, head_dim);
        Ok(())
    }

    /// First keys from which the sketch is made.
    fn calibration_len(&self) -> usize {
        0
    }

    /// The sketch of a key/value head from its first keys, `[calibration_len, head_dim]`.
    fn sketch(&self, kv_head: usize, keys: &[f32], head_dim: usize) -> Self::Sketch;

    /// Notes a complete page, `[page_len, head_dim]`.
    fn note(&self, sketch: &Self::Sketch, page: &[f32], note: &mut [f32]);

    /// What a query `[head_dim]` asks of notes.
    fn ask(&self, sketch: &Self::Sketch, q: &[f32], question: &mut [f32]);
}

impl<S: PageScorer> Router for S {
    const NAME: &'static str = S::NAME;

    type Summary = PageNotes<S>;

    fn summary(&self, shape: &StreamShape) -> Result<PageNotes<S>> {
        PageNotes::new(self, shape)
    }

    fn append(&self, notes: &mut PageNotes<S>, k: &TensorView<'_>) {
        notes.append(self, k);
    }

    fn bytes(&self, notes: &PageNotes<S>) -> usize {
        notes.bytes()
    }

    fn choose(&self, notes: &PageNotes<S>, q: &TensorView<'_>, shape: &AttnShape) -> Result<BlockMask> {
        let (s, width) = (*shape, self.width(shape.head_dim)?);
        let mut data = vec![0.0; s.rows() * width];
        let kv_head = |head: usize| head / s.n_heads_q * s.n_heads_kv + s.kv_head(head % s.n_heads_q);
        for_each_task(
            data.chunks_mut((s.n_q * width).max(1)).enumerate(),
            || (),
            |(), (head, questions)| {
                // Before there is a sketch, no query needs scores.
                let Some(sketch) = &notes.heads[kv_head(head)].sketch else { return };
                let rows = rows_f32(q, head / s.n_heads_q, head % s.n_heads_q, 0..s.n_q);
                let rows = rows.chunks_exact(s.head_dim).zip(questions.chunks_exact_mut(width));
                rows.for_each(|(q, question)| self.ask(sketch, q, question));
            },
        );
        let lists = s.batch * s.n_heads_q;
        let queries = IndexQueries { lists, heads: 1, rows: s.n_q, width, data, weights: None, relu: false };
        let selector = TopPages { pages: self.pages(), all_up_to: self.calibration_len(), shape };
        let chosen = select(&queries, |list| &notes.heads[kv_head(list)].notes, &selector);
        masked(&self.pages(), shape, s.n_heads_q, chosen)
    }

    fn entries(&self) -> usize {
        let pages = self.pages();
        pages.n_pages.max(self.calibration_len().div_ceil(pages.page_len.max(1)))
    }

    fn work(&self, shape: &AttnShape) -> Work {
        let pages = self.pages();
        let width = self.width(shape.head_dim).unwrap_or(shape.head_dim) as u64;
        let scores = crate::heads(shape) * causal_pairs(shape) / pages.page_len.max(1) as u64;
        work(&pages, shape, self.calibration_len(), (scores, width), shape.n_heads_q)
    }

    fn growth(&self) -> Growth {
        growth(&self.pages(), self.width(64).unwrap_or(64))
    }
}

/// At a million keys of width 64: what is attended is linear, scores of notes are not.
fn growth(pages: &Pages, width: usize) -> Growth {
    let (attended, scores) = (pages.keys().saturating_mul(4 * 64), (1 << 20) / pages.page_len.max(1) * width);
    match scores / attended.max(1) {
        0 => Growth::Linear,
        1..=6 => Growth::SubQuadratic,
        _ => Growth::Quadratic,
    }
}

/// Pages that were chosen, seen causally by `lists` groups of query heads.
fn masked(pages: &Pages, shape: &AttnShape, lists: usize, chosen: Lists) -> Result<BlockMask> {
    match pages.page_len {
        1 => tokens(shape, lists, chosen),
        len => blocks(shape, len, lists, |at| wide(chosen.row(at))),
    }
}

/// Work of so many scores of some width, choices for `lists` groups of query heads included.
fn work(pages: &Pages, s: &AttnShape, all_up_to: usize, scores: (u64, u64), lists: usize) -> Work {
    let (scores, width) = scores;
    let n_pages = s.n_kv.div_ceil(pages.page_len.max(1));
    let notes = (s.batch * s.n_heads_kv * n_pages) as u64 * width * 4;
    let dense = pairs_up_to(s, all_up_to.max(pages.keys())).min(pairs_up_to(s, s.n_kv));
    Work {
        pairs: pairs_up_to(s, pages.keys()).max(dense),
        decision_flops: 2 * scores * width,
        decision_bytes: notes + list_bytes(s, lists, pages.n_pages.min(n_pages)),
    }
}
