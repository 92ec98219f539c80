//! How far away a guest's driver is: nearer than memory, or as far.
//!
//! Processors that share a cache hand a line to each other within tens of nanoseconds. Two that share none, on different chiplets or
//! sockets, need as long as memory does; what one writes for the other had better go by way of memory then (`stream.rs`).
//! Whoever runs a guest's vCPUs may move them at any time, so this is measured all the time: how long it takes to load a line that the driver
//! has written since it was here last.
//!
//! One of the files with unsafe code in this crate: instructions that have no safe name.

use std::hint::{black_box, select_unpredictable};
use std::sync::LazyLock;
use std::sync::atomic::AtomicU16;
use std::thread::sleep;
use std::time::Duration;

use crate::memory::CACHE_LINE_BYTES;

/// One look in so many is measured: that takes some tens of nanoseconds. A prime: not in step with bursts and rings.
const LOOKS: u8 = 61;

/// So many measurements in a row, or as many more of one kind than of the other, change what is believed.
const SURE: u8 = 12;

/// From how many ticks on a line has come from as far away as memory.
static FAR_TICKS: LazyLock<u32> = LazyLock::new(far_ticks);

/// Of one ring's driver. Near, until measured.
#[derive(Debug)]
pub(crate) struct Distance {
    looks: u8,
    /// Far measurements less near ones, within `0..=SURE`.
    score: u8,
    is_far: bool,
}

impl Distance {
    pub(crate) fn new() -> Self {
        // Now, and not while a worker waits.
        LazyLock::force(&FAR_TICKS);
        Self { looks: 0, score: 0, is_far: false }
    }

    #[inline]
    pub(crate) fn is_far(&self) -> bool {
        self.is_far
    }

    /// Whether the next look at a line that the driver writes to is to be measured.
    #[inline]
    pub(crate) fn is_due(&mut self) -> bool {
        self.looks = (self.looks + 1) % LOOKS;
        self.looks == 0
    }

    /// To load a line that the driver had written to took so many ticks.
    #[cold]
    pub(crate) fn note(&mut self, ticks: u32) {
        self.judge(ticks >= *FAR_TICKS);
    }

    fn judge(&mut self, was_far: bool) {
        self.score = if was_far { (self.score + 1).min(SURE) } else { self.score.saturating_sub(1) };
        match self.score {
            0 => self.is_far = false,
            SURE => self.is_far = true,
            _ => {}
        }
    }
}

/// Loads from `line` (Acquire), after all loads before it have come; tells how many ticks of the processor's clock that took.
#[inline(always)]
pub(crate) fn timed_load(line: &AtomicU16) -> (u16, u32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: it reads what `line` refers to, which anybody may write to at the same time.
    unsafe {
        let (value, start, end): (u32, u32, u32);
        std::arch::asm!(
            "lfence", "rdtsc", "lfence", "mov {start:e}, eax",
            "movzx {value:e}, word ptr [{line}]",
            "lfence", "rdtsc", "lfence",
            line = in(reg) line.as_ptr(), value = out(reg) value, start = out(reg) start, out("eax") end, out("edx") _,
            options(nostack, preserves_flags),
        );
        (value as u16, end.wrapping_sub(start))
    }
    #[cfg(not(target_arch = "x86_64"))]
    (line.load(std::sync::atomic::Ordering::Acquire), 0)
}

/// Where to load from if `is_measured` is false. A processor guesses that it is, wrongly when it is not, and would have asked for
/// `line` long before the clock is read: loads from memory would seem to take too little, down to half.
#[inline(always)]
pub(crate) fn decoy_if(is_measured: bool, line: &AtomicU16) -> &AtomicU16 {
    static DECOY: AtomicU16 = AtomicU16::new(0);
    // Of what the compiler does not know to be the condition of the branch, and without one.
    select_unpredictable(black_box(is_measured), &DECOY, line)
}

#[repr(align(64))]
struct Line(AtomicU16);
const _: () = assert!(align_of::<Line>() == CACHE_LINE_BYTES);

/// Two thirds of the way from the nearest cache to memory. Where there is no such clock nothing is ever far.
fn far_ticks() -> u32 {
    // The least of some tries, apart: while others are busy with it memory seems to be farther away.
    let least = |before: fn(&Line)| {
        let tries = (0..4).map(|_| {
            sleep(Duration::from_millis(1));
            load_ticks(before)
        });
        tries.min().unwrap_or(0)
    };
    let (cache, memory) = (least(|_| ()), least(evict));
    if memory > cache { cache + (memory - cache) * 2 / 3 } else { u32::MAX }
}

/// How long it takes to load a line that was just written, after `before`: a quarter of all loads take less. (Most of what
/// makes them longer is others' use of memory.)
fn load_ticks(before: impl Fn(&Line)) -> u32 {
    let mut samples = [0; 64];
    for (sample, value) in samples.iter_mut().zip(1..) {
        let line = Line(AtomicU16::new(value));
        before(&line);
        *sample = timed_load(&line.0).1;
    }
    let quarter = samples.len() / 4;
    *samples.select_nth_unstable(quarter).1
}

/// Leaves a line nowhere but in memory.
fn evict(line: &Line) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a line's content is the same afterwards; CLFLUSH belongs to SSE2, which every such processor has.
    unsafe {
        use std::arch::x86_64::{_mm_clflush, _mm_mfence};
        _mm_clflush((&raw const *line).cast());
        _mm_mfence();
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = line;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_mind_takes_many_measurements_and_not_all_need_agree() {
        let mut distance = Distance::new();
        let mut after = |far: &[bool]| {
            far.iter().for_each(|&far| distance.judge(far));
            distance.is_far()
        };
        assert!(!after(&[true; SURE as usize - 1]));
        assert!(after(&[true]));
        assert!(after(&[false; SURE as usize - 1]), "still");
        assert!(!after(&[false]));
        // Two of three.
        assert!(!after(&[[true, true, false]; 9].concat()));
        assert!(after(&[[true, true, false]; 9].concat()));
        assert!(after(&[true, false].repeat(100)));
    }

    #[test]
    fn one_look_in_many_is_measured() {
        let mut distance = Distance::new();
        let due = (0..10 * u32::from(LOOKS)).filter(|_| distance.is_due()).count();
        assert_eq!(due, 10);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn memory_is_far_and_the_own_cache_is_near() {
        // Of three tries, for the sake of a busy machine.
        let is_told_apart = || load_ticks(evict) >= *FAR_TICKS && load_ticks(|_| ()) < *FAR_TICKS;
        assert!((0..3).any(|_| is_told_apart()), "memory {}, {} or more", load_ticks(evict), *FAR_TICKS);
    }
}
