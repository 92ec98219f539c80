//! The eventfds of a ring: we ring kick, the back-end rings call and err.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::error::FrontEndError;

/// Kick, call and error descriptors of one ring. A clone shares them, and counts its own kicks.
#[derive(Clone, Debug)]
pub struct Doorbell {
    kick: Arc<EventFd>,
    call: Arc<EventFd>,
    error: Arc<EventFd>,
    kicks: u64,
}

impl Doorbell {
    pub(super) fn new() -> Result<Self, FrontEndError> {
        let eventfd = || {
            EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)
                .map(Arc::new)
                .map_err(FrontEndError::system("creating an eventfd"))
        };
        Ok(Self { kick: eventfd()?, call: eventfd()?, error: eventfd()?, kicks: 0 })
    }

    /// Tells the back-end to look.
    pub fn kick(&mut self) {
        self.kicks += 1;
        // A full counter (EAGAIN) is a back-end that has been told often enough.
        let _ = self.kick.write(1);
    }

    /// Kicks so far.
    pub fn kicks(&self) -> u64 {
        self.kicks
    }

    /// Calls since the last time this was asked.
    pub fn calls(&self) -> u64 {
        self.call.read().unwrap_or(0)
    }

    /// Whether the back-end has reported the ring as broken since the last time this was asked.
    pub fn broken(&self) -> bool {
        self.error.read().is_ok()
    }

    /// Sleeps until the back-end calls; false after `timeout`. Leaves the call to be counted by [`Self::calls`].
    ///
    /// # Errors
    /// What poll(2) says.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let mut fds = [PollFd::new(self.call_fd(), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        Ok(poll(&mut fds, timeout)? > 0)
    }

    /// What SET_VRING_KICK carries.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// What SET_VRING_CALL carries.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// What SET_VRING_ERR carries.
    pub fn error_fd(&self) -> BorrowedFd<'_> {
        self.error.as_fd()
    }
}
