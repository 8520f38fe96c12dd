//! What a recurrence remembers.

use attn_core::{AttnError, Result};

/// Sizes of a [`State`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateShape {
    /// Independent problems.
    pub batch: usize,
    /// Query heads: each has its own memory.
    pub heads: usize,
    /// Width of the keys' features.
    pub key_dim: usize,
    /// Width of the values.
    pub value_dim: usize,
}

impl StateShape {
    /// Memories: one a batch entry and head.
    pub fn memories(&self) -> usize {
        self.batch * self.heads
    }
}

/// The memory of all heads: `s [batch, heads, key_dim, value_dim]` and, for normalised variants,
/// `z [batch, heads, key_dim]`, row-major f32 whatever the inputs' dtype.
#[derive(Debug, Clone, PartialEq)]
pub struct State {
    shape: StateShape,
    s: Vec<f32>,
    z: Option<Vec<f32>>,
}

/// One head's part of a [`State`].
#[derive(Debug)]
pub(super) struct HeadState<'a> {
    /// `[key_dim, value_dim]`.
    pub(super) s: &'a mut [f32],
    /// `[key_dim]`; empty without a normaliser.
    pub(super) z: &'a mut [f32],
}

impl HeadState<'_> {
    pub(super) fn reborrow(&mut self) -> HeadState<'_> {
        HeadState { s: self.s, z: self.z }
    }
}

impl State {
    /// A memory of nothing.
    pub fn zero(shape: StateShape, normalised: bool) -> Self {
        let keys = shape.memories() * shape.key_dim;
        Self { shape, s: vec![0.0; keys * shape.value_dim], z: normalised.then(|| vec![0.0; keys]) }
    }

    /// A memory as given.
    ///
    /// # Errors
    /// [`AttnError::Shape`] if a length is not that of the shape.
    pub fn new(shape: StateShape, s: Vec<f32>, z: Option<Vec<f32>>) -> Result<Self> {
        let keys = shape.memories() * shape.key_dim;
        if s.len() != keys * shape.value_dim {
            return Err(AttnError::shape("initial_state", "elements", s.len(), keys * shape.value_dim));
        }
        if let Some(z) = &z
            && z.len() != keys
        {
            return Err(AttnError::shape("initial_normaliser", "elements", z.len(), keys));
        }
        Ok(Self { shape, s, z })
    }

    /// Sizes.
    pub fn shape(&self) -> StateShape {
        self.shape
    }

    /// `[batch, heads, key_dim, value_dim]`: the sums of `k v^T`.
    pub fn s(&self) -> &[f32] {
        &self.s
    }

    /// `[batch, heads, key_dim]`: the sums of `k`, for normalised variants.
    pub fn z(&self) -> Option<&[f32]> {
        self.z.as_deref()
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        size_of_val(&self.s[..]) + self.z.as_deref().map_or(0, size_of_val)
    }

    /// Checks that the state is one of `shape`.
    pub(super) fn check(&self, shape: &StateShape, normalised: bool) -> Result<()> {
        let axes = [
            ("batch", self.shape.batch, shape.batch),
            ("n_heads_q", self.shape.heads, shape.heads),
            ("head_dim", self.shape.key_dim, shape.key_dim),
            ("head_dim_v", self.shape.value_dim, shape.value_dim),
        ];
        for (axis, found, expected) in axes {
            if found != expected {
                return Err(AttnError::shape("state", axis, found, expected));
            }
        }
        if self.z.is_some() != normalised {
            let say = |has: bool| if has { "with a normaliser" } else { "without a normaliser" };
            return Err(AttnError::value("state", say(!normalised), say(normalised)));
        }
        Ok(())
    }

    /// The heads' parts, batch by batch.
    pub(super) fn heads_mut(&mut self) -> impl Iterator<Item = HeadState<'_>> {
        let StateShape { key_dim, value_dim, .. } = self.shape;
        let mut z = self.z.as_deref_mut().unwrap_or_default().chunks_exact_mut(key_dim.max(1));
        let s = self.s.chunks_exact_mut((key_dim * value_dim).max(1));
        s.map(move |s| HeadState { s, z: z.next().unwrap_or_default() })
    }
}
