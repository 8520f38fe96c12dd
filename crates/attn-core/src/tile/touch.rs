//! Reads one number of each cache line of a row, in order.
//!
//! Vector loads of a row may be put into any order by the compiler, which often likes them best from the last to the
//! first. The prefetchers of the CPU follow lines that are asked for in ascending order; a loop that is bound by reading
//! loses a quarter of the bandwidth where they are not.

#![allow(unsafe_code)]

/// Bytes of a cache line on every CPU that this workspace has vector code for.
const LINE: usize = 64;

/// Asks for the lines of `row` from first to last, ahead of whatever reads it next.
#[inline(always)]
pub fn touch<T: Copy>(row: &[T]) {
    for number in row.iter().step_by(LINE / size_of::<T>().clamp(1, LINE)) {
        // SAFETY: `number` is a reference, so it can be read; a copy of a `T: Copy` is forgotten at once.
        unsafe { std::ptr::read_volatile(number) };
    }
}
