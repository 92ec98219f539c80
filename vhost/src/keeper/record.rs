//! What a front-end and we have agreed on: everything that a new datapath would have to be told.
//!
//! Owned by the filter; one per connection. Limits: [`MEMORY_SLOTS_MAX`] regions, two rings per queue pair.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::message::{Region, RingAddresses};
use crate::dirty_log::DirtyLog;
use crate::inflight::Inflight;

/// Regions that one front-end may have mapped; the answer to GET_MAX_MEM_SLOTS. Each costs the daemon two
/// descriptors, so a front-end must not be free to take them all; QEMU needs a handful plus one per hot-plugged DIMM.
pub(super) const MEMORY_SLOTS_MAX: usize = 64;

/// One region of guest memory and the file behind it.
#[derive(Debug)]
pub(super) struct MappedRegion {
    pub(super) region: Region,
    pub(super) file: Arc<OwnedFd>,
}

/// A kick, call or error descriptor as the front-end set it last.
#[derive(Debug, Default)]
pub(super) enum RingSignal {
    #[default]
    Unset,
    /// "Invalid FD flag": the other side polls.
    Polled,
    Descriptor(Arc<OwnedFd>),
}

impl RingSignal {
    /// What goes along with the message that sets it.
    pub(super) fn descriptors(&self) -> Vec<Arc<OwnedFd>> {
        match self {
            Self::Descriptor(descriptor) => vec![Arc::clone(descriptor)],
            Self::Unset | Self::Polled => Vec::new(),
        }
    }
}

/// One ring's part of the session.
#[derive(Debug, Default)]
pub(super) struct RingRecord {
    pub(super) size: Option<u16>,
    pub(super) addresses: Option<RingAddresses>,
    pub(super) base: u16,
    pub(super) kick: RingSignal,
    pub(super) call: RingSignal,
    pub(super) error: RingSignal,
    pub(super) enabled: bool,
}

/// The whole session.
#[derive(Debug, Default)]
pub(super) struct SessionRecord {
    /// Acked virtio feature bits without PRIVATE_FEATURES; `None` before SET_FEATURES and after a reset.
    pub(super) features: Option<u64>,
    pub(super) protocol_features: u64,
    /// Sorted by guest address, disjoint.
    pub(super) memory: Vec<MappedRegion>,
    pub(super) rings: Vec<RingRecord>,
    /// VIRTIO 1.2 §2.1 device status, as the front-end wrote it.
    pub(super) status: u8,
    /// NET_SET_MTU.
    pub(super) mtu: Option<u16>,
    /// Whether VHOST_F_LOG_ALL is acked.
    pub(super) log_all: bool,
    /// SET_LOG_BASE. It comes before LOG_ALL when a migration begins, and goes when LOG_ALL goes.
    pub(super) log: Option<Arc<DirtyLog>>,
    /// GET_INFLIGHT_FD or SET_INFLIGHT_FD, whichever was last.
    pub(super) inflight: Option<Arc<Inflight>>,
    /// SET_BACKEND_REQ_FD: kept open for as long as the front-end is there. Nothing is read from it or written to it.
    pub(super) backend_channel: Option<OwnedFd>,
}

impl SessionRecord {
    pub(super) fn new(ring_count: usize) -> Self {
        Self { rings: std::iter::repeat_with(RingRecord::default).take(ring_count).collect(), ..Self::default() }
    }

    /// RESET_DEVICE: rings disabled and stopped, features to be negotiated anew; memory, ownership and the call and
    /// error descriptors stay, for QEMU sets those once at start.
    pub(super) fn reset_device(&mut self) {
        self.features = None;
        self.status = 0;
        self.log_all = false;
        self.log = None;
        self.inflight = None;
        for ring in &mut self.rings {
            let call = std::mem::take(&mut ring.call);
            let error = std::mem::take(&mut ring.error);
            *ring = RingRecord { call, error, ..RingRecord::default() };
        }
    }

    /// GET_VRING_BASE has stopped ring `index` at `base`; the session forgets kick and call with it.
    pub(super) fn ring_stopped(&mut self, index: usize, base: u16) {
        let ring = &mut self.rings[index];
        ring.base = base;
        ring.kick = RingSignal::Unset;
        ring.call = RingSignal::Unset;
    }

    /// The region that holds all `bytes` from `front_end_address` on.
    pub(super) fn region_of(&self, front_end_address: u64, bytes: u64) -> Option<&Region> {
        let end = front_end_address.checked_add(bytes)?;
        self.memory.iter().map(|mapped| &mapped.region).find(|region| {
            // vetted: front_end_address + bytes does not overflow
            front_end_address >= region.front_end_address && end <= region.front_end_address + region.bytes
        })
    }

    /// Queue pairs whose guest receiveq is enabled.
    pub(super) fn pairs_enabled(&self) -> u16 {
        self.rings.iter().step_by(2).filter(|ring| ring.enabled).count() as u16
    }
}
