//! One worker's state, and one turn of its loop: the straight line that every frame takes.

use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crossbeam::queue::ArrayQueue;
use dreamwire_policy::{ConnectionRow, Direction, Key};
use dreamwire_vhost::frame::{HEADER_COPY_BYTES, RawFrame};
use dreamwire_vhost::ring::Ring;

use super::RingRow;
use super::handoff::{Inbox, Links, PARCELS, SEEN_MAX};
use super::outlets::Outlets;
use crate::burst::{Burst, NextHop, Origin};
use crate::counters::{UnderlayCounters, WorkerCounters};
use crate::fdb::{Fdb, FdbRow, Learned, Location, Seen};
use crate::flow_cache::FlowCache;
use crate::mac::Mac;
use crate::perimeter::events::Event;
use crate::perimeter::{Perimeter, Perimeters};
use crate::snapshot::{Network, NetworkId, PORTS_MAX, Port, PortId, Snapshot, UNDERLAYS_MAX, UnderlayId};
use crate::stage::accept::accept;
use crate::stage::admit::admit;
use crate::stage::decap::decap;
use crate::stage::meter::meter;
use crate::stage::parse::ETHERNET_BYTES;
use crate::stage::police::police;
use crate::stage::recall::recall;
use crate::stage::receive::receive;
use crate::stage::switch::switch;
use crate::stage::transmit::{Tails, transmit};
use crate::underlay::{Rx, Underlay};

/// Kicks of an untouched ring before its memory is believed not to be shared. QEMU kicks once by itself at the start.
const KICKS_IN_VAIN_MAX: u32 = 2;

/// Turns in a row that a transmitq may be found empty before it counts as idle: some 100 µs of an otherwise idle worker.
const EMPTY_TURNS_MAX: u32 = 1024;

/// Idle transmitqs looked at in one turn, so that many silent guests do not slow down those that talk. A worker that
/// sleeps is told by their kicks.
const IDLE_PER_TURN: usize = 4;

/// All idle ones are looked at this often at least, however long turns are: with 510 of them a frame costs the worker 62 ns,
/// with a lap of 200 µs and eight a turn 75 (docs/performance.md).
const IDLE_LAP_NS: u64 = 500_000;

/// Parcels that a turn takes from one other worker, so that its own guests have their turn too.
const PARCELS_PER_TURN: usize = 4;

/// Learned addresses that a turn takes from one other worker.
const SEEN_PER_TURN: usize = 256;

/// How often a part of the table of addresses is swept.
const SWEEP_NS: u64 = 1_000_000_000;

/// A guest's transmitq.
#[derive(Debug)]
struct Source {
    port: PortId,
    queue: u16,
    ring: Ring,
    flows: FlowCache<()>,
    /// Turns since something was in it.
    empty_turns: u32,
    kicks: u32,
    kicked_but_empty: bool,
}

impl Source {
    /// The port and network that it is served for. `None` if it is not served: quarantined, its port or network is not
    /// in the snapshot, or the port has no such queue there.
    #[inline]
    fn place<'s>(&self, snapshot: &'s Snapshot) -> Option<(&'s Port, &'s Network)> {
        let port = snapshot.port(self.port)?;
        let network = snapshot.network(port.network)?;
        let has_queue = usize::from(self.queue) < port.counters.rings.len();
        (has_queue && !self.ring.is_broken()).then_some((port, network))
    }
}

/// An underlay's receiving half.
#[derive(Debug)]
struct Inlet {
    id: UnderlayId,
    rx: Rx,
    flows: FlowCache<Option<Origin>>,
    counters: Arc<UnderlayCounters>,
}

/// What a worker owns. Public for tests and harnesses that run turns themselves.
#[derive(Debug)]
pub struct Worker {
    snapshot: Arc<Snapshot>,
    /// Those up to `busy` are looked at in every turn, the others now and then.
    sources: Vec<Source>,
    busy: usize,
    /// The next idle one to be looked at, counted from `busy`.
    next_idle: usize,
    /// When all idle ones had been looked at.
    idle_lap_ns: u64,
    inlets: Vec<Inlet>,
    inbox: Inbox,
    outlets: Outlets,
    perimeters: Perimeters,
    fdb: Fdb,
    burst: Burst,
    /// For frames that are made here.
    own_flows: FlowCache<Option<PortId>>,
    counters: Arc<WorkerCounters>,
    now_ns: u64,
    /// When old addresses were last looked for.
    swept_ns: u64,
}

impl Worker {
    /// A worker without ports, and without others beside it.
    pub fn new(snapshot: Arc<Snapshot>, counters: Arc<WorkerCounters>) -> Self {
        Self::linked(snapshot, counters, Links::default())
    }

    /// A worker without ports, one of several.
    pub fn linked(snapshot: Arc<Snapshot>, counters: Arc<WorkerCounters>, links: Links) -> Self {
        let Links { mut outbox, inbox } = links;
        let mut fdb = Fdb::default();
        if !outbox.is_alone() {
            outbox.count_at(&counters);
            fdb.keep_news();
            fdb.begin_at(snapshot.worker);
        }
        Self {
            snapshot,
            sources: Vec::with_capacity(PORTS_MAX),
            busy: 0,
            next_idle: 0,
            idle_lap_ns: 0,
            inlets: Vec::with_capacity(UNDERLAYS_MAX),
            inbox,
            outlets: Outlets::linked(outbox),
            perimeters: Perimeters::default(),
            fdb,
            burst: Burst::default(),
            own_flows: FlowCache::default(),
            counters,
            now_ns: 0,
            swept_ns: 0,
        }
    }

    /// Carries one burst from each source that is not idle to its end. Returns the number of frames and datagrams taken. About once a
    /// second it forgets old addresses, busy or not.
    pub fn turn(&mut self, now_ns: u64) -> usize {
        self.now_ns = now_ns;
        self.outlets.set_now(now_ns);
        self.perimeters.set_now(now_ns);
        if now_ns.saturating_sub(self.swept_ns) >= SWEEP_NS {
            self.swept_ns = now_ns;
            self.fdb.sweep(now_ns);
        }
        let mut moved = self.turn_inbox(PARCELS_PER_TURN);
        moved += self.turn_busy() + self.turn_idle();
        for index in 0..self.inlets.len() {
            moved += self.turn_inlet(index);
        }
        self.ship();
        if moved > 0 {
            self.counters.busy_turns.add(1);
        } else {
            self.counters.empty_turns.add(1);
        }
        moved
    }

    /// Takes what other workers have for us, up to `parcels` from each; returns the number of frames.
    #[inline]
    fn turn_inbox(&mut self, parcels: usize) -> usize {
        let mut moved = 0;
        for sender in 0..self.inbox.senders() {
            for _ in 0..SEEN_PER_TURN {
                let Some(seen) = self.inbox.hear(sender) else { break };
                self.hear(seen);
            }
            for _ in 0..parcels {
                let Some(mut parcel) = self.inbox.take(sender) else { break };
                let Self { snapshot, perimeters, outlets, fdb, .. } = self;
                if snapshot.has_policies {
                    parcel.burst.unask();
                }
                admit(&mut parcel.burst, snapshot, perimeters, fdb);
                meter(&mut parcel.burst, snapshot, perimeters, false);
                accept(&parcel, snapshot, perimeters, outlets);
                outlets.flush(snapshot);
                moved += parcel.burst.length;
                self.inbox.give_back(sender, parcel);
            }
        }
        if moved > 0 {
            self.counters.handoff_rx.add(moved as u64);
        }
        moved
    }

    /// Takes everything that other workers have shipped so far.
    pub fn empty_inbox(&mut self) {
        self.turn_inbox(PARCELS);
        for sender in 0..self.inbox.senders() {
            // No more than there can be now: others may go on learning meanwhile.
            for _ in 0..SEEN_MAX {
                let Some(seen) = self.inbox.hear(sender) else { break };
                self.hear(seen);
            }
        }
    }

    /// Notes what another worker has learned, if it can be true by our snapshot.
    fn hear(&mut self, seen: Seen) {
        let Some(network) = self.snapshot.network(seen.network).filter(|network| network.learning) else { return };
        if holds(&self.snapshot, seen.network, seen.mac, seen.location)
            && self.fdb.hear(seen, self.now_ns, network.age_ns) == Learned::Refused
        {
            network.counters.learn_refused.add(1);
        }
    }

    /// Ships what is for other workers. Whatever hands something over ends with it.
    #[inline]
    fn ship(&mut self) {
        if self.outlets.outbox.is_alone() {
            return;
        }
        let (news, lost) = self.fdb.take_news();
        news.for_each(|seen| self.outlets.outbox.tell(seen));
        if lost > 0 {
            self.counters.handoff_unlearned.add(lost);
        }
        self.outlets.outbox.ship();
    }

    /// Before sleeping: has others wake us; false if they have left something already.
    pub(super) fn lie_down(&self) -> bool {
        self.inbox.lie_down()
    }

    /// After sleeping, or not.
    pub(super) fn get_up(&self) {
        self.inbox.get_up();
    }

    #[inline]
    fn turn_busy(&mut self) -> usize {
        let mut moved = 0;
        // From the end: one that becomes idle changes places with the last, which was looked at already.
        for index in (0..self.busy).rev() {
            let frames = self.turn_source(index);
            moved += frames;
            let source = &mut self.sources[index];
            source.empty_turns = if frames > 0 { 0 } else { source.empty_turns + 1 };
            if source.empty_turns > EMPTY_TURNS_MAX {
                self.busy -= 1;
                self.sources.swap(index, self.busy);
            }
        }
        moved
    }

    #[inline]
    fn turn_idle(&mut self) -> usize {
        let mut moved = 0;
        let idle = self.sources.len() - self.busy;
        let is_overdue = self.now_ns - self.idle_lap_ns >= IDLE_LAP_NS;
        if is_overdue || idle <= IDLE_PER_TURN {
            self.idle_lap_ns = self.now_ns;
        }
        for _ in 0..if is_overdue { idle } else { idle.min(IDLE_PER_TURN) } {
            if self.busy + self.next_idle >= self.sources.len() {
                self.next_idle = 0;
                self.idle_lap_ns = self.now_ns;
            }
            let index = self.busy + self.next_idle;
            if self.sources[index].ring.has_work() {
                // Where it stood, another one stands that was looked at already, or none.
                let index = self.wake(index);
                moved += self.turn_source(index);
            } else {
                self.next_idle += 1;
            }
        }
        moved
    }

    /// Has a source looked at in every turn from now on; returns its new place.
    fn wake(&mut self, mut index: usize) -> usize {
        if index >= self.busy {
            self.sources.swap(index, self.busy);
            index = self.busy;
            self.busy += 1;
        }
        self.sources[index].empty_turns = 0;
        index
    }

    #[inline]
    fn turn_source(&mut self, index: usize) -> usize {
        let Self { snapshot, sources, outlets, perimeters, fdb, burst, now_ns, .. } = self;
        let source = &mut sources[index];
        let Some((port, network)) = source.place(snapshot) else { return 0 };
        if let Err(fault) = receive(burst, &mut source.ring, source.queue, source.port, port, network) {
            outlets.fault_log.report(snapshot, source.port, source.queue, fault);
            return 0;
        }
        if burst.length == 0 {
            return 0;
        }
        source.ring.expect_frames();
        outlets.outbox.begin();
        let is_known = snapshot.has_policies && recall(burst, source.port, port, snapshot, perimeters, fdb);
        if !is_known {
            police(burst, source.port, port, snapshot, perimeters);
            switch(burst, snapshot, fdb, &mut source.flows, |_, _| (), *now_ns);
            admit(burst, snapshot, perimeters, fdb);
        }
        meter(burst, snapshot, perimeters, true);
        transmit(burst, Tails::Ring(&source.ring), snapshot, perimeters, outlets);
        outlets.flush(snapshot);
        if source.ring.complete() {
            port.counters.rings[usize::from(source.queue)].calls.add(1);
        }
        burst.length
    }

    #[inline]
    fn turn_inlet(&mut self, index: usize) -> usize {
        let Self { snapshot, inlets, outlets, perimeters, fdb, burst, now_ns, .. } = self;
        let inlet = &mut inlets[index];
        let packets = decap(burst, inlet.id, &mut inlet.rx, &inlet.counters, snapshot, outlets);
        if packets > 0 {
            outlets.outbox.begin();
            let tag = |burst: &Burst, index: usize| Some(burst.origins[index]);
            switch(burst, snapshot, fdb, &mut inlet.flows, tag, *now_ns);
            if snapshot.has_policies {
                burst.unask();
            }
            admit(burst, snapshot, perimeters, fdb);
            meter(burst, snapshot, perimeters, true);
            transmit(burst, Tails::Datagrams(&inlet.rx), snapshot, perimeters, outlets);
            outlets.flush(snapshot);
            inlet.rx.complete();
        }
        packets
    }

    /// Carries one frame to its end that is made here in the name of a port's guest. It is guarded, learned from and
    /// switched like the guest's own. At most [`HEADER_COPY_BYTES`] and at least an Ethernet header; another is ignored, as
    /// is one for a port that the snapshot does not have.
    pub fn originate(&mut self, id: PortId, frame: &[u8]) {
        let Self { snapshot, outlets, perimeters, fdb, burst, now_ns, .. } = self;
        let Some(port) = snapshot.port(id).filter(|port| snapshot.network(port.network).is_some()) else { return };
        if !(ETHERNET_BYTES..=HEADER_COPY_BYTES).contains(&frame.len()) {
            return;
        }
        burst.length = 1;
        burst.frames[0] = RawFrame::EMPTY;
        burst.frames[0].header[..frame.len()].copy_from_slice(frame);
        burst.frames[0].header_bytes = frame.len() as u16;
        burst.frames[0].frame_bytes = frame.len() as u32;
        burst.networks[0] = port.network;
        burst.origins[0] = Origin::Port(id);
        burst.all_finished();
        burst.next_hops[0] = NextHop::Undecided;
        port.counters.originated.add(1);
        burst.unask();
        outlets.outbox.begin();
        police(burst, id, port, snapshot, perimeters);
        switch(burst, snapshot, fdb, &mut self.own_flows, |_, _| Some(id), *now_ns);
        admit(burst, snapshot, perimeters, fdb);
        meter(burst, snapshot, perimeters, true);
        transmit(burst, Tails::None, snapshot, perimeters, outlets);
        outlets.flush(snapshot);
        self.ship();
    }

    /// Replaces the snapshot between two turns; returns the old one, for the control thread to free.
    pub fn adopt(&mut self, snapshot: Arc<Snapshot>) -> Arc<Snapshot> {
        // What was shipped under an earlier snapshot names objects by its numbers. A number is given out again only after
        // everybody has adopted a snapshot without it, and whoever has, has shipped all that names it: it is here by now.
        self.empty_inbox();
        let old = std::mem::replace(&mut self.snapshot, snapshot);
        let snapshot = &self.snapshot;
        self.fdb.renew();
        self.perimeters.adopt(snapshot);
        self.fdb.retain(|network, mac, location| holds(snapshot, network, mac, location));
        old
    }

    /// Gives a port what its policy keeps, or takes it; returns the last one, for the control thread to free.
    pub fn guard(&mut self, port: PortId, perimeter: Option<Box<Perimeter>>) -> Option<Box<Perimeter>> {
        self.perimeters.guard(&self.snapshot, port, perimeter)
    }

    /// Adds the connections of a port with a policy that are in the next `rows.capacity()` places of its table from `first` on;
    /// whether there are more places.
    pub fn connection_rows(&self, port: PortId, first: usize, rows: &mut Vec<ConnectionRow>) -> bool {
        self.perimeters.rows(port, first, rows)
    }

    /// The connection of a port with a policy that carries such a packet.
    pub fn connection(&self, port: PortId, direction: Direction, key: &Key) -> Option<ConnectionRow> {
        self.perimeters.connection(port, direction, key)
    }

    /// Tells of single frames into `queue` from now on.
    pub fn tell(&mut self, queue: Arc<ArrayQueue<Event>>) {
        self.perimeters.events.tell_to(queue);
    }

    /// Takes a ring over: even `queue`s are guests' receiveqs, odd ones their transmitqs. One that was not detached
    /// before is given back: two sources on one ring would each believe to know its indices.
    pub fn attach(&mut self, port: PortId, queue: u16, mut ring: Ring) -> Option<Ring> {
        let replaced = self.detach(port, queue);
        if replaced.is_some() {
            tracing::error!(port = port.0, queue, "a ring was attached again without being detached");
        }
        ring.disable_kicks();
        // Whatever was used before the ring came here may not have been notified (a daemon that was killed); a
        // notification too many is harmless (VIRTIO 1.2 §2.7.7.1).
        ring.notify();
        if queue.is_multiple_of(2) {
            self.outlets.attach(port, queue / 2, ring);
        } else {
            let flows = FlowCache::default();
            self.sources.push(Source { port, queue, ring, flows, empty_turns: 0, kicks: 0, kicked_but_empty: false });
            self.wake(self.sources.len() - 1);
        }
        replaced
    }

    /// Gives a ring back.
    pub fn detach(&mut self, port: PortId, queue: u16) -> Option<Ring> {
        if queue.is_multiple_of(2) {
            return self.outlets.detach(port, queue / 2);
        }
        let index = self.sources.iter().position(|source| source.port == port && source.queue == queue)?;
        // Among the idle ones first: then the others keep their places.
        let last_busy = self.busy.saturating_sub(1);
        let index = if index < self.busy {
            self.sources.swap(index, last_busy);
            self.busy = last_busy;
            last_busy
        } else {
            index
        };
        Some(self.sources.swap_remove(index).ring)
    }

    /// Takes an underlay over.
    pub fn add_underlay(&mut self, id: UnderlayId, driver: impl Into<Underlay>) {
        let (rx, tx, counters) = driver.into().into_halves();
        self.inlets.push(Inlet { id, rx, flows: FlowCache::default(), counters: Arc::clone(&counters) });
        self.outlets.add_uplink(id, tx, counters);
    }

    /// Closes an underlay.
    pub fn remove_underlay(&mut self, id: UnderlayId) {
        self.outlets.remove_uplink(id);
        self.inlets.retain(|inlet| inlet.id != id);
    }

    /// Takes over one of the two rings of an underlay's front-end: 0 is its receiveq, 1 its transmitq. One that was not
    /// detached before is given back; so is one that the underlay has no use for.
    pub fn attach_wire(&mut self, id: UnderlayId, queue: u16, mut ring: Ring) -> Option<Ring> {
        ring.disable_kicks();
        // As for a port's: see `attach`.
        ring.notify();
        match self.wire_ring(id, queue) {
            Some(place) => place.replace(ring),
            None => Some(ring),
        }
    }

    /// Gives a ring of an underlay's front-end back.
    pub fn detach_wire(&mut self, id: UnderlayId, queue: u16) -> Option<Ring> {
        self.wire_ring(id, queue)?.take()
    }

    fn wire_ring(&mut self, id: UnderlayId, queue: u16) -> Option<&mut Option<Ring>> {
        match queue {
            0 => self.outlets.uplink_ring(id),
            1 => self.inlets.iter_mut().find(|inlet| inlet.id == id)?.rx.ring(),
            _ => None,
        }
    }

    /// For epoll.
    pub(super) fn underlay_descriptors(&self, id: UnderlayId) -> Vec<BorrowedFd<'_>> {
        self.inlets.iter().filter(|inlet| inlet.id == id).flat_map(|inlet| inlet.rx.descriptors()).collect()
    }

    /// Tells an underlay the cards of the next hops to these VTEPs, sorted by VTEP.
    pub fn set_next_hops(&mut self, id: UnderlayId, told: &[(IpAddr, Mac)]) {
        self.outlets.set_next_hops(id, told);
    }

    /// The rings that underlays receive from.
    fn wires(&mut self) -> impl Iterator<Item = &mut Ring> {
        let rings = self.inlets.iter_mut().filter_map(|inlet| inlet.rx.ring()?.as_mut());
        rings.filter(|ring| !ring.is_broken())
    }

    /// Sources that a turn looks at. No others: one that is not emptied must not keep the worker awake.
    fn served(&mut self) -> impl Iterator<Item = &mut Source> {
        let snapshot = &self.snapshot;
        self.sources.iter_mut().filter(|source| source.place(snapshot).is_some())
    }

    /// Whether every ring announces new work by a kick.
    pub fn may_sleep(&mut self) -> bool {
        self.served().all(|source| source.ring.kick().is_some()) && self.wires().all(|ring| ring.kick().is_some())
    }

    /// Asks all guests for kicks; true if one of them has work already.
    pub fn enable_kicks(&mut self) -> bool {
        let mut work = false;
        // Every ring has to be asked.
        for index in 0..self.sources.len() {
            if self.sources[index].place(&self.snapshot).is_some() && self.sources[index].ring.enable_kicks() {
                work = true;
                self.wake(index);
            }
        }
        self.wires().fold(work, |work, ring| ring.enable_kicks() | work)
    }

    /// Tells all guests that kicks are not needed while the worker polls.
    pub fn disable_kicks(&mut self) {
        self.served().for_each(|source| source.ring.disable_kicks());
        self.wires().for_each(Ring::disable_kicks);
    }

    /// Counts a kick that woke the worker.
    pub(super) fn kicked(&mut self, port: PortId, queue: u16) {
        let Some(index) = self.sources.iter().position(|source| source.port == port && source.queue == queue) else {
            return;
        };
        let index = self.wake(index);
        let source = &mut self.sources[index];
        let Some(known) = self.snapshot.port(port) else { return };
        let Some(counters) = known.counters.rings.get(usize::from(queue)) else { return };
        counters.kicks.add(1);
        source.kicks = source.kicks.saturating_add(1);
        let receiveq_untouched = self.outlets.ring(port, queue / 2).is_none_or(Ring::never_used);
        source.kicked_but_empty = source.kicks >= KICKS_IN_VAIN_MAX && source.ring.never_used() && receiveq_untouched;
        if source.kicked_but_empty && source.kicks == KICKS_IN_VAIN_MAX {
            tracing::warn!(
                port = %known.name,
                "the guest kicks but its rings stay empty here: is the VM's memory shared (share=on)?"
            );
        }
    }

    /// What was learned of a station.
    pub fn fdb_row(&self, network: NetworkId, mac: Mac) -> Option<FdbRow> {
        self.fdb.row(network, mac, self.now_ns)
    }

    /// The learned addresses.
    pub fn fdb_rows(&self) -> Vec<FdbRow> {
        self.fdb.rows(self.now_ns)
    }

    /// The attached rings.
    pub fn ring_rows(&self) -> Vec<RingRow> {
        let row = |port, queue, ring: &Ring, kicked_but_empty| RingRow {
            port,
            queue,
            size: ring.size(),
            enabled: ring.enabled(),
            quarantined: ring.fault().map(|fault| fault.to_string()),
            kicked_but_empty,
            far: queue.is_multiple_of(2).then(|| ring.is_far()),
        };
        let receiveqs = self.outlets.rings().map(|(port, pair, ring)| row(port, 2 * pair, ring, false));
        let transmitqs = self.sources.iter().map(|s| row(s.port, s.queue, &s.ring, s.kicked_but_empty));
        receiveqs.chain(transmitqs).collect()
    }
}

/// Whether a station may have been learned there.
fn holds(snapshot: &Snapshot, network: NetworkId, mac: Mac, location: Location) -> bool {
    snapshot.network(network).is_some_and(|known| {
        !known.static_macs.contains_key(&mac)
            && match location {
                Location::Port(port) => snapshot.port(port).is_some_and(|port| port.network == network),
                Location::Vtep(vtep) => known.tunnel.as_ref().is_some_and(|t| t.remotes.contains(&vtep)),
            }
    })
}
