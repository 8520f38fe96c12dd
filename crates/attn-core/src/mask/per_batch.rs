//! Numbers that may differ by batch entry.

use super::broadcast::check_axis;
use crate::{AttnError, AttnShape, Result};

/// One value a batch entry, or one for all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PerBatch<T> {
    values: Vec<T>,
    /// 0 if one value serves all.
    stride: usize,
}

impl<T: Copy> PerBatch<T> {
    pub(crate) fn new(name: &str, values: Vec<T>, shape: &AttnShape) -> Result<Self> {
        let stride = usize::from(values.len() != 1);
        if stride == 1 && values.len() != shape.batch {
            return Err(AttnError::shape(name, "batch", values.len(), format!("1 or {}", shape.batch)));
        }
        Ok(Self { values, stride })
    }

    /// Checks that there is a value for every batch entry of `shape`.
    pub(crate) fn check(&self, name: &str, shape: &AttnShape) -> Result<()> {
        if self.stride == 0 { Ok(()) } else { check_axis(name, "batch", self.values.len(), shape.batch) }
    }

    #[inline(always)]
    pub(crate) fn of(&self, batch: usize) -> T {
        self.values[batch * self.stride]
    }
}
