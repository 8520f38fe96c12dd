//! Which lengths a sweep visits: `1k..64k` doubles from end to end, `1k,3k,10k` names them.
//!
//! `k` is 1024 and `m` is 1024 k: lengths of attention problems are counted in powers of two.

use crate::{LabError, Result};

/// The longest length that is taken for a wish and not for a typing error.
const LONGEST: usize = 1 << 30;

/// Lengths, ascending, each once.
///
/// # Errors
/// [`LabError::Argument`] that shows what a range looks like.
pub fn lengths(text: &str) -> Result<Vec<usize>> {
    let refuse = |why: &str| {
        LabError::Argument(format!("--n `{text}`: {why}; expected a range (1k..64k) or a list (1k,4k,16k)"))
    };
    let mut all = Vec::new();
    for part in text.split(',').map(str::trim) {
        let Some((first, last)) = part.split_once("..") else {
            all.push(length(part).ok_or_else(|| refuse("not a length"))?);
            continue;
        };
        let first = length(first).ok_or_else(|| refuse("the start is not a length"))?;
        let last = length(last.trim_start_matches('=')).ok_or_else(|| refuse("the end is not a length"))?;
        if first > last {
            return Err(refuse("it runs backwards"));
        }
        let doubled = std::iter::successors(Some(first), |n| n.checked_mul(2));
        all.extend(doubled.take_while(|n| *n < last));
        // An end that no doubling meets was asked for all the same.
        all.push(last);
    }
    all.sort_unstable();
    all.dedup();
    Ok(all)
}

/// `4096`, `4k`, `1m`; at least 1.
fn length(text: &str) -> Option<usize> {
    let text = text.trim().to_ascii_lowercase();
    let (digits, unit) = match text.as_bytes().last()? {
        b'k' => (&text[..text.len() - 1], 1 << 10),
        b'm' => (&text[..text.len() - 1], 1 << 20),
        _ => (text.as_str(), 1),
    };
    let n = digits.parse::<usize>().ok()?.checked_mul(unit)?;
    (1..=LONGEST).contains(&n).then_some(n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_double_and_reach_their_end() {
        assert_eq!(lengths("1k..8k").unwrap(), [1024, 2048, 4096, 8192]);
        assert_eq!(lengths("1k..3k").unwrap(), [1024, 2048, 3072]);
        assert_eq!(lengths("512..512").unwrap(), [512]);
        assert_eq!(lengths("256k..=1m").unwrap(), [1 << 18, 1 << 19, 1 << 20]);
    }

    #[test]
    fn lists_are_sorted_and_may_hold_ranges() {
        assert_eq!(lengths("3k, 1K,1m").unwrap(), [1024, 3072, 1 << 20]);
        assert_eq!(lengths("100,1k..2k,1024").unwrap(), [100, 1024, 2048]);
    }

    #[test]
    fn nonsense_is_refused_with_an_example() {
        for text in ["", "0", "8k..1k", "1k..", "x", "1.5k", "-4", "9999999m", "1k;2k", "k"] {
            let line = lengths(text).unwrap_err().to_string();
            assert!(line.contains("1k..64k") && line.contains(&format!("`{text}`")), "{line}");
        }
    }
}
