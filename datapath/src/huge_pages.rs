//! Huge pages for tables that are large, and in use.
//!
//! A table of small pages costs what is used of it, but every frame of many flows finds its page's translation gone from
//! the processor's own table (TLB). So a table begins with small pages, and where a quarter of a huge page has come to be
//! used, the kernel is asked to make it one (Linux 6.1, MADV_COLLAPSE; without it nothing happens). What workers do not
//! use stays out of memory, and what they use takes four times as much at most.
//!
//! Done by the control thread, now and then. A worker that wants such a page meanwhile waits for it: 0.6 to 0.8 ms were seen.

use std::collections::VecDeque;
use std::ops::Range;

/// Bytes of a huge page. Where it has another size, the kernel refuses.
const HUGE_BYTES: usize = 2 << 20;
const PAGE_BYTES: usize = 4 << 10;
const PAGES: usize = HUGE_BYTES / PAGE_BYTES;
/// Of these, as many have to be resident.
const RESIDENT_MIN: usize = PAGES / 4;

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

    /// Looks at the next `count` of them, and has those made huge that are used enough, `most` at most. The number of those.
    pub fn gather(&mut self, count: usize, most: usize) -> usize {
        let mut made = 0;
        for _ in 0..count.min(self.starts.len()) {
            if made == most {
                break;
            }
            let Some(start) = self.starts.pop_front() else { break };
            if resident_pages(start) >= RESIDENT_MIN && make_huge(start) {
                made += 1;
            } else {
                self.starts.push_back(start);
            }
        }
        made
    }
}

/// Small pages from `start` on, as many as a huge one has, that are in memory.
fn resident_pages(start: usize) -> usize {
    let mut states = [0u8; PAGES];
    // SAFETY: writes a byte for each page into `states`; memory that is not mapped is an error.
    let answer = unsafe { libc::mincore(start as *mut libc::c_void, HUGE_BYTES, states.as_mut_ptr()) };
    if answer == 0 { states.iter().filter(|&&state| state & 1 != 0).count() } else { 0 }
}

fn make_huge(start: usize) -> bool {
    // SAFETY: changes no byte of the memory; if it is not mapped any more, that is an error.
    unsafe { libc::madvise(start as *mut libc::c_void, HUGE_BYTES, libc::MADV_COLLAPSE) == 0 }
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
        let mut words = vec![0u64; 4 * HUGE_BYTES / 8];
        let mut pages = HugePages::new([range(&words)]);
        let count = pages.starts.len();
        assert!((3..=4).contains(&count), "{count}");
        let (first, second) = (pages.starts[0], pages.starts[1]);
        let base = words.as_ptr() as usize;
        let index = |address: usize| (address - base) / 8;
        let places = || (0..PAGES).map(|page| index(first) + page * PAGE_BYTES / 8);
        places().for_each(|place| words[place] = place as u64 + 1);
        words[index(second)] = 7;
        assert_eq!((resident_pages(first), resident_pages(second)), (PAGES, 1));
        // A kernel may not know how, or have none to give: then all stays as it was.
        let made = pages.gather(usize::MAX, usize::MAX);
        assert_eq!(pages.starts.len(), count - made);
        assert!(!pages.starts.is_empty() && made <= 1, "{made}");
        assert_eq!(resident_pages(second), 1, "what is hardly used stays small");
        assert!(places().all(|place| words[place] == place as u64 + 1));
        if made == 1 {
            assert_eq!(huge_bytes(first), HUGE_BYTES);
        } else {
            eprintln!("NOT TESTED: this kernel makes no huge pages of small ones");
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
