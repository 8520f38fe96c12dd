//! The largest scores of a stream that is never held as a whole.

use super::rank::{indices, is_visible, keep_largest, rank};

/// The `k` largest of the scores offered so far, in `O(k)` memory and `O(1)` amortised time a score: candidates gather in a
/// buffer twice as long as needed, which is cut to the `k` best when it is full. What is kept does not depend on the
/// order of the offers: of equal scores, the lower index.
///
/// ```
/// use attn_sparse::select::TopK;
///
/// let mut top = TopK::new(2);
/// for (index, score) in [0.5, 2.0, 1.0, 2.0].into_iter().enumerate() {
///     top.offer(score, index);
/// }
/// assert_eq!(top.take(), [1, 3]);
/// ```
#[derive(Debug, Clone)]
pub struct TopK {
    k: usize,
    /// Ranks of the candidates, in no order.
    kept: Vec<u64>,
    /// Nothing that ranks lower is among the `k` best.
    floor: u64,
    /// Scores below this rank lower than `floor`.
    threshold: f32,
}

impl TopK {
    /// An empty selection of at most `k`.
    pub fn new(k: usize) -> Self {
        Self { k, kept: Vec::new(), floor: 0, threshold: f32::NEG_INFINITY }
    }

    /// Scores below it are not among the `k` largest so far: a caller may skip them unasked. -inf until `k` are known.
    pub fn threshold(&self) -> f32 {
        self.threshold
    }

    /// Offers the score of `index`.
    ///
    /// # Panics
    /// If the index is 2^32 or more.
    #[inline]
    pub fn offer(&mut self, score: f32, index: usize) {
        let index = u32::try_from(index).expect("indices are below 2^32");
        let rank = rank(score, index);
        if rank >= self.floor && is_visible(score) && self.k > 0 {
            self.kept.push(rank);
            if self.kept.len() >= 2 * self.k.max(16) {
                self.cut();
            }
        }
    }

    /// Takes over what another one, of other indices, has been offered.
    pub fn merge(&mut self, other: &Self) {
        self.kept.extend_from_slice(&other.kept);
        if self.kept.len() > self.k.max(1) {
            self.cut();
        }
    }

    /// Cuts the candidates to the `k` best and raises the threshold.
    fn cut(&mut self) {
        keep_largest(&mut self.kept, self.k);
        if self.kept.len() == self.k && self.k > 0 {
            self.floor = self.kept[self.k - 1];
            self.threshold = super::rank::score_of(self.floor);
        }
    }

    /// Indices of the `k` largest, ascending; the selection is empty again.
    pub fn take(&mut self) -> Vec<usize> {
        keep_largest(&mut self.kept, self.k);
        let indices = indices(&self.kept);
        self.clear();
        indices
    }

    /// Forgets all scores.
    pub fn clear(&mut self) {
        self.kept.clear();
        (self.floor, self.threshold) = (0, f32::NEG_INFINITY);
    }
}
