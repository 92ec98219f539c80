//! Copies past the caches.
//!
//! A cache line that is written as a whole with non-temporal stores is neither fetched nor kept: whoever reads it next finds it
//! in memory. That is worth it for a reader that is as far away as memory is (see [`crate::distance`]): there a line that is
//! written the usual way crosses the distance twice for each reader's once.
//!
//! One of the files with unsafe code in this crate: see `memory.rs`.

use std::ops::Range;

use crate::memory::CACHE_LINE_BYTES;

/// Copies those of `bytes` bytes that fill whole cache lines of `to`, in order; which they are. The others are left alone.
///
/// # Safety
/// `bytes` bytes from `from` can be read and from `to` written. They may overlap: then it matters not what is written.
#[inline(always)]
pub(crate) unsafe fn copy_lines(from: *const u8, to: *mut u8, bytes: usize) -> Range<usize> {
    let start = (to as usize).wrapping_neg() % CACHE_LINE_BYTES;
    if !cfg!(target_arch = "x86_64") || start + CACHE_LINE_BYTES > bytes {
        return 0..0;
    }
    let end = start + (bytes - start) / CACHE_LINE_BYTES * CACHE_LINE_BYTES;
    #[cfg(target_arch = "x86_64")]
    for at in (start..end).step_by(16) {
        use std::arch::x86_64::{_mm_loadu_si128, _mm_stream_si128};
        // SAFETY: within the bytes that the caller vouches for; `to` plus `start` is aligned to a line.
        unsafe { _mm_stream_si128(to.add(at).cast(), _mm_loadu_si128(from.add(at).cast())) };
    }
    start..end
}

/// What was copied so comes before whatever is stored next.
#[inline]
pub(crate) fn fence() {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: it has no operands.
    unsafe {
        std::arch::x86_64::_mm_sfence();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_lines_are_copied_and_nothing_else_is_touched() {
        #[repr(align(64))]
        struct Lines([u8; 512]);
        let from: Vec<u8> = (0..512).map(|at| at as u8 | 1).collect();
        for start in 0..130 {
            for bytes in 0..380 {
                let mut to = Lines([0; 512]);
                let skip = bytes % 16;
                // SAFETY: both have so many bytes.
                let lines = unsafe { copy_lines(from[skip..].as_ptr(), to.0[start..].as_mut_ptr(), bytes) };
                fence();
                let whole = start.next_multiple_of(64)..((start + bytes) / 64 * 64);
                if whole.is_empty() {
                    assert_eq!(lines, 0..0);
                } else if cfg!(target_arch = "x86_64") {
                    assert_eq!(lines, whole.start - start..whole.end - start);
                }
                for (at, byte) in to.0.iter().enumerate() {
                    let copied = at >= start && lines.contains(&(at - start));
                    assert_eq!(*byte, if copied { from[skip + at - start] } else { 0 }, "{bytes} bytes at {start}");
                }
            }
        }
    }
}
