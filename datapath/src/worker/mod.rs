//! A worker: the thread that owns ports' rings, underlays and tables, and alone touches them.
//!
//! Theory of operation. [`WorkerHandle::spawn`] starts a thread that runs [`Worker::turn`] over and over. A turn takes
//! one burst from every guest transmitq and every underlay and carries it through the pipeline to its end; between two
//! turns the worker holds no reference into anything, which makes that moment the quiescent state: commands from the
//! control thread (new snapshot, attach, detach) are carried out there, and the generation of the adopted snapshot is
//! announced. After a busy window in which nothing came, the worker asks every guest for kicks, looks once more, and
//! sleeps in epoll until a kick, a datagram or a command comes.
//!
//! Several workers share nothing but the hand-off (`handoff`): frames for another's ports, and learned addresses.
//!
//! A worker that panics ends the process: its guests' rings are in an unknown state, and a supervisor restarts us.

mod doorbell;
mod fault_log;
pub(crate) mod handoff;
mod mailbox;
pub(crate) mod outgoing;
pub(crate) mod outlets;
mod sleep;
mod turn;
/// What the doorbell is made of; its test has loom's in this place.
mod sync {
    pub(super) use std::sync::atomic::{AtomicBool, Ordering, fence};
}

use std::io;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use crossbeam::channel::bounded;
use crossbeam::queue::ArrayQueue;
use dreamwire_policy::{ConnectionRow, Direction, Key};
use dreamwire_vhost::ring::Ring;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::counters::WorkerCounters;
use crate::fdb::FdbRow;
use crate::mac::Mac;
use crate::perimeter::Perimeter;
use crate::perimeter::events::{self, Event};
use crate::snapshot::{NetworkId, PortId, Snapshot, UnderlayId};
use crate::underlay::Underlay;
pub use handoff::Links;
use mailbox::{Command, Mailbox};
use sleep::Sleeper;
pub use turn::Worker;

/// Where all workers' clocks begin: they compare times of what they have seen.
static STARTED: LazyLock<Instant> = LazyLock::new(Instant::now);

/// How long an adaptive worker polls after the last frame. A guest that answers at once does so in a few µs; a sleep and
/// wake-up cost about 10 µs.
const BUSY_WINDOW_NS: u64 = 50_000;

/// How often an idle worker wakes to forget old addresses.
const HOUSEKEEPING_MS: u16 = 1000;

/// How a worker waits for work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Polling {
    /// Never sleeps.
    Poll,
    /// Polls for a busy window after the last frame, then sleeps.
    #[default]
    Adaptive,
    /// Sleeps as soon as there is nothing to do.
    Interrupt,
}

/// How to start a worker.
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Its number, from 0.
    pub index: u16,
    /// CPU to pin to.
    pub cpu: Option<usize>,
    /// How it waits.
    pub polling: Polling,
}

/// The state of a ring at a worker, for `show port`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RingRow {
    /// Port.
    pub port: PortId,
    /// Ring index: even for the guest's receiveqs, odd for its transmitqs.
    pub queue: u16,
    /// Entries.
    pub size: u16,
    /// SET_VRING_ENABLE.
    pub enabled: bool,
    /// Why it was quarantined, if it was.
    pub quarantined: Option<String>,
    /// The guest kicked it but nothing ever appeared in it: the VM's memory is most likely not shared.
    pub kicked_but_empty: bool,
    /// Of a guest's receiveq: whether the guest's driver is as far away as memory ([`Ring::is_far`]).
    pub far: Option<bool>,
}

/// Places of a connection table that are read between two turns: some 20 µs.
const PLACES_AT_ONCE: usize = 1024;

/// A running worker. Methods may be called from any thread but the worker's own. Dropping it stops the worker.
#[derive(Debug)]
pub struct WorkerHandle {
    mailbox: Arc<Mailbox>,
    counters: Arc<WorkerCounters>,
    events: Arc<ArrayQueue<Event>>,
    thread: Option<JoinHandle<()>>,
}

impl WorkerHandle {
    /// Starts the thread of a worker that has no others beside it. Fails if the CPU does not exist or descriptors have run
    /// out.
    pub fn spawn(config: WorkerConfig, initial: Arc<Snapshot>) -> io::Result<Self> {
        Self::start(config, initial, Links::default())
    }

    /// Starts workers that hand frames to one another. A snapshot's [`Snapshot::worker`] is its place in the list.
    pub fn spawn_all(workers: Vec<(WorkerConfig, Arc<Snapshot>)>) -> io::Result<Vec<Self>> {
        let links = Links::mesh(workers.len())?;
        workers.into_iter().zip(links).map(|((config, initial), links)| Self::start(config, initial, links)).collect()
    }

    fn start(config: WorkerConfig, initial: Arc<Snapshot>, links: Links) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox::new()?);
        let counters = Arc::<WorkerCounters>::default();
        let events = events::queue();
        let mut sleeper = Sleeper::new(mailbox.wake())?;
        if let Some(wake) = links.inbox.wake() {
            sleeper.watch_inbox(wake)?;
        }
        let mut cpus = CpuSet::new();
        if let Some(cpu) = config.cpu {
            cpus.set(cpu)?;
        }
        let (pinned, pinning) = bounded(1);
        let thread = thread::Builder::new().name(format!("worker-{}", config.index)).spawn({
            let (mailbox, counters, events) = (Arc::clone(&mailbox), Arc::clone(&counters), Arc::clone(&events));
            move || {
                let result = config.cpu.map_or(Ok(()), |_| sched_setaffinity(Pid::from_raw(0), &cpus));
                let failed = result.is_err();
                let _ = pinned.send(result);
                if failed {
                    return;
                }
                let worker = AssertUnwindSafe(|| run(initial, &config, links, &mailbox, &counters, events, sleeper));
                if catch_unwind(worker).is_err() {
                    tracing::error!(worker = config.index, "a worker has panicked; the process ends");
                    std::process::abort();
                }
            }
        })?;
        match pinning.recv() {
            Ok(Ok(())) => Ok(Self { mailbox, counters, events, thread: Some(thread) }),
            Ok(Err(error)) => Err(error.into()),
            Err(_) => Err(io::Error::other("the worker thread ended at once")),
        }
    }

    /// Hands a new snapshot over; it takes effect at the next burst.
    pub fn publish(&self, snapshot: Arc<Snapshot>) {
        self.free_retired();
        self.mailbox.send(Command::Publish(snapshot));
    }

    /// The generation that the worker works with. It holds no reference to an older snapshot, nor to anything that only
    /// older ones name.
    pub fn adopted_generation(&self) -> u64 {
        self.free_retired();
        // Acquire: pairs with the worker's release after it has let go of the older snapshot.
        self.mailbox.adopted.load(Ordering::Acquire)
    }

    fn free_retired(&self) {
        while self.mailbox.retired.pop().is_some() {}
    }

    /// Hands a ring over.
    pub fn attach(&self, port: PortId, queue: u16, ring: Ring) {
        self.attach_all(port, vec![(queue, ring)]);
    }

    /// Hands rings over, all of them between the same two turns.
    pub fn attach_all(&self, port: PortId, rings: Vec<(u16, Ring)>) {
        self.mailbox.send(Command::Attach { port, rings });
    }

    /// Takes a ring back; returns when the worker has let go of it.
    pub fn detach(&self, port: PortId, queue: u16) -> Option<Ring> {
        Some(self.detach_all(port, vec![queue]).pop()?.1)
    }

    /// Takes back those of a port's rings that are there, all of them between the same two turns.
    pub fn detach_all(&self, port: PortId, queues: Vec<u16>) -> Vec<(u16, Ring)> {
        self.ask(|reply| Command::Detach { port, queues, reply }).unwrap_or_default()
    }

    /// Has the worker take everything that others have shipped to it so far; returns when it has.
    pub fn empty_inbox(&self) {
        self.ask(|reply| Command::EmptyInbox { reply });
    }

    /// Sends a frame in the name of a port's guest, as if it came from there; returns when it is on its way. It must be a
    /// whole Ethernet frame of at most 128 bytes (a header copy); another is ignored.
    pub fn originate(&self, port: PortId, frame: &[u8]) {
        // Waited for: whoever can have frames made must not be able to queue them.
        self.ask(|reply| Command::Originate { port, frame: frame.into(), reply });
    }

    /// Gives a port what its policy keeps, before the snapshot that has the policy is published; returns what it had before.
    /// `None` takes it.
    pub fn guard(&self, port: PortId, perimeter: Option<Box<Perimeter>>) -> Option<Box<Perimeter>> {
        self.ask(|reply| Command::Guard { port, perimeter, reply }).flatten()
    }

    /// The connections of a port with a policy, `limit` at most, and whether there are more.
    pub fn connections(&self, port: PortId, limit: usize) -> (Vec<ConnectionRow>, bool) {
        let mut all = Vec::new();
        self.read_connections(port, |rows| {
            all.extend(rows);
            all.len() <= limit
        });
        let has_more = all.len() > limit;
        all.truncate(limit);
        (all, has_more)
    }

    /// The connections of a port that carry packets like these. Each is looked up, but for ICMP, whose identifiers are not asked: the
    /// table is read for those.
    pub fn connections_of(&self, port: PortId, packets: &[(Direction, Key)]) -> Vec<ConnectionRow> {
        let (mut sought, known): (Vec<_>, Vec<_>) = packets.iter().partition(|(_, key)| key.is_icmp());
        let find = |&(direction, key): &(Direction, Key)| {
            self.ask(|reply| Command::FindConnection { port, direction, key, reply }).flatten()
        };
        let mut found: Vec<_> = known.iter().filter_map(find).collect();
        if !sought.is_empty() {
            self.read_connections(port, |rows| {
                for row in rows {
                    let before = sought.len();
                    sought.retain(|(direction, key)| !row.carries(key, *direction));
                    found.extend((sought.len() < before).then_some(row));
                }
                !sought.is_empty()
            });
        }
        found
    }

    /// Reads a port's connections part by part until `take` has enough. The worker goes on between parts of the table.
    fn read_connections(&self, port: PortId, mut take: impl FnMut(Vec<ConnectionRow>) -> bool) {
        for first in (0..).step_by(PLACES_AT_ONCE) {
            let rows = Vec::with_capacity(PLACES_AT_ONCE);
            let answer = self.ask(|reply| Command::ReadConnections { port, first, rows, reply });
            let Some((rows, more)) = answer else { return };
            if !take(rows) || !more {
                return;
            }
        }
    }

    /// What the worker has to tell of single frames since the last call. The worker is not disturbed.
    pub fn events(&self) -> impl Iterator<Item = Event> {
        std::iter::from_fn(|| self.events.pop())
    }

    /// Hands an underlay over.
    pub fn add_underlay(&self, id: UnderlayId, driver: impl Into<Underlay>) {
        self.mailbox.send(Command::AddUnderlay { id, driver: Box::new(driver.into()) });
    }

    /// Tells an underlay which cards the next hops to these VTEPs have: all that are known now.
    pub fn set_next_hops(&self, id: UnderlayId, mut told: Box<[(IpAddr, Mac)]>) {
        told.sort_unstable();
        self.mailbox.send(Command::SetNextHops { id, told });
    }

    /// Hands a ring of an underlay's front-end over.
    pub fn attach_wire(&self, id: UnderlayId, queue: u16, ring: Ring) {
        self.mailbox.send(Command::AttachWire { id, queue, ring: Box::new(ring) });
    }

    /// Takes a ring of an underlay's front-end back; returns when the worker has let go of it.
    pub fn detach_wire(&self, id: UnderlayId, queue: u16) -> Option<Ring> {
        self.ask(|reply| Command::DetachWire { id, queue, reply }).flatten().map(|ring| *ring)
    }

    /// Closes an underlay; returns when the worker has let go of it and its address and port are free again.
    pub fn remove_underlay(&self, id: UnderlayId) {
        self.ask(|reply| Command::RemoveUnderlay { id, reply });
    }

    /// What was learned of a station.
    pub fn station(&self, network: NetworkId, mac: Mac) -> Option<FdbRow> {
        self.ask(|reply| Command::FindStation { network, mac, reply }).flatten()
    }

    /// The learned addresses.
    pub fn fdb(&self) -> Vec<FdbRow> {
        self.ask(|reply| Command::ReadFdb { reply }).unwrap_or_default()
    }

    /// The attached rings.
    pub fn rings(&self) -> Vec<RingRow> {
        self.ask(|reply| Command::ReadRings { reply }).unwrap_or_default()
    }

    /// The loop's counters.
    pub fn counters(&self) -> &Arc<WorkerCounters> {
        &self.counters
    }

    fn ask<T>(&self, command: impl FnOnce(crossbeam::channel::Sender<T>) -> Command) -> Option<T> {
        let (reply, answer) = bounded(1);
        self.mailbox.send(command(reply));
        answer.recv().ok()
    }
}

impl Drop for WorkerHandle {
    fn drop(&mut self) {
        self.mailbox.send(Command::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The thread's life. See the module's text.
fn run(
    initial: Arc<Snapshot>,
    config: &WorkerConfig,
    links: Links,
    mailbox: &Mailbox,
    counters: &Arc<WorkerCounters>,
    events: Arc<ArrayQueue<Event>>,
    mut sleeper: Sleeper,
) {
    let busy_window_ns = match config.polling {
        Polling::Poll => u64::MAX,
        Polling::Adaptive => BUSY_WINDOW_NS,
        Polling::Interrupt => 0,
    };
    let started = *STARTED;
    mailbox.adopted.store(initial.generation, Ordering::Release);
    let mut worker = Worker::linked(initial, Arc::clone(counters), links);
    worker.tell(events);
    let (mut last_busy_ns, mut are_kicks_enabled) = (0, false);
    loop {
        while mailbox.is_waiting()
            && let Some(command) = mailbox.take()
        {
            counters.commands.add(1);
            if !obey(&mut worker, &mut sleeper, mailbox, command) {
                return;
            }
        }
        // 2^64 ns are 584 years.
        let now_ns = started.elapsed().as_nanos() as u64;
        let moved = worker.turn(now_ns);
        if std::mem::take(&mut are_kicks_enabled) {
            // Not before: what has woken us does not wait for a look at each ring.
            worker.disable_kicks();
        }
        if moved > 0 {
            last_busy_ns = now_ns;
            continue;
        }
        if now_ns - last_busy_ns < busy_window_ns || !worker.may_sleep() {
            std::hint::spin_loop();
            continue;
        }
        if !worker.enable_kicks() && worker.lie_down() && !mailbox.is_waiting() {
            counters.sleeps.add(1);
            sleeper.sleep(HOUSEKEEPING_MS, |port, queue| worker.kicked(port, queue));
        }
        worker.get_up();
        are_kicks_enabled = true;
    }
}

/// Carries a command out; false if it was the last one.
fn obey(worker: &mut Worker, sleeper: &mut Sleeper, mailbox: &Mailbox, command: Command) -> bool {
    match command {
        Command::Publish(snapshot) => {
            let generation = snapshot.generation;
            mailbox.retired.push(worker.adopt(snapshot));
            // Release: pairs with `adopted_generation`.
            mailbox.adopted.store(generation, Ordering::Release);
        }
        Command::Attach { port, rings } => {
            for (queue, ring) in rings {
                sleeper.watch_ring(port, queue, &ring);
                if let Some(replaced) = worker.attach(port, queue, ring) {
                    sleeper.forget_ring(queue, &replaced);
                }
            }
        }
        Command::Detach { port, queues, reply } => {
            let rings = queues.into_iter().filter_map(|queue| Some((queue, worker.detach(port, queue)?)));
            let rings: Vec<_> = rings.inspect(|(queue, ring)| sleeper.forget_ring(*queue, ring)).collect();
            let _ = reply.send(rings);
        }
        Command::AddUnderlay { id, driver } => {
            worker.add_underlay(id, *driver);
            worker.underlay_descriptors(id).into_iter().for_each(|descriptor| sleeper.watch_underlay(descriptor));
        }
        Command::SetNextHops { id, told } => worker.set_next_hops(id, &told),
        Command::AttachWire { id, queue, ring } => {
            sleeper.watch_wire(queue, &ring);
            if let Some(unused) = worker.attach_wire(id, queue, *ring) {
                tracing::error!(underlay = id.0, queue, "a ring was attached without the last one being detached");
                sleeper.forget_ring(queue, &unused);
            }
        }
        Command::DetachWire { id, queue, reply } => {
            let ring = worker.detach_wire(id, queue);
            if let Some(ring) = &ring {
                sleeper.forget_ring(queue, ring);
            }
            let _ = reply.send(ring.map(Box::new));
        }
        Command::RemoveUnderlay { id, reply } => {
            worker.remove_underlay(id);
            let _ = reply.send(());
        }
        Command::EmptyInbox { reply } => {
            worker.empty_inbox();
            let _ = reply.send(());
        }
        Command::Originate { port, frame, reply } => {
            worker.originate(port, &frame);
            let _ = reply.send(());
        }
        Command::Guard { port, perimeter, reply } => drop(reply.send(worker.guard(port, perimeter))),
        Command::ReadConnections { port, first, mut rows, reply } => {
            let more = worker.connection_rows(port, first, &mut rows);
            drop(reply.send((rows, more)));
        }
        Command::FindConnection { port, direction, key, reply } => {
            let _ = reply.send(worker.connection(port, direction, &key));
        }
        Command::FindStation { network, mac, reply } => drop(reply.send(worker.fdb_row(network, mac))),
        Command::ReadFdb { reply } => drop(reply.send(worker.fdb_rows())),
        Command::ReadRings { reply } => drop(reply.send(worker.ring_rows())),
        Command::Stop => return false,
    }
    true
}
