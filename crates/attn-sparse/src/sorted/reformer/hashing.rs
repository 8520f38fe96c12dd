//! Where the buckets of tokens come from.

use super::Reformer;
use super::buckets::{Digits, hash};
use crate::sorted::noise::normal;
use attn_core::{AttnError, Qkv, Result, TensorView};

/// How tokens find their buckets.
#[derive(Debug, Clone, Copy, Default)]
pub enum Hashing<'a> {
    /// Rotations are drawn with the variant's seed, the same for all heads.
    #[default]
    Drawn,
    /// Rotations `[head_dim, n_hashes, columns]`; columns are half the sum of the factors of `n_buckets`, and where no
    /// `n_buckets` is set, half the buckets.
    Rotations(&'a [f32]),
    /// The buckets themselves, `[batch, n_heads_q, n_hashes, n]` of queries and `[batch, n_heads_kv, n_hashes, n]` of keys
    /// (not read if queries and keys are shared).
    Buckets {
        /// Of queries.
        q: &'a [i32],
        /// Of keys.
        k: &'a [i32],
    },
}

/// A checked [`Hashing`].
pub(super) enum Resolved<'a> {
    Rotations { rotations: Vec<f32>, digits: Digits },
    Buckets { q: &'a [i32], k: &'a [i32], n_buckets: usize, n_hashes: usize, heads: [usize; 2] },
}

impl<'a> Hashing<'a> {
    pub(super) fn resolve(self, config: &Reformer, x: &Qkv<'_>) -> Result<Resolved<'a>> {
        let (shape, n_hashes) = (x.shape(), config.n_hashes);
        let factors = config.factors(shape.n_q);
        match self {
            Self::Drawn => {
                let digits = Digits { factors, n_hashes };
                let len = shape.head_dim * n_hashes * digits.columns();
                Ok(Resolved::Rotations { rotations: normal(config.seed, len), digits })
            }
            Self::Rotations(rotations) => {
                let per_round = shape.head_dim * n_hashes;
                let columns = rotations.len() / per_round;
                let factors = if config.n_buckets.is_empty() { vec![2 * columns] } else { factors };
                let digits = Digits { factors, n_hashes };
                let expected = per_round * digits.columns();
                if columns == 0 || rotations.len() != expected {
                    let expected = format!("head_dim x n_hashes x columns = {}", expected.max(per_round));
                    return Err(AttnError::shape("rotations", "elements", rotations.len(), expected));
                }
                Ok(Resolved::Rotations { rotations: rotations.to_vec(), digits })
            }
            Self::Buckets { q, k } => {
                let rows = |heads: usize| shape.batch * heads * n_hashes * shape.n_q;
                let sides = [("buckets", q, shape.n_heads_q), ("buckets_k", k, shape.n_heads_kv)];
                let sides = &sides[..2 - usize::from(config.shared_qk)];
                for (name, buckets, heads) in sides {
                    if buckets.len() != rows(*heads) {
                        let expected = format!("batch x heads x n_hashes x n = {}", rows(*heads));
                        return Err(AttnError::shape(*name, "elements", buckets.len(), expected));
                    }
                }
                let all = || sides.iter().flat_map(|(_, buckets, _)| buckets.iter().copied());
                let n_buckets = all().max().map_or(1, |most| most.max(0) as usize + 1);
                if let Some(negative) = all().find(|b| *b < 0) {
                    return Err(AttnError::value("buckets", negative, "at least 0"));
                }
                let known: Option<usize> =
                    (!config.n_buckets.is_empty()).then(|| config.n_buckets.iter().product());
                let most = known.unwrap_or(4 * shape.n_q.max(64));
                if n_buckets > most || n_buckets.saturating_mul(n_hashes) >= i32::MAX as usize {
                    return Err(AttnError::value("buckets", n_buckets - 1, format!("below {most}")));
                }
                let heads = [shape.n_heads_q, shape.n_heads_kv];
                Ok(Resolved::Buckets { q, k, n_buckets, n_hashes, heads })
            }
        }
    }
}

impl Resolved<'_> {
    pub(super) fn n_buckets(&self) -> usize {
        match self {
            Self::Rotations { digits, .. } => digits.factors.iter().product(),
            Self::Buckets { n_buckets, .. } => *n_buckets,
        }
    }

    /// Buckets `[n_hashes, n]` of the tokens of one head of `rows`.
    pub(super) fn buckets(&self, rows: &TensorView<'_>, at: [usize; 2], of_keys: bool) -> Vec<i32> {
        match self {
            Self::Rotations { rotations, digits } => hash(rows, at, rotations, digits),
            Self::Buckets { q, k, n_hashes, heads, .. } => {
                let (buckets, heads) = if of_keys { (k, heads[1]) } else { (q, heads[0]) };
                let len = n_hashes * rows.shape()[2];
                buckets[(at[0] * heads + at[1]) * len..][..len].to_vec()
            }
        }
    }
}
