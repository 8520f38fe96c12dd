//! A learned bias for each distance.

use super::distance::Distance;
use super::{BiasIndex, ScoreMod};
use crate::mask::{Pair, check_fits};
use crate::{AttnError, AttnShape, Result};

/// `s + table[h, clamp(j - (i + offset), -max, max) + max]`.
///
/// Source: Shaw, Uszkoreit, Vaswani, 2018 (clipped distances), with a scalar for each, as in Raffel et al. 2020.
///
/// ```
/// use attn_core::AttnShape;
/// use attn_core::mask::Pair;
/// use attn_core::score::{RelativeBias, ScoreMod};
///
/// let shape = AttnShape::square(1, 9, 16);
/// let bias = RelativeBias::new(&[0.1, 0.2, 0.3], 1, &shape, 0)?; // before, same place, after
/// assert_eq!(bias.apply(1.0, Pair { batch: 0, head: 0, i: 5, j: 2 }), 1.1);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RelativeBias<'a> {
    /// `[n_heads_q, 2 * max + 1]`.
    table: &'a [f32],
    max: i32,
    distance: Distance,
}

impl<'a> RelativeBias<'a> {
    /// `table [n_heads_q, 2 * max + 1]`, row-major; `offset` is the position of query 0 on the key axis.
    ///
    /// # Errors
    /// [`AttnError::Layout`] if the table has another size; [`AttnError::Value`] for distances beyond 2^29.
    pub fn new(table: &'a [f32], max: usize, shape: &AttnShape, offset: isize) -> Result<Self> {
        let distance = Distance::new(shape, offset)?;
        let width = max.checked_mul(2).and_then(|both| both.checked_add(1));
        if width.and_then(|width| width.checked_mul(shape.n_heads_q)) != Some(table.len()) {
            let heads = shape.n_heads_q;
            let reason = format!("{} elements, expected {heads} heads of 2 * {max} + 1", table.len());
            return Err(AttnError::Layout { tensor: "table".into(), reason });
        }
        if max > 1 << 29 {
            return Err(AttnError::value("max", max, "at most 2^29"));
        }
        Ok(Self { table, max: max as i32, distance })
    }

    #[inline(always)]
    fn at(&self, at: Pair) -> f32 {
        self.table[self.index(at)]
    }
}

impl BiasIndex for RelativeBias<'_> {
    fn len(&self) -> usize {
        self.table.len()
    }

    #[inline(always)]
    fn index(&self, at: Pair) -> usize {
        let slot = self.distance.of(at).clamp(-self.max, self.max) + self.max;
        at.head * (2 * self.max as usize + 1) + slot as usize
    }
}

impl ScoreMod for RelativeBias<'_> {
    fn check(&self, shape: &AttnShape) -> Result<()> {
        check_fits("table", self.table.len(), &[0, 2 * self.max as usize + 1, 0, 0], shape)
    }

    #[inline(always)]
    fn apply(&self, score: f32, at: Pair) -> f32 {
        score + self.at(at)
    }

    fn apply_f64(&self, score: f64, at: Pair) -> f64 {
        score + f64::from(self.at(at))
    }

    #[inline(always)]
    fn derivative(&self, _: f32, _: Pair) -> f32 {
        1.0
    }
}
