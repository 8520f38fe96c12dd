//! The program `attn`. All of it is in the library `attn_lab`.

use peak_alloc::PeakAlloc;
use std::process::ExitCode;

/// Counts allocated bytes: see `attn_lab::memory`.
#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

fn main() -> ExitCode {
    attn_lab::cli::main()
}
