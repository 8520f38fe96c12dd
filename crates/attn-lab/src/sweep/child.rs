//! The process of one point (`attn sweep-point`, hidden): its own, so that its peak of resident memory is its own.
//!
//! It loads the inputs, then waits for words of the sweep on standard input, so that runs of several variants can be
//! interleaved. It ends when standard input does.

use super::protocol::{Answer, Ask, Job};
use crate::{LabError, Result, memory, output, pool, registry, tensors};
use attn_core::registry::{NamedTensor, NamedTensors, TensorData, output_like};
use attn_core::{Attention, Element, View};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

/// Serves one point over standard input and output.
///
/// # Errors
/// [`LabError::Io`] if the sweep cannot be reached; everything else is told to it as an answer.
pub fn serve() -> Result<ExitCode> {
    let Some(first) = next()? else { return Ok(ExitCode::SUCCESS) };
    let outcome = serde_json::from_str(&first)
        .map_err(|e| LabError::Argument(format!("sweep-point is started by `attn sweep` alone: {e}")))
        .and_then(|job: Job| pool::with_threads(job.threads, None, || work(&job))?);
    if let Err(e) = outcome {
        output::print_json(&Answer::Failed { reason: e.to_string() })?;
    }
    Ok(ExitCode::SUCCESS)
}

fn work(job: &Job) -> Result<()> {
    let attention = registry::get(&job.variant)?.build(&job.options)?;
    let inputs = tensors::load(&job.input)?;
    let mut out = output_like(&inputs.qkv()?);
    // Reading the file took its size twice; that is not the point's doing.
    memory::reset_peak_rss();
    output::print_json(&Answer::Ready)?;
    while let Some(line) = next()? {
        let ask: Ask = serde_json::from_str(&line).map_err(|e| LabError::Argument(e.to_string()))?;
        let answer = match ask {
            Ask::Warm => {
                let (seconds, extra_bytes) = memory::extra_bytes(|| run(&*attention, &inputs, &mut out));
                Answer::Warm { seconds: seconds?, extra_bytes, rows: rows_of(&out, &job.rows)? }
            }
            Ask::Run => Answer::Run { seconds: run(&*attention, &inputs, &mut out)? },
            Ask::Stop => Answer::Stop { peak_rss_bytes: memory::peak_rss_bytes() },
        };
        output::print_json(&answer)?;
        if ask == Ask::Stop {
            break;
        }
    }
    Ok(())
}

fn run(attention: &dyn Attention, inputs: &NamedTensors, out: &mut NamedTensor) -> Result<f64> {
    let (x, out) = (inputs.qkv()?, out.as_out()?);
    let from = Instant::now();
    attention.forward(x, out)?;
    Ok(from.elapsed().as_secs_f64())
}

fn rows_of(out: &NamedTensor, rows: &[(usize, usize, usize)]) -> Result<Vec<Vec<u32>>> {
    fn bits<E: Element>(view: &View<'_, E>, rows: &[(usize, usize, usize)]) -> Vec<Vec<u32>> {
        let row = |&(batch, head, i): &(usize, usize, usize)| {
            view.head(batch, head).row(i).iter().map(|x| x.load().to_bits()).collect()
        };
        rows.iter().map(row).collect()
    }
    let unfit = || LabError::Argument(format!("output of shape {:?}", out.shape));
    let shape: [usize; 4] = out.shape.as_slice().try_into().map_err(|_| unfit())?;
    Ok(match &out.data {
        TensorData::F32(d) => bits(&View::contiguous("out", d, shape)?, rows),
        TensorData::Bf16(d) => bits(&View::contiguous("out", d, shape)?, rows),
        TensorData::F16(d) => bits(&View::contiguous("out", d, shape)?, rows),
        TensorData::I32(_) | TensorData::U8(_) => return Err(unfit()),
    })
}

/// The next line of standard input; `None` at its end.
fn next() -> Result<Option<String>> {
    let mut line = String::new();
    let read = std::io::stdin().read_line(&mut line);
    let read = read.map_err(|e| LabError::io("read", Path::new("standard input"), e))?;
    Ok((read > 0).then_some(line))
}
