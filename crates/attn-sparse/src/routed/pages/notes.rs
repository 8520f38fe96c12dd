//! Notes of all complete pages, grown at the end as keys come.

use super::PageScorer;
use crate::routed::key_panels::KeyPanels;
use crate::routed::rows::rows_f32;
use attn_core::parallel::for_each_task;
use attn_core::{AttnError, Result, StreamShape, TensorView};
use std::fmt;

/// Keys that are looked at together.
const PIECE: usize = 4096;

/// What a [`PageScorer`] keeps of the keys.
pub struct PageNotes<S: PageScorer> {
    /// One a batch entry and key/value head.
    pub(super) heads: Vec<HeadNotes<S::Sketch>>,
    n_heads_kv: usize,
    head_dim: usize,
    width: usize,
}

/// What is kept of one key/value head.
pub(super) struct HeadNotes<K> {
    pub(super) sketch: Option<K>,
    pub(super) notes: KeyPanels<f32>,
    /// Keys that are not noted yet.
    open: Vec<f32>,
}

impl<K> HeadNotes<K> {
    /// Makes the sketch once there are keys enough, and then notes all complete pages.
    fn note<S: PageScorer<Sketch = K>>(&mut self, scorer: &S, kv_head: usize, d: usize, note: &mut [f32]) {
        let calibration = scorer.calibration_len() * d;
        if self.sketch.is_none() && self.open.len() >= calibration {
            self.sketch = Some(scorer.sketch(kv_head, &self.open[..calibration], d));
        }
        let Some(sketch) = &self.sketch else { return };
        let page = (scorer.pages().page_len * d).max(1);
        let complete = self.open.chunks_exact(page);
        let rest = complete.remainder().len();
        for page in complete {
            scorer.note(sketch, page, note);
            self.notes.push(note.iter().copied());
        }
        self.open.drain(..self.open.len() - rest);
        // A long prompt leaves no buffer of its own behind.
        self.open.shrink_to(page);
    }
}

impl<S: PageScorer> fmt::Debug for PageNotes<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageNotes")
            .field("scorer", &S::NAME)
            .field("width", &self.width)
            .finish_non_exhaustive()
    }
}

impl<S: PageScorer> PageNotes<S> {
    pub(super) fn new(scorer: &S, shape: &StreamShape) -> Result<Self> {
        scorer.pages().check()?;
        scorer.check_heads(shape.n_heads_kv, shape.head_dim)?;
        let width = scorer.width(shape.head_dim)?;
        if width == 0 && shape.head_dim > 0 {
            return Err(AttnError::value("width of notes", 0, "at least 1"));
        }
        let now = scorer.calibration_len() == 0;
        let head = |at: usize| HeadNotes {
            sketch: now.then(|| scorer.sketch(at % shape.n_heads_kv, &[], shape.head_dim)),
            notes: KeyPanels::new(width),
            open: Vec::new(),
        };
        let heads = (0..shape.batch * shape.n_heads_kv).map(head).collect();
        Ok(Self { heads, n_heads_kv: shape.n_heads_kv, head_dim: shape.head_dim, width })
    }

    pub(super) fn append(&mut self, scorer: &S, k: &TensorView<'_>) {
        let (n_heads, d, n, width) = (self.n_heads_kv, self.head_dim, k.shape()[2], self.width);
        for_each_task(
            self.heads.iter_mut().enumerate(),
            || vec![0.0; width],
            |note, (at, head)| {
                for first in (0..n).step_by(PIECE) {
                    head.open.extend(rows_f32(k, at / n_heads, at % n_heads, first..(first + PIECE).min(n)));
                    head.note(scorer, at % n_heads, d, note);
                }
            },
        );
    }

    pub(super) fn bytes(&self) -> usize {
        let head = |head: &HeadNotes<_>| head.notes.bytes() + 4 * head.open.capacity();
        self.heads.iter().map(head).sum()
    }
}
