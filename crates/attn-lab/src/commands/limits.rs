//! `attn limits`: what this machine can do at best.

use crate::{Result, machine::Machine, output, pool};
use attn_core::limits::Limits;
use attn_core::simd::Isa;
use clap::Args;
use comfy_table::{Table, presets};
use std::process::ExitCode;

/// Measures what this machine can do at best.
#[derive(Debug, Args)]
pub struct LimitsCommand {
    /// Threads of the second measurement; default: all
    #[arg(long)]
    pub threads: Option<usize>,
    /// Instruction set: avx512, avx2, neon or portable; default: the fastest
    #[arg(long)]
    pub isa: Option<Isa>,
    /// One JSON object instead of a table
    #[arg(long)]
    pub json: bool,
}

/// The JSON object.
#[derive(Debug, serde::Serialize)]
struct Measured {
    machine: Machine,
    /// For one thread, and for several.
    limits: Vec<Limits>,
}

impl LimitsCommand {
    /// Measures and prints.
    ///
    /// # Errors
    /// An instruction set that this CPU lacks, zero threads, or an output that cannot be written.
    pub fn run(&self) -> Result<ExitCode> {
        let isa = self.isa.unwrap_or_else(Isa::current);
        let threads = self.threads.unwrap_or_else(pool::all_threads);
        let mut limits = vec![Limits::measure(isa, 1)?];
        if threads != 1 {
            limits.push(Limits::measure(isa, threads)?);
        }
        let measured = Measured { machine: Machine::detect(), limits };
        if self.json {
            output::print_json(&measured)?;
        } else {
            output::print(&table(&measured))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

fn table(measured: &Measured) -> String {
    let mut table = Table::new();
    table.load_preset(presets::UTF8_HORIZONTAL_ONLY);
    let columns = measured.limits.iter().map(|l| match l.threads {
        1 => "1 thread".to_string(),
        n => format!("{n} threads"),
    });
    table.set_header(std::iter::once(measured.machine.cpu.clone()).chain(columns));
    let mut row = |name: &str, cell: &dyn Fn(&Limits) -> String| {
        table.add_row(std::iter::once(name.to_string()).chain(measured.limits.iter().map(cell)));
    };
    let gflops = |estimate| if estimate { "GFLOP/s (estimate)" } else { "GFLOP/s" };
    row("f32 multiply-add", &|l| format!("{:.1} {} {}", l.fma_gflops, gflops(l.fma_is_estimate), l.isa));
    row("bf16 dot product", &|l| l.bf16_gflops.map_or("none".into(), |g| format!("{g:.1} GFLOP/s")));
    row("read in cache", &|l| format!("{:.1} GB/s", l.cache_read_gb_s));
    row("read from memory", &|l| format!("{:.1} GB/s", l.memory_read_gb_s));
    table.to_string()
}
