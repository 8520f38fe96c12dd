//! The three branches, for some rows of queries against all keys up to theirs.

use super::Nsa;
use super::compression::Compressed;
use super::inputs::{NsaBranch, NsaOutputs};
use crate::decider::Decision;
use crate::routed::ended::Ended;
use crate::routed::given_lists;
use crate::routed::router::{rows_apart, visible};
use attn_core::mask::{Align, Band, Mask};
use attn_core::score::Unchanged;
use attn_core::{AttnShape, Result, TensorView, View, ViewMut};
use attn_flash::engine::{AnySpec, KvView, Problem, attend_any};

/// Some rows of queries, the last of which stands at the last key.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rows {
    pub(super) shape: AttnShape,
    pub(super) softmax_scale: f32,
}

impl Rows {
    /// Keys that a row sees.
    pub(super) fn visible(&self, row: usize) -> usize {
        visible(&self.shape, row)
    }

    pub(super) fn ended(&self, nsa: &Nsa) -> Ended {
        Ended::of(nsa.compress_len, nsa.compress_stride, &self.shape)
    }

    /// The window's mask.
    pub(super) fn band(&self, nsa: &Nsa) -> Band {
        Band { left: Some(nsa.window.saturating_sub(1)), ..Band::causal(&self.shape, Align::BottomRight) }
    }

    pub(super) fn together<'a>(&self, mask: &'a (dyn Mask + 'a)) -> AnySpec<'a> {
        AnySpec::new(self.softmax_scale, mask, &Unchanged)
    }

    /// Attends with f32 results.
    fn branch(&self, problem: Problem<'_>, spec: &AnySpec<'_>) -> Result<NsaBranch> {
        let mut branch = NsaBranch::unwritten(&self.shape);
        let out = ViewMut::contiguous("out", &mut branch.out, self.shape.out())?;
        attend_any(problem, out.into(), Some(&mut branch.lse), spec)?;
        Ok(branch)
    }
}

impl Nsa {
    /// The decision of the selected branch.
    pub(super) fn decision(&self, s: &AttnShape, selected: &[Vec<usize>]) -> Result<Decision> {
        given_lists(s, self.select_len, s.n_heads_kv, selected)
    }

    /// All branches; `q` is f32. The gated sum is left to the caller.
    pub(super) fn attend(
        &self,
        rows: &Rows,
        q: View<'_, f32>,
        kv: (KvView<'_>, KvView<'_>),
        compressed: &Compressed,
        given: Option<&[Vec<usize>]>,
    ) -> Result<NsaOutputs> {
        let (s, tensor) = (rows.shape, TensorView::from(q));
        let (selected, compress) = match given {
            None if s.n_q == 1 => self.select_and_attend(compressed, &tensor, rows),
            given => {
                let blocks = compressed.rows();
                let (k, v) = compressed.views(&blocks)?;
                let ended = rows.ended(self);
                let problem = Problem::cached(q, k, v, None)?;
                let compress = rows.branch(problem, &rows.together(&ended))?;
                (given.map_or_else(|| self.select(compressed, &tensor, rows), <[_]>::to_vec), compress)
            }
        };
        let problem = || Problem::cached(q, kv.0, kv.1, None);
        let decision = self.decision(&s, &selected)?;
        let select =
            rows.branch(problem()?, &rows_apart(decision.mask(), self.select_len, rows.softmax_scale, &s))?;
        let band = rows.band(self);
        let window = match self.window {
            0 => None,
            _ => Some(rows.branch(problem()?, &rows.together(&band))?),
        };
        Ok(NsaOutputs { out: Vec::new(), compress, select, window, selected })
    }
}
