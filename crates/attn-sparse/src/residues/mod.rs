//! Queries that see keys of their own residue class alone: gathered class by class, nothing hidden is visited.
//!
//! If query `i` at position `p = i + n_kv - n_q` sees key `j` only where `p = j (mod step)`, attention falls apart into
//! `step` smaller problems, one for each residue `c`. With `i_0` the first query of the class and `j_0 = c`,
//!
//! ```text
//! query a of the class  is  i = i_0 + a step            key b of the class  is  j = j_0 + b step
//! p - j = step (a + offset - b)                         offset = (i_0 + n_kv - n_q - c) / step
//! ```
//!
//! so that a window of `w step` positions becomes a plain window of `w` in the class. The rows of a class are strided
//! views: nothing is copied. Steps may differ between heads; heads with equal steps run together.
//!
//! [`crate::Parted`] is for sets of pairs whose rows overlap or are no strides: one call on gathered f32 copies a part, merged. Here
//! rows lie in one class each: no copy, no merge, one call a class, with sinks and score mods, which parts do not know.

mod backward;
mod forward;

use attn_core::mask::{Head, Mask, Pair};
use attn_core::score::{BiasIndex, ScoreMod};
use attn_core::{AttnError, AttnShape, Result};
pub(crate) use backward::backward;
pub(crate) use forward::forward;
use std::ops::Range;
use std::sync::Arc;

/// One residue class of the positions, in some heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Class {
    /// Positions from one row of the class to the next.
    pub step: usize,
    /// Position of query 0 of the class, counted on the class's key axis.
    pub offset: isize,
    first_q: usize,
    first_kv: usize,
}

impl Class {
    /// The class of query `first_q`, one of the first `step`.
    fn of(first_q: usize, step: usize, shape: &AttnShape) -> Self {
        let position = first_q as isize + shape.n_kv as isize - shape.n_q as isize;
        let first_kv = position.rem_euclid(step as isize);
        Self { step, offset: (position - first_kv) / step as isize, first_q, first_kv: first_kv as usize }
    }

    /// Classes that have a query.
    pub(crate) fn all(step: usize, shape: &AttnShape) -> impl Iterator<Item = Self> + use<> {
        let shape = *shape;
        (0..step.min(shape.n_q)).map(move |first| Self::of(first, step, &shape))
    }

    /// Its queries and its keys.
    pub(crate) fn lengths(&self, shape: &AttnShape) -> (usize, usize) {
        let rows = |first: usize, n: usize| n.saturating_sub(first).div_ceil(self.step);
        (rows(self.first_q, shape.n_q), rows(self.first_kv, shape.n_kv))
    }

    fn query(&self, a: usize) -> usize {
        self.first_q + a * self.step
    }

    fn key(&self, b: usize) -> usize {
        self.first_kv + b * self.step
    }
}

/// Makes the mask of a class, whose rows are counted within it.
type LocalMask = dyn Fn(Class) -> Box<dyn Mask + Send + Sync> + Send + Sync;

/// Which rows belong together, and who sees whom among them.
#[derive(Clone)]
pub struct Residues {
    /// One for all query heads, or one each.
    steps: Arc<[usize]>,
    /// The one residue that each head keeps, if not all: rows of the others see nothing.
    kept: Option<Arc<[usize]>>,
    local: Arc<LocalMask>,
}

impl Residues {
    /// `steps`: one for all query heads or one each; `local` makes the mask of a class, whose query 0 stands at
    /// [`Class::offset`].
    ///
    /// # Errors
    /// [`AttnError::Value`] for a step of 0.
    pub fn new(
        steps: impl Into<Arc<[usize]>>,
        local: impl Fn(Class) -> Box<dyn Mask + Send + Sync> + Send + Sync + 'static,
    ) -> Result<Self> {
        let steps = steps.into();
        if steps.contains(&0) {
            return Err(AttnError::value("dilation", 0, "at least 1"));
        }
        Ok(Self { steps, kept: None, local: Arc::new(local) })
    }

    /// Only the class `kept[h]` of each query head `h`.
    pub(crate) fn keeping(self, kept: impl Into<Arc<[usize]>>) -> Self {
        Self { kept: Some(kept.into()), ..self }
    }

    pub(crate) fn check(&self, shape: &AttnShape) -> Result<()> {
        let heads = shape.n_heads_q;
        let lens = [self.steps.len(), self.kept.as_ref().map_or(1, |kept| kept.len())];
        match lens.into_iter().find(|&len| len != 1 && len != heads) {
            Some(len) => Err(AttnError::shape("dilation", "n_heads_q", len, format!("1 or {heads}"))),
            None => Ok(()),
        }
    }

    /// The step of a head, and the residue it keeps.
    fn of(&self, head: usize) -> (usize, Option<usize>) {
        let at = |list: &[usize]| list[if list.len() == 1 { 0 } else { head }];
        (at(&self.steps), self.kept.as_deref().map(at))
    }

    /// Heads that run together: consecutive, with equal steps, and either whole groups that share key/value heads or
    /// inside one of them.
    fn parts(&self, shape: &AttnShape) -> Vec<Part> {
        let (heads, group) = (shape.n_heads_q, shape.group_size().max(1));
        let (mut parts, mut at) = (Vec::new(), 0);
        while at < heads {
            let like = self.of(at);
            let same = at + (at..heads).take_while(|&h| self.of(h) == like).count();
            let group_end = (at / group + 1) * group;
            let end = match at % group {
                0 if same >= group_end => same / group * group,
                _ => same.min(group_end),
            };
            let (step, kept) = like;
            parts.push(Part { heads: at..end, kv_heads: at / group..(end - 1) / group + 1, step, kept });
            at = end;
        }
        parts
    }
}

/// Heads that run together.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Part {
    heads: Range<usize>,
    kv_heads: Range<usize>,
    step: usize,
    kept: Option<usize>,
}

impl Part {
    /// Classes that have a query.
    fn classes(&self, shape: &AttnShape) -> impl Iterator<Item = Class> + use<> {
        let kept = self.kept;
        Class::all(self.step, shape).filter(move |class| kept.is_none_or(|kept| kept == class.first_kv))
    }

    /// Whether some row belongs to no class that has a query.
    fn leaves_rows(&self, shape: &AttnShape) -> bool {
        self.kept.is_some() || shape.n_q < self.step
    }
}

/// What is asked of a class, asked of the whole: heads and rows by their numbers there.
struct InClass<'a, T: ?Sized> {
    class: Class,
    first_head: usize,
    whole: &'a T,
}

impl<T: ?Sized> InClass<'_, T> {
    fn place(&self, at: Pair) -> Pair {
        let head = Head { batch: at.batch, head: at.head + self.first_head };
        head.pair(self.class.query(at.i), self.class.key(at.j))
    }
}

impl<T: ScoreMod + ?Sized> ScoreMod for InClass<'_, T> {
    fn apply(&self, score: f32, at: Pair) -> f32 {
        self.whole.apply(score, self.place(at))
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        self.whole.apply_f64(score, self.place(at))
    }

    fn derivative(&self, score: f32, at: Pair) -> f32 {
        self.whole.derivative(score, self.place(at))
    }

    fn has_derivative(&self) -> bool {
        self.whole.has_derivative()
    }

    fn is_identity(&self) -> bool {
        self.whole.is_identity()
    }
}

impl<T: BiasIndex + ?Sized> BiasIndex for InClass<'_, T> {
    fn len(&self) -> usize {
        self.whole.len()
    }

    fn index(&self, at: Pair) -> usize {
        self.whole.index(self.place(at))
    }
}

/// The log-sum-exps of the rows of a class, `[batch, part heads, rows]`, among those of all rows, `[batch, n_heads_q, n_q]`.
struct ClassRows<'a> {
    shape: &'a AttnShape,
    heads: Range<usize>,
    class: Class,
}

impl ClassRows<'_> {
    /// The place of each of them among all.
    fn places(&self) -> impl Iterator<Item = usize> + '_ {
        let (s, class) = (self.shape, self.class);
        let rows =
            move |head: usize| (class.first_q..s.n_q).step_by(class.step).map(move |i| head * s.n_q + i);
        (0..s.batch)
            .flat_map(move |batch| self.heads.clone().flat_map(move |head| rows(batch * s.n_heads_q + head)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::mask::SeeAll;

    fn parts(steps: &[usize], n_heads_kv: usize) -> Vec<(Range<usize>, Range<usize>)> {
        let shape = AttnShape { n_heads_kv, ..AttnShape::square(steps.len(), 4, 4) };
        let residues = Residues::new(steps, |_| Box::new(SeeAll)).unwrap();
        residues.parts(&shape).into_iter().map(|part| (part.heads, part.kv_heads)).collect()
    }

    #[test]
    fn heads_with_equal_steps_run_together_in_whole_groups() {
        assert_eq!(parts(&[2, 2, 2, 2], 2), [(0..4, 0..2)]);
        assert_eq!(parts(&[2, 2, 3, 3], 2), [(0..2, 0..1), (2..4, 1..2)]);
        assert_eq!(parts(&[2, 2, 2, 3], 2), [(0..2, 0..1), (2..3, 1..2), (3..4, 1..2)]);
        assert_eq!(parts(&[1, 2, 2, 2], 2), [(0..1, 0..1), (1..2, 0..1), (2..4, 1..2)]);
        assert_eq!(parts(&[1, 2, 2, 2], 4), [(0..1, 0..1), (1..4, 1..4)]);
    }

    #[test]
    fn classes_keep_distances() {
        for (n_q, n_kv) in [(7, 7), (3, 10), (10, 3), (1, 9)] {
            let shape = AttnShape { n_q, n_kv, ..AttnShape::square(1, 1, 1) };
            for step in [1, 2, 3, 5, 12] {
                let residues = Residues::new([step], |_| Box::new(SeeAll)).unwrap();
                let mut queries = Vec::new();
                for class in residues.parts(&shape)[0].classes(&shape) {
                    for a in (0..n_q).take_while(|&a| class.query(a) < n_q) {
                        queries.push(class.query(a));
                        for b in (0..n_kv).take_while(|&b| class.key(b) < n_kv) {
                            let apart = (class.query(a) + n_kv) as isize - (n_q + class.key(b)) as isize;
                            assert_eq!(apart, step as isize * (a as isize + class.offset - b as isize));
                        }
                    }
                }
                queries.sort_unstable();
                assert_eq!(queries, (0..n_q).collect::<Vec<_>>());
            }
        }
    }
}
