//! An eventfd of ours or a front-end's: checked for what it is, never blocks a worker.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, readlink};

use crate::interrupt;

/// An eventfd: one of our own, or a kick, call or error descriptor that was proved to be one when it was received.
#[derive(Debug)]
pub struct EventFd {
    descriptor: OwnedFd,
    /// Somebody else has it too, and can make it blocking at any time.
    shared: bool,
}

impl EventFd {
    /// Takes a descriptor from a front-end. Fails if it is not an eventfd: a pipe or a socket in its place
    /// could block the writer. Sets `O_NONBLOCK`, which the kernel
    /// keeps per open file: the front-end's copy becomes non-blocking with it, as QEMU's is already. The front-end may
    /// clear it again, so nothing here relies on it.
    pub fn from_front_end(descriptor: OwnedFd) -> io::Result<Self> {
        let link = readlink(format!("/proc/self/fd/{}", descriptor.as_raw_fd()).as_str())?;
        if link.as_encoded_bytes() != b"anon_inode:[eventfd]" {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("expected an eventfd, got {}", link.to_string_lossy()),
            ));
        }
        let flags = OFlag::from_bits_retain(fcntl(&descriptor, FcntlArg::F_GETFL)?);
        fcntl(&descriptor, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self { descriptor, shared: true })
    }

    /// A new eventfd of our own, counter 0, non-blocking, close-on-exec.
    pub fn new() -> io::Result<Self> {
        use nix::sys::eventfd::{EfdFlags, EventFd as NixEventFd};
        let event = NixEventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self { descriptor: event.as_fd().try_clone_to_owned()?, shared: false })
    }

    /// Another handle of the same eventfd.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self { descriptor: self.descriptor.try_clone()?, shared: self.shared })
    }

    /// Adds one to the counter. A counter at its maximum means that the reader has a wake-up pending already, so
    /// `EAGAIN` is success. Other errors are for the port's counters, never for a panic. Never waits.
    pub fn signal(&self) -> io::Result<()> {
        if self.shared {
            return interrupt::signal(self.as_fd());
        }
        match nix::unistd::write(&self.descriptor, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads the counter to zero; returns whether it was above zero. For eventfds of our own: a shared one could block.
    pub fn drain(&self) -> bool {
        let mut counter = [0u8; 8];
        matches!(nix::unistd::read(&self.descriptor, &mut counter), Ok(8))
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pipe_is_refused_by_name() {
        let (read_end, _write_end) = nix::unistd::pipe().unwrap();
        let error = EventFd::from_front_end(read_end).unwrap_err().to_string();
        assert!(error.contains("expected an eventfd, got pipe:"), "{error}");
    }

    #[test]
    fn a_front_end_that_makes_its_eventfd_blocking_again_blocks_nobody() {
        use nix::sys::eventfd::{EfdFlags, EventFd as NixEventFd};
        let theirs = NixEventFd::from_flags(EfdFlags::EFD_CLOEXEC).unwrap();
        let ours = EventFd::from_front_end(theirs.as_fd().try_clone_to_owned().unwrap()).unwrap();
        theirs.write(u64::MAX - 1).unwrap();
        fcntl(&theirs, FcntlArg::F_SETFL(OFlag::O_RDWR)).unwrap();
        ours.signal().unwrap();
        ours.try_clone().unwrap().signal().unwrap();
    }

    #[test]
    fn a_full_counter_neither_blocks_nor_fails() {
        let event = EventFd::new().unwrap();
        nix::unistd::write(event.as_fd(), &(u64::MAX - 1).to_ne_bytes()).unwrap();
        event.signal().unwrap();
        assert!(event.drain());
        assert!(!event.drain());
    }
}
