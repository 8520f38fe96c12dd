//! The `k` largest of many scores, seen one after another in `O(k)` memory.

/// Keeps the `k` largest scores with their indices. Equal scores: the lower index wins. A score of -inf is never kept;
/// NaN counts as the largest, so that it is seen and not lost.
#[derive(Debug, Clone)]
pub(crate) struct Top {
    k: usize,
    /// Score and index in one number, larger is better.
    ranks: Vec<u64>,
    /// No lower score can enter.
    floor: f32,
}

/// Numbers in the order of scores, then of falling indices.
fn rank(score: f32, index: usize) -> u64 {
    let bits = (score + 0.0).to_bits(); // -0 becomes 0
    let ordered = match bits >> 31 {
        _ if score.is_nan() => u32::MAX,
        0 => bits | 1 << 31,
        _ => !bits,
    };
    u64::from(ordered) << 32 | u64::from(!(index as u32))
}

fn index(rank: u64) -> usize {
    !(rank as u32) as usize
}

impl Top {
    pub(crate) fn new(k: usize) -> Self {
        Self { k, ranks: Vec::new(), floor: f32::NEG_INFINITY }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.ranks.clear();
        self.floor = f32::NEG_INFINITY;
    }

    /// `index` must fit 32 bits and come once.
    #[inline(always)]
    pub(crate) fn push(&mut self, score: f32, index: usize) {
        // Not `score >= floor`, which loses NaN.
        if score < self.floor || score == f32::NEG_INFINITY {
            return;
        }
        self.enter(rank(score, index));
    }

    /// A member that is kept before all others.
    pub(crate) fn force(&mut self, index: usize) {
        self.enter(rank(f32::NAN, index));
    }

    /// Drops a member, if it is kept.
    pub(crate) fn remove(&mut self, member: usize) {
        self.ranks.retain(|rank| index(*rank) != member);
    }

    fn enter(&mut self, rank: u64) {
        self.ranks.push(rank);
        if self.ranks.len() >= 2 * self.k + 32 {
            self.shrink();
        }
    }

    /// Drops all but the best `k`.
    fn shrink(&mut self) {
        if self.ranks.len() <= self.k {
            return;
        }
        if self.k == 0 {
            self.ranks.clear();
            return;
        }
        let (_, last, _) = self.ranks.select_nth_unstable_by(self.k - 1, |a, b| b.cmp(a));
        let ordered = (*last >> 32) as u32;
        self.floor = match ordered >> 31 {
            _ if ordered == u32::MAX => f32::INFINITY,
            1 => f32::from_bits(ordered & !(1 << 31)),
            _ => f32::from_bits(!ordered),
        };
        self.ranks.truncate(self.k);
    }

    /// Takes over what another one keeps.
    pub(crate) fn merge(&mut self, other: &Self) {
        self.ranks.extend_from_slice(&other.ranks);
        self.shrink();
    }

    /// The indices kept, ascending.
    pub(crate) fn sorted(&mut self) -> Vec<usize> {
        self.shrink();
        let mut kept: Vec<usize> = self.ranks.iter().map(|rank| index(*rank)).collect();
        kept.sort_unstable();
        kept
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn top(k: usize, scores: &[f32]) -> Vec<usize> {
        let mut top = Top::new(k);
        scores.iter().enumerate().for_each(|(at, score)| top.push(*score, at));
        top.sorted()
    }

    #[test]
    fn the_largest_win_and_ties_go_to_the_lower_index() {
        assert_eq!(top(2, &[1.0, 3.0, -2.0, 3.0, 3.0]), [1, 3]);
        assert_eq!(top(3, &[0.0, -0.0, 0.0, 0.0]), [0, 1, 2]);
        assert_eq!(top(3, &[f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY]), [1]);
        assert_eq!(top(1, &[f32::INFINITY, f32::NAN, 5.0]), [1]);
        assert_eq!(top(0, &[1.0; 100]), [0usize; 0]);
        assert_eq!(top(2, &[7.0; 1000]), [0, 1]);
    }

    #[test]
    fn it_agrees_with_sorting_whatever_the_parts() {
        let scores: Vec<f32> = (0..5000u64).map(|i| ((i * 7919 % 1013) as f32 - 500.0) * 0.25).collect();
        let mut order: Vec<usize> = (0..scores.len()).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        for k in [1, 7, 64, 4999, 6000] {
            let mut want = order[..k.min(scores.len())].to_vec();
            want.sort_unstable();
            assert_eq!(top(k, &scores), want, "k = {k}");
            let mut parts = [Top::new(k), Top::new(k), Top::new(k)];
            scores.iter().enumerate().for_each(|(at, score)| parts[at / 1700].push(*score, at));
            let [mut first, second, third] = parts;
            first.merge(&third);
            first.merge(&second);
            assert_eq!(first.sorted(), want, "k = {k} in parts");
        }
    }

    #[test]
    fn forced_members_come_first() {
        let mut top = Top::new(2);
        top.push(f32::INFINITY, 0);
        top.push(3.0, 1);
        top.force(9);
        assert_eq!(top.sorted(), [0, 9]);
        top.remove(9);
        assert_eq!(top.sorted(), [0]);
        top.clear();
        assert_eq!(top.sorted(), [0usize; 0]);
    }
}
