//! The end of a row: division by the normaliser, sink, log-sum-exp; and the merge of rows that were split.
//!
//! A row ends as an accumulator `acc`, a reference `r` and a sum `l`, with weights `e^(s - r)`. With parts `p` over disjoint
//! keys and a sink logit `b` that has no value:
//!
//! ```text
//! R = max(r_p, b)          L = sum_p e^(r_p - R) l_p + e^(b - R)
//! out = sum_p e^(r_p - R) acc_p / L          lse = R + ln L
//! ```
//!
//! A part that has seen nothing has `r = -inf`, `l = 0` and contributes nothing. Source: Milakov and Gimelshein 2018.

use super::tasks::TaskOut;
use attn_core::OutRows;

/// The rows of one head that a task writes.
#[derive(Debug)]
pub(super) struct HeadOut<'a> {
    pub(super) out: OutRows<'a>,
    pub(super) lse: Option<&'a mut [f32]>,
}

/// Writes row `row` of `out` from its parts, each `[acc.., r, l]`.
pub(super) fn merge<'p>(
    parts: impl Iterator<Item = &'p [f32]> + Clone,
    sink: Option<f32>,
    out: &mut HeadOut<'_>,
    row: usize,
) {
    let states = || parts.clone().filter_map(|part| part.split_last_chunk::<2>());
    let total = Total::new(states().map(|(_, &[reference, sum])| (reference, sum)), sink);
    let width = states().next().map_or(0, |(acc, _)| acc.len());
    let element = |c: usize| {
        states().fold(0.0, |sum, (acc, &[reference, _])| {
            let weight = total.weight(reference);
            // A part that weighs nothing adds nothing, even if it overflowed.
            if weight == 0.0 { sum } else { sum + weight * acc[c] }
        })
    };
    out.out.store(row, (0..width).map(element));
    total.store_lse(out, row);
}

/// Writes one finished row, `acc` with its reference and sum, where a task's results go: divided and rounded, or as it is,
/// to be merged. `place` is the head and the row within the task, `lane` their number.
#[inline(always)]
pub(super) fn emit(
    out: &mut TaskOut<'_>,
    (head, row): (usize, usize),
    lane: usize,
    acc: &[f32],
    (reference, sum): (f32, f32),
    sink: Option<f32>,
) {
    match out {
        TaskOut::Final(heads) => {
            let out = &mut heads[head];
            let total = Total::new(std::iter::once((reference, sum)), sink);
            let weight = total.weight(reference);
            if weight == 0.0 {
                out.out.store(row, acc.iter().map(|_| 0.0));
            } else {
                out.out.store(row, acc.iter().map(|x| x * weight));
            }
            total.store_lse(out, row);
        }
        TaskOut::Partial(parts) => {
            let part = &mut parts[lane * (acc.len() + 2)..][..acc.len() + 2];
            part[..acc.len()].copy_from_slice(acc);
            part[acc.len()..].copy_from_slice(&[reference, sum]);
        }
    }
}

/// Normaliser of a row.
#[derive(Debug, Clone, Copy)]
pub(super) struct Total {
    reference: f32,
    sum: f32,
}

impl Total {
    /// From the `(r, l)` of its parts, and the sink.
    #[inline]
    pub(super) fn new(parts: impl Iterator<Item = (f32, f32)> + Clone, sink: Option<f32>) -> Self {
        let sink = sink.unwrap_or(f32::NEG_INFINITY);
        let reference = parts.clone().fold(sink, |max, (r, _)| max.max(r));
        let share = |r: f32| if r == f32::NEG_INFINITY { 0.0 } else { (r - reference).exp() };
        let sum = parts.fold(share(sink), |sum, (r, l)| if l == 0.0 { sum } else { sum + share(r) * l });
        Self { reference, sum }
    }

    /// What the accumulator of a part with reference `r` is multiplied by.
    #[inline]
    pub(super) fn weight(&self, r: f32) -> f32 {
        if r == f32::NEG_INFINITY || self.sum == 0.0 {
            return if self.sum.is_nan() { f32::NAN } else { 0.0 };
        }
        (r - self.reference).exp() / self.sum
    }

    /// Writes the natural log-sum-exp of row `row`, if it is wanted.
    #[inline]
    pub(super) fn store_lse(&self, out: &mut HeadOut<'_>, row: usize) {
        if let Some(lse) = &mut out.lse {
            // In f64: both terms may be far larger than what is left of them.
            lse[row] = (f64::from(self.reference) + f64::from(self.sum).ln()) as f32;
        }
    }
}
