//! What the suite found.

use std::fmt;

/// One promise of one configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// The promise's name.
    pub promise: &'static str,
    /// The options of the configuration, as `key=value` pairs, or `defaults`.
    pub configuration: String,
    /// Kept, or how it was broken: what, where, by how much, on which shape.
    pub outcome: Result<(), String>,
}

/// Every promise that was tried, in every configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// The variant's name.
    pub variant: &'static str,
    /// Kept and broken promises, in the order they were tried.
    pub findings: Vec<Finding>,
}

impl Report {
    /// The broken promises.
    pub fn broken(&self) -> impl Iterator<Item = &Finding> {
        self.findings.iter().filter(|f| f.outcome.is_err())
    }

    /// True if something was tried and nothing is broken.
    pub fn is_clean(&self) -> bool {
        !self.findings.is_empty() && self.broken().next().is_none()
    }
}

impl fmt::Display for Report {
    /// One line a broken promise, and a last line with the counts.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in self.broken() {
            let Finding { promise, configuration, outcome } = finding;
            let reason = outcome.as_ref().err().map_or("", String::as_str);
            writeln!(f, "{} ({configuration}) breaks `{promise}`: {reason}", self.variant)?;
        }
        let (all, broken) = (self.findings.len(), self.broken().count());
        write!(f, "{}: {} promises kept, {broken} broken", self.variant, all - broken)
    }
}
