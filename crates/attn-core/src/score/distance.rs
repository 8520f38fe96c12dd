//! How far a key stands from its query.

use crate::mask::Pair;
use crate::{AttnError, AttnShape, Result};

/// `j - (i + offset)`, in 32 bits, which vector code converts and compares cheaply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Distance {
    offset: i32,
}

impl Distance {
    /// `offset` is the position of query 0 on the key axis.
    ///
    /// # Errors
    /// [`AttnError::Value`] if a distance within `shape` would not fit 31 bits.
    pub(super) fn new(shape: &AttnShape, offset: isize) -> Result<Self> {
        const MOST: usize = 1 << 29;
        if offset.unsigned_abs() > MOST || shape.n_q > MOST || shape.n_kv > MOST {
            let found = format!("{offset} for {} queries and {} keys", shape.n_q, shape.n_kv);
            return Err(AttnError::value("offset", found, format!("three numbers of at most {MOST}")));
        }
        Ok(Self { offset: offset as i32 })
    }

    #[inline(always)]
    pub(super) fn of(self, at: Pair) -> i32 {
        (at.j as i32).wrapping_sub(at.i as i32).wrapping_sub(self.offset)
    }

    /// The least and the greatest distance within `shape`; `(0, 0)` if it has no pair.
    pub(super) fn bounds(self, shape: &AttnShape) -> (i32, i32) {
        if shape.n_q == 0 || shape.n_kv == 0 {
            return (0, 0);
        }
        let of = |i, j| self.of(Pair { batch: 0, head: 0, i, j });
        (of(shape.n_q - 1, 0), of(0, shape.n_kv - 1))
    }
}
