//! How figures read in tables and plots: three digits at most, and the unit that fits.

/// Seconds of a call: `12.3 µs`, `4.56 ms`, `7.89 s`, `2.1 min`.
pub fn time(seconds: f64) -> String {
    match seconds {
        s if s < 1e-3 => format!("{} µs", three(s * 1e6)),
        s if s < 1.0 => format!("{} ms", three(s * 1e3)),
        s if s < 120.0 => format!("{} s", three(s)),
        s => long_time(s),
    }
}

/// Seconds that somebody waits: `0.4 s`, `12 s`, `41 min`, `3.5 h`.
pub fn long_time(seconds: f64) -> String {
    match seconds {
        s if s < 9.95 => format!("{s:.1} s"),
        s if s < 119.5 => format!("{s:.0} s"),
        s if s < 119.5 * 60.0 => format!("{:.0} min", s / 60.0),
        s if s < 47.5 * 3600.0 => format!("{:.1} h", s / 3600.0),
        s => format!("{:.0} days", s / 86400.0),
    }
}

/// Two times in one unit: `11.9-12.8 ms`.
pub fn spread(low: f64, high: f64) -> String {
    let (low, high) = (time(low), time(high));
    match (low.split_once(' '), high.split_once(' ')) {
        (Some((number, unit)), Some((_, same))) if unit == same => format!("{number}-{high}"),
        _ => format!("{low}-{high}"),
    }
}

/// A cosine: `0.912`; six digits where it is close to 1.
pub fn cosine(x: f64) -> String {
    if x > 0.9995 { format!("{x:.6}") } else { format!("{x:.3}") }
}

/// `512 B`, `3.4 KiB`, `1.2 GiB`.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut size = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        if size < 1024.0 {
            break;
        }
        size /= 1024.0;
        unit = next;
    }
    if unit == "B" || size >= 99.95 { format!("{size:.0} {unit}") } else { format!("{size:.1} {unit}") }
}

/// A length: `512`, `1k`, `3k`, `1000`, `1m`.
pub fn length(n: usize) -> String {
    match n {
        n if n >= 1 << 20 && n.is_multiple_of(1 << 20) => format!("{}m", n >> 20),
        n if n >= 1 << 10 && n.is_multiple_of(1 << 10) => format!("{}k", n >> 10),
        n => n.to_string(),
    }
}

/// A length that was computed and not chosen: `1.4k`.
pub fn about_length(n: usize) -> String {
    match n as f64 {
        x if x >= 1048576.0 => format!("{:.1}m", x / 1048576.0),
        x if x >= 1024.0 => format!("{:.1}k", x / 1024.0),
        _ => n.to_string(),
    }
}

/// A count a second: `1.23 M`.
pub fn count(x: f64) -> String {
    match x {
        x if x >= 1e9 => format!("{} G", three(x / 1e9)),
        x if x >= 1e6 => format!("{} M", three(x / 1e6)),
        x if x >= 1e3 => format!("{} k", three(x / 1e3)),
        x => three(x),
    }
}

/// An error: `0.123`, or `1.2e-7` where that is shorter.
pub fn error(x: f64) -> String {
    match x {
        0.0 => "0".into(),
        x if x.abs() < 1e-3 => format!("{x:.1e}"),
        x => three(x),
    }
}

/// Three significant digits, no exponent.
pub fn three(x: f64) -> String {
    match x.abs() {
        a if a >= 99.95 => format!("{x:.0}"),
        a if a >= 9.995 => format!("{x:.1}"),
        a if a >= 0.9995 => format!("{x:.2}"),
        _ => format!("{x:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits_and_a_unit() {
        assert_eq!([12.34e-6, 0.00456, 7.891, 2460.0].map(time), ["12.3 µs", "4.56 ms", "7.89 s", "41 min"]);
        assert_eq!(
            [0.42, 12.3, 2460.0, 12600.0, 864000.0].map(long_time),
            ["0.4 s", "12 s", "41 min", "3.5 h", "10 days"]
        );
        assert_eq!([0, 900, 3500, 1 << 30].map(bytes), ["0 B", "900 B", "3.4 KiB", "1.0 GiB"]);
        assert_eq!(
            [100, 1024, 1000, 3072, 1 << 20, 5 << 20].map(length),
            ["100", "1k", "1000", "3k", "1m", "5m"]
        );
        assert_eq!([1434, 700].map(about_length), ["1.4k", "700"]);
        assert_eq!([1.5e9, 2.345e6, 900.0].map(count), ["1.50 G", "2.35 M", "900"]);
        assert_eq!(
            (spread(0.0119, 0.0128), spread(0.9e-3, 1.1e-3)),
            ("11.9-12.8 ms".into(), "900 µs-1.10 ms".into())
        );
        assert_eq!([0.9123, 0.9999991].map(cosine), ["0.912", "0.999999"]);
        assert_eq!([0.0, 1.234e-7, 0.1234, 1.5].map(error), ["0", "1.2e-7", "0.123", "1.50"]);
    }
}
