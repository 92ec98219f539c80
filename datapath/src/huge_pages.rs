//! Huge pages for tables that are large, and in use.
//!
//! A table of small pages costs what is used of it, but every frame of many flows finds its page's translation gone from
//! the processor's own table (TLB). So a table begins with small pages, and where a quarter of a huge page has come to be
//! used, the kernel is asked to make it one (Linux 6.1, MADV_COLLAPSE; without it, or where
//! `/proc/self/pagemap` cannot be read, nothing happens). Used is what was written to: what was only read is the kernel's page of zeros.
//!
//! Where the system gives huge pages to all (`transparent_hugepage/enabled` is `always`), tables have them from the start.
//!
//! Done by the control thread, now and then. A worker that wants such a page meanwhile waits for it: 0.6 to 0.8 ms were seen.
//! What is sure to be written to soon is had in memory ahead, in small pages or large.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// Bytes of a huge page. Where it has another size, the kernel refuses.
pub(crate) const HUGE_BYTES: usize = 2 << 20;
const PAGE_BYTES: usize = 4 << 10;
const PAGES: usize = HUGE_BYTES / PAGE_BYTES;
/// Of these, as many have to be used.
const USED_MIN: usize = PAGES / 4;

/// Has a table in memory now, in huge pages if the kernel has them to give.
pub fn from_start(memory: Range<usize>) {
    let first = memory.start.next_multiple_of(HUGE_BYTES);
    let bytes = (memory.end & !(HUGE_BYTES - 1)).saturating_sub(first);
    // SAFETY: changes no byte of the memory; if it is not mapped, that is an error.
    let advise = |advice| unsafe { libc::madvise(first as *mut libc::c_void, bytes, advice) };
    advise(libc::MADV_HUGEPAGE);
    if advise(libc::MADV_POPULATE_WRITE) != 0 {
        // Linux before 5.14. No worker shall wait for huge pages to be cleared.
        advise(libc::MADV_NOHUGEPAGE);
    }
}

/// Has memory that will be written to, whole pages of it, in one go: a fault for each page costs more.
#[cold]
pub(crate) fn populate(memory: Range<usize>) {
    let first = memory.start & !(PAGE_BYTES - 1);
    let bytes = memory.end.next_multiple_of(PAGE_BYTES) - first;
    // SAFETY: changes no byte of the memory; if it is not mapped, or the kernel is older than Linux 5.14, that is an error.
    unsafe { libc::madvise(first as *mut libc::c_void, bytes, libc::MADV_POPULATE_WRITE) };
}

/// Where some tables could have huge pages, and have none yet.
#[derive(Debug, Default)]
pub struct HugePages {
    starts: VecDeque<usize>,
}

impl HugePages {
    /// `memory`: addresses of tables.
    pub fn new(memory: impl IntoIterator<Item = Range<usize>>) -> Self {
        let whole = |range: Range<usize>| {
            let first = range.start.next_multiple_of(HUGE_BYTES);
            (first..range.end).step_by(HUGE_BYTES).filter(move |start| start + HUGE_BYTES <= range.end)
        };
        Self { starts: memory.into_iter().flat_map(whole).collect() }
    }

    /// Looks at the next `count` of them, and asks for those to be made huge that are used enough, `most` at most. How many it
    /// has asked for. One that the kernel refuses (it has none to give, or never heard of it) is not asked for again.
    pub fn gather(&mut self, count: usize, most: usize) -> usize {
        if most == 0 || self.starts.is_empty() {
            return 0;
        }
        let Ok(pagemap) = File::open("/proc/self/pagemap") else { return 0 };
        let mut asked = 0;
        for _ in 0..count.min(self.starts.len()) {
            if asked == most {
                break;
            }
            let Some(start) = self.starts.pop_front() else { break };
            if used_pages(&pagemap, start) >= USED_MIN {
                make_huge(start);
                asked += 1;
            } else {
                self.starts.push_back(start);
            }
        }
        asked
    }
}

/// Small pages from `start` on, as many as a huge one has, that were written to (proc_pid_pagemap(5)).
fn used_pages(pagemap: &File, start: usize) -> usize {
    const PRESENT: u64 = 1 << 63;
    // The page of zeros is nobody's alone.
    const EXCLUSIVE: u64 = 1 << 56;
    let mut entries = [0u8; PAGES * size_of::<u64>()];
    let offset = start / PAGE_BYTES * size_of::<u64>();
    if pagemap.read_exact_at(&mut entries, offset as u64).is_err() {
        return 0;
    }
    let (entries, _) = entries.as_chunks();
    let is_used = |entry: u64| entry & (PRESENT | EXCLUSIVE) == PRESENT | EXCLUSIVE;
    entries.iter().filter(|&&entry| is_used(u64::from_ne_bytes(entry))).count()
}

/// Small pages from `start` on, as many as a huge one has, that are in memory.
#[cfg(test)]
pub(crate) fn resident_pages(start: usize) -> usize {
    let mut states = [0u8; PAGES];
    // SAFETY: writes a byte for each page into `states`; memory that is not mapped is an error.
    let answer = unsafe { libc::mincore(start as *mut libc::c_void, HUGE_BYTES, states.as_mut_ptr()) };
    if answer == 0 { states.iter().filter(|&&state| state & 1 != 0).count() } else { 0 }
}

/// Whether the page of an address is in memory.
#[cfg(test)]
pub(crate) fn resident(address: usize) -> bool {
    let mut state = 0u8;
    // SAFETY: as above, for one page.
    let answer =
        unsafe { libc::mincore((address & !(PAGE_BYTES - 1)) as *mut libc::c_void, PAGE_BYTES, &raw mut state) };
    answer == 0 && state & 1 != 0
}

/// Whatever the system gives to all, this has small pages.
#[cfg(test)]
pub(crate) fn keep_small(memory: Range<usize>) {
    // SAFETY: changes no byte of the memory; if it is not mapped, that is an error.
    unsafe { libc::madvise(memory.start as *mut libc::c_void, memory.len(), libc::MADV_NOHUGEPAGE) };
}

fn make_huge(start: usize) {
    // SAFETY: changes no byte of the memory; if it is not mapped any more, that is an error, and like others of no consequence.
    unsafe { libc::madvise(start as *mut libc::c_void, HUGE_BYTES, libc::MADV_COLLAPSE) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(words: &[u64]) -> Range<usize> {
        let bytes = words.as_ptr_range();
        bytes.start as usize..bytes.end as usize
    }

    #[test]
    fn only_whole_huge_pages_that_are_used_are_made() {
        let setting = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
        if !setting.contains("[madvise]") && !setting.contains("[never]") {
            eprintln!("NOT TESTED: this system makes huge pages of its own accord, or none: {setting:?}");
            return;
        }
        let mut words = vec![0u64; 4 * HUGE_BYTES / 8];
        let mut pages = HugePages::new([range(&words)]);
        let count = pages.starts.len();
        assert!((3..=4).contains(&count), "{count}");
        let (first, second, third) = (pages.starts[0], pages.starts[1], pages.starts[2]);
        let base = words.as_ptr() as usize;
        let index = |address: usize| (address - base) / 8;
        let places = || (0..PAGES).map(|page| index(first) + page * PAGE_BYTES / 8);
        let read = (0..PAGES).map(|page| words[index(third) + page * PAGE_BYTES / 8]);
        assert_eq!((read.sum::<u64>(), resident_pages(third)), (0, PAGES));
        places().for_each(|place| words[place] = place as u64 + 1);
        words[index(second)] = 7;
        assert_eq!((resident_pages(first), resident_pages(second)), (PAGES, 1));
        assert_eq!(pages.gather(usize::MAX, 0), 0);
        assert_eq!(pages.gather(usize::MAX, usize::MAX), 1);
        assert_eq!(pages.starts.len(), count - 1);
        assert!(!pages.starts.contains(&first));
        assert!(pages.starts.contains(&third), "what was only read is not used");
        assert_eq!(resident_pages(second), 1, "what is hardly used stays small");
        assert!(places().all(|place| words[place] == place as u64 + 1));
        // The kernel may have had none to give, or not know how.
        if huge_bytes(first) != HUGE_BYTES {
            eprintln!("NOT TESTED: this kernel has made no huge page of small ones");
        }
    }

    /// Of the mapping at an address, by the kernel's word.
    fn huge_bytes(address: usize) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut here = false;
        for line in maps.lines() {
            if let Some((range, _)) = line.split_once(' ')
                && let Some((from, to)) = range.split_once('-')
                && let (Ok(from), Ok(to)) = (usize::from_str_radix(from, 16), usize::from_str_radix(to, 16))
            {
                here = (from..to).contains(&address);
            } else if here && let Some(kilobytes) = line.strip_prefix("AnonHugePages:") {
                return kilobytes.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10;
            }
        }
        0
    }
}
