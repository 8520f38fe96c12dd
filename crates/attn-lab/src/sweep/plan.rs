//! What a point will take, and whether it may.
//!
//! Time: the cost model's FLOPs over the rate that the variant reached at the largest length measured so far, or over
//! the machine's peak if there is none, which gives a lower bound. Memory: q, k, v, the output and what the cost model
//! says is allocated, and the program itself.

use crate::measure::Policy;
use crate::report::units;
use std::time::Duration;

/// Resident memory of the program without a problem, bytes; measured at 20 to 40 MB.
const PROGRAM_BYTES: u64 = 48 << 20;
/// Share of the available memory that points may fill.
const MEMORY_SHARE: f64 = 0.85;

/// What is known about a variant's speed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Rate {
    /// FLOP/s at a measured length.
    Measured(f64),
    /// FLOP/s that it stays below: the machine's peak, or the rate it missed when it was stopped.
    AtMost(f64),
}

/// Predicted seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// One forward call.
    pub call: f64,
    /// The whole point, with warm-up.
    pub point: f64,
    /// True if it may take longer.
    pub at_least: bool,
}

/// Predicts a point of `flops` floating-point operations.
pub fn predict(flops: u64, rate: Rate, policy: &Policy) -> Prediction {
    let (flop_s, at_least) = match rate {
        Rate::Measured(rate) => (rate, false),
        Rate::AtMost(rate) => (rate, true),
    };
    let call = flops as f64 / flop_s.max(1.0);
    Prediction { call, point: point_seconds(call, policy), at_least }
}

/// Warm-up and timed runs of calls that take `call` seconds each, as [`crate::measure::Times::is_done`] counts them.
fn point_seconds(call: f64, policy: &Policy) -> f64 {
    if policy.counts_the_first(Duration::try_from_secs_f64(call).unwrap_or(Duration::MAX)) {
        return call;
    }
    let (min, max) = (policy.min_time.as_secs_f64(), policy.max_time.as_secs_f64());
    let enough = (policy.min_runs as f64 * call).max((min / call.max(1e-9)).ceil() * call);
    let cut_off = (max / call.max(1e-9)).ceil() * call;
    call + enough.min(cut_off).max(call)
}

/// The seconds that a sweep may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Budget {
    /// All of it, from its start.
    pub total: Duration,
    /// One point.
    pub point: Duration,
}

/// Why a point is not run; as its row shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Refusal {
    /// With the figures.
    pub reason: String,
}

impl Budget {
    /// Refuses a point that would take longer than one may, or than what is `left` of the whole budget.
    pub fn refuse(&self, prediction: &Prediction, left: Duration) -> Option<Refusal> {
        let about = if prediction.at_least { "at least " } else { "" };
        let predicted = units::long_time(prediction.point);
        let over = |limit: Duration| prediction.point > limit.as_secs_f64();
        let why = if over(self.point) {
            format!("over {} a point", units::long_time(self.point.as_secs_f64()))
        } else if over(left) {
            format!("{} left of the budget", units::long_time(left.as_secs_f64()))
        } else {
            return None;
        };
        Some(Refusal { reason: format!("predicted {about}{predicted}; {why}") })
    }
}

/// Predicted resident memory of a point's process: `io_bytes` of inputs and output, `allocated` beyond. While the inputs
/// are read they are there twice.
pub fn resident_bytes(io_bytes: u64, allocated: u64) -> u64 {
    PROGRAM_BYTES + (io_bytes + allocated).max(io_bytes / 2 * 3)
}

/// Refuses a point that does not fit into `available` bytes.
pub fn refuse_memory(resident: u64, available: u64) -> Option<Refusal> {
    let fits = resident as f64 <= available as f64 * MEMORY_SHARE;
    (!fits).then(|| Refusal {
        reason: format!(
            "predicted {} of memory; {} available",
            units::bytes(resident),
            units::bytes(available)
        ),
    })
}

/// Groups points by memory so that each group fits at once: indices into `resident`, in order.
pub fn waves(resident: &[u64], available: u64) -> Vec<Vec<usize>> {
    let room = (available as f64 * MEMORY_SHARE) as u64;
    let mut waves: Vec<Vec<usize>> = Vec::new();
    let mut used = 0u64;
    for (i, bytes) in resident.iter().enumerate() {
        match waves.last_mut() {
            Some(wave) if used.saturating_add(*bytes) <= room => wave.push(i),
            _ => {
                waves.push(vec![i]);
                used = 0;
            }
        }
        used = used.saturating_add(*bytes);
    }
    waves
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> Policy {
        Policy { min_runs: 5, min_time: Duration::from_millis(300), max_time: Duration::from_secs(2) }
    }

    #[test]
    fn a_point_takes_what_the_policy_lets_it_run() {
        let close = |call: f64, want: f64| {
            let got = point_seconds(call, &policy());
            assert!((got - want).abs() < 1e-9, "{call}: {got}, expected {want}");
        };
        close(0.1, 0.1 + 0.5); // five runs
        close(0.02, 0.02 + 0.3); // 15 runs, for 0.3 s
        close(0.75, 0.75 + 2.25); // three runs reach 2 s
        close(15.0, 30.0); // one run
        close(60.0, 60.0); // the first call counts
    }

    #[test]
    fn predictions_follow_the_rate() {
        let measured = predict(2_000_000_000, Rate::Measured(1e9), &policy());
        assert_eq!((measured.call, measured.point, measured.at_least), (2.0, 4.0, false));
        assert!(predict(1, Rate::AtMost(1e9), &policy()).at_least);
    }

    #[test]
    fn what_is_over_the_budget_is_refused_with_the_figures() {
        let budget = Budget { total: Duration::from_secs(150), point: Duration::from_secs(15) };
        let point = |seconds| Prediction { call: seconds / 2.0, point: seconds, at_least: false };
        assert_eq!(budget.refuse(&point(10.0), Duration::from_secs(20)), None);
        let long = budget.refuse(&point(2460.0), Duration::from_secs(20)).unwrap();
        assert_eq!(long.reason, "predicted 41 min; over 15 s a point");
        let late = budget.refuse(&point(10.0), Duration::from_secs(4)).unwrap();
        assert_eq!(late.reason, "predicted 10 s; 4.0 s left of the budget");
        let bound = Prediction { at_least: true, ..point(60.0) };
        assert!(budget.refuse(&bound, Duration::from_secs(20)).unwrap().reason.contains("at least 60 s"));
    }

    #[test]
    fn memory_is_refused_with_both_figures() {
        assert_eq!(refuse_memory(1 << 30, 2 << 30), None);
        let refusal = refuse_memory(2 << 30, 2 << 30).unwrap();
        assert_eq!(refusal.reason, "predicted 2.0 GiB of memory; 2.0 GiB available");
    }

    #[test]
    fn waves_keep_the_order_and_the_room() {
        assert_eq!(waves(&[40, 40, 40, 90, 1], 100), vec![vec![0, 1], vec![2], vec![3], vec![4]]);
        assert_eq!(waves(&[], 100), Vec::<Vec<usize>>::new());
    }
}
