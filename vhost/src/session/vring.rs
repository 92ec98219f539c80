//! The protocol engine's view of one ring: passes every change on to the session.
//!
//! Wraps the engine's own `VringRwLock`, which translates and checks addresses and reads the used index. It never
//! gets a descriptor: the engine would start a ring only if it held a kick descriptor (a polled ring never), and would
//! keep more handles than are needed.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, RwLockReadGuard, RwLockWriteGuard};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use vhost_user_backend::{VringRwLock, VringState, VringStateGuard, VringStateMutGuard, VringT};
use virtio_queue::Error;

use super::ring_state::RingParts;
use super::{EngineMemory, Session};
use crate::eventfd::EventFd;

thread_local! {
    /// The session whose rings are being created on this thread, and how many there are already: the engine passes
    /// `VringT::new` neither, and creates rings in the order of their index (vhost-user-backend 0.24, handler.rs:128).
    static ADOPTING: RefCell<Option<(Arc<Session>, u16)>> = const { RefCell::new(None) };
}

/// Runs `create`, in which the engine creates its rings; they become `session`'s.
pub(crate) fn adopt_rings<T>(session: &Arc<Session>, create: impl FnOnce() -> T) -> T {
    ADOPTING.set(Some((Arc::clone(session), 0)));
    let created = create();
    ADOPTING.set(None);
    created
}

/// One ring of a session.
#[derive(Clone)]
pub(crate) struct SessionVring {
    engine: VringRwLock<EngineMemory>,
    session: Arc<Session>,
    queue: u16,
}

impl SessionVring {
    /// A descriptor of the front-end's. The keeper has checked what it is; here it gets the close-on-exec flag that
    /// the engine's recvmsg does not ask for.
    fn event(&self, file: Option<File>) -> Option<EventFd> {
        let descriptor = OwnedFd::from(file?);
        let event = fcntl(&descriptor, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .map_err(io::Error::from)
            .and_then(|_| EventFd::from_front_end(descriptor));
        event.inspect_err(|error| self.session.reports.warn(format!("ring {}: {error}", self.queue))).ok()
    }
}

impl<'a> VringStateGuard<'a, EngineMemory> for SessionVring {
    type G = RwLockReadGuard<'a, VringState<EngineMemory>>;
}

impl<'a> VringStateMutGuard<'a, EngineMemory> for SessionVring {
    type G = RwLockWriteGuard<'a, VringState<EngineMemory>>;
}

impl VringT<EngineMemory> for SessionVring {
    fn new(memory: EngineMemory, max_queue_size: u16) -> Result<Self, Error> {
        let engine = VringRwLock::new(memory, max_queue_size)?;
        ADOPTING.with_borrow_mut(|adopting| {
            let (session, count) = adopting.as_mut().expect("the engine creates rings inside adopt_rings() only");
            let queue = *count;
            *count += 1;
            Ok(Self { engine, session: Arc::clone(session), queue })
        })
    }

    fn get_ref(&self) -> RwLockReadGuard<'_, VringState<EngineMemory>> {
        self.engine.get_ref()
    }

    fn get_mut(&self) -> RwLockWriteGuard<'_, VringState<EngineMemory>> {
        self.engine.get_mut()
    }

    fn set_enabled(&self, enabled: bool) {
        self.engine.set_enabled(enabled);
        if self.session.state().rings[usize::from(self.queue)].enabled != enabled {
            self.session.alter(self.queue, |ring| ring.enabled = enabled);
        }
    }

    fn set_queue_info(&self, descriptors: u64, available: u64, used: u64) -> Result<(), Error> {
        self.engine.set_queue_info(descriptors, available, used)?;
        // The ring is not complete again before the engine has read the used index at its new place.
        self.session.alter(self.queue, |ring| {
            ring.parts = Some(RingParts { descriptors, available, used });
            ring.next_used = None;
        });
        Ok(())
    }

    fn queue_next_avail(&self) -> u16 {
        self.session.state().rings[usize::from(self.queue)].next_avail
    }

    fn set_queue_next_avail(&self, base: u16) {
        self.session.alter(self.queue, |ring| {
            ring.set_base(base);
            ring.forgive();
        });
    }

    fn set_queue_next_used(&self, index: u16) {
        self.session.alter(self.queue, |ring| ring.next_used = Some(index));
    }

    fn queue_used_idx(&self) -> Result<u16, Error> {
        self.engine.queue_used_idx()
    }

    fn set_queue_size(&self, size: u16) {
        self.engine.set_queue_size(size);
        self.session.alter(self.queue, |ring| ring.size = Some(size));
    }

    fn set_queue_event_idx(&self, enabled: bool) {
        // For the owner this is a feature bit like any other.
        self.engine.set_queue_event_idx(enabled);
    }

    fn set_queue_ready(&self, ready: bool) {
        // Only ever false, at the start of GET_VRING_BASE: ready rings need a kick descriptor, and get none.
        if !ready {
            self.session.state().rings[usize::from(self.queue)].begin_stop();
        }
    }

    fn set_kick(&self, file: Option<File>) {
        let kick = self.event(file);
        if kick.is_none() && self.session.state().rings[usize::from(self.queue)].end_stop() {
            return;
        }
        self.session.alter(self.queue, |ring| ring.start(kick));
    }

    fn set_call(&self, file: Option<File>) {
        let call = self.event(file);
        self.session.alter(self.queue, |ring| ring.call = call);
    }

    fn set_err(&self, file: Option<File>) {
        let error = self.event(file);
        self.session.alter(self.queue, |ring| ring.error = error);
    }

    // The rest is for back-ends whose rings the engine serves.

    fn add_used(&self, head: u16, bytes: u32) -> Result<(), Error> {
        self.engine.add_used(head, bytes)
    }

    fn signal_used_queue(&self) -> io::Result<()> {
        self.engine.signal_used_queue()
    }

    fn enable_notification(&self) -> Result<bool, Error> {
        self.engine.enable_notification()
    }

    fn disable_notification(&self) -> Result<(), Error> {
        self.engine.disable_notification()
    }

    fn needs_notification(&self) -> Result<bool, Error> {
        self.engine.needs_notification()
    }

    fn read_kick(&self) -> io::Result<bool> {
        self.engine.read_kick()
    }
}
