//! Logarithmic axes: which part of the line is shown, and where ticks stand.

use super::units;

/// What an axis measures; decides where ticks are good and how they read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// Positions: ticks at powers of two.
    Length,
    /// Seconds: ticks at powers of ten.
    Seconds,
    /// Bytes: ticks at powers of two.
    Bytes,
    /// Relative error: ticks at powers of ten.
    Error,
}

impl Quantity {
    /// The axis title.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Length => "sequence length n",
            Self::Seconds => "time of one call",
            Self::Bytes => "bytes",
            Self::Error => "relative L2 error",
        }
    }

    fn base(self) -> f64 {
        match self {
            Self::Length | Self::Bytes => 2.0,
            Self::Seconds | Self::Error => 10.0,
        }
    }

    fn label(self, x: f64) -> String {
        match self {
            Self::Length => units::length(x.round() as usize),
            Self::Bytes => units::bytes(x.round() as u64).replace(".0 ", " "),
            Self::Seconds => match x {
                x if x < 0.9995e-3 => format!("{} µs", trimmed(x * 1e6)),
                x if x < 0.9995 => format!("{} ms", trimmed(x * 1e3)),
                x => format!("{} s", trimmed(x)),
            },
            Self::Error if x < 0.9e-3 => format!("1e{:.0}", x.log10()),
            Self::Error => trimmed(x),
        }
    }
}

fn trimmed(x: f64) -> String {
    let text = format!("{x:.3}");
    text.trim_end_matches('0').trim_end_matches('.').to_string()
}

/// The largest error an axis shows. One means as far off as zeros would be; far beyond, how far says nothing more, and
/// would squeeze what does.
const MOST_ERROR: f64 = 10.0;

/// A logarithmic axis between two pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Axis {
    quantity: Quantity,
    /// Logarithms of the ends.
    low: f64,
    high: f64,
    /// Pixels of the ends.
    from: f64,
    to: f64,
}

impl Axis {
    /// An axis that shows all of `values`, with a little room, from pixel `from` to pixel `to`.
    pub(super) fn over(quantity: Quantity, values: impl Iterator<Item = f64>, from: f64, to: f64) -> Self {
        let most = if quantity == Quantity::Error { MOST_ERROR } else { f64::INFINITY };
        let logs = values.filter(|x| x.is_finite() && *x > 0.0).map(|x| x.min(most).ln());
        let (low, high) = logs.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), x| (l.min(x), h.max(x)));
        let (low, high) = if low <= high { (low, high) } else { (0.0, 0.0) };
        // A single value still gets a line to stand on: a factor of two on both sides.
        let room = if high - low < 1e-9 { 2f64.ln() } else { 0.05 * (high - low) };
        Self { quantity, low: low - room, high: high + room, from, to }
    }

    /// The pixel of a value; what lies below the axis, zero included, stands at its start.
    pub(super) fn at(&self, value: f64) -> f64 {
        let log = if value > 0.0 { value.ln().clamp(self.low, self.high) } else { self.low };
        self.from + (log - self.low) / (self.high - self.low) * (self.to - self.from)
    }

    /// True if a value is larger than all that the axis shows.
    pub(super) fn is_beyond(&self, value: f64) -> bool {
        value > 0.0 && value.ln() > self.high
    }

    /// Pixels of the ends, as given.
    pub(super) fn pixels(&self) -> (f64, f64) {
        (self.from, self.to)
    }

    pub(super) fn quantity(&self) -> Quantity {
        self.quantity
    }

    /// Pixels and labels of at most `most` ticks.
    pub(super) fn ticks(&self, most: usize) -> Vec<(f64, String)> {
        let base = self.quantity.base();
        let first = (self.low / base.ln()).ceil() as i32;
        let last = (self.high / base.ln()).floor() as i32;
        let powers = (last - first + 1).max(0) as usize;
        let values: Vec<f64> = if powers < 3 && base == 10.0 {
            let between = |steps: &[f64]| -> Vec<f64> {
                let all = (first - 1..=last).flat_map(|p| steps.iter().map(move |m| m * 10f64.powi(p)));
                all.filter(|x| (self.low..=self.high).contains(&x.ln())).collect()
            };
            let fine = between(&[1.0, 2.0, 5.0]);
            if fine.len() > most { between(&[1.0, 3.0]) } else { fine }
        } else if powers < 3 && self.quantity == Quantity::Bytes {
            let quarters = (first - 1..=last).flat_map(|p| [1.0, 1.25, 1.5, 1.75].map(|m| m * 2f64.powi(p)));
            quarters.filter(|x| (self.low..=self.high).contains(&x.ln())).collect()
        } else {
            let step = powers.div_ceil(most.max(1)).max(1);
            // Multiples of the step, so that bytes stand at 1, 16, 256 KiB whatever the range.
            (first..=last).filter(|p| p.rem_euclid(step as i32) == 0).map(|p| base.powi(p)).collect()
        };
        let digits =
            |x: f64| if self.quantity == Quantity::Error && x < 0.9e-3 { is_power_of_ten(x) } else { true };
        values.into_iter().filter(|x| digits(*x)).map(|x| (self.at(x), self.quantity.label(x))).collect()
    }
}

fn is_power_of_ten(x: f64) -> bool {
    (x.log10() - x.log10().round()).abs() < 1e-9
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(quantity: Quantity, values: &[f64], most: usize) -> Vec<String> {
        let axis = Axis::over(quantity, values.iter().copied(), 0.0, 100.0);
        axis.ticks(most).into_iter().map(|(_, label)| label).collect()
    }

    #[test]
    fn ticks_are_round_numbers_with_units() {
        assert_eq!(labels(Quantity::Length, &[1024.0, 8192.0], 8), ["1k", "2k", "4k", "8k"]);
        assert_eq!(
            labels(Quantity::Length, &[1024.0, 1048576.0], 6),
            ["1k", "4k", "16k", "64k", "256k", "1m"]
        );
        assert_eq!(labels(Quantity::Seconds, &[2e-5, 0.5], 8), ["100 µs", "1 ms", "10 ms", "100 ms"]);
        assert_eq!(labels(Quantity::Seconds, &[0.004, 0.03], 8), ["5 ms", "10 ms", "20 ms"]);
        assert_eq!(labels(Quantity::Error, &[1e-7, 0.5], 8)[..2], ["1e-7", "1e-6"]);
        assert_eq!(labels(Quantity::Bytes, &[1e6, 6e7], 4), ["1 MiB", "4 MiB", "16 MiB", "64 MiB"]);
    }

    #[test]
    fn values_keep_their_order_and_zero_stands_at_the_start() {
        let axis = Axis::over(Quantity::Bytes, [10.0, 1000.0].into_iter(), 300.0, 0.0);
        let errors = Axis::over(Quantity::Error, [1e-6, 37000.0].into_iter(), 300.0, 0.0);
        assert!(errors.is_beyond(37000.0) && !errors.is_beyond(5.0) && errors.at(37000.0) == 0.0);
        assert!(axis.at(10.0) > axis.at(100.0) && axis.at(100.0) > axis.at(1000.0));
        assert_eq!(axis.at(0.0), 300.0);
        let one = Axis::over(Quantity::Bytes, [64.0].into_iter(), 0.0, 100.0);
        assert!((one.at(64.0) - 50.0).abs() < 1e-9);
        assert!(Axis::over(Quantity::Error, std::iter::empty(), 0.0, 1.0).at(1.0).is_finite());
    }
}
