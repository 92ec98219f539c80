//! The device side of a virtqueue, served in bursts.
//!
//! Theory of operation. A ring is set up once (sizes, alignment and extents checked, host pointers cached) and then
//! belongs to one worker. In the direction from the guest a burst is: [`Ring::receive`] takes up to 32 chains, copying
//! each one's virtio-net header and first bytes and noting where the rest lies; the worker sends every frame on, reading
//! [`Ring::payload`]; [`Ring::complete`] gives all chains back with one store of the used index. In the direction to the
//! guest, [`Ring::send`] fills one chain (or several, with mergeable buffers) per frame and [`Ring::flush`] shows all of
//! them to the guest at once. `complete` and `flush` notify the guest if it asked for that.
//!
//! What the guest controls is read once: the available index once per burst, each ring entry and descriptor once. Chains are seen
//! ahead, and those of one buffer are taken as they were seen then; nothing that was seen of another counts, it is read when
//! its turn comes.
//! A violation of the ring's format ([`RingFault`]) stops the ring for good: the guest has to reset its device.
//!
//! Both layouts of VIRTIO 1.2 are served, split (§2.7) and packed (§2.8, with RING_PACKED negotiated), behind one type:
//! which one is decided once per burst or frame, never per descriptor.

mod buffers;
mod far;
mod inflight_packed;
mod inflight_split;
mod narrow;
mod packed;
mod packed_chain;
mod packed_events;
mod packed_resumed;
mod packed_staging;
mod position;
mod recover;
mod split;
mod split_chain;
mod split_entries;
mod split_resumed;

use std::ops::AddAssign;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::dirty_log::RingLog;
use crate::eventfd::EventFd;
use crate::frame::{Before, NetHeader, RawFrame};
use crate::inflight::InflightPart;
use crate::memory::{Memory, Payload};
use buffers::Straight;
use far::{FarRun, Places};
use inflight_packed::has_inflight;
use packed::PackedRing;
use split::SplitRing;

/// Chains taken at once. 32 descriptors are 512 bytes, 8 cache lines.
pub const BURST: usize = 32;

/// Entries that a ring has at most (VIRTIO 1.2 §2.7).
pub const RING_SIZE_MAX: u16 = 32768;

/// Pieces of guest memory that one chain may consist of. Linux sends at most 17 fragments and two headers; Windows
/// drivers up to 256.
pub const CHAIN_SEGMENTS_MAX: usize = 256;

/// Descriptors that one chain may have in one table, empty ones included. QEMU allows 1024; no driver comes near half of
/// it. Empty descriptors are no pieces of memory, yet each costs a read: without this limit a guest of one ring could
/// have millions read in a burst.
pub const CHAIN_DESCRIPTORS_MAX: u16 = 512;

/// Descriptors after which a burst takes no further chain, but for those of one buffer: a full burst of 32 descriptors each. With the
/// last chain's own limit a burst reads at most twice as many.
pub const BURST_DESCRIPTORS_MAX: usize = 1024;

/// Pieces of guest memory that one burst may refer to: at least one chain of the longest kind beside a burst of usual
/// ones.
pub const BURST_SEGMENTS_MAX: usize = 1024;

/// Chains that one frame may be spread over with mergeable buffers: 64 KiB over the smallest buffers seen in practice.
pub const MERGED_CHAINS_MAX: usize = 64;

/// Bytes of a frame at most: a 64 KiB IP packet, its Ethernet header and two VLAN tags.
pub const FRAME_BYTES_MAX: u32 = 65535 + 14 + 8;

const _: () = assert!(BURST_SEGMENTS_MAX >= CHAIN_SEGMENTS_MAX + BURST);
const _: () = assert!(BURST_SEGMENTS_MAX <= u16::MAX as usize);
const _: () = assert!(CHAIN_DESCRIPTORS_MAX as usize >= CHAIN_SEGMENTS_MAX);

/// Everything needed to serve a ring, as the session gathered it.
#[derive(Debug)]
pub struct RingSetup {
    /// The memory that all addresses refer to.
    pub memory: Arc<Memory>,
    /// Entries, at most [`RING_SIZE_MAX`]; a power of two unless RING_PACKED is negotiated.
    pub size: u16,
    /// Guest-physical address of the descriptor table (packed: the descriptor ring).
    pub descriptors: u64,
    /// Guest-physical address of the available ring (packed: the driver's event suppression structure).
    pub available: u64,
    /// Guest-physical address of the used ring (packed: the device's event suppression structure).
    pub used: u64,
    /// Index of the next available entry to take. Packed: bit 15 is the wrap counter; a ring begins at 0x8000.
    pub next_avail: u16,
    /// Index of the next used entry to write. Packed: not looked at, it is the same as `next_avail` at rest.
    pub next_used: u16,
    /// Negotiated virtio feature bits.
    pub features: u64,
    /// SET_VRING_ENABLE's state. A disabled guest transmitq is consumed and discarded, a disabled guest receiveq gets
    /// nothing (vhost-user specification, "Ring states").
    pub enabled: bool,
    /// Guest to device; `None` means poll.
    pub kick: Option<EventFd>,
    /// Device to guest; `None` means that the guest polls.
    pub call: Option<EventFd>,
    /// Signalled when the ring is found corrupt.
    pub error: Option<EventFd>,
    /// Every write to guest memory is noted there, while the guest is being migrated.
    pub log: Option<RingLog>,
    /// Where chains that are taken and not given back are noted, and where those of a device before us are found.
    pub inflight: Option<InflightPart>,
    /// How the guest broke it before; such a ring is not served. The front-end clears it by stopping the ring.
    pub fault: Option<RingFault>,
}

/// Why a ring cannot be served at all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// Not a power of two, zero, or above the maximum.
    #[error("ring size {0} is not a power of two between 1 and {RING_SIZE_MAX}")]
    Size(u16),
    /// A packed ring of no entries, or of more than the maximum.
    #[error("packed ring size {0} is not between 1 and {RING_SIZE_MAX}")]
    PackedSize(u16),
    /// A packed ring is to start outside of itself.
    #[error("descriptor {index} is outside the packed ring of {size} that is to start there")]
    Position {
        /// The index, without wrap counter.
        index: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A part of the ring does not lie in one memory region, or is misaligned.
    #[error("the {part} at {address:#x}, {bytes} bytes, is misaligned or not in one region of guest memory")]
    Address {
        /// Which part.
        part: &'static str,
        /// Guest-physical address.
        address: u64,
        /// Its length.
        bytes: u64,
    },
}

/// How a guest broke its ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RingFault {
    /// The available index is further ahead than the ring has entries.
    #[error("available index {index} is more than {size} entries ahead of {next}")]
    AvailableIndex {
        /// As read.
        index: u16,
        /// What the device expected next.
        next: u16,
        /// Entries of the ring.
        size: u16,
    },
    /// A descriptor index outside the table.
    #[error("descriptor index {index} is outside the table of {size}")]
    DescriptorIndex {
        /// As read.
        index: u16,
        /// Entries of the table.
        size: u16,
    },
    /// A chain longer than its table, so that it loops, or than [`CHAIN_DESCRIPTORS_MAX`].
    #[error("the descriptor chain at {head} loops, or has more than {CHAIN_DESCRIPTORS_MAX} descriptors")]
    Loop {
        /// First descriptor.
        head: u16,
    },
    /// An address outside guest memory.
    #[error("a buffer at {address:#x}, {bytes} bytes, is outside guest memory")]
    BufferAddress {
        /// As read.
        address: u64,
        /// As read.
        bytes: u32,
    },
    /// A device-writable descriptor where the device reads, or the reverse.
    #[error("descriptor {index} has the wrong direction")]
    Direction {
        /// Index in its table.
        index: u16,
    },
    /// An indirect table that is nested, chained, empty, no multiple of 16 bytes, or not negotiated.
    #[error("descriptor {index} refers to an indirect table that is not allowed")]
    Indirect {
        /// Index in its table.
        index: u16,
    },
    /// The file behind guest memory is shorter than the memory table says.
    #[error("its memory file was truncated")]
    MemoryTruncated,
}

/// Why a frame was not put into a guest's ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendError {
    /// The guest has not posted enough buffers.
    Full,
    /// The guest's next buffer is too small for the frame and buffers may not be merged.
    BufferTooSmall,
    /// The ring is disabled.
    Disabled,
    /// The ring is broken, now or before.
    Fault(RingFault),
}

/// What was put into a ring, in frames and their bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sent {
    /// Frames.
    pub frames: u64,
    /// Their bytes, without net headers.
    pub bytes: u64,
}

impl AddAssign for Sent {
    #[inline]
    fn add_assign(&mut self, other: Self) {
        self.frames += other.frames;
        self.bytes += other.bytes;
    }
}

/// How the ring lies in memory.
#[allow(clippy::large_enum_variant, reason = "a ring is moved only when it is attached")]
#[derive(Debug)]
enum Layout {
    Split(SplitRing),
    Packed(PackedRing),
}

/// Does the same with whichever layout it is.
macro_rules! with_layout {
    ($layout:expr, $ring:ident => $do:expr) => {
        match $layout {
            Layout::Split($ring) => $do,
            Layout::Packed($ring) => $do,
        }
    };
}

/// The device side of one virtqueue, with its memory and descriptors.
#[derive(Debug)]
pub struct Ring {
    layout: Layout,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    error: Option<EventFd>,
    enabled: bool,
    features: u64,
    fault: Option<RingFault>,
}

impl Ring {
    /// Checks sizes, addresses and extents once, and caches host pointers.
    pub fn new(setup: RingSetup) -> Result<Self, RingError> {
        let layout = if is_packed(setup.features) {
            Layout::Packed(PackedRing::new(&setup)?)
        } else {
            Layout::Split(SplitRing::new(&setup)?)
        };
        let truncated = setup.memory.is_truncated().then_some(RingFault::MemoryTruncated);
        let RingSetup { kick, call, error, enabled, features, fault, .. } = setup;
        Ok(Self { layout, kick, call, error, enabled, features, fault: fault.or(truncated) })
    }

    /// As [`Ring::new`], when the indices are only a front-end's word: a packed ring tells its position itself
    /// (`recover.rs`), and a burst that a device before us left half given back is finished. Unless the in-flight region
    /// has that burst: then it is served again.
    pub fn resume(mut setup: RingSetup) -> Result<Self, RingError> {
        if is_packed(setup.features) {
            let is_told = |setup: &RingSetup| setup.inflight.as_ref().is_some_and(has_inflight);
            // Opened once to see whether that can be believed: if not, nothing is in flight afterwards.
            if is_told(&setup) {
                PackedRing::new(&setup)?;
            }
            if !is_told(&setup) {
                recover::recover(&mut setup);
            }
        }
        Self::new(setup)
    }

    /// Takes up to `frames.len()` frames from the guest's transmitq. Returns how many; they must be given back by
    /// [`Ring::complete`] before the next call. Frames whose `fault` is set are to be counted and dropped.
    ///
    /// On a fault the ring is broken from here on; frames taken before the fault in the same burst are given up.
    #[inline]
    pub fn receive(&mut self, frames: &mut [RawFrame]) -> Result<usize, RingFault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let received = with_layout!(&mut self.layout, ring => ring.receive(frames));
        // Looked at behind the reads: what they may have found behind the end of the file were zeros.
        if self.memory().is_truncated() {
            return Err(self.break_down(RingFault::MemoryTruncated));
        }
        received.map_err(|fault| self.break_down(fault))
    }

    /// Asks for the cache lines of the frames that the next [`Ring::receive`] will find. Not in a packed ring: only its descriptors tell
    /// whether there are any, and looking takes their lines from the driver.
    #[inline]
    pub fn expect_frames(&mut self) {
        if let Layout::Split(ring) = &mut self.layout {
            ring.expect_frames();
        }
    }

    /// Where the bytes behind a received frame's header copy lie.
    #[inline]
    pub fn payload(&self, frame: &RawFrame) -> Payload<'_> {
        with_layout!(&self.layout, ring => ring.payload(frame))
    }

    /// Gives all chains of the last [`Ring::receive`] back and notifies the guest if it asked for it. Returns whether
    /// it was notified.
    #[inline]
    pub fn complete(&mut self) -> bool {
        with_layout!(&mut self.layout, ring => ring.complete());
        self.publish()
    }

    /// Puts one frame into the guest's receiveq: `net`, then `header`, then `payload`. Seen by the guest after
    /// [`Ring::flush`]. Either the whole frame is staged or nothing of it.
    #[inline(always)]
    pub fn send(&mut self, net: NetHeader, header: &[u8], payload: Payload<'_>) -> Result<(), SendError> {
        if let Some(fault) = self.fault {
            return Err(SendError::Fault(fault));
        }
        if !self.enabled {
            return Err(SendError::Disabled);
        }
        with_layout!(&mut self.layout, ring => ring.send(net, header, payload)).map_err(|error| self.stop_at(error))
    }

    /// Whether the guest's driver is as far away as memory, as was measured last.
    #[inline]
    pub fn is_far(&self) -> bool {
        with_layout!(&self.layout, ring => ring.is_far())
    }

    /// As [`Ring::send`] for frames in a row, of which `net` and `payload` give the rest, if there is any. An error if there is room
    /// for none; it may stop before any of them, which is for [`Ring::send`] then. `FAR`: past the caches, as is best where
    /// [`Ring::is_far`]; the guest finds the same, and perhaps zeros behind a frame, up to the end of a cache line of its buffer.
    #[inline(always)]
    pub fn send_run<'f, const FAR: bool, const BYTES: usize, const WORDS: usize>(
        &mut self,
        frames: &[RawFrame],
        before: impl Before<BYTES, WORDS>,
        net: impl Fn(usize) -> Option<NetHeader>,
        payload: impl Fn(usize) -> Payload<'f>,
    ) -> Result<Sent, SendError> {
        if let Some(fault) = self.fault {
            return Err(SendError::Fault(fault));
        }
        if !self.enabled {
            return Err(SendError::Disabled);
        }
        if self.is_logged() {
            return Ok(Sent::default());
        }
        let sent = if FAR {
            let mut places = Places::new();
            let mut run = FarRun::new(&mut places);
            with_layout!(&mut self.layout, ring => ring.send_run(&mut run, frames, before, net, payload))
        } else {
            with_layout!(&mut self.layout, ring => ring.send_run(&mut Straight, frames, before, net, payload))
        };
        sent.map_err(|error| self.stop_at(error))
    }

    /// Shows everything sent since the last flush to the guest and notifies it if it asked for that. Returns whether
    /// it was notified.
    #[inline]
    pub fn flush(&mut self) -> bool {
        self.publish()
    }

    #[inline]
    fn publish(&mut self) -> bool {
        let notify = with_layout!(&mut self.layout, ring => ring.publish());
        if self.memory().is_truncated() && self.fault.is_none() {
            self.break_down(RingFault::MemoryTruncated);
        }
        if notify && let Some(call) = &self.call {
            // A failed write means that the front-end closed its side: its disconnect is on the way.
            return call.signal().is_ok();
        }
        false
    }

    /// Notifies the guest whether it asked for it or not.
    pub fn notify(&self) {
        if let Some(call) = &self.call {
            // As in `publish`.
            let _ = call.signal();
        }
    }

    /// Asks the guest to kick when it makes something available. Returns whether something already is: then the caller
    /// must look again before it sleeps.
    pub fn enable_kicks(&mut self) -> bool {
        self.fault.is_none() && with_layout!(&mut self.layout, ring => ring.enable_kicks())
    }

    /// Whether something may have been made available. A glance: the ring is not touched beyond it.
    #[inline]
    pub fn has_work(&self) -> bool {
        self.fault.is_none() && with_layout!(&self.layout, ring => ring.has_work())
    }

    /// Tells the guest that kicks are not needed.
    pub fn disable_kicks(&mut self) {
        with_layout!(&mut self.layout, ring => ring.disable_kicks());
    }

    /// The kick descriptor, for epoll. `None`: the guest does not kick, the ring must be polled.
    pub fn kick(&self) -> Option<&EventFd> {
        self.kick.as_ref()
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        with_layout!(&self.layout, ring => ring.size())
    }

    /// SET_VRING_ENABLE's state.
    #[inline]
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// The negotiated virtio feature bits.
    #[inline]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// How the guest broke the ring, or its memory, if it did.
    pub fn fault(&self) -> Option<RingFault> {
        self.fault.or_else(|| self.memory().is_truncated().then_some(RingFault::MemoryTruncated))
    }

    /// Whether the ring was found broken, and is not served any more.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.fault.is_some()
    }

    /// Whether the available index still stands at zero, as in memory that the guest does not share with us.
    pub fn never_used(&self) -> bool {
        with_layout!(&self.layout, ring => ring.never_used())
    }

    /// Index of the next available entry: what GET_VRING_BASE answers. Packed: bit 15 is the wrap counter.
    pub fn next_avail(&self) -> u16 {
        match &self.layout {
            Layout::Split(ring) => ring.next_avail(),
            Layout::Packed(ring) => ring.position(),
        }
    }

    /// Index of the next used entry. Packed: bit 15 is the wrap counter.
    pub fn next_used(&self) -> u16 {
        match &self.layout {
            Layout::Split(ring) => ring.next_used(),
            Layout::Packed(ring) => ring.position(),
        }
    }

    /// The memory it was set up with.
    pub fn memory(&self) -> &Arc<Memory> {
        with_layout!(&self.layout, ring => ring.memory())
    }

    /// Gives the setup back, with the indices as they stand now, so that a changed ring can be attached again.
    pub fn into_setup(self) -> RingSetup {
        let fault = self.fault();
        let (size, next_avail, next_used) = (self.size(), self.next_avail(), self.next_used());
        let Self { layout, kick, call, error, enabled, features, .. } = self;
        let (descriptors, available, used) = with_layout!(&layout, ring => ring.addresses());
        let (memory, log, inflight) = with_layout!(layout, ring => ring.into_shared());
        RingSetup {
            memory,
            size,
            descriptors,
            available,
            used,
            next_avail,
            next_used,
            features,
            enabled,
            kick,
            call,
            error,
            log,
            inflight,
            fault,
        }
    }

    /// Whether all that is written has to be told of.
    #[inline]
    fn is_logged(&self) -> bool {
        with_layout!(&self.layout, ring => ring.is_logged())
    }

    /// A ring with a fault is broken from here on.
    #[cold]
    fn stop_at(&mut self, error: SendError) -> SendError {
        match error {
            SendError::Fault(fault) => SendError::Fault(self.break_down(fault)),
            other => other,
        }
    }

    #[cold]
    fn break_down(&mut self, found: RingFault) -> RingFault {
        // Zeros behind the end of the file look like anything.
        let fault = if self.memory().is_truncated() { RingFault::MemoryTruncated } else { found };
        self.fault = Some(fault);
        if let Some(error) = &self.error {
            // The front-end may have closed its side; the fault is reported by the worker anyway.
            let _ = error.signal();
        }
        fault
    }
}

/// Bytes of the virtio-net header with these features (VIRTIO 1.2 §5.1.6.1).
fn net_header_bytes(features: u64) -> usize {
    if features & ((1 << VIRTIO_F_VERSION_1) | (1 << VIRTIO_NET_F_MRG_RXBUF)) != 0 {
        NetHeader::BYTES
    } else {
        NetHeader::LEGACY_BYTES
    }
}

fn has(features: u64, bit: u32) -> bool {
    features & (1 << bit) != 0
}

/// Whether RING_PACKED was negotiated.
pub(crate) fn is_packed(features: u64) -> bool {
    has(features, VIRTIO_F_RING_PACKED)
}

fn event_idx(features: u64) -> bool {
    has(features, VIRTIO_RING_F_EVENT_IDX)
}

fn in_order(features: u64) -> bool {
    has(features, VIRTIO_F_IN_ORDER)
}

fn indirect(features: u64) -> bool {
    has(features, VIRTIO_RING_F_INDIRECT_DESC)
}

fn mergeable(features: u64) -> bool {
    has(features, VIRTIO_NET_F_MRG_RXBUF)
}
