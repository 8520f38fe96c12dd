//! Numbers of every kind: plain, huge, denormal, infinite, NaN.

use super::bytes::Bytes;

const SPECIAL: [f32; 8] =
    [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE, 1e-42, -0.0, -1e30];

/// Numbers between -2 and 2 that `seed` determines.
pub fn noise(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let mut next = move || {
        // SplitMix64 (Steele, Lea, Flood, 2014).
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let x = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((x ^ (x >> 31)) >> 40) as f32 / (1u64 << 22) as f32 - 2.0
    };
    (0..len).map(|_| next()).collect()
}

/// `len` numbers, most often noise.
pub fn numbers(bytes: &mut Bytes<'_>, len: usize) -> Vec<f32> {
    let mut numbers = noise(len, bytes.word());
    match bytes.within(0..=15) {
        10 => numbers.fill(0.0),
        11 => numbers.fill(bytes.pick(&SPECIAL)),
        12 => {
            let factor = bytes.pick(&[1e-42, 1e-30, 1e-3, 30.0, 1e4, 1e30]);
            numbers.iter_mut().for_each(|x| *x *= factor);
        }
        13.. if len > 0 => {
            for _ in 0..bytes.within(1..=4) {
                let at = bytes.within(0..=len - 1);
                numbers[at] = bytes.pick(&SPECIAL);
            }
        }
        _ => {}
    }
    numbers
}

/// The largest of the numbers that are finite, by absolute value.
pub fn largest(numbers: &[f32]) -> f64 {
    numbers.iter().filter(|x| x.is_finite()).fold(0.0, |max, x| f64::max(max, f64::from(x.abs())))
}

pub fn all_finite(numbers: &[f32]) -> bool {
    numbers.iter().all(|x| x.is_finite())
}
