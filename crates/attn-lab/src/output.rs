//! What goes to the terminal. A reader that went away (`attn list | head`) is no error.

use crate::{LabError, Result};
use std::io::{ErrorKind, Write};
use std::path::Path;

/// Writes `text` and a line break to standard output.
///
/// # Errors
/// [`LabError::Io`] if it cannot be written, except for a closed pipe.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            Err(LabError::io("write", Path::new("standard output"), e))
        }
        _ => Ok(()),
    }
}

/// Writes `value` as one line of JSON to standard output.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text =
        serde_json::to_string(value).map_err(|e| LabError::Argument(format!("cannot write JSON: {e}")))?;
    print(&text)
}

/// Writes one line to standard error: hints and complaints. Nowhere else to turn if that fails.
pub fn note(text: &str) {
    let one_line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let _ = writeln!(std::io::stderr().lock(), "attn: {one_line}");
}
