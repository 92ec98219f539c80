//! Containment of SIGBUS: a front-end that truncates its memory file ends its own port's service, not the process.
//!
//! Theory of operation. An access to a mapped page behind the end of its file raises SIGBUS in the thread that makes it.
//! Every [`crate::memory::Memory`] enters its mappings in a table of fixed size while it lives ([`Guarded`]). The
//! handler looks the fault's address up there. If it is found, the handler maps anonymous zero pages over the whole
//! mapping, from then on private to us, marks the memory tables that contain it as truncated, and returns: the access
//! is made again and sees zeros. Who uses the memory asks for the mark once per burst and stops the port's rings
//! ("its memory file was truncated"). A fault anywhere else gets the default action: a core dump, as without us.
//!
//! The handler calls `mmap` and `sigaction` alone, takes no lock and allocates nothing. The entry of the mapping in
//! which it runs cannot change meanwhile, because the thread that faulted keeps its `Memory` alive; entries of others
//! can, and are recognised by their ticket, which is read before and after (a seqlock whose values never repeat).
//!
//! Limits: [`MAPPINGS_MAX`] mappings and [`TABLES_MAX`] memory tables in the process. What a hole punched into the file
//! does is the kernel's business: such a page reads as zeros without a signal.

use std::io;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering, fence};

use libc::{c_int, c_void, siginfo_t};

/// Mappings in the process: 1024 ports of 64 regions, each twice while a table is replaced. Pages of the table that no
/// mapping was ever entered in cost nothing.
pub const MAPPINGS_MAX: usize = 2 * 1024 * 64;

/// Memory tables in the process: two for each of 1024 ports, and as many again for rings that still hold an old one.
pub const TABLES_MAX: usize = 4 * 1024;

/// An entry that is being written.
const CLAIMED: u64 = u64::MAX;

/// One mapping. `ticket` is 0 while the entry is free, else the one of its table, which no other table ever has.
struct Mapping {
    ticket: AtomicU64,
    start: AtomicUsize,
    bytes: AtomicUsize,
    table: AtomicU32,
}

/// The mappings, filled from the front.
static MAPPINGS: [Mapping; MAPPINGS_MAX] = [const {
    Mapping {
        ticket: AtomicU64::new(0),
        start: AtomicUsize::new(0),
        bytes: AtomicUsize::new(0),
        table: AtomicU32::new(0),
    }
}; MAPPINGS_MAX];

/// How far [`MAPPINGS`] was ever filled.
static MAPPINGS_USED: AtomicUsize = AtomicUsize::new(0);

/// The memory tables: 0 while free, else `ticket << 1`, and bit 0 once a mapping of it was truncated.
static TABLES: [AtomicU64; TABLES_MAX] = [const { AtomicU64::new(0) }; TABLES_MAX];

/// The next table's ticket; 2^62 of them are enough.
static NEXT_TICKET: AtomicU64 = AtomicU64::new(1);

/// The mappings of one memory table, guarded until dropped. Drop it before they are unmapped.
#[derive(Debug)]
pub struct Guarded {
    table: usize,
    mappings: Box<[usize]>,
}

impl Guarded {
    /// Guards `mappings`, host addresses and lengths in bytes. Fails when a table of the process is full.
    pub fn new(mappings: impl Iterator<Item = (usize, usize)>) -> io::Result<Self> {
        // Relaxed: only the number has to be unique.
        let ticket = NEXT_TICKET.fetch_add(1, Ordering::Relaxed);
        let claim = |place: &AtomicU64, value| place.compare_exchange(0, value, Ordering::Acquire, Ordering::Relaxed);
        let table = TABLES.iter().position(|table| claim(table, ticket << 1).is_ok()).ok_or_else(full)?;
        let mut guarded = Self { table, mappings: Box::default() };
        let mut entered = Vec::new();
        let mut places = MAPPINGS.iter().enumerate();
        for (start, bytes) in mappings {
            let Some((index, mapping)) = places.find(|(_, mapping)| claim(&mapping.ticket, CLAIMED).is_ok()) else {
                guarded.mappings = entered.into();
                return Err(full());
            };
            mapping.start.store(start, Ordering::Relaxed);
            mapping.bytes.store(bytes, Ordering::Relaxed);
            mapping.table.store(table as u32, Ordering::Relaxed);
            // Release: pairs with the handler's acquire; who sees the ticket sees what was written before.
            mapping.ticket.store(ticket, Ordering::Release);
            MAPPINGS_USED.fetch_max(index + 1, Ordering::Release);
            entered.push(index);
        }
        guarded.mappings = entered.into();
        Ok(guarded)
    }

    /// Whether one of the mappings was found truncated. One relaxed load.
    #[inline]
    pub fn is_truncated(&self) -> bool {
        // Relaxed: the mark is set by a handler on the thread that asks, or by another thread whose port stops itself.
        TABLES[self.table].load(Ordering::Relaxed) & 1 != 0
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        for &index in &self.mappings {
            // Release: pairs with the acquire of the next claim, so that the next values are written after.
            MAPPINGS[index].ticket.store(0, Ordering::Release);
        }
        TABLES[self.table].store(0, Ordering::Release);
    }
}

fn full() -> io::Error {
    io::Error::other(format!("more than {MAPPINGS_MAX} memory regions or {TABLES_MAX} memory tables in this process"))
}

/// Installs the handler for the whole process; again and again does no harm. Before it is installed, and for faults
/// outside of guest memory, SIGBUS ends the process.
pub fn install() -> io::Result<()> {
    // SAFETY: `action` is a plain C structure for which zeros are a valid value; `handle` has the signature that
    // SA_SIGINFO demands and does only what is safe in a signal handler.
    let result = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handle as extern "C" fn(c_int, *mut siginfo_t, *mut c_void) as usize;
        // The standard library gives each thread an alternate stack.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&raw mut action.sa_mask);
        libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut())
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// See the module's text.
extern "C" fn handle(signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo_t to an SA_SIGINFO handler, with an address for BUS_ADRERR.
    let (code, address) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    // SAFETY: the C library's errno is this thread's own.
    let errno = unsafe { *libc::__errno_location() };
    if code == libc::BUS_ADRERR && contain(address) {
        // SAFETY: as above; the interrupted code must find it unchanged.
        unsafe { *libc::__errno_location() = errno };
        return;
    }
    // SAFETY: both are async-signal-safe. The signal is blocked in its handler: raised again it arrives with the default
    // action when this returns, whether it came from a fault or from kill(2).
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}

/// Replaces every guarded mapping that contains `address`; whether there is one.
fn contain(address: usize) -> bool {
    let mut contained = false;
    for mapping in &MAPPINGS[..MAPPINGS_USED.load(Ordering::Acquire)] {
        // Acquire: pairs with the release of `Guarded::new`.
        let ticket = mapping.ticket.load(Ordering::Acquire);
        let start = mapping.start.load(Ordering::Relaxed);
        let bytes = mapping.bytes.load(Ordering::Relaxed);
        let table = mapping.table.load(Ordering::Relaxed) as usize;
        // The loads above come before the second look at the ticket.
        fence(Ordering::Acquire);
        let changed = mapping.ticket.load(Ordering::Relaxed) != ticket;
        if ticket == 0 || ticket == CLAIMED || changed || address < start || address - start >= round_up(bytes) {
            continue;
        }
        // Two tables that share the mapping (one region was added) need one replacement, and a mark each.
        if !contained && !replace(start, round_up(bytes)) {
            return false;
        }
        contained = true;
        // Compared, not stored: should the other table be gone and its place taken, its ticket is another.
        let _ = TABLES[table].compare_exchange(ticket << 1, ticket << 1 | 1, Ordering::Relaxed, Ordering::Relaxed);
    }
    contained
}

/// Maps anonymous memory over a mapping. All of it: each page on its own would be a signal each, and pages of huge
/// files cannot be replaced one by one.
fn replace(start: usize, bytes: usize) -> bool {
    // NORESERVE: what is never touched costs nothing, whatever the region's size.
    let flags = libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: the range is a mapping of guest memory, which its `Memory` keeps mapped and which is accessed by address
    // only: other threads see either the old bytes or zeros. munmap(2) removes the replacement as it would the original.
    let mapped = unsafe { libc::mmap(start as *mut c_void, bytes, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
    mapped != libc::MAP_FAILED
}

/// A mapping ends with its last page. 4096 is the smallest page of all targets; sizes of huge pages are multiples
/// already (keeper/vet.rs).
const fn round_up(bytes: usize) -> usize {
    bytes.next_multiple_of(4096)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::num::NonZeroUsize;
    use std::os::unix::process::ExitStatusExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

    use super::*;

    const PAGE: usize = 4096;

    /// A mapping of `pages` pages of a file that ends after `whole` of them.
    fn truncated(pages: usize, whole: usize) -> (File, *mut u8) {
        let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len((pages * PAGE) as u64).unwrap();
        let bytes = NonZeroUsize::new(pages * PAGE).unwrap();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { mmap(None, bytes, access, MapFlags::MAP_SHARED, &file, 0) }.unwrap();
        file.set_len((whole * PAGE) as u64).unwrap();
        (file, start.as_ptr().cast())
    }

    #[test]
    fn an_access_behind_the_end_reads_zeros_and_marks_the_tables_that_have_it() {
        install().unwrap();
        let (_file, start) = truncated(4, 1);
        let (_other_file, other) = truncated(1, 1);
        let guard = |start: *mut u8, pages| Guarded::new([(start as usize, pages * PAGE)].into_iter()).unwrap();
        let (one, two, innocent) = (guard(start, 4), guard(start, 4), guard(other, 1));
        assert!(!one.is_truncated());
        // SAFETY: mapped above; the handler replaces what is behind the file's end.
        let byte = unsafe { start.add(2 * PAGE).read_volatile() };
        assert_eq!(byte, 0);
        assert!(one.is_truncated() && two.is_truncated() && !innocent.is_truncated());
        // SAFETY: as above; a store behind the end too.
        unsafe { start.add(3 * PAGE).write_volatile(7) };
        drop((one, two));
        let next = guard(other, 1);
        assert!(!next.is_truncated(), "the place of a table is new for the next");
        // SAFETY: mapped above, and not used any more.
        unsafe { munmap(std::ptr::NonNull::new(start).unwrap().cast(), 4 * PAGE) }.unwrap();
    }

    const CHILD: &str = "DREAMWIRE_SIGBUS_CHILD";

    /// Ends this process by SIGBUS, so it runs in a child of its own: see the test below.
    #[test]
    fn faults_outside_of_guest_memory() {
        if std::env::var_os(CHILD).is_none() {
            return;
        }
        install().unwrap();
        let (_file, start) = truncated(1, 0);
        // SAFETY: mapped; behind the end of its file, which is the point.
        unsafe { start.read_volatile() };
    }

    #[test]
    fn a_fault_elsewhere_ends_the_process_as_ever() {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap());
        child.args(["--exact", "sigbus::tests::faults_outside_of_guest_memory"]).env(CHILD, "1");
        let ended = child.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null()).status().unwrap();
        assert_eq!(ended.signal(), Some(libc::SIGBUS));
    }
}
