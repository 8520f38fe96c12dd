//! `results.jsonl`: one line a point, written when it is known; what is in it need not be measured again.
//!
//! The last line of a case counts. A line that a cut-off run left half written is dropped.

use super::case::{Outcome, Row};
use crate::{LabError, Result};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The results of this sweep and of earlier ones in the same folder.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    rows: HashMap<String, Row>,
}

impl Journal {
    /// Opens `path`, creating it if need be; `fresh` empties it first.
    ///
    /// # Errors
    /// [`LabError::Io`] if it cannot be read and written; [`LabError::Format`] for a line that is no result.
    pub fn open(path: &Path, fresh: bool) -> Result<Self> {
        let mut options = OpenOptions::new();
        let file =
            options.create(true).append(true).open(path).map_err(|e| LabError::io("write", path, e))?;
        if fresh {
            file.set_len(0).map_err(|e| LabError::io("write", path, e))?;
        }
        let text = std::fs::read_to_string(path).map_err(|e| LabError::io("read", path, e))?;
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        file.set_len(whole as u64).map_err(|e| LabError::io("write", path, e))?;
        let mut rows = HashMap::new();
        for (i, line) in text[..whole].lines().enumerate() {
            let row: Row = serde_json::from_str(line).map_err(|e| {
                let hint = "start over with --fresh, or choose another --out";
                LabError::format(path, format!("line {}: not a result of this program ({e}); {hint}", i + 1))
            })?;
            rows.insert(row.case.key(), row);
        }
        Ok(Self { path: path.to_path_buf(), file, rows })
    }

    /// The row of a case, if one is known.
    pub fn get(&self, key: &str) -> Option<&Row> {
        self.rows.get(key)
    }

    /// True if the case has been measured.
    pub fn is_measured(&self, key: &str) -> bool {
        self.get(key).is_some_and(|row| row.measured().is_some())
    }

    /// Adds a row and brings it to disk; a row that says nothing new is not repeated.
    ///
    /// # Errors
    /// [`LabError::Io`].
    pub fn add(&mut self, row: Row) -> Result<()> {
        let key = row.case.key();
        if self.rows.get(&key).is_some_and(|known| says_the_same(&known.outcome, &row.outcome)) {
            return Ok(());
        }
        let write = |e| LabError::io("write", &self.path, e);
        let mut line = serde_json::to_vec(&row).map_err(|e| LabError::format(&self.path, e))?;
        line.push(b'\n');
        self.file.write_all(&line).and_then(|()| self.file.sync_data()).map_err(write)?;
        self.rows.insert(key, row);
        Ok(())
    }
}

fn says_the_same(known: &Outcome, new: &Outcome) -> bool {
    match (known, new) {
        (Outcome::NotRun { reason: a, .. }, Outcome::NotRun { reason: b, .. }) => a == b,
        _ => known == new,
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::examples::{not_run, row};
    use super::*;

    #[test]
    fn what_was_measured_is_known_again_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        let mut journal = Journal::open(&path, false).unwrap();
        journal.add(row("flash", 1024, 0.5, 1e-7)).unwrap();
        journal.add(not_run("naive", 4096)).unwrap();
        drop(journal);

        let journal = Journal::open(&path, false).unwrap();
        let case = row("flash", 1024, 9.0, 9.0).case;
        assert!(journal.is_measured(&case.key()), "the figures are no part of the key");
        assert!(!journal.is_measured(&not_run("naive", 4096).case.key()), "not run is not measured");
        let changed: Vec<super::super::case::Case> = vec![
            super::super::case::Case { n: 2048, ..case.clone() },
            super::super::case::Case { input_hash: "4567".into(), ..case.clone() },
            super::super::case::Case { seed: 1, ..case.clone() },
            super::super::case::Case { threads: 1, ..case.clone() },
            super::super::case::Case { dtype: attn_core::DType::Bf16, ..case.clone() },
            super::super::case::Case { options: case.options.clone().with("scale", 2), ..case.clone() },
            super::super::case::Case { version: "0.2.0".into(), ..case.clone() },
            super::super::case::Case { source: "lm".into(), ..case },
        ];
        assert!(changed.iter().all(|case| !journal.is_measured(&case.key())));
        assert!(!Journal::open(&path, true).unwrap().is_measured(&row("flash", 1024, 1.0, 0.0).case.key()));
    }

    #[test]
    fn a_half_written_line_is_dropped_and_the_rest_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        Journal::open(&path, false).unwrap().add(row("flash", 1024, 0.5, 1e-7)).unwrap();
        OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"source\":\"ga").unwrap();
        let mut journal = Journal::open(&path, false).unwrap();
        journal.add(row("flash", 2048, 0.5, 1e-7)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2);
        assert_eq!(Journal::open(&path, false).unwrap().rows.len(), 2);
    }

    #[test]
    fn the_same_verdict_is_written_once_and_a_measurement_replaces_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        let mut journal = Journal::open(&path, false).unwrap();
        journal.add(not_run("naive", 4096)).unwrap();
        journal.add(not_run("naive", 4096)).unwrap();
        journal.add(row("naive", 4096, 0.5, 1e-7)).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 2);
        assert!(Journal::open(&path, false).unwrap().is_measured(&not_run("naive", 4096).case.key()));
    }

    #[test]
    fn a_foreign_file_is_refused_untouched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results.jsonl");
        std::fs::write(&path, "{\"a\":1}\n").unwrap();
        let line = Journal::open(&path, false).unwrap_err().to_string();
        assert!(line.contains("line 1") && line.contains("--fresh"), "{line}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"a\":1}\n");
    }
}
