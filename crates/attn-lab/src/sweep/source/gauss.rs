//! The control: q, k and v without any structure. Attention over them is nearly flat, which favours no selection.

use super::{Fnv, Source, SourceKind};
use crate::{Result, gauss};
use attn_core::registry::NamedTensors;
use attn_core::{AttnShape, DType};

/// Independent standard normal numbers.
#[derive(Debug, Clone, Copy)]
pub struct Gauss {
    /// Query and key/value heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Seed.
    pub seed: u64,
}

impl Source for Gauss {
    fn kind(&self) -> SourceKind {
        SourceKind::Gauss
    }

    fn describe(&self) -> String {
        format!("independent normal numbers, seed {}", self.seed)
    }

    fn shape(&self, n: usize) -> AttnShape {
        AttnShape::square(self.heads, n, self.head_dim)
    }

    fn hash(&self, _: usize) -> Result<String> {
        Ok(Fnv::new().with(self.describe().as_bytes()).hex())
    }

    fn inputs(&self, n: usize) -> Result<NamedTensors> {
        Ok(gauss::qkv(&self.shape(n), DType::F32, self.seed))
    }
}
