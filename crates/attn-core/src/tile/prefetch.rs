//! A hint to the memory system.
#![allow(unsafe_code)]

/// Asks for the cache lines of `data` ahead of their use.
#[inline(always)]
pub fn prefetch<T>(data: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        let start = data.as_ptr().cast::<i8>();
        for line in (0..size_of_val(data)).step_by(64) {
            // SAFETY: a prefetch reads nothing and faults on no address; the pointer stays inside `data`.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(start.add(line)) };
        }
    }
    let _ = data;
}
