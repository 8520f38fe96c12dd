//! What a variant asks of the engine.

use super::{State, StateShape};
use crate::feature_map::FeatureMap;
use attn_core::{AttnError, AttnShape, Result};
use std::sync::Arc;

/// Options of the engine: a variant is one row of these.
#[derive(Debug, Clone)]
pub struct Spec {
    /// The variant's name, for error messages.
    pub name: &'static str,
    /// A query sees the keys up to its own position; else all of them.
    pub causal: bool,
    /// Multiplies the read; never the state.
    pub scale: f32,
    /// The front end: what queries and keys become; `None` leaves them as they are.
    pub features: Option<Arc<dyn FeatureMap>>,
    /// How the state fades.
    pub decay: Decay,
    /// The back end: what the read is divided by.
    pub normaliser: Normaliser,
    /// Tokens the chunked form handles at once.
    pub chunk_len: usize,
}

/// How the state fades at every token, as a natural log.
#[derive(Debug, Clone, PartialEq)]
pub enum Decay {
    /// Not at all.
    None,
    /// `S <- e^g S` with one constant `g <= 0` a query head; -inf forgets everything.
    PerHead(Vec<f32>),
}

/// What the read `q^T S` is divided by.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Normaliser {
    /// Nothing.
    None,
    /// `scale q . z + eps` with `z` the decayed sum of keys; where that is 0, the output is 0.
    SumPlus {
        /// Keeps the quotient finite.
        eps: f32,
    },
}

impl Decay {
    /// The constant of a head, if there is one.
    pub(super) fn of_head(&self, head: usize) -> Option<f32> {
        match self {
            Self::None => None,
            Self::PerHead(log_decay) => Some(log_decay[head]),
        }
    }
}

impl Spec {
    /// Width of a query's or key's features.
    pub fn key_dim(&self, head_dim: usize) -> usize {
        self.features.as_ref().map_or(head_dim, |map| map.width(head_dim))
    }

    /// Sizes of the state of such a problem: one a query head.
    pub fn state_shape(&self, shape: &AttnShape) -> StateShape {
        StateShape {
            batch: shape.batch,
            heads: shape.n_heads_q,
            key_dim: self.key_dim(shape.head_dim),
            value_dim: shape.head_dim_v,
        }
    }

    /// Whether the state has a normaliser `z`.
    pub fn has_normaliser(&self) -> bool {
        self.normaliser != Normaliser::None
    }

    /// Checks that `state` fits a problem.
    pub(super) fn check_state(&self, shape: &AttnShape, state: &State) -> Result<()> {
        state.check(&self.state_shape(shape), self.has_normaliser())?;
        if self.causal && shape.n_q > shape.n_kv {
            let what = format!("a state with {} queries for {} keys", shape.n_q, shape.n_kv);
            return Err(AttnError::unsupported(self.name, what));
        }
        Ok(())
    }

    /// Checks the options for a problem of `n_heads_q` heads.
    ///
    /// # Errors
    /// [`AttnError::Value`], [`AttnError::Shape`] or [`AttnError::Unsupported`] naming the option.
    pub fn check(&self, n_heads_q: usize) -> Result<()> {
        if !self.scale.is_finite() {
            return Err(AttnError::value("scale", self.scale, "a finite number"));
        }
        if self.chunk_len == 0 {
            return Err(AttnError::value("chunk_len", 0, "at least 1"));
        }
        if let Normaliser::SumPlus { eps } = self.normaliser
            && !(eps.is_finite() && eps >= 0.0)
        {
            return Err(AttnError::value("eps", eps, "a finite number, at least 0"));
        }
        if let Decay::PerHead(log_decay) = &self.decay {
            if !self.causal {
                return Err(AttnError::unsupported(self.name, "a decay without `causal`"));
            }
            if log_decay.len() != n_heads_q {
                return Err(AttnError::shape("log_decay", "n_heads_q", log_decay.len(), n_heads_q));
            }
            if let Some(g) = log_decay.iter().find(|g| g.is_nan() || **g > 0.0) {
                return Err(AttnError::value("log_decay", g, "at most 0 (a natural log)"));
            }
        }
        Ok(())
    }
}
