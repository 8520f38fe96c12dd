//! Memory of a call and of the process.
//!
//! The binary installs [`PeakAlloc`] as its allocator, which counts bytes; in a program that does not (a test of this
//! library), [`is_counting`] is false and no figure is made up.

use nix::sys::resource::{UsageWho, getrusage};
use peak_alloc::PeakAlloc;

/// True if this process counts its allocations.
pub fn is_counting() -> bool {
    PeakAlloc.current_usage() > 0
}

/// Runs `work`, and says how many bytes were allocated beyond those held before, at the moment of most; `None` if this
/// process does not count. Whatever other threads allocate meanwhile is counted too.
pub fn extra_bytes<R>(work: impl FnOnce() -> R) -> (R, Option<u64>) {
    PeakAlloc.reset_peak_usage();
    let before = PeakAlloc.current_usage();
    let result = work();
    let extra = PeakAlloc.peak_usage().saturating_sub(before);
    (result, is_counting().then_some(extra as u64))
}

/// The most memory that this process had resident, bytes.
///
/// From `/proc/self/status` where there is one: `getrusage` starts, in a child process, with what its parent had.
pub fn peak_rss_bytes() -> Option<u64> {
    peak_in_proc().or_else(|| {
        let max = u64::try_from(getrusage(UsageWho::RUSAGE_SELF).ok()?.max_rss()).ok()?;
        // The one kernel family that counts bytes here; all others count KiB.
        Some(if cfg!(target_vendor = "apple") { max } else { max * 1024 })
    })
}

/// Starts the count of [`peak_rss_bytes`] again from what is resident now; false where the system cannot.
pub fn reset_peak_rss() -> bool {
    // proc(5): writing 5 to clear_refs resets the peak resident set size of the process.
    peak_in_proc().is_some() && std::fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn peak_in_proc() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Memory that a new allocation may use without swapping, bytes.
pub fn available_bytes() -> u64 {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    // Zero means that the platform does not say: then nothing is refused on its account.
    match system.available_memory() {
        0 => u64::MAX,
        bytes => bytes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_at_least_what_was_touched() {
        let before = peak_rss_bytes().unwrap();
        let touched = std::hint::black_box(vec![1u8; 64 << 20]);
        let after = peak_rss_bytes().unwrap();
        assert!(after >= before && after >= touched.len() as u64, "{before} then {after}");
    }

    #[test]
    fn nothing_is_made_up_without_the_counting_allocator() {
        let (sum, extra) = extra_bytes(|| vec![1u8; 100].len());
        assert_eq!((sum, extra), (100, None));
    }
}
