//! Seeded normal numbers, the same on every machine.
//!
//! Uniform numbers come from SplitMix64 (Steele, Lea and Flood 2014), normal ones from pairs of them by Box and Muller 1958.

/// `len` standard normal numbers; the seed and the place alone decide each.
pub(crate) fn normal(seed: u64, len: usize) -> Vec<f32> {
    let uniform = |at: u64| {
        let mut x =
            seed.wrapping_mul(0xd134_2543_de82_ef95).wrapping_add(at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    };
    let one = |at: u64| {
        let (u, angle) = (1.0 - uniform(2 * at + 1), uniform(2 * at + 2));
        ((-2.0 * u.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()) as f32
    };
    (0..len as u64).map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::normal;

    #[test]
    fn numbers_are_normal_and_seeds_differ() {
        let x = normal(7, 40_000);
        let moment = |p: i32| x.iter().map(|x| f64::from(*x).powi(p)).sum::<f64>() / x.len() as f64;
        assert!(moment(1).abs() < 0.03 && (moment(2) - 1.0).abs() < 0.03 && (moment(4) - 3.0).abs() < 0.2);
        assert!(normal(8, 100).iter().zip(&x).all(|(a, b)| a != b));
        assert_eq!(normal(7, 10), x[..10]);
    }
}
