//! How often a case runs, and which figures describe its times.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Quantiles of some times, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Seconds {
    /// A fifth of the runs took less.
    pub p20: f64,
    /// Half of the runs took less.
    pub median: f64,
    /// Four fifths of the runs took less.
    pub p80: f64,
}

/// When a case has run often enough.
///
/// One warm-up run is not counted, unless it is so long that what it warms up is no part of it
/// ([`Policy::counts_the_first`]). A case is done after `min_runs` runs that took `min_time` together, or as soon as its
/// runs took `max_time`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Policy {
    /// Runs that a quick case makes at least.
    pub min_runs: usize,
    /// Time that a quick case is repeated for, so that its quantiles mean something.
    pub min_time: Duration,
    /// A slow case makes no further run after this time.
    pub max_time: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self { min_runs: 5, min_time: Duration::from_millis(300), max_time: Duration::from_secs(2) }
    }
}

impl Policy {
    /// Whether a first call of this length counts: ten times the time after which a slow case is done. Fresh pages and cold
    /// caches cost a thousandth of it, and a second call would double the wait.
    pub fn counts_the_first(&self, call: Duration) -> bool {
        call >= 10 * self.max_time
    }
}

/// The times of one case, counted up run by run, so that runs of several cases can be interleaved.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Times(Vec<f64>);

impl Times {
    /// No run so far.
    pub fn new() -> Self {
        Self::default()
    }

    /// After a first call: no run, or that one where it counts.
    pub fn after_first(policy: &Policy, call: Duration) -> Self {
        let mut times = Self::new();
        if policy.counts_the_first(call) {
            times.push(call);
        }
        times
    }

    /// Adds one run.
    pub fn push(&mut self, time: Duration) {
        self.0.push(time.as_secs_f64());
    }

    /// Runs so far.
    pub fn runs(&self) -> usize {
        self.0.len()
    }

    /// Seconds of all runs together.
    pub fn total(&self) -> f64 {
        self.0.iter().sum()
    }

    /// True if `policy` asks for no further run.
    pub fn is_done(&self, policy: &Policy) -> bool {
        let total = self.total();
        let enough = self.runs() >= policy.min_runs.max(1) && total >= policy.min_time.as_secs_f64();
        enough || (self.runs() > 0 && total >= policy.max_time.as_secs_f64())
    }

    /// The quantiles, linearly interpolated between runs; `None` before the first run.
    pub fn seconds(&self) -> Option<Seconds> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        let last = sorted.len().checked_sub(1)?;
        let quantile = |share: f64| {
            let at = share * last as f64;
            let (below, above) = (sorted[at.floor() as usize], sorted[at.ceil() as usize]);
            below + (above - below) * at.fract()
        };
        Some(Seconds { p20: quantile(0.2), median: quantile(0.5), p80: quantile(0.8) })
    }
}

/// One warm-up run, then runs until `policy` is content.
///
/// # Errors
/// The first error of `work`.
pub fn repeat<E>(policy: &Policy, mut work: impl FnMut() -> Result<(), E>) -> Result<Times, E> {
    let from = Instant::now();
    work()?;
    let mut times = Times::after_first(policy, from.elapsed());
    while !times.is_done(policy) {
        let from = Instant::now();
        work()?;
        times.push(from.elapsed());
    }
    Ok(times)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(seconds: &[f64]) -> Times {
        Times(seconds.to_vec())
    }

    #[test]
    fn quantiles_interpolate_and_do_not_care_for_order() {
        let seconds = times(&[5.0, 1.0, 4.0, 2.0, 3.0, 6.0]).seconds().unwrap();
        assert_eq!(seconds, Seconds { p20: 2.0, median: 3.5, p80: 5.0 });
        assert_eq!(times(&[7.0]).seconds().unwrap(), Seconds { p20: 7.0, median: 7.0, p80: 7.0 });
        assert_eq!(Times::new().seconds(), None);
    }

    #[test]
    fn a_quick_case_runs_on_and_a_slow_one_stops() {
        let policy = Policy::default();
        assert!(!Times::new().is_done(&policy));
        assert!(!times(&[0.001; 5]).is_done(&policy), "quick: not yet 0.3 s");
        assert!(times(&[0.1; 5]).is_done(&policy));
        assert!(!times(&[0.4; 3]).is_done(&policy), "neither five runs nor 2 s");
        assert!(times(&[3.0]).is_done(&policy), "slow: one run");
    }

    #[test]
    fn repeat_warms_up_once_and_passes_errors_on() {
        let policy = Policy { min_runs: 3, min_time: Duration::ZERO, max_time: Duration::from_secs(60) };
        let mut runs = 0;
        let times = repeat(&policy, || {
            runs += 1;
            Ok::<(), ()>(())
        });
        assert_eq!((times.unwrap().runs(), runs), (3, 4));
        assert_eq!(repeat(&policy, || Err("no")), Err("no"));
    }

    #[test]
    fn a_long_first_call_is_the_measurement() {
        let policy = Policy { min_runs: 3, min_time: Duration::ZERO, max_time: Duration::from_micros(100) };
        assert!(policy.counts_the_first(Duration::from_millis(1)));
        assert!(!policy.counts_the_first(Duration::from_micros(999)));
        let mut runs = 0;
        let times = repeat(&policy, || {
            runs += 1;
            std::thread::sleep(Duration::from_millis(2));
            Ok::<(), ()>(())
        });
        assert_eq!((times.unwrap().runs(), runs), (1, 1));
    }
}
