//! `results.csv`: the rows of this sweep, one a line, every figure in its own column and in plain units.

use super::case::{Outcome, Row};
use crate::{LabError, Result};
use std::path::Path;

const HEADER: [&str; 38] = [
    "source",
    "input",
    "input_hash",
    "variant",
    "options",
    "n",
    "batch",
    "n_heads_q",
    "n_heads_kv",
    "head_dim",
    "head_dim_v",
    "causal",
    "dtype",
    "threads",
    "isa",
    "rows",
    "seed",
    "version",
    "build",
    "cpu",
    "status",
    "reason",
    "seconds_p20",
    "seconds_median",
    "seconds_p80",
    "runs",
    "tokens_s",
    "gflops",
    "share_of_peak",
    "extra_bytes",
    "peak_rss_bytes",
    "rel_l2",
    "rel_l2_low",
    "rel_l2_high",
    "worst_row",
    "cosine_p5",
    "cosine_median",
    "max_abs",
];

/// Writes all rows.
///
/// # Errors
/// [`LabError`] if the file cannot be written.
pub fn write(path: &Path, rows: &[Row]) -> Result<()> {
    let complaint = |e: csv::Error| LabError::format(path, format!("cannot be written: {e}"));
    let mut writer = csv::Writer::from_path(path).map_err(complaint)?;
    writer.write_record(HEADER).map_err(complaint)?;
    for row in rows {
        writer.write_record(record(row)).map_err(complaint)?;
    }
    writer.flush().map_err(|e| LabError::io("write", path, e))
}

fn record(row: &Row) -> Vec<String> {
    let c = &row.case;
    let options: Vec<String> = c.options.0.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let (status, reason) = match &row.outcome {
        Outcome::Measured(_) => ("measured", ""),
        Outcome::NotRun { reason, .. } => ("not-run", reason.as_str()),
        Outcome::Failed { reason } => ("failed", reason.as_str()),
    };
    let mut cells = vec![
        c.source.clone(),
        c.input.clone(),
        c.input_hash.clone(),
        c.variant.clone(),
        options.join(" "),
        c.n.to_string(),
        c.batch.to_string(),
        c.n_heads_q.to_string(),
        c.n_heads_kv.to_string(),
        c.head_dim.to_string(),
        c.head_dim_v.to_string(),
        c.causal.to_string(),
        c.dtype.to_string(),
        c.threads.to_string(),
        c.isa.to_string(),
        c.rows.to_string(),
        c.seed.to_string(),
        c.version.clone(),
        c.build.clone(),
        c.cpu.clone(),
        status.into(),
        reason.into(),
    ];
    let Some(m) = row.measured() else {
        cells.resize(HEADER.len(), String::new());
        return cells;
    };
    let optional = |x: Option<u64>| x.map_or(String::new(), |x| x.to_string());
    cells.extend([m.seconds.p20, m.seconds.median, m.seconds.p80].map(|x| x.to_string()));
    cells.extend([
        m.runs.to_string(),
        m.tokens_s.to_string(),
        m.gflops.to_string(),
        m.share_of_peak.to_string(),
    ]);
    cells.extend([optional(m.extra_bytes), optional(m.peak_rss_bytes)]);
    cells.extend([m.error.rel_l2, m.error.rel_l2_low, m.error.rel_l2_high].map(|x| x.to_string()));
    cells.push(m.error.worst_row.map_or(String::new(), |x| x.to_string()));
    cells.extend([m.error.cosine_p5, m.error.cosine_median, m.error.max_abs].map(|x| x.to_string()));
    cells
}

#[cfg(test)]
mod tests {
    use super::super::case::examples::{not_run, row};
    use super::*;

    #[test]
    fn every_row_has_every_column_and_reads_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.csv");
        let mut failed = not_run("odd", 64);
        failed.outcome = Outcome::Failed { reason: "a, \"quoted\"\nreason".into() };
        write(&path, &[row("flash", 1024, 0.5, 1e-7), not_run("naive", 4096), failed]).unwrap();
        let mut reader = csv::Reader::from_path(&path).unwrap();
        let column = |name: &str| HEADER.iter().position(|h| *h == name).unwrap();
        let rows: Vec<csv::StringRecord> = reader.records().map(|r| r.unwrap()).collect();
        assert!(rows.len() == 3 && rows.iter().all(|r| r.len() == HEADER.len()));
        assert_eq!(rows[0][column("seconds_median")].parse::<f64>().unwrap(), 0.5);
        assert_eq!(rows[0][column("max_abs")].parse::<f64>().unwrap(), 0.5);
        assert_eq!(&rows[0][column("extra_bytes")], "1048576");
        assert_eq!((&rows[1][column("status")], &rows[1][column("reason")]), ("not-run", "predicted 41 min"));
        assert_eq!(&rows[2][column("reason")], "a, \"quoted\"\nreason");
    }
}
