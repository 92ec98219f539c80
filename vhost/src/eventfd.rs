//! An eventfd received from a front-end: checked for what it is, non-blocking, never blocks a worker.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl, readlink};

/// A kick, call or error descriptor that was proved to be an eventfd when it was received.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Takes a descriptor from a front-end. Fails if it is not an eventfd: a pipe or a socket in its place
    /// could block the writer (FACTS: descriptors of the wrong kind). Sets `O_NONBLOCK`, which the kernel
    /// keeps per open file: the front-end's copy becomes non-blocking with it, as QEMU's is already.
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
        Ok(Self(descriptor))
    }

    /// A new eventfd of our own, counter 0, non-blocking, close-on-exec.
    pub fn new() -> io::Result<Self> {
        use nix::sys::eventfd::{EfdFlags, EventFd as NixEventFd};
        let event = NixEventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?;
        Ok(Self(event.as_fd().try_clone_to_owned()?))
    }

    /// Another handle of the same eventfd.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self(self.0.try_clone()?))
    }

    /// Adds one to the counter. A counter at its maximum means that the reader has a wake-up pending already, so
    /// `EAGAIN` is success. Other errors are for the port's counters, never for a panic.
    pub fn signal(&self) -> io::Result<()> {
        match nix::unistd::write(&self.0, &1u64.to_ne_bytes()) {
            Ok(_) | Err(Errno::EAGAIN) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads the counter to zero; returns whether it was above zero.
    pub fn drain(&self) -> bool {
        let mut counter = [0u8; 8];
        matches!(nix::unistd::read(&self.0, &mut counter), Ok(8))
    }
}

impl AsFd for EventFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
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
    fn a_full_counter_neither_blocks_nor_fails() {
        let event = EventFd::new().unwrap();
        nix::unistd::write(event.as_fd(), &(u64::MAX - 1).to_ne_bytes()).unwrap();
        event.signal().unwrap();
        assert!(event.drain());
        assert!(!event.drain());
    }
}
