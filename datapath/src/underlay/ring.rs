//! The `vhost-user` driver: the wire is a virtio-net card that is served to a front-end, as a port's is. The front-end
//! stands for the physical network: another virtual switch, a nested hypervisor, a test harness.
//!
//! No kernel helps here: outer headers are written and read whole, neighbours are found by ARP and neighbour discovery.
//! The card offers no offloads, so every packet is finished. Rings come and go with the front-end; without one, packets
//! are dropped as by a cable that is not plugged in.
//!
//! Like a real card it is trusted no more than the wire: lengths are held against the frame, VTEPs against `remotes`.
//! Packets larger than the MTU are dropped, not fragmented, and fragments are not put together.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use dreamwire_vhost::frame::{HEADER_COPY_BYTES, NetHeader, RawFrame};
use dreamwire_vhost::limiter::Limiter;
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{FRAME_BYTES_MAX, Ring, RingFault, SendError, Sent};
use virtio_bindings::bindings::virtio_net::{VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_NONE};

use super::encap::Encap;
use super::host::{self, Heard};
use super::neighbours::Neighbours;
use super::open::{Alike, Opened, Station, TunnelPacket, open};
use super::outer::OUTER_BYTES_MAX;
use super::{Arrival, Inner};
use crate::checksum::Sum;
use crate::counters::UnderlayCounters;
use crate::drop_reason::DropReason;
use crate::mac::Mac;
use crate::vxlan;

/// An inner header copy is no longer than this; a longer "header" is a finished frame in private memory.
const START_BYTES: usize = OUTER_BYTES_MAX + HEADER_COPY_BYTES;

/// Who this host is on the wire.
#[derive(Debug, Clone)]
pub struct RingUnderlayConfig {
    /// Its card.
    pub mac: Mac,
    /// Its VTEP.
    pub address: IpAddr,
    /// UDP port of the tunnels.
    pub udp_port: u16,
    /// Bytes of an IP packet that the wire takes.
    pub mtu: u16,
    /// Where to send what is for no neighbour. `None`: everybody is a neighbour.
    pub gateway: Option<IpAddr>,
    /// Neighbours that need not be asked for.
    pub neighbours: Vec<(IpAddr, Mac)>,
}

/// An underlay whose wire is a ring. The ring itself comes later.
#[derive(Debug)]
pub struct RingUnderlay {
    config: RingUnderlayConfig,
    counters: Arc<UnderlayCounters>,
}

impl RingUnderlay {
    /// Never fails: nothing is opened.
    pub fn new(config: RingUnderlayConfig, counters: Arc<UnderlayCounters>) -> Self {
        Self { config, counters }
    }

    /// Where its packets are counted.
    pub fn counters(&self) -> &Arc<UnderlayCounters> {
        &self.counters
    }

    pub(crate) fn into_halves(self) -> (RingRx, RingTx) {
        let RingUnderlayConfig { mac, address, udp_port, mtu, gateway, neighbours } = self.config;
        let station = Station { mac, address, udp_port };
        let neighbours = Neighbours::new(&neighbours, true);
        let tx = RingTx {
            ring: None,
            encap: Encap::new(station, neighbours, gateway, mtu),
            scratch: vec![0; FRAME_BYTES_MAX as usize].into(),
            start: Box::new([0; START_BYTES]),
            is_touched: false,
            counters: self.counters,
            lines: Lines::default(),
        };
        let scratch = vec![0; FRAME_BYTES_MAX as usize].into();
        let rx = RingRx { ring: None, station, alike: None, scratch, lines: Lines::default() };
        (rx, tx)
    }
}

/// What is logged of rings that the front-end breaks, which it can do at will.
#[derive(Debug)]
struct Lines(Limiter);

impl Default for Lines {
    fn default() -> Self {
        Self(Limiter::new(Instant::now()))
    }
}

impl Lines {
    #[cold]
    fn report(&mut self, queue: u16, fault: RingFault) {
        if let Some(suppressed) = self.0.admit(Instant::now()) {
            tracing::warn!(queue, %fault, suppressed, "the underlay's ring is quarantined until its driver resets");
        }
    }
}

/// Takes packets from the front-end's transmitq.
#[derive(Debug)]
pub(crate) struct RingRx {
    pub(super) ring: Option<Ring>,
    station: Station,
    /// What the last packet of this burst that had an inner frame was like.
    alike: Option<Alike>,
    /// For checksums: guest memory is summed in a private copy.
    scratch: Box<[u8]>,
    lines: Lines,
}

impl RingRx {
    #[inline]
    pub(super) fn receive(&mut self, frames: &mut [RawFrame]) -> usize {
        self.alike = None;
        let Some(ring) = self.ring.as_mut().filter(|ring| !ring.is_broken()) else { return 0 };
        match ring.receive(frames) {
            Ok(count) => count,
            Err(fault) => {
                self.lines.report(1, fault);
                0
            }
        }
    }

    #[inline]
    pub(super) fn open(&mut self, slot: usize, into: usize, frames: &mut [RawFrame]) -> Arrival {
        let Some(ring) = self.ring.as_mut() else { return Arrival::Drop(DropReason::PortDown) };
        let frame = &mut frames[slot];
        if frame.fault.is_some() {
            return Arrival::Drop(DropReason::BadChain);
        }
        if !ring.enabled() {
            // vhost-user, "Ring states": a disabled transmitq is consumed without side effects.
            return Arrival::Drop(DropReason::SenderDisabled);
        }
        let alike = self.alike.as_ref().and_then(|last| last.open(frame.headers(), frame.frame_bytes as usize));
        if let Some(inner_bytes) = alike.filter(|_| frame.net.is_empty()) {
            ring.narrow(frame, Alike::INNER_AT as u16, inner_bytes as u32);
            if slot != into {
                frames.swap(slot, into);
            }
            return Arrival::Alike;
        }
        // Nothing was offered, so nothing may be left undone.
        if u32::from(frame.net.flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM != 0
            || u32::from(frame.net.gso_type) != VIRTIO_NET_HDR_GSO_NONE
        {
            return Arrival::Drop(DropReason::BadOffload);
        }
        let opened = open(&self.station, frame.headers(), frame.frame_bytes as usize);
        // Not moved out: it would be copied.
        let packet = match &opened {
            Opened::Tunnel(packet) => packet,
            Opened::Host => return Arrival::Host,
            Opened::Drop(reason) => return Arrival::Drop(*reason),
        };
        if packet.is_summed && !verify(packet, frame, ring.payload(frame), &mut self.scratch) {
            return Arrival::Drop(DropReason::OuterChecksum);
        }
        self.alike = Alike::of(packet, frame.headers());
        ring.narrow(frame, packet.inner_at() as u16, packet.inner_bytes() as u32);
        frame.net = NetHeader::default();
        if slot != into {
            frames.swap(slot, into);
        }
        Arrival::Inner(packet.tunnel, packet.vtep)
    }

    #[inline]
    pub(super) fn payload(&self, frame: &RawFrame) -> Payload<'_> {
        self.ring.as_ref().map_or(Payload::EMPTY, |ring| ring.payload(frame))
    }

    #[inline]
    pub(super) fn complete(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.complete();
        }
    }
}

/// Whether a packet's UDP checksum is right. What it protects from is the wire; the frame is judged from its private
/// copy as ever.
#[cold]
fn verify(packet: &TunnelPacket, frame: &RawFrame, tail: Payload<'_>, scratch: &mut [u8]) -> bool {
    let headers = frame.headers();
    let whole = &mut scratch[..headers.len() + tail.bytes() as usize];
    whole[..headers.len()].copy_from_slice(headers);
    tail.copy_out(&mut whole[headers.len()..]);
    let udp = &whole[packet.udp_at..packet.udp_at + packet.udp_bytes];
    packet.verify(headers, Sum::default().bytes(udp))
}

/// Puts packets into the front-end's receiveq, and speaks for this host.
#[derive(Debug)]
pub(crate) struct RingTx {
    pub(super) ring: Option<Ring>,
    encap: Encap,
    scratch: Box<[u8]>,
    /// An outer header and the header copy behind it.
    start: Box<[u8; START_BYTES]>,
    is_touched: bool,
    counters: Arc<UnderlayCounters>,
    lines: Lines,
}

impl RingTx {
    /// See [`super::Tx::aim`].
    #[inline]
    pub(super) fn aim(&mut self, vtep: &IpAddr, tunnel: vxlan::Header, now_ns: u64) -> Result<(), DropReason> {
        if self.ring.is_none() {
            return Err(DropReason::PortDown);
        }
        let aimed = self.encap.aim(vtep, tunnel, now_ns);
        // At once: the next aim may have another question, or none.
        if self.encap.ask.is_some() {
            self.ask();
        }
        aimed
    }

    /// See [`super::Tx::send_run`].
    #[inline]
    pub(super) fn send_run<'f, const FAR: bool>(
        &mut self,
        frames: &[RawFrame],
        flow_hash: impl Fn(&RawFrame) -> u32,
        payload: impl Fn(usize) -> Payload<'f>,
    ) -> Result<Sent, DropReason> {
        let Self { ring, encap, is_touched, .. } = self;
        let Some(ring) = ring.as_mut() else { return Err(DropReason::PortDown) };
        let Some(before) = encap.before(flow_hash) else { return Ok(Sent::default()) };
        let was_broken = ring.is_broken();
        let sent = ring.send_run::<FAR, _, _>(frames, before, |_| None, payload).map_err(refusal);
        *is_touched |= sent.is_ok_and(|sent| sent.frames > 0);
        if !was_broken
            && ring.is_broken()
            && let Some(fault) = ring.fault()
        {
            self.lines.report(0, fault);
        }
        sent
    }

    /// One frame, at once.
    #[inline]
    pub(super) fn send(&mut self, inner: Inner<'_>) -> Result<(), DropReason> {
        let Self { ring, encap, scratch, start, is_touched, .. } = self;
        let Some(ring) = ring.as_mut() else { return Err(DropReason::PortDown) };
        let was_broken = ring.is_broken();
        let inner_bytes = inner.bytes();
        let outer = encap.header(inner_bytes);
        let sent = outer.and_then(|outer| {
            let result = if outer.is_summed() {
                // What is summed is what is sent: a private copy.
                let whole = &mut scratch[..inner_bytes];
                whole[..inner.header.len()].copy_from_slice(inner.header);
                inner.payload.copy_out(&mut whole[inner.header.len()..]);
                let outer = outer.finish_summed(inner_bytes, inner.flow_hash, Sum::default().bytes(whole));
                ring.send(NetHeader::default(), outer, Payload::private(whole))
            } else if inner.payload.bytes() == 0 {
                // Private already, all of it.
                let outer = outer.finish(inner_bytes, inner.flow_hash);
                ring.send(NetHeader::default(), outer, Payload::private(inner.header))
            } else if inner.header.len() <= HEADER_COPY_BYTES {
                let outer = outer.finish(inner_bytes, inner.flow_hash);
                start[..outer.len()].copy_from_slice(outer);
                let bytes = outer.len() + inner.header.len();
                start[outer.len()..bytes].copy_from_slice(inner.header);
                ring.send(NetHeader::default(), &start[..bytes], inner.payload)
            } else {
                // A finished piece, nearly all of it private already.
                let whole = &mut scratch[..inner_bytes];
                whole[..inner.header.len()].copy_from_slice(inner.header);
                inner.payload.copy_out(&mut whole[inner.header.len()..]);
                ring.send(NetHeader::default(), outer.finish(inner_bytes, inner.flow_hash), Payload::private(whole))
            };
            result.map_err(refusal)
        });
        *is_touched |= sent.is_ok();
        if !was_broken
            && ring.is_broken()
            && let Some(fault) = ring.fault()
        {
            self.lines.report(0, fault);
        }
        sent
    }

    #[cold]
    fn ask(&mut self) {
        let ask = self.encap.ask.take();
        if let Some(question) = ask.and_then(|ask| host::question(&self.encap.station, ask)) {
            self.say(question.bytes(), Payload::EMPTY);
        }
    }

    /// Sends what this host itself has to say. What does not go out is as good as lost on the wire.
    fn say(&mut self, header: &[u8], payload: Payload<'_>) {
        let Some(ring) = &mut self.ring else { return };
        if ring.send(NetHeader::default(), header, payload).is_ok() {
            self.is_touched = true;
            self.counters.tx_host.add(1);
        }
    }

    pub(super) fn hear(&mut self, frame: &RawFrame, tail: Payload<'_>, now_ns: u64) -> Result<(), DropReason> {
        let Encap { station, neighbours, .. } = &mut self.encap;
        match host::hear(station, neighbours, frame.headers(), now_ns)? {
            Heard::Noted => {}
            Heard::Answer(message) => self.say(message.bytes(), Payload::EMPTY),
            Heard::Echo(message) => self.say(message.bytes(), tail),
        }
        Ok(())
    }

    /// Shows everything to the front-end; returns how many times it was notified.
    #[inline]
    pub(super) fn flush(&mut self) -> u64 {
        if !std::mem::take(&mut self.is_touched) {
            return 0;
        }
        self.ring.as_mut().map_or(0, |ring| u64::from(ring.flush()))
    }
}

fn refusal(error: SendError) -> DropReason {
    match error {
        SendError::Full => DropReason::UnderlayFull,
        SendError::Disabled => DropReason::PortDown,
        SendError::BufferTooSmall | SendError::Fault(_) => DropReason::BadReceiveChain,
    }
}
