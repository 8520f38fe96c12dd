//! LongNet: dense attention among every `r`-th position of long segments, for several segment lengths, merged.
//!
//! Branch `k` has segments of `w_k` positions and dilation `r_k`, which divides `w_k`. In head `h` it keeps the positions
//! congruent to `h` modulo `r_k`; with `p = i + n_kv - n_q`,
//!
//! ```text
//! A_k(i) = { j : floor(j / w_k) = floor(p / w_k),  j = p = h (mod r_k) }           causal: and j <= p
//! out_i  = sum_k e^(lse_k,i - lse_i) out_k,i          lse_i = ln sum_k e^lse_k,i
//! ```
//!
//! A position that a branch does not keep gets nothing from it. A pair that `c` branches see counts `c` times: the merge is
//! a softmax over the union in which its score carries `ln c`. Heads differ in what they keep, so that together they keep
//! everything. Near keys are seen densely, far ones the sparser the further; time is `O(n * sum w_k / r_k^2)`.
//!
//! Each branch runs class by class ([`crate::Residues`]), on rows that lie `r_k` apart.
//!
//! Source: Ding et al., "LongNet: Scaling Transformers to 1,000,000,000 Tokens", 2023.

mod attention;
mod mask;

use crate::Decision;
use crate::patterns::SameChunk;
use crate::residues::{Class, Residues};
use attn_core::mask::{And, Band};
use attn_core::{AttnError, AttnShape, Result};
use mask::{Copies, LongNetMask};

/// Segments of one length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Branch {
    /// Positions of a segment.
    pub segment: usize,
    /// From one position kept to the next; divides `segment`.
    pub dilation: usize,
}

impl Branch {
    /// The residue that a head keeps.
    fn residue(self, head: usize) -> usize {
        head % self.dilation
    }

    /// The segment of a position, if the branch keeps it in this head.
    fn segment_of(self, position: usize, head: usize) -> Option<usize> {
        (position % self.dilation == self.residue(head)).then_some(position / self.segment)
    }

    fn sees(self, (position, j, head): (usize, usize, usize)) -> bool {
        let segment = self.segment_of(position, head);
        segment.is_some() && segment == self.segment_of(j, head)
    }
}

/// Dilated attention in segments of several lengths; see the module.
///
/// ```
/// use attn_core::{Attention, AttnShape, DType};
/// use attn_sparse::{Branch, LongNet};
///
/// let branches = vec![Branch { segment: 64, dilation: 1 }, Branch { segment: 256, dilation: 4 }];
/// let attention = LongNet::new(branches, true)?;
/// let dense = AttnShape::square(1, 4096, 64);
/// assert!(attention.cost(&dense, DType::F32).flops < 4096 * 4096 * 128 / 20);
/// # Ok::<(), attn_core::AttnError>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct LongNet {
    branches: Vec<Branch>,
    causal: bool,
    softmax_scale: Option<f32>,
}

impl LongNet {
    /// # Errors
    /// [`AttnError::Value`] without branches, and for a dilation that does not divide its segment.
    pub fn new(branches: Vec<Branch>, causal: bool) -> Result<Self> {
        if branches.is_empty() {
            return Err(AttnError::value("branches", 0, "at least 1"));
        }
        for Branch { segment, dilation } in &branches {
            if *dilation == 0 || *segment == 0 || segment % dilation != 0 {
                let expected = format!("at least 1, a divisor of the segment {segment}");
                return Err(AttnError::value("dilation", dilation, expected));
            }
        }
        Ok(Self { branches, causal, softmax_scale: None })
    }

    /// With a factor of raw dot products; `None` is `1/sqrt(head_dim)`.
    #[must_use]
    pub fn with_scale(self, softmax_scale: Option<f32>) -> Self {
        Self { softmax_scale, ..self }
    }

    /// Its branches.
    pub fn branches(&self) -> &[Branch] {
        &self.branches
    }

    /// The pairs that any branch sees, and the `ln c` of those that several see.
    fn mask(&self, branches: &[Branch], shape: &AttnShape) -> (LongNetMask, Copies) {
        let offset = shape.n_kv as isize - shape.n_q as isize;
        let mask = LongNetMask { branches: branches.to_vec(), causal: self.causal, offset };
        (mask.clone(), Copies(mask))
    }

    /// What one branch attends.
    fn decision(&self, branch: Branch, shape: &AttnShape) -> Result<Decision> {
        let causal = self.causal;
        let residues = Residues::new([branch.dilation], move |class: Class| {
            let band = Band { offset: class.offset, left: None, right: causal.then_some(0) };
            Box::new(And(band, SameChunk::new(branch.segment / branch.dilation, class.offset)))
        })?;
        let kept: Vec<usize> = (0..shape.n_heads_q).map(|head| branch.residue(head)).collect();
        Ok(Decision::by_residue(self.mask(&[branch], shape).0, residues.keeping(kept)))
    }

    /// Pairs of all branches, over all heads of all batch entries; those that several see count as often.
    fn pairs(&self, shape: &AttnShape) -> u64 {
        let of_head =
            |head| self.branches.iter().map(|branch| self.branch_pairs(*branch, head, shape)).sum::<u64>();
        shape.batch as u64 * (0..shape.n_heads_q).map(of_head).sum::<u64>()
    }

    fn branch_pairs(&self, branch: Branch, head: usize, shape: &AttnShape) -> u64 {
        // Kept positions below x, and their places in segments of c.
        let (residue, step) = (branch.residue(head), branch.dilation);
        let below = |x: usize| x.saturating_sub(residue).div_ceil(step);
        let (first, end) = (below(shape.n_kv.saturating_sub(shape.n_q)), below(shape.n_kv));
        let (c, mut at, mut pairs) = (branch.segment / step, first, 0u64);
        while at < end {
            let start = at / c * c;
            let stop = (start + c).min(end);
            let rows = (stop - at) as u64;
            pairs += match self.causal {
                true => rows * (at - start + 1) as u64 + rows * (rows - 1) / 2,
                false => rows * (stop - start) as u64,
            };
            at = stop;
        }
        pairs
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use attn_core::mask::{Head, Mask};

    #[test]
    fn pairs_are_those_of_the_masks() {
        let branches = vec![
            Branch { segment: 4, dilation: 1 },
            Branch { segment: 6, dilation: 3 },
            Branch { segment: 10, dilation: 5 },
        ];
        for causal in [true, false] {
            let longnet = LongNet::new(branches.clone(), causal).unwrap();
            for (n_q, n_kv) in [(0, 3), (23, 23), (5, 17), (17, 5)] {
                let shape = AttnShape { batch: 2, n_q, n_kv, ..AttnShape::square(4, 1, 1) };
                let mut want = 0;
                for branch in &branches {
                    let (mask, _) = longnet.mask(&[*branch], &shape);
                    attn_testkit::masks::assert_consistent(&mask, &shape);
                    for head in 0..4 {
                        let head = Head { batch: 0, head };
                        let seen = |i: usize| (0..n_kv).filter(|&j| mask.sees(head.pair(i, j))).count();
                        want += 2 * (0..n_q).map(seen).sum::<usize>() as u64;
                    }
                }
                assert_eq!(longnet.pairs(&shape), want, "causal {causal}, {n_q} x {n_kv}");
            }
        }
    }

    #[test]
    fn dilations_divide_their_segments() {
        for (segment, dilation) in [(4, 3), (4, 0), (0, 1), (2, 4)] {
            let error = LongNet::new(vec![Branch { segment, dilation }], true).unwrap_err().to_string();
            assert!(error.contains("dilation") && error.contains(&segment.to_string()), "{error}");
        }
        assert!(LongNet::new(Vec::new(), true).is_err());
    }
}
