//! One ring as the front-end has described it so far.

use std::io;
use std::sync::Arc;

use crate::dirty_log::{DirtyLog, RingLog};
use crate::eventfd::EventFd;
use crate::inflight::InflightPart;
use crate::memory::Memory;
use crate::ring::{RingFault, RingSetup, is_packed};

/// Guest-physical addresses of a ring's parts.
#[derive(Debug, Clone, Copy)]
pub(super) struct RingParts {
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
}

/// Everything said about one ring; complete once [`RingState::setup`] gives a set-up.
#[derive(Debug, Default)]
pub(super) struct RingState {
    /// The owner has it.
    pub(super) attached: bool,
    pub(super) size: Option<u16>,
    pub(super) parts: Option<RingParts>,
    /// A packed ring's has its wrap counter in bit 15.
    pub(super) next_avail: u16,
    /// Read from the used ring by the engine after it has set the addresses; until then they cannot be served. In a
    /// packed ring it has no meaning: there it only says that the addresses are set.
    pub(super) next_used: Option<u16>,
    /// The indices are what the owner has reached, not what the front-end said.
    reached: bool,
    pub(super) enabled: bool,
    /// VHOST_VRING_F_LOG's address.
    pub(super) used_log: Option<u64>,
    /// Between SET_VRING_KICK and GET_VRING_BASE ("Ring states").
    started: bool,
    /// The engine is in the middle of GET_VRING_BASE: the kick descriptor it takes away next is no call to poll.
    stopping: bool,
    kick: Option<EventFd>,
    pub(super) call: Option<EventFd>,
    pub(super) error: Option<EventFd>,
    /// How the guest broke it. Outlives whatever the front-end changes about the ring while it runs; only what a driver's
    /// reset brings about clears it: see [`RingState::forgive`].
    fault: Option<RingFault>,
}

impl RingState {
    /// SET_VRING_KICK: starts the ring; without a descriptor the owner polls.
    pub(super) fn start(&mut self, kick: Option<EventFd>) {
        self.started = true;
        self.stopping = false;
        self.kick = kick;
    }

    /// The engine begins to stop the ring.
    pub(super) fn begin_stop(&mut self) {
        self.stopping = true;
    }

    /// True once after [`RingState::begin_stop`].
    pub(super) fn end_stop(&mut self) -> bool {
        std::mem::take(&mut self.stopping)
    }

    /// GET_VRING_BASE: the ring is not served until it is started anew. The index stays, to be read.
    pub(super) fn stop(&mut self) {
        self.started = false;
        self.kick = None;
        self.forgive();
    }

    /// The ring starts afresh: it was stopped, the device was reset, or its index was set anew.
    pub(super) fn forgive(&mut self) {
        self.fault = None;
    }

    /// RESET_DEVICE: as new, but for the descriptors that QEMU sets once at start.
    pub(super) fn reset(&mut self) {
        let (call, error) = (self.call.take(), self.error.take());
        *self = Self { call, error, ..Self::default() };
    }

    /// The owner has given the ring back with these indices, and broken if it was.
    pub(super) fn ring_reached(&mut self, next_avail: u16, next_used: u16, fault: Option<RingFault>) {
        self.next_avail = next_avail;
        self.next_used = Some(next_used);
        self.reached = true;
        self.fault = fault;
    }

    /// SET_VRING_BASE.
    pub(super) fn set_base(&mut self, base: u16) {
        self.next_avail = base;
        self.reached = false;
    }

    /// Whether the indices are known, or just the front-end's word.
    pub(super) fn is_reached(&self) -> bool {
        self.reached
    }

    /// The set-up of a complete ring, with handles of its own of all descriptors.
    pub(super) fn setup(
        &self,
        memory: &Arc<Memory>,
        features: u64,
        log: Option<&Arc<DirtyLog>>,
        inflight: Option<InflightPart>,
    ) -> io::Result<Option<RingSetup>> {
        let (true, Some(size), Some(parts), Some(next_used)) = (self.started, self.size, self.parts, self.next_used)
        else {
            return Ok(None);
        };
        let handle = |event: &Option<EventFd>| event.as_ref().map(EventFd::try_clone).transpose();
        Ok(Some(RingSetup {
            memory: Arc::clone(memory),
            size,
            descriptors: parts.descriptors,
            available: parts.available,
            used: parts.used,
            next_avail: self.next_avail,
            next_used: if is_packed(features) { self.next_avail } else { next_used },
            features,
            enabled: self.enabled,
            kick: handle(&self.kick)?,
            call: handle(&self.call)?,
            error: handle(&self.error)?,
            log: log.map(|log| RingLog { log: Arc::clone(log), used_address: self.used_log }),
            inflight,
            fault: self.fault,
        }))
    }

    /// Tells the front-end that the ring is not served.
    pub(super) fn signal_error(&self) {
        if let Some(event) = &self.error {
            // If that fails there is nobody else to tell; the owner gets a warning in any case.
            let _ = event.signal();
        }
    }
}
