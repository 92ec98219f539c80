//! How outer packets leave and enter this host.
//!
//! An underlay is opened by the control thread, which reports what is wrong with it, and then given to a worker, which
//! makes two halves of it: what receives and what sends. There are a few drivers, known here; which one it is, is asked
//! once per packet by a branch that is always the same, nothing is called through a pointer.

pub mod af_xdp;
mod encap;
mod host;
mod neighbours;
mod open;
mod outer;
mod ring;
mod rx;
mod socket;
mod sockopt;
mod tx;

use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use dreamwire_vhost::frame::{HEADER_COPY_BYTES, NetHeader, RawFrame};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{Ring, Sent};

pub use neighbours::NEIGHBOURS_MAX;
pub use outer::{Ends, OUTER_BYTES_MAX, OuterHeader};
pub(crate) use ring::{RingRx, RingTx};
pub use ring::{RingUnderlay, RingUnderlayConfig};
pub(crate) use rx::SocketRx;
pub use socket::SocketUnderlay;
pub(crate) use tx::SocketTx;

use af_xdp::{XdpRx, XdpTx, XdpUnderlay};

use crate::counters::UnderlayCounters;
use crate::drop_reason::DropReason;
use crate::mac::Mac;
use crate::snapshot::NetworkId;
use crate::vxlan;

/// Room for one packet in a buffer: an IP packet at most (RFC 791 §3.1).
const SLOT_BYTES: usize = 65536;

/// Kernel buffers: 100 bursts of full-sized frames, some 5 ms at 10 Gbit/s.
const KERNEL_BUFFER_BYTES: usize = 8 << 20;

/// An underlay, open.
#[derive(Debug)]
pub enum Underlay {
    /// The kernel's sockets.
    Socket(SocketUnderlay),
    /// A ring served to a vhost-user front-end.
    Ring(RingUnderlay),
    /// A network device, past the kernel.
    Xdp(Box<XdpUnderlay>),
}

impl Underlay {
    /// Where its packets are counted.
    pub fn counters(&self) -> &Arc<UnderlayCounters> {
        match self {
            Self::Socket(driver) => driver.counters(),
            Self::Ring(driver) => driver.counters(),
            Self::Xdp(driver) => driver.counters(),
        }
    }

    /// The halves, with their buffers; they stay on the thread that asks for them.
    pub(crate) fn into_halves(self) -> (Rx, Tx, Arc<UnderlayCounters>) {
        let counters = Arc::clone(self.counters());
        match self {
            Self::Socket(driver) => {
                let (rx, tx) = driver.into_halves();
                (Rx::Socket(Box::new(rx)), Tx::Socket(Box::new(tx)), counters)
            }
            Self::Ring(driver) => {
                let (rx, tx) = driver.into_halves();
                (Rx::Ring(Box::new(rx)), Tx::Ring(Box::new(tx)), counters)
            }
            Self::Xdp(driver) => {
                let (rx, tx) = driver.into_halves();
                (Rx::Xdp(Box::new(rx)), Tx::Xdp(Box::new(tx)), counters)
            }
        }
    }
}

impl From<SocketUnderlay> for Underlay {
    fn from(driver: SocketUnderlay) -> Self {
        Self::Socket(driver)
    }
}

impl From<RingUnderlay> for Underlay {
    fn from(driver: RingUnderlay) -> Self {
        Self::Ring(driver)
    }
}

impl From<XdpUnderlay> for Underlay {
    fn from(driver: XdpUnderlay) -> Self {
        Self::Xdp(Box::new(driver))
    }
}

/// What a received packet turned out to be.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Arrival {
    /// An inner frame, which was written to the place given.
    Inner(vxlan::Header, IpAddr),
    /// Another one, with the tunnel header and from the VTEP of the last one.
    Alike,
    /// Something for this host itself.
    Host,
    /// Nothing that is wanted.
    Drop(DropReason),
}

/// The receiving half.
#[derive(Debug)]
pub(crate) enum Rx {
    Socket(Box<SocketRx>),
    Ring(Box<RingRx>),
    Xdp(Box<XdpRx>),
}

impl Rx {
    /// Receives up to a burst of packets; returns how many. They are [`Rx::open`]ed one by one, in order.
    #[inline]
    pub(crate) fn receive(&mut self, frames: &mut [RawFrame]) -> usize {
        match self {
            Self::Socket(rx) => rx.receive(),
            Self::Ring(rx) => rx.receive(frames),
            Self::Xdp(rx) => rx.receive(),
        }
    }

    /// Looks at packet `slot`, and writes the frame in it to `frames[into]`, which is not behind `slot`.
    #[inline]
    pub(crate) fn open(&mut self, slot: usize, into: usize, frames: &mut [RawFrame]) -> Arrival {
        match self {
            Self::Socket(rx) => rx.open(slot, &mut frames[into]),
            Self::Ring(rx) => rx.open(slot, into, frames),
            Self::Xdp(rx) => rx.open(slot, &mut frames[into]),
        }
    }

    /// The bytes of a frame of this burst behind its header copy. `slot` is the packet that it was in.
    #[inline]
    pub(crate) fn payload(&self, frame: &RawFrame, slot: usize) -> Payload<'_> {
        match self {
            Self::Socket(rx) => {
                let (bytes, _) = rx.datagram(slot);
                Payload::private(&bytes[bytes.len() - frame.tail_bytes() as usize..])
            }
            Self::Ring(rx) => rx.payload(frame),
            Self::Xdp(rx) => rx.payload(frame, slot),
        }
    }

    /// Gives the burst's buffers back.
    #[inline]
    pub(crate) fn complete(&mut self) {
        match self {
            Self::Socket(_) => {}
            Self::Ring(rx) => rx.complete(),
            Self::Xdp(rx) => rx.complete(),
        }
    }

    /// System calls that the last [`Rx::receive`] made.
    #[inline]
    pub(crate) fn calls(&self) -> u64 {
        match self {
            Self::Socket(_) => 1,
            Self::Ring(_) | Self::Xdp(_) => 0,
        }
    }

    /// For epoll. A ring's kick comes and goes with the ring.
    pub(crate) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Socket(rx) => vec![rx.descriptor()],
            Self::Ring(_) => Vec::new(),
            Self::Xdp(rx) => rx.descriptors().collect(),
        }
    }

    /// The ring that packets are taken from, if the driver has one.
    pub(crate) fn ring(&mut self) -> Option<&mut Option<Ring>> {
        match self {
            Self::Socket(_) | Self::Xdp(_) => None,
            Self::Ring(rx) => Some(&mut rx.ring),
        }
    }
}

/// A frame on its way into a tunnel.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Inner<'a> {
    pub(crate) network: NetworkId,
    pub(crate) flow_hash: u32,
    /// The private copy of its first bytes, or all of it.
    pub(crate) header: &'a [u8],
    pub(crate) payload: Payload<'a>,
}

impl Inner<'_> {
    #[inline]
    pub(crate) fn bytes(&self) -> usize {
        self.header.len() + self.payload.bytes() as usize
    }
}

/// How far a frame came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Staged {
    /// Its fate is told by [`Tx::flush`].
    Waiting,
    /// It is on the wire, or will be with the next flush whatever happens.
    Sent,
}

/// The sending half.
#[derive(Debug)]
pub(crate) enum Tx {
    Socket(Box<SocketTx>),
    Ring(Box<RingTx>),
    Xdp(Box<XdpTx>),
}

impl Tx {
    /// Whether [`Tx::flush`] must come before the next [`Tx::stage`].
    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        match self {
            Self::Socket(tx) => tx.is_full(),
            Self::Ring(_) | Self::Xdp(_) => false,
        }
    }

    /// Says where the frames go that are staged next, in this turn, and as what; or why they cannot.
    #[inline]
    pub(crate) fn aim(&mut self, vtep: &IpAddr, tunnel: vxlan::Header, now_ns: u64) -> Result<(), DropReason> {
        match self {
            Self::Socket(tx) => tx.aim(*vtep, tunnel),
            Self::Ring(tx) => tx.aim(vtep, tunnel, now_ns),
            Self::Xdp(tx) => tx.encap.aim(vtep, tunnel, now_ns),
        }
    }

    /// Writes one packet around a frame: the one copy on the way out.
    #[inline]
    pub(crate) fn stage(&mut self, inner: Inner<'_>) -> Result<Staged, DropReason> {
        match self {
            Self::Socket(tx) => tx.stage(inner).map(|()| Staged::Waiting),
            Self::Ring(tx) => tx.send(inner).map(|()| Staged::Sent),
            Self::Xdp(tx) => tx.send(inner).map(|()| Staged::Sent),
        }
    }

    /// Whether whoever takes what is sent is as far away as memory ([`Ring::is_far`]).
    #[inline]
    pub(crate) fn is_far(&self) -> bool {
        matches!(self, Self::Ring(tx) if tx.ring.as_ref().is_some_and(Ring::is_far))
    }

    /// Writes a packet around each of a run of finished frames, of which `flow_hash` and `payload` give the rest. Returns how many are
    /// on the wire, or will be with the next flush; an error if there is room for none. It may stop before any of them, which
    /// is for [`Tx::stage`] then.
    #[inline]
    pub(crate) fn send_run<'f, const FAR: bool>(
        &mut self,
        frames: &[RawFrame],
        flow_hash: impl Fn(&RawFrame) -> u32,
        payload: impl Fn(usize) -> Payload<'f>,
    ) -> Result<Sent, DropReason> {
        match self {
            Self::Ring(tx) => tx.send_run::<FAR>(frames, flow_hash, payload),
            Self::Socket(_) | Self::Xdp(_) => Ok(Sent::default()),
        }
    }

    /// Sends everything staged. Tells `done` of each waiting packet's network, inner bytes and fate; returns the number
    /// of system calls.
    #[inline]
    pub(crate) fn flush(&mut self, done: impl FnMut(NetworkId, u32, Result<(), DropReason>)) -> u64 {
        match self {
            Self::Socket(tx) => tx.flush(done),
            Self::Ring(tx) => tx.flush(),
            Self::Xdp(tx) => tx.flush(),
        }
    }

    /// Takes what [`Rx::open`] found to be for this host. `Err`: it was not.
    pub(crate) fn hear(&mut self, frame: &RawFrame, payload: Payload<'_>, now_ns: u64) -> Result<(), DropReason> {
        match self {
            Self::Socket(_) | Self::Xdp(_) => Err(DropReason::NotForHost),
            Self::Ring(tx) => tx.hear(frame, payload, now_ns),
        }
    }

    /// The ring that packets are put into, if the driver has one.
    pub(crate) fn ring(&mut self) -> Option<&mut Option<Ring>> {
        match self {
            Self::Socket(_) | Self::Xdp(_) => None,
            Self::Ring(tx) => Some(&mut tx.ring),
        }
    }

    /// The cards of the next hops to these VTEPs, sorted by VTEP: all that are known now. For drivers that do not find
    /// them out themselves.
    pub(crate) fn set_next_hops(&mut self, told: &[(IpAddr, Mac)]) {
        if let Self::Xdp(tx) = self {
            tx.encap.neighbours.replace(told);
        }
    }
}

/// Writes a frame that lies whole in a buffer as a burst has it.
#[inline]
fn copy_header(inner: &[u8], frame: &mut RawFrame) {
    let header_bytes = inner.len().min(HEADER_COPY_BYTES);
    frame.header[..header_bytes].copy_from_slice(&inner[..header_bytes]);
    frame.header_bytes = header_bytes as u16;
    frame.frame_bytes = inner.len() as u32;
    frame.net = NetHeader::default();
    frame.fault = None;
}
