//! Measuring the points of one length side by side.
//!
//! Every point has its own process; all are loaded and warmed up first. Then rounds go over them, one call each, until
//! each point has enough (a call of 20 seconds is not made twice): whatever disturbs the machine for a while disturbs all
//! variants and not one. Nothing else runs while a call is timed.

use super::case::{Case, ErrorFigures, Measurement, Outcome, Row};
use super::plan::{self, Prediction};
use super::protocol::{Answer, Ask, Job};
use super::sample::Sample;
use super::worker::{Trouble, Worker};
use crate::measure::{Policy, Times};
use crate::report::units;
use crate::{Result, memory};
use std::path::Path;
use std::time::Duration;

/// A point that may run.
#[derive(Debug, Clone)]
pub struct Point {
    /// The case.
    pub case: Case,
    /// Floating-point operations of one call.
    pub flops: u64,
    /// Predicted resident memory.
    pub resident: u64,
    /// Predicted time.
    pub prediction: Prediction,
}

/// What the points of one length share.
#[derive(Debug, Clone, Copy)]
pub struct Conditions<'a> {
    /// This program.
    pub program: &'a Path,
    /// File with q, k and v.
    pub input: &'a Path,
    /// Exact attention on sampled rows.
    pub sample: &'a Sample,
    /// When a point has run often enough.
    pub policy: Policy,
    /// The longest wait for one warm-up.
    pub patience: Duration,
    /// The machine's peak on these threads.
    pub peak_gflops: f64,
}

/// Told about what happens.
pub trait Observer {
    /// A point is worked on.
    fn working(&mut self, case: &Case, doing: &str);

    /// A point has come to its end.
    ///
    /// # Errors
    /// What keeps the row from being written.
    fn finished(&mut self, row: Row) -> Result<()>;
}

/// Measures `points` of one length.
///
/// # Errors
/// If this program cannot be started again, or a row cannot be written. A point's own trouble becomes its row.
pub fn measure(points: Vec<Point>, conditions: &Conditions<'_>, observer: &mut dyn Observer) -> Result<()> {
    let resident: Vec<u64> = points.iter().map(|point| point.resident).collect();
    for wave in plan::waves(&resident, memory::available_bytes()) {
        let mut running = Vec::new();
        for at in wave {
            let point = &points[at];
            observer.working(&point.case, "warming up");
            match Running::start(point, conditions)? {
                Ok(mut warm) => match warm.finished(conditions) {
                    None => running.push(warm),
                    Some(outcome) => observer.finished(Row { case: point.case.clone(), outcome })?,
                },
                Err(outcome) => observer.finished(Row { case: point.case.clone(), outcome })?,
            }
        }
        while !running.is_empty() {
            let mut next_round = Vec::new();
            for mut point in running {
                observer.working(&point.point.case, &format!("run {}", point.times.runs() + 1));
                match point.run_once(conditions) {
                    None => next_round.push(point),
                    Some(outcome) => observer.finished(Row { case: point.point.case.clone(), outcome })?,
                }
            }
            running = next_round;
        }
    }
    Ok(())
}

/// A point between its warm-up and its last run.
struct Running<'a> {
    point: &'a Point,
    worker: Worker,
    times: Times,
    warm_seconds: f64,
    extra_bytes: Option<u64>,
    error: ErrorFigures,
}

impl<'a> Running<'a> {
    fn start(point: &'a Point, conditions: &Conditions<'_>) -> Result<std::result::Result<Self, Outcome>> {
        let rows = conditions.sample.rows.iter().map(|row| (row.batch, row.head, row.i)).collect();
        let job = Job {
            input: conditions.input.to_path_buf(),
            variant: point.case.variant.clone(),
            options: point.case.options.clone(),
            threads: point.case.threads,
            rows,
        };
        let stopped = |trouble| Ok(Err(stopped(trouble, point, conditions.patience)));
        // Loading is not the variant's work; a slow disk gets the same patience again.
        let mut worker = match Worker::start(conditions.program, &job, conditions.patience * 4)? {
            Ok(worker) => worker,
            Err(trouble) => return stopped(trouble),
        };
        let (warm_seconds, extra_bytes, rows) = match worker.ask(Ask::Warm, conditions.patience) {
            Ok(Answer::Warm { seconds, extra_bytes, rows }) => (seconds, extra_bytes, rows),
            Ok(other) => return stopped(Trouble::Failed(format!("unexpected answer {other:?}"))),
            Err(trouble) => return stopped(trouble),
        };
        let widen = |bits: Vec<u32>| bits.into_iter().map(|b| f64::from(f32::from_bits(b))).collect();
        let rows: Vec<Vec<f64>> = rows.into_iter().map(widen).collect();
        match ErrorFigures::from_finite(&conditions.sample.compare(&rows)?) {
            Some(error) => {
                let first = Duration::from_secs_f64(warm_seconds.max(0.0));
                let times = Times::after_first(&conditions.policy, first);
                Ok(Ok(Self { point, worker, times, warm_seconds, extra_bytes, error }))
            }
            None => stopped(Trouble::Failed("the output holds NaN or infinite numbers".into())),
        }
    }

    /// One timed call; the outcome if it was the last.
    fn run_once(&mut self, conditions: &Conditions<'_>) -> Option<Outcome> {
        let patience = conditions.patience.max(Duration::from_secs_f64(4.0 * self.warm_seconds));
        match self.worker.ask(Ask::Run, patience) {
            Ok(Answer::Run { seconds }) => self.times.push(Duration::from_secs_f64(seconds.max(0.0))),
            Ok(other) => return Some(Outcome::Failed { reason: format!("unexpected answer {other:?}") }),
            Err(trouble) => return Some(stopped(trouble, self.point, patience)),
        }
        self.finished(conditions)
    }

    /// The outcome, if the calls so far are enough.
    fn finished(&mut self, conditions: &Conditions<'_>) -> Option<Outcome> {
        if !self.times.is_done(&conditions.policy) {
            return None;
        }
        let peak_rss_bytes = match self.worker.ask(Ask::Stop, conditions.patience) {
            Ok(Answer::Stop { peak_rss_bytes }) => peak_rss_bytes,
            // The times are good even if the process forgot to say good-bye.
            _ => None,
        };
        let seconds = self.times.seconds()?;
        let gflops = self.point.flops as f64 / seconds.median / 1e9;
        Some(Outcome::Measured(Measurement {
            seconds,
            runs: self.times.runs(),
            tokens_s: (self.point.case.batch * self.point.case.n) as f64 / seconds.median,
            flops: self.point.flops,
            gflops,
            peak_gflops: conditions.peak_gflops,
            share_of_peak: gflops / conditions.peak_gflops,
            extra_bytes: self.extra_bytes,
            peak_rss_bytes,
            error: self.error,
        }))
    }
}

/// What the row of a point says that was given up after `patience`.
pub fn stopped_reason(patience: Duration) -> String {
    format!("stopped after {}", units::long_time(patience.as_secs_f64()))
}

fn stopped(trouble: Trouble, point: &Point, patience: Duration) -> Outcome {
    match trouble {
        Trouble::Failed(reason) => Outcome::Failed { reason },
        Trouble::TookTooLong => Outcome::NotRun {
            reason: stopped_reason(patience),
            predicted_seconds: Some(point.prediction.point),
            predicted_bytes: Some(point.resident),
        },
    }
}
