//! Everything that a worker can send to: the receiveqs of its ports' guests, its underlays, and the other workers.

use std::net::IpAddr;
use std::sync::Arc;

use dreamwire_vhost::frame::{Bare, NetHeader, RawFrame};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{BURST, Ring, SendError, Sent};
use foldhash::quality::FixedState;

use super::fault_log::FaultLog;
use super::handoff::Outbox;
use super::outgoing::{Outgoing, Run};
use crate::burst::NextHop;
use crate::counters::UnderlayCounters;
use crate::drop_reason::DropReason;
use crate::mac::Mac;
use crate::pieces::Pieces;
use crate::snapshot::{NetworkId, PORTS_MAX, Port, PortId, Snapshot, UNDERLAYS_MAX, UnderlayId, WorkerId};
use crate::stage::parse::flow_hash;
use crate::underlay::{Inner, Staged, Tx};
use crate::vxlan;

/// One guest's receiveqs.
#[derive(Debug, Default)]
struct Sinks {
    /// By queue pair.
    rings: Vec<Option<Sink>>,
    /// The queue pairs that may be sent to.
    enabled: Vec<u16>,
}

#[derive(Debug)]
struct Sink {
    ring: Ring,
    /// What its guest can do: negotiated virtio feature bits.
    features: u64,
    /// Something was sent since the last flush.
    touched: bool,
}

impl Sink {
    /// Puts a frame into the ring, cut if the guest cannot take it whole, or counts at its port why not.
    #[inline(never)]
    fn send(&mut self, pieces: &mut Pieces, port: &Port, snapshot: &Snapshot, frame: Outgoing<'_>) -> Sent {
        let mut sent = Sent::default();
        let mut send = |net, header: &[u8], payload: Payload<'_>| match self.ring.send(net, header, payload) {
            Ok(()) => sent += Sent { frames: 1, bytes: header.len() as u64 + u64::from(payload.bytes()) },
            Err(error) => port.counters.drops.add(refusal(error), 1),
        };
        match frame.offload() {
            Some(offload) if !offload.suits(self.features) => {
                let finished = |header: &[u8], payload: Payload<'_>| send(NetHeader::default(), header, payload);
                let count = pieces.cut(*offload, frame.header(), frame.payload(), finished);
                if let Some(network) = snapshot.network(frame.network()) {
                    network.counters.cut_copies.add(count - 1);
                }
            }
            _ => send(frame.net_header().unwrap_or_default(), frame.header(), frame.payload()),
        }
        sent
    }
}

#[derive(Debug)]
struct Uplink {
    tx: Tx,
    counters: Arc<UnderlayCounters>,
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Outlets {
    /// By port.
    sinks: Vec<Sinks>,
    /// Rings to be flushed: port and queue pair.
    touched: Vec<(PortId, u16)>,
    /// By underlay.
    uplinks: Vec<Option<Uplink>>,
    /// The other workers.
    pub(super) outbox: Outbox,
    pieces: Pieces,
    /// Chooses a flow's queue and outer source port. Not seeded at random: both stay the same when the daemon is started
    /// again, and with them the flow's order. Whoever aims at one queue has no more of it than with one flow.
    hasher: FixedState,
    now_ns: u64,
    /// Here, because here receiveqs are found broken.
    pub(super) fault_log: FaultLog,
}

impl Default for Outlets {
    fn default() -> Self {
        Self {
            sinks: (0..PORTS_MAX).map(|_| Sinks::default()).collect(),
            touched: Vec::with_capacity(PORTS_MAX),
            uplinks: (0..UNDERLAYS_MAX).map(|_| None).collect(),
            outbox: Outbox::default(),
            pieces: Pieces::default(),
            hasher: FixedState::default(),
            now_ns: 0,
            fault_log: FaultLog::default(),
        }
    }
}

impl Outlets {
    /// Of a worker with others beside it, if `outbox` has any.
    pub(super) fn linked(outbox: Outbox) -> Self {
        Self { outbox, ..Self::default() }
    }

    /// The time, at the start of a turn.
    #[inline]
    pub(super) fn set_now(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
        self.fault_log.set_now(now_ns);
    }

    /// Takes over a guest's receiveq.
    pub(crate) fn attach(&mut self, port: PortId, pair: u16, ring: Ring) {
        let sinks = &mut self.sinks[usize::from(port.0)];
        let pair = usize::from(pair);
        if sinks.rings.len() <= pair {
            sinks.rings.resize_with(pair + 1, || None);
        }
        sinks.rings[pair] = Some(Sink { features: ring.features(), ring, touched: false });
        sinks.list_enabled();
        // A place for each ring, so that sending never allocates.
        let rings: usize = self.sinks.iter().map(|sinks| sinks.rings.len()).sum();
        self.touched.reserve(rings);
    }

    /// Gives a guest's receiveq back, flushed.
    pub(crate) fn detach(&mut self, port: PortId, pair: u16) -> Option<Ring> {
        let sinks = &mut self.sinks[usize::from(port.0)];
        let sink = sinks.rings.get_mut(usize::from(pair))?.take()?;
        sinks.list_enabled();
        Some(sink.ring)
    }

    /// The attached receiveqs: port, queue pair, ring.
    pub(crate) fn rings(&self) -> impl Iterator<Item = (PortId, u16, &Ring)> {
        self.sinks.iter().enumerate().flat_map(|(port, sinks)| {
            let rings = sinks.rings.iter().enumerate();
            rings.filter_map(move |(pair, sink)| Some((PortId(port as u16), pair as u16, &sink.as_ref()?.ring)))
        })
    }

    /// The receiveq of queue pair `pair`, if attached.
    pub(crate) fn ring(&self, port: PortId, pair: u16) -> Option<&Ring> {
        Some(&self.sinks.get(usize::from(port.0))?.rings.get(usize::from(pair))?.as_ref()?.ring)
    }

    pub(crate) fn add_uplink(&mut self, id: UnderlayId, tx: Tx, counters: Arc<UnderlayCounters>) {
        self.uplinks[usize::from(id.0)] = Some(Uplink { tx, counters });
    }

    pub(crate) fn remove_uplink(&mut self, id: UnderlayId) {
        self.uplinks[usize::from(id.0)] = None;
    }

    /// The place for the ring that an underlay sends through, if it has one.
    pub(super) fn uplink_ring(&mut self, id: UnderlayId) -> Option<&mut Option<Ring>> {
        self.uplinks.get_mut(usize::from(id.0))?.as_mut()?.tx.ring()
    }

    pub(super) fn set_next_hops(&mut self, id: UnderlayId, told: &[(IpAddr, Mac)]) {
        if let Some(uplink) = self.uplinks.get_mut(usize::from(id.0)).and_then(Option::as_mut) {
            uplink.tx.set_next_hops(told);
        }
    }

    /// Tells an underlay what came for this host itself. `Err`: it did not.
    #[cold]
    pub(crate) fn hear(&mut self, id: UnderlayId, frame: &RawFrame, payload: Payload<'_>) -> Result<(), DropReason> {
        match &mut self.uplinks[usize::from(id.0)] {
            Some(uplink) => uplink.tx.hear(frame, payload, self.now_ns),
            None => Err(DropReason::Removed),
        }
    }

    /// Sends frames to a port: puts them into its guest's ring, or hands them to the worker that has it.
    #[inline]
    pub(crate) fn send_to_port(&mut self, snapshot: &Snapshot, id: PortId, frames: Run<'_>) {
        let Some(port) = snapshot.port(id) else {
            frames.for_each(|frame| self.count_removed(snapshot, frame.network()));
            return;
        };
        // Where its rings are counts, not where the snapshot has them: while a port moves they differ. Not so with a policy: the
        // worker that the snapshot names judges, and nobody else.
        let is_elsewhere = port.worker != snapshot.worker;
        if is_elsewhere && (port.policy.is_some() || self.sinks[usize::from(id.0)].enabled.is_empty()) {
            self.hand_off(snapshot, port.worker, NextHop::Port(id), frames);
        } else {
            self.deliver(snapshot, id, port, frames);
        }
    }

    /// Sends frames to a port that must be here, for another worker, which may know another snapshot.
    pub(crate) fn deliver_to_port(&mut self, snapshot: &Snapshot, id: PortId, frames: Run<'_>) {
        let is_judged = |port: &&Port| port.policy.is_none() || port.worker == snapshot.worker;
        let known = snapshot.port(id).filter(is_judged);
        let known = known.filter(|port| frames.clone().all(|frame| frame.network() == port.network));
        match known {
            Some(port) => self.deliver(snapshot, id, port, frames),
            None => frames.for_each(|frame| self.count_removed(snapshot, frame.network())),
        }
    }

    /// Counts the end of a frame whose destination is not there any more.
    #[cold]
    pub(crate) fn count_removed(&mut self, snapshot: &Snapshot, network: NetworkId) {
        match snapshot.network(network) {
            Some(network) => network.counters.drops.add(DropReason::Removed, 1),
            None => self.outbox.count_removed(),
        }
    }

    /// Hands frames to another worker, or counts at their network that it does not keep up.
    #[inline(never)]
    pub(crate) fn hand_off(&mut self, snapshot: &Snapshot, to: WorkerId, next_hop: NextHop, frames: Run<'_>) {
        for frame in frames {
            if !self.outbox.put(to, next_hop, frame)
                && let Some(network) = snapshot.network(frame.network())
            {
                network.counters.drops.add(DropReason::HandoffFull, 1);
            }
        }
    }

    /// Puts frames into a guest's receiveqs, or counts at the port why not.
    #[inline]
    fn deliver(&mut self, snapshot: &Snapshot, id: PortId, port: &Port, frames: Run<'_>) {
        match self.sinks[usize::from(id.0)].enabled[..] {
            [pair] => self.fill(snapshot, id, port, pair, frames),
            [] => port.counters.drops.add(DropReason::PortDown, frames.len() as u64),
            _ => self.deliver_by_flow(snapshot, id, port, frames),
        }
    }

    /// One flow, one queue: its frames stay in order. Those in a row for one queue share what has to be looked up for it.
    #[inline(never)]
    fn deliver_by_flow(&mut self, snapshot: &Snapshot, id: PortId, port: &Port, mut frames: Run<'_>) {
        let mut queues = [0; BURST];
        let pairs = &self.sinks[usize::from(id.0)].enabled;
        for (queue, frame) in queues.iter_mut().zip(frames.clone()) {
            let flow_hash = u64::from(flow_hash(&self.hasher, frame.header()));
            // A hash of 32 bits times the number of queues, shifted back: an even spread without a division.
            *queue = pairs[((flow_hash * pairs.len() as u64) >> 32) as usize];
        }
        for alike in queues[..frames.len()].chunk_by(|queue, next| queue == next) {
            self.fill(snapshot, id, port, alike[0], frames.split_off(alike.len()));
        }
    }

    /// Puts frames into one of a guest's receiveqs. What the receiver cannot do itself is done first.
    #[inline(always)]
    fn fill(&mut self, snapshot: &Snapshot, id: PortId, port: &Port, pair: u16, frames: Run<'_>) {
        let sink = self.sinks[usize::from(id.0)].rings[usize::from(pair)].as_ref();
        if sink.is_some_and(|sink| sink.ring.is_far()) {
            self.fill_far(snapshot, id, port, pair, frames);
        } else {
            self.fill_as::<false>(snapshot, id, port, pair, frames);
        }
    }

    /// Apart: registers and stack that it takes are not those of the others.
    #[inline(never)]
    fn fill_far(&mut self, snapshot: &Snapshot, id: PortId, port: &Port, pair: u16, frames: Run<'_>) {
        self.fill_as::<true>(snapshot, id, port, pair, frames);
    }

    /// For a guest whose driver is far away, or not ([`Ring::send_run`]).
    #[inline(always)]
    fn fill_as<const FAR: bool>(
        &mut self,
        snapshot: &Snapshot,
        id: PortId,
        port: &Port,
        pair: u16,
        mut frames: Run<'_>,
    ) {
        // The port may have fewer queues in this snapshot than its guest still has rings here.
        let sink = self.sinks[usize::from(id.0)].rings[usize::from(pair)].as_mut();
        let (Some(sink), Some(counters)) = (sink, port.counters.rings.get(usize::from(2 * pair))) else {
            port.counters.drops.add(DropReason::PortDown, frames.len() as u64);
            return;
        };
        let was_broken = sink.ring.is_broken();
        let mut sent = Sent::default();
        while frames.len() > 0 {
            let suited = frames.suited(sink.features);
            if suited > 0 {
                let (net, payload) = (|ahead| frames.ahead(ahead).net_header(), |ahead| frames.ahead(ahead).payload());
                match sink.ring.send_run::<FAR, _, _>(&frames.raw()[..suited], Bare, net, payload) {
                    Ok(run) => {
                        sent += run;
                        frames.leave_out(run.frames as usize);
                    }
                    // Where there is no room for the first of them there is none for the others.
                    Err(error) => {
                        port.counters.drops.add(refusal(error), suited as u64);
                        frames.leave_out(suited);
                    }
                }
            }
            if let Some(frame) = frames.next() {
                sent += sink.send(&mut self.pieces, port, snapshot, frame);
            }
        }
        if sent.frames > 0 {
            counters.traffic.add(sent.frames, sent.bytes);
            if !sink.touched {
                sink.touched = true;
                self.touched.push((id, pair));
            }
        }
        if let Some(fault) = sink.ring.fault().filter(|_| !was_broken && sink.ring.is_broken()) {
            self.fault_log.report(snapshot, id, 2 * pair, fault);
        }
    }

    /// Sends frames of one network to another host, or hands them to the worker that has the underlay.
    #[inline]
    pub(crate) fn send_to_vtep(&mut self, snapshot: &Snapshot, vtep: &IpAddr, network: NetworkId, frames: Run<'_>) {
        if !self.deliver_to_vtep(snapshot, vtep, network, frames.clone()) {
            self.hand_off_to_vtep(snapshot, vtep, network, frames);
        }
    }

    #[cold]
    fn hand_off_to_vtep(&mut self, snapshot: &Snapshot, vtep: &IpAddr, network: NetworkId, frames: Run<'_>) {
        let tunnel = snapshot.network(network).and_then(|network| network.tunnel.as_ref());
        let worker = tunnel.map(|tunnel| snapshot.uplink_worker(tunnel.underlay));
        match worker.filter(|worker| *worker != snapshot.worker) {
            Some(worker) => self.hand_off(snapshot, worker, NextHop::Vtep(*vtep), frames),
            None => frames.for_each(|_| self.count_removed(snapshot, network)),
        }
    }

    /// Sends frames of network `id` to another host, or counts at the network why not; false, with nothing counted, if its
    /// underlay is not here. A tunnel carries finished frames only.
    #[inline]
    #[must_use]
    pub(crate) fn deliver_to_vtep(
        &mut self,
        snapshot: &Snapshot,
        vtep: &IpAddr,
        id: NetworkId,
        frames: Run<'_>,
    ) -> bool {
        let tunnel = snapshot.network(id).and_then(|network| network.tunnel.as_ref());
        let uplink = tunnel.and_then(|tunnel| self.uplinks[usize::from(tunnel.underlay.0)].as_ref());
        if uplink.is_some_and(|uplink| uplink.tx.is_far()) {
            self.deliver_to_vtep_far(snapshot, vtep, id, frames)
        } else {
            self.deliver_to_vtep_as::<false>(snapshot, vtep, id, frames)
        }
    }

    /// As [`Outlets::fill_far`].
    #[inline(never)]
    fn deliver_to_vtep_far(&mut self, snapshot: &Snapshot, vtep: &IpAddr, id: NetworkId, frames: Run<'_>) -> bool {
        self.deliver_to_vtep_as::<true>(snapshot, vtep, id, frames)
    }

    /// As [`Outlets::fill_as`].
    #[inline(always)]
    fn deliver_to_vtep_as<const FAR: bool>(
        &mut self,
        snapshot: &Snapshot,
        vtep: &IpAddr,
        id: NetworkId,
        mut frames: Run<'_>,
    ) -> bool {
        let Some(network) = snapshot.network(id) else { return false };
        let tunnel = network.tunnel.as_ref();
        let uplink = tunnel.and_then(|tunnel| Some((tunnel, self.uplinks[usize::from(tunnel.underlay.0)].as_mut()?)));
        let Some((tunnel, uplink)) = uplink else { return false };
        let now_ns = self.now_ns;
        let mut sent = Sent::default();
        let mut aimed = None;
        // Whether the wire takes runs, as far as is known.
        let mut takes_runs = true;
        while let Some(first) = frames.first() {
            let group = if tunnel.carries_group { first.group(snapshot) } else { 0 };
            if aimed != Some(group) {
                aimed = None;
                if let Err(reason) = uplink.tx.aim(vtep, vxlan::Header::new(tunnel.vni, group), now_ns) {
                    network.counters.drops.add(reason, 1);
                    frames.leave_out(1);
                    continue;
                }
                aimed = Some(group);
            }
            let finished = match takes_runs {
                true if tunnel.carries_group => frames.of_one_origin().min(frames.suited(0)),
                true => frames.suited(0),
                false => 0,
            };
            if finished > 0 {
                let (hash, payload) = (
                    |frame: &RawFrame| flow_hash(&self.hasher, frame.headers()),
                    |ahead| frames.ahead(ahead).payload(),
                );
                match uplink.tx.send_run::<FAR>(&frames.raw()[..finished], hash, payload) {
                    Ok(run) => {
                        sent += run;
                        takes_runs = run.frames > 0;
                        frames.leave_out(run.frames as usize);
                        if run.frames as usize == finished {
                            continue;
                        }
                    }
                    // As at a guest's.
                    Err(reason) => {
                        network.counters.drops.add(reason, finished as u64);
                        frames.leave_out(finished);
                        continue;
                    }
                }
            }
            let Some(frame) = frames.next() else { break };
            let flow_hash = flow_hash(&self.hasher, frame.header());
            let mut send = |header: &[u8], payload: Payload<'_>| {
                if uplink.tx.is_full() {
                    uplink.flush(snapshot);
                }
                let inner = Inner { network: id, flow_hash, header, payload };
                match uplink.tx.stage(inner) {
                    Ok(Staged::Waiting) => {}
                    Ok(Staged::Sent) => sent += Sent { frames: 1, bytes: inner.bytes() as u64 },
                    Err(reason) => network.counters.drops.add(reason, 1),
                }
            };
            match frame.offload() {
                None => send(frame.header(), frame.payload()),
                Some(offload) => {
                    let count = self.pieces.cut(*offload, frame.header(), frame.payload(), send);
                    network.counters.cut_copies.add(count - 1);
                }
            }
        }
        if sent.frames > 0 {
            network.counters.tunnel_tx.add(sent.frames, sent.bytes);
        }
        true
    }

    /// Shows all that was sent to guests and to the kernel.
    #[inline]
    pub(crate) fn flush(&mut self, snapshot: &Snapshot) {
        for (id, pair) in self.touched.drain(..) {
            let Some(Some(sink)) = self.sinks[usize::from(id.0)].rings.get_mut(usize::from(pair)) else { continue };
            sink.touched = false;
            let was_broken = sink.ring.is_broken();
            if sink.ring.flush()
                && let Some(port) = snapshot.port(id)
            {
                port.counters.rings[usize::from(2 * pair)].calls.add(1);
            }
            if sink.ring.is_broken()
                && !was_broken
                && let Some(fault) = sink.ring.fault()
            {
                self.fault_log.report(snapshot, id, 2 * pair, fault);
            }
        }
        for uplink in self.uplinks.iter_mut().flatten() {
            uplink.flush(snapshot);
        }
    }
}

impl Sinks {
    fn list_enabled(&mut self) {
        self.enabled.clear();
        let rings = self.rings.iter().enumerate();
        let usable = rings.filter(|(_, sink)| sink.as_ref().is_some_and(|sink| sink.ring.enabled()));
        self.enabled.extend(usable.map(|(pair, _)| pair as u16));
    }
}

impl Uplink {
    #[inline]
    fn flush(&mut self, snapshot: &Snapshot) {
        let calls = self.tx.flush(|id, bytes, fate| {
            let Some(network) = snapshot.network(id) else { return };
            match fate {
                Ok(()) => network.counters.tunnel_tx.add(1, u64::from(bytes)),
                Err(reason) => network.counters.drops.add(reason, 1),
            }
        });
        if calls > 0 {
            self.counters.tx_calls.add(calls);
        }
    }
}

fn refusal(error: SendError) -> DropReason {
    match error {
        SendError::Full => DropReason::RingFull,
        SendError::Disabled => DropReason::PortDown,
        SendError::BufferTooSmall | SendError::Fault(_) => DropReason::BadReceiveChain,
    }
}
