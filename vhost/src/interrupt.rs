//! Signals an eventfd that somebody else may have made blocking, without ever blocking.
//!
//! Theory of operation. `O_NONBLOCK` belongs to the open file, which a front-end shares with us: it can clear the flag
//! after we have set it, fill the counter, and let a write(2) of ours wait for ever. pwritev2's `RWF_NOWAIT` is refused
//! for eventfds, poll before write leaves a moment in between, and a new open file cannot be had. What cannot wait is
//! the kernel's own way of signalling: an asynchronous read whose completion is announced on an eventfd
//! (`IOCB_FLAG_RESFD`, io_submit(2)) adds one to the counter, or leaves it at its maximum. So each thread has a context
//! for asynchronous reads and submits one of zero bytes from an empty file of ours, which completes at once. That is
//! one system call as write(2) is, dearer by half a microsecond, once per burst and only where the guest asked for it.
//! The completions are thrown away 64 at a time. Measured on a shared machine (EPYC, virtual): write 0.29 µs, poll and
//! write 0.62 µs, this 0.82 µs; `cargo test --release -p dreamwire-vhost --lib -- --ignored --nocapture what_a_signal_costs`.
//!
//! Where the kernel has no contexts to give (`fs.aio-max-nr`, or a sandbox without io_setup), a write after a poll takes
//! its place: then the moment between the two remains, and with it a front-end that can hold the thread up.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::OnceLock;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};

/// Completions that the kernel keeps at least.
const EVENTS: usize = 128;
/// Signals after which they are thrown away.
const SIGNALS_BETWEEN_REAPS: usize = EVENTS / 2;

/// `IOCB_CMD_PREAD` and `IOCB_FLAG_RESFD` of linux/aio_abi.h.
const COMMAND_PREAD: u16 = 0;
const FLAG_RESFD: u32 = 1;

/// `struct iocb` of linux/aio_abi.h (its `key` and `rw_flags` change places with the byte order; both are zero).
#[repr(C)]
#[derive(Default)]
struct ControlBlock {
    data: u64,
    key_and_flags: [u32; 2],
    command: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}
const _: () = assert!(size_of::<ControlBlock>() == 64);

/// `struct io_event` of linux/aio_abi.h.
#[repr(C)]
#[derive(Default, Clone, Copy)]
struct Event([u64; 4]);

/// One thread's context.
struct Context {
    id: libc::c_ulong,
    file: BorrowedFd<'static>,
    /// Completions not thrown away yet.
    pending: usize,
}

thread_local! {
    /// Made when the thread signals for the first time; `None` inside: the kernel has none to give.
    static CONTEXT: RefCell<Option<Option<Context>>> = const { RefCell::new(None) };
}

/// Adds one to the counter of `eventfd`, or leaves it at its maximum. Never waits (but see the module's text).
#[inline]
pub(crate) fn signal(eventfd: BorrowedFd<'_>) -> io::Result<()> {
    let submitted = CONTEXT.try_with(|context| {
        let mut context = context.borrow_mut();
        context.get_or_insert_with(|| Context::new().ok()).as_mut().map(|context| context.signal(eventfd))
    });
    // A thread that is ending has no context any more.
    submitted.ok().flatten().unwrap_or_else(|| poll_and_write(eventfd))
}

/// A file without bytes to read from: the same for all threads, never closed.
fn empty_file() -> io::Result<BorrowedFd<'static>> {
    static EMPTY: OnceLock<OwnedFd> = OnceLock::new();
    if let Some(file) = EMPTY.get() {
        return Ok(file.as_fd());
    }
    let file = memfd_create("dreamwire-nothing", MFdFlags::MFD_CLOEXEC)?;
    Ok(EMPTY.get_or_init(|| file).as_fd())
}

impl Context {
    fn new() -> io::Result<Self> {
        let file = empty_file()?;
        let mut id: libc::c_ulong = 0;
        // SAFETY: io_setup(2) writes the new context's id where the pointer says, which is a live variable.
        let result = unsafe { libc::syscall(libc::SYS_io_setup, EVENTS, &raw mut id) };
        if result == 0 { Ok(Self { id, file, pending: 0 }) } else { Err(io::Error::last_os_error()) }
    }

    fn signal(&mut self, eventfd: BorrowedFd<'_>) -> io::Result<()> {
        if self.pending >= SIGNALS_BETWEEN_REAPS {
            self.reap();
        }
        let mut block = ControlBlock {
            command: COMMAND_PREAD,
            file: self.file.as_raw_fd() as u32,
            flags: FLAG_RESFD,
            eventfd: eventfd.as_raw_fd() as u32,
            ..ControlBlock::default()
        };
        let mut blocks = [&raw mut block];
        // SAFETY: io_submit(2) reads one pointer and the block that it points to, both alive; the read is of no bytes,
        // so that its buffer is never touched, and complete when the call returns.
        let result = unsafe { libc::syscall(libc::SYS_io_submit, self.id, 1usize, blocks.as_mut_ptr()) };
        if result != 1 {
            return Err(io::Error::last_os_error());
        }
        self.pending += 1;
        Ok(())
    }

    fn reap(&mut self) {
        let mut events = [Event::default(); EVENTS];
        let none = ptr::null::<libc::timespec>();
        // SAFETY: io_getevents(2) writes at most `EVENTS` events where the pointer says; with a minimum of 0 it does
        // not wait.
        let count =
            unsafe { libc::syscall(libc::SYS_io_getevents, self.id, 0usize, EVENTS, events.as_mut_ptr(), none) };
        self.pending -= usize::try_from(count).unwrap_or(0).min(self.pending);
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: the context is this thread's own and has nothing under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.id) };
    }
}

/// The way without asynchronous reads.
#[cold]
fn poll_and_write(eventfd: BorrowedFd<'_>) -> io::Result<()> {
    let mut polled = [PollFd::new(eventfd, PollFlags::POLLOUT)];
    let ready = poll(&mut polled, PollTimeout::ZERO)?;
    if ready == 0 || !polled[0].revents().is_some_and(|events| events.contains(PollFlags::POLLOUT)) {
        // At its maximum: the reader has a wake-up pending.
        return Ok(());
    }
    match nix::unistd::write(eventfd, &1u64.to_ne_bytes()) {
        Ok(_) | Err(Errno::EAGAIN) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use nix::sys::eventfd::{EfdFlags, EventFd};

    use super::*;

    fn blocking(counter: u64) -> EventFd {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
        event.write(counter).unwrap();
        event
    }

    #[test]
    fn each_signal_adds_one_and_completions_never_run_out() {
        let event = blocking(1);
        for _ in 0..10_000 {
            signal(event.as_fd()).unwrap();
        }
        assert_eq!(event.read().unwrap(), 10_001);
    }

    #[test]
    fn a_full_counter_of_a_blocking_eventfd_does_not_block() {
        let event = blocking(u64::MAX - 1);
        let began = Instant::now();
        for _ in 0..100 {
            signal(event.as_fd()).unwrap();
            poll_and_write(event.as_fd()).unwrap();
        }
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }

    #[test]
    fn what_is_no_eventfd_is_an_error() {
        let file = memfd_create("file", MFdFlags::MFD_CLOEXEC).unwrap();
        assert!(signal(file.as_fd()).is_err());
    }

    /// A system has room for about 170 (fs.aio-max-nr): a thread's goes with it.
    #[test]
    fn threads_give_their_contexts_back() {
        let event = blocking(1);
        for _ in 0..200 {
            std::thread::scope(|scope| scope.spawn(|| signal(event.as_fd()).unwrap()).join().unwrap());
        }
        assert_eq!(event.read().unwrap(), 201);
    }

    /// The figures of docs/security.md: DREAMWIRE_MEASURE=200000 cargo test --release -p dreamwire-vhost what_a -- --nocapture
    #[test]
    fn what_a_signal_costs() {
        let steps = std::env::var("DREAMWIRE_MEASURE").ok().and_then(|steps| steps.parse().ok()).unwrap_or(100);
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).unwrap();
        let ns = |step: &dyn Fn()| {
            let began = Instant::now();
            (0..steps).for_each(|_| step());
            began.elapsed().as_nanos() / steps
        };
        for _ in 0..5 {
            let write = ns(&|| assert!(event.write(1).is_ok()));
            let polled = ns(&|| poll_and_write(event.as_fd()).unwrap());
            let submitted = ns(&|| signal(event.as_fd()).unwrap());
            println!("write {write} ns, poll and write {polled} ns, io_submit {submitted} ns");
        }
    }
}
