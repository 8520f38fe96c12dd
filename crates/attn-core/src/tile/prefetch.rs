//! Asking for memory before it is needed.
#![allow(unsafe_code)]

/// Bytes of a cache line; where lines are longer, each is asked for more than once.
const LINE_BYTES: usize = 64;

/// Asks for `data`, to be in the second-level cache when it is read or written. A hint: nothing waits for it, and where there
/// is no such instruction nothing happens.
#[inline(always)]
pub fn prefetch<T>(data: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let start = data.as_ptr().cast::<i8>();
        for at in (0..size_of_val(data)).step_by(LINE_BYTES) {
            // SAFETY: the address lies inside `data`; a prefetch reads nothing and never faults.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(start.add(at)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, LINE_BYTES);
}

/// As [`prefetch`] for as many elements that lie `by` elements behind `data`. They need not be there, nor anything else: for
/// a caller that knows where others will want to go on.
#[inline(always)]
pub fn prefetch_behind<T>(data: &[T], by: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        let start = data.as_ptr().wrapping_add(by).cast::<i8>();
        for at in (0..size_of_val(data)).step_by(LINE_BYTES) {
            // SAFETY: a prefetch reads nothing and never faults, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T1>(start.wrapping_add(at)) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (data, by, LINE_BYTES);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_slice_may_be_asked_for() {
        let numbers: Vec<f32> = (0..1001).map(|x| x as f32).collect();
        prefetch(&numbers);
        prefetch(&numbers[3..5]);
        prefetch::<f32>(&[]);
        prefetch(&[(); 3]);
        prefetch_behind(&numbers, 100_000);
        prefetch_behind(&numbers, usize::MAX);
        assert_eq!(numbers[1000], 1000.0);
    }
}
