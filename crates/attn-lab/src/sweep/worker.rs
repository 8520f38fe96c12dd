//! The sweep's end of a point's process: start it, ask it, stop waiting when it takes too long.

use super::protocol::{Answer, Ask, Job};
use crate::{LabError, Result};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// The hidden subcommand that serves a point.
pub const SUBCOMMAND: &str = "sweep-point";

/// A process with one point. It is killed when this value goes.
#[derive(Debug)]
pub struct Worker {
    child: Child,
    asks: ChildStdin,
    answers: Receiver<String>,
}

/// Why a process gave no answer.
#[derive(Debug, PartialEq)]
pub enum Trouble {
    /// It took longer than allowed.
    TookTooLong,
    /// It said why it cannot go on, or died.
    Failed(String),
}

impl Worker {
    /// Starts `program` with a job and waits until it has loaded its inputs.
    ///
    /// # Errors
    /// [`LabError::Io`] if the program cannot be started; inside, what became of the job.
    pub fn start(program: &Path, job: &Job, wait: Duration) -> Result<std::result::Result<Self, Trouble>> {
        let start = |e| LabError::io("start", program, e);
        let mut child = Command::new(program)
            .arg(SUBCOMMAND)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(start)?;
        let (Some(asks), Some(out)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(start(std::io::Error::other("its pipes are missing")));
        };
        let (sender, answers) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(std::io::Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut worker = Self { child, asks, answers };
        Ok(match worker.say(job, wait) {
            Ok(Answer::Ready) => Ok(worker),
            Ok(other) => Err(Trouble::Failed(format!("unexpected answer {other:?}"))),
            Err(trouble) => Err(trouble),
        })
    }

    /// Asks and waits for the answer.
    ///
    /// # Errors
    /// [`Trouble`].
    pub fn ask(&mut self, ask: Ask, wait: Duration) -> std::result::Result<Answer, Trouble> {
        self.say(&ask, wait)
    }

    fn say(&mut self, what: &impl serde::Serialize, wait: Duration) -> std::result::Result<Answer, Trouble> {
        let failed = |e: &dyn std::fmt::Display| Trouble::Failed(e.to_string());
        let mut line = serde_json::to_vec(what).map_err(|e| failed(&e))?;
        line.push(b'\n');
        if self.asks.write_all(&line).and_then(|()| self.asks.flush()).is_err() {
            return Err(self.death());
        }
        match self.answers.recv_timeout(wait) {
            Ok(line) => match serde_json::from_str(&line).map_err(|e| failed(&e))? {
                Answer::Failed { reason } => Err(Trouble::Failed(reason)),
                answer => Ok(answer),
            },
            Err(RecvTimeoutError::Timeout) => Err(Trouble::TookTooLong),
            Err(RecvTimeoutError::Disconnected) => Err(self.death()),
        }
    }

    /// What a process that went away left behind.
    fn death(&mut self) -> Trouble {
        let status = self.child.wait().map_or_else(|e| e.to_string(), |status| status.to_string());
        let mut last_words = String::new();
        if let Some(mut err) = self.child.stderr.take() {
            // Its last words are a courtesy; without them the status says enough.
            let _ = err.read_to_string(&mut last_words);
        }
        let hint = if status.contains("signal: 9") { "; probably out of memory" } else { "" };
        let words = last_words.split_whitespace().collect::<Vec<_>>().join(" ");
        let words = if words.is_empty() { String::new() } else { format!(": {words}") };
        Trouble::Failed(format!("its process ended with {status}{hint}{words}"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Already gone is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
