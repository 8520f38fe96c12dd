//! Which axis of a tensor is which.

use crate::AttnError;

/// The order of a tensor's axes. Views are always `(batch, heads, length, width)`; strides make up for the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AxisOrder {
    /// `(batch, heads, length, width)`: as matmul wants them.
    Bhnd,
    /// `(batch, length, heads, width)`: as a projection gives them.
    Bnhd,
    /// `(length, heads, width)`: packed sequences, one batch entry.
    Nhd,
}

impl AxisOrder {
    /// The axes by name, for errors.
    pub fn names(self) -> &'static str {
        match self {
            Self::Bhnd => "(batch, heads, length, width)",
            Self::Bnhd => "(batch, length, heads, width)",
            Self::Nhd => "(length, heads, width)",
        }
    }

    /// Lengths and strides of a tensor as those of `(batch, heads, length, width)`.
    pub(super) fn view(
        self,
        tensor: &str,
        dims: &[usize],
        strides: &[usize],
    ) -> crate::Result<[[usize; 4]; 2]> {
        let both = [dims, strides];
        match (self, dims.len()) {
            (Self::Bhnd, 4) => Ok(both.map(|x| [x[0], x[1], x[2], x[3]])),
            (Self::Bnhd, 4) => Ok(both.map(|x| [x[0], x[2], x[1], x[3]])),
            // One batch entry: its stride is never taken.
            (Self::Nhd, 3) => Ok([[1, dims[1], dims[0], dims[2]], [0, strides[1], strides[0], strides[2]]]),
            _ => Err(AttnError::value(format!("{tensor}'s shape"), format!("{dims:?}"), self.names())),
        }
    }

    /// The lengths of a tensor that is `shape = (batch, heads, length, width)` as a view.
    pub fn dims(self, [batch, heads, length, width]: [usize; 4]) -> Vec<usize> {
        match self {
            Self::Bhnd => vec![batch, heads, length, width],
            Self::Bnhd => vec![batch, length, heads, width],
            Self::Nhd => vec![length, heads, width],
        }
    }

    /// The strides of `shape = (batch, heads, length, width)` in a contiguous tensor of this order.
    pub(super) fn strides(self, shape: [usize; 4]) -> [usize; 4] {
        let [_, heads, length, width] = shape;
        match self {
            Self::Bhnd => crate::view::contiguous_strides(shape),
            // As the strides of an empty tensor, these need not be meaningful, only not overflow.
            Self::Bnhd | Self::Nhd => {
                let row = heads.saturating_mul(width);
                [length.saturating_mul(row), width, row, 1]
            }
        }
    }
}
