//! Seeded draws without repetition.

/// `count` different numbers below `n` that are not in `taken` (sorted, without repetition), or all there are; ascending.
/// They depend on the arguments alone.
pub(in crate::patterns) fn draw(key: [u64; 3], n: usize, taken: &[usize], count: usize) -> Vec<usize> {
    let free = n - taken.iter().filter(|t| **t < n).count();
    let mut state = key.iter().fold(0x9e37_79b9_7f4a_7c15, |state, part| mix(state ^ part));
    // Floyd 1987: one number a step, none twice.
    let mut ranks: Vec<usize> = Vec::with_capacity(count.min(free));
    for last in free.saturating_sub(count)..free {
        state = mix(state);
        let rank = ((u128::from(state) * (last as u128 + 1)) >> 64) as usize;
        ranks.push(if ranks.contains(&rank) { last } else { rank });
    }
    ranks.sort_unstable();
    // From ranks among the free numbers to the numbers.
    let mut taken = taken.iter().copied().peekable();
    let mut skipped = 0;
    for rank in &mut ranks {
        while taken.next_if(|t| *t <= *rank + skipped).is_some() {
            skipped += 1;
        }
        *rank += skipped;
    }
    ranks
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn mix(state: u64) -> u64 {
    let z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_free_different_and_even() {
        let mut counts = [0; 12];
        for seed in 0..3000 {
            let taken = [0, 3, 4, 11];
            let drawn = draw([seed, 1, 2], 12, &taken, 3);
            assert_eq!(drawn.len(), 3);
            assert!(
                drawn.windows(2).all(|w| w[0] < w[1]) && drawn.iter().all(|x| !taken.contains(x) && *x < 12)
            );
            assert_eq!(drawn, draw([seed, 1, 2], 12, &taken, 3));
            drawn.iter().for_each(|x| counts[*x] += 1);
        }
        // 3000 * 3 / 8 = 1125 each; five standard deviations are 133.
        let free = [1, 2, 5, 6, 7, 8, 9, 10];
        assert!(free.iter().all(|x| (counts[*x] as i64 - 1125).abs() < 133), "{counts:?}");
        assert_eq!(draw([0, 0, 0], 5, &[2], 100), [0, 1, 3, 4]);
        assert_eq!(draw([0, 0, 0], 2, &[0, 1, 7], 1), [0; 0]);
        assert_ne!(draw([1, 0, 0], 1000, &[], 5), draw([2, 0, 0], 1000, &[], 5));
    }
}
