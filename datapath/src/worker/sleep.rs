//! How a worker sleeps: epoll over kicks, underlays and the mailbox.
//!
//! Edge-triggered, so that waking up costs no read of the descriptor: an edge that comes between the last look at a ring
//! and `epoll_wait` is kept by the kernel, and a turn looks at everything anyway.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use dreamwire_vhost::eventfd::EventFd;
use dreamwire_vhost::ring::Ring;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use crate::snapshot::PortId;

/// Events taken from one `epoll_wait`. The rest stays ready.
const EVENTS: usize = 64;

/// Epoll data for what needs no attention beyond a turn.
const NO_RING: u64 = u64::MAX;

#[derive(Debug)]
pub(super) struct Sleeper {
    epoll: Epoll,
}

impl Sleeper {
    pub(super) fn new(wake: &EventFd) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let sleeper = Self { epoll };
        sleeper.watch(wake.as_fd(), NO_RING)?;
        Ok(sleeper)
    }

    fn watch(&self, descriptor: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        Ok(self.epoll.add(descriptor, EpollEvent::new(flags, token))?)
    }

    /// Other workers wake this one.
    pub(super) fn watch_inbox(&mut self, wake: &EventFd) -> io::Result<()> {
        self.watch(wake.as_fd(), NO_RING)
    }

    /// A guest transmitq's kicks wake the worker. Receiveqs are looked at when there is something to send.
    pub(super) fn watch_ring(&mut self, port: PortId, queue: u16, ring: &Ring) {
        if queue % 2 == 1
            && let Some(kick) = ring.kick()
            && let Err(error) = self.watch(kick.as_fd(), u64::from(port.0) << 16 | u64::from(queue))
        {
            tracing::warn!(port = port.0, queue, %error, "cannot wait for this ring's kicks");
        }
    }

    /// As above, for the ring that an underlay receives from.
    pub(super) fn watch_wire(&mut self, queue: u16, ring: &Ring) {
        if queue % 2 == 1
            && let Some(kick) = ring.kick()
        {
            self.watch_underlay(kick.as_fd());
        }
    }

    pub(super) fn forget_ring(&mut self, queue: u16, ring: &Ring) {
        if queue % 2 == 1
            && let Some(kick) = ring.kick()
        {
            // Fails only if adding it did.
            let _ = self.epoll.delete(kick.as_fd());
        }
    }

    /// The kernel forgets it when it is closed.
    pub(super) fn watch_underlay(&mut self, descriptor: BorrowedFd<'_>) {
        if let Err(error) = self.watch(descriptor, NO_RING) {
            tracing::warn!(%error, "cannot wait for the underlay");
        }
    }

    /// Sleeps until something happens or `timeout_ms` have passed; tells `kicked` of rings that were kicked.
    pub(super) fn sleep(&mut self, timeout_ms: u16, mut kicked: impl FnMut(PortId, u16)) {
        let mut events = [EpollEvent::empty(); EVENTS];
        // An interrupted wait is a wake-up like any other.
        let count = self.epoll.wait(&mut events, EpollTimeout::from(timeout_ms)).unwrap_or(0);
        for event in &events[..count] {
            if event.data() != NO_RING {
                kicked(PortId((event.data() >> 16) as u16), event.data() as u16);
            }
        }
    }
}
