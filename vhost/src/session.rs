//! One front-end's session as the datapath sees it: gathers ring state and hands whole rings to their owner.
//!
//! Theory of operation. The protocol engine (`vhost-user-backend`) calls us for every change, message by message, on
//! its one thread. A ring is *complete* when it has memory, size, addresses, its used index and a start
//! (SET_VRING_KICK, with or without a descriptor). Complete rings are built and attached; between attach and detach
//! the owner alone touches them. Whatever changes about an attached ring is done in three steps: detach, which returns
//! once the owner has let go; alter; attach again, with the indices that the ring has reached. So a worker never sees
//! a half-changed ring, and an answer to the front-end (of GET_VRING_BASE, of a new memory table) means that no
//! worker is inside any more. Old mappings live as long as a ring holds them. Where a ring goes on is known once it was
//! attached; before that it is the front-end's word, which a packed ring is asked to confirm ([`Ring::resume`]).
//!
//! Engine and keeper run at different times on one session: the engine's thread while it has a message to judge, the
//! keeper when it has none (`Session::set_logging`), and after that thread has ended (`Session::close`). The mutex is for
//! the compiler; it is never held across a call to the owner. A panic in the owner is caught, reported, and ends the session's service, never the thread: the engine
//! would poison its own lock and hang the front-end.
//!
//! Limits: two rings per queue pair, `RING_SIZE_MAX` entries per ring.

mod ring_state;
mod vring;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::VhostUserBackend;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::epoll::EventSet;

use self::ring_state::RingState;
use crate::dirty_log::DirtyLog;
use crate::inflight::{Inflight, InflightPart};
use crate::keeper::{RING_SIZE_MAX, Reports, VHOST_USER_F_PROTOCOL_FEATURES};
use crate::memory::Memory;
use crate::owner::RingOwner;
use crate::ring::{Ring, is_packed};

pub(crate) use self::vring::{SessionVring, adopt_rings};

/// Guest memory as the protocol engine holds it. No bitmap: the dirty log is the keeper's.
pub(crate) type EngineMemory = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// One session: the protocol engine's back-end on one side, the ring owner on the other.
pub(crate) struct Session {
    offered: u64,
    owner: Arc<dyn RingOwner>,
    reports: Arc<Reports>,
    state: Mutex<State>,
}

/// What a session's rings do about the dirty log, which is the keeper's.
#[derive(Debug, Default)]
pub(crate) enum Logging {
    /// Nothing.
    #[default]
    Off,
    /// They stand still until it is there: a front-end that starts a device in the middle of a migration starts its
    /// rings first and sends the log afterwards (QEMU, `vhost_dev_start`). What they wrote meanwhile would be lost.
    Awaited,
    /// They note every write.
    On(Arc<DirtyLog>),
}

/// What is known between two messages.
struct State {
    memory: Option<Arc<Memory>>,
    logging: Logging,
    /// Where the rings note what they have taken; the keeper has vetted it.
    inflight: Option<Arc<Inflight>>,
    /// Acked virtio bits.
    features: u64,
    rings: Vec<RingState>,
    /// The owner has panicked: nothing is attached any more.
    broken: bool,
}

impl Session {
    /// A session with `ring_count` rings that offers virtio bits `offered` to its front-end.
    pub(crate) fn new(ring_count: usize, offered: u64, owner: Arc<dyn RingOwner>, reports: Arc<Reports>) -> Arc<Self> {
        let rings = std::iter::repeat_with(RingState::default).take(ring_count).collect();
        let state = State { memory: None, logging: Logging::Off, inflight: None, features: 0, rings, broken: false };
        let offered = offered | VHOST_USER_F_PROTOCOL_FEATURES;
        Arc::new(Self { offered, owner, reports, state: Mutex::new(state) })
    }

    /// Ends the session: takes all rings back and forgets memory and descriptors.
    pub(crate) fn close(&self) {
        // The indices that come back are of no use: a front-end that returns restores them itself.
        self.queues().for_each(|queue| self.take_back(queue));
        let mut state = self.state();
        state.memory = None;
        state.logging = Logging::Off;
        state.inflight = None;
        state.rings.iter_mut().for_each(|ring| *ring = RingState::default());
    }

    /// Changes whether the rings log, and where to. When this returns no ring writes unlogged, or to another log.
    pub(crate) fn set_logging(&self, logging: Logging) {
        self.alter_all(|state| state.logging = logging);
    }

    /// Changes where, and whether, ring `queue` logs its writes to the used ring while it logs at all.
    pub(crate) fn set_used_log(&self, queue: u16, address: Option<u64>) {
        self.alter(queue, |ring| ring.used_log = address);
    }

    /// Changes where the rings note what they have taken. Those that are served already have nothing of it to resume.
    pub(crate) fn set_inflight(&self, region: Arc<Inflight>) {
        self.alter_all(|state| state.inflight = Some(region));
    }

    /// The driver has reset its device (VIRTIO 1.2 §2.4): broken rings are served again once they are sound.
    pub(crate) fn driver_reset(&self) {
        self.alter_all(|state| state.rings.iter_mut().for_each(RingState::forgive));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queues(&self) -> std::ops::Range<u16> {
        0..self.state().rings.len() as u16
    }

    /// Changes ring `queue` while nobody serves it.
    fn alter(&self, queue: u16, change: impl FnOnce(&mut RingState)) {
        self.take_back(queue);
        change(&mut self.state().rings[usize::from(queue)]);
        self.attach_if_complete(queue);
    }

    /// Changes what all rings share while nobody serves any of them.
    fn alter_all(&self, change: impl FnOnce(&mut State)) {
        self.queues().for_each(|queue| self.take_back(queue));
        change(&mut self.state());
        self.queues().for_each(|queue| self.attach_if_complete(queue));
    }

    /// Waits until the owner has let go of ring `queue`, and notes the indices it has reached.
    fn take_back(&self, queue: u16) {
        let attached = std::mem::take(&mut self.state().rings[usize::from(queue)].attached);
        if !attached {
            return;
        }
        let ring = self.contained("detach", || self.owner.detach(queue)).flatten();
        let state = &mut self.state().rings[usize::from(queue)];
        match ring {
            Some(ring) => state.ring_reached(ring.next_avail(), ring.next_used(), ring.fault()),
            // Without the ring its indices are unknown; only the front-end can start it anew.
            None => state.stop(),
        }
    }

    fn attach_if_complete(&self, queue: u16) {
        let (setup, reached, uncovered) = {
            let state = &*self.state();
            let log = match &state.logging {
                Logging::Off => None,
                Logging::Awaited => return,
                Logging::On(log) => Some(log),
            };
            let ring = &state.rings[usize::from(queue)];
            match &state.memory {
                Some(memory) if !state.broken => {
                    let part = state.inflight_part(queue);
                    let uncovered = state.inflight.is_some() && part.is_none();
                    (ring.setup(memory, state.features, log, part), ring.is_reached(), uncovered)
                }
                _ => return,
            }
        };
        if uncovered && matches!(setup, Ok(Some(_))) {
            self.reports.warn(format!("ring {queue} has no place in the in-flight region; it is served without"));
        }
        let build = if reached { Ring::new } else { Ring::resume };
        let built = match setup {
            Ok(None) => return,
            Ok(Some(setup)) => self.contained("ring set-up", || build(setup).map_err(|error| error.to_string())),
            Err(error) => Some(Err(format!("its event descriptors cannot be duplicated: {error}"))),
        };
        match built {
            Some(Ok(ring)) => {
                self.state().rings[usize::from(queue)].attached = true;
                self.contained("attach", || self.owner.attach(queue, ring));
            }
            Some(Err(reason)) => {
                self.state().rings[usize::from(queue)].signal_error();
                self.reports.warn(format!("ring {queue} is not served: {reason}"));
            }
            None => {}
        }
    }

    /// Calls out; a panic out there is logged and ends this session's service.
    fn contained<T>(&self, what: &str, call: impl FnOnce() -> T) -> Option<T> {
        let outcome = catch_unwind(AssertUnwindSafe(call));
        if outcome.is_err() {
            self.state().broken = true;
            tracing::error!(what, "a panic in the ring owner was contained; the session serves no rings from here on");
        }
        outcome.ok()
    }
}

impl State {
    /// Ring `queue`'s part of the in-flight region, if there is one that fits.
    fn inflight_part(&self, queue: u16) -> Option<InflightPart> {
        let size = self.rings[usize::from(queue)].size?;
        InflightPart::new(self.inflight.as_ref()?, queue, size, is_packed(self.features))
    }
}

impl VhostUserBackend for Session {
    type Bitmap = ();
    type Vring = SessionVring;

    fn num_queues(&self) -> usize {
        self.state().rings.len()
    }

    fn max_queue_size(&self) -> usize {
        usize::from(RING_SIZE_MAX)
    }

    fn features(&self) -> u64 {
        self.offered
    }

    fn acked_features(&self, features: u64) {
        let features = features & !VHOST_USER_F_PROTOCOL_FEATURES;
        if self.state().features != features {
            self.alter_all(|state| state.features = features);
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        // What the keeper uses between it and us; REPLY_ACK the engine adds itself.
        VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        self.alter_all(|state| {
            state.inflight = None;
            state.features = 0;
            state.logging = Logging::Off;
            state.rings.iter_mut().for_each(RingState::reset);
        });
    }

    fn set_event_idx(&self, _enabled: bool) {
        // Part of the features that acked_features() brings right after.
    }

    /// The engine has swapped its table already and answers the front-end when this returns. The old mappings are
    /// still there: each attached ring holds the `Memory` it was built with.
    fn update_memory(&self, memory: EngineMemory) -> io::Result<()> {
        let mapped = memory.memory().into_inner();
        // The engine receives descriptors without close-on-exec.
        for file in mapped.iter().filter_map(|region| region.file_offset()) {
            fcntl(file.file(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
        }
        let memory = Arc::new(Memory::new(mapped)?);
        self.alter_all(|state| state.memory = Some(memory));
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        // No thread of the engine's polls any ring: they are the owner's.
        Vec::new()
    }

    /// GET_VRING_BASE: after this the engine reads the index that the ring has reached.
    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        let queue = u16::try_from(queue).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.take_back(queue);
        if let Some(part) = self.state().inflight_part(queue) {
            part.settle();
        }
        self.alter(queue, RingState::stop);
        if self.state().broken { Err(io::Error::other("the ring owner has failed")) } else { Ok(()) }
    }

    fn handle_event(&self, _: u16, _: EventSet, _: &[SessionVring], _: usize) -> io::Result<()> {
        // Without threads of the engine's there are no events.
        Ok(())
    }
}
