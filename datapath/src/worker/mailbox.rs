//! What the control thread tells a worker.

use std::io;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crossbeam::channel::Sender;
use crossbeam::queue::SegQueue;
use dreamwire_policy::{ConnectionRow, Direction, Key};
use dreamwire_vhost::eventfd::EventFd;
use dreamwire_vhost::ring::Ring;

use super::RingRow;
use crate::fdb::FdbRow;
use crate::mac::Mac;
use crate::perimeter::Perimeter;
use crate::snapshot::{NetworkId, PortId, Snapshot, UnderlayId};
use crate::underlay::Underlay;

/// One message. Whoever waits for a reply gets one, or an error when the worker has ended.
#[derive(Debug)]
pub(super) enum Command {
    Publish(Arc<Snapshot>),
    Attach {
        port: PortId,
        rings: Vec<(u16, Ring)>,
    },
    Detach {
        port: PortId,
        queues: Vec<u16>,
        reply: Sender<Vec<(u16, Ring)>>,
    },
    AddUnderlay {
        id: UnderlayId,
        driver: Box<Underlay>,
    },
    AttachWire {
        id: UnderlayId,
        queue: u16,
        ring: Box<Ring>,
    },
    DetachWire {
        id: UnderlayId,
        queue: u16,
        reply: Sender<Option<Box<Ring>>>,
    },
    SetNextHops {
        id: UnderlayId,
        told: Box<[(IpAddr, Mac)]>,
    },
    RemoveUnderlay {
        id: UnderlayId,
        reply: Sender<()>,
    },
    /// Take what other workers have shipped so far, then say so.
    EmptyInbox {
        reply: Sender<()>,
    },
    Originate {
        port: PortId,
        frame: Box<[u8]>,
        reply: Sender<()>,
    },
    Guard {
        port: PortId,
        perimeter: Option<Box<Perimeter>>,
        reply: Sender<Option<Box<Perimeter>>>,
    },
    /// From `first` on, as many places as `rows` has room for. The answer says whether there are more.
    ReadConnections {
        port: PortId,
        first: usize,
        rows: Vec<ConnectionRow>,
        reply: Sender<(Vec<ConnectionRow>, bool)>,
    },
    /// The connection of a port that carries such a packet.
    FindConnection {
        port: PortId,
        direction: Direction,
        key: Key,
        reply: Sender<Option<ConnectionRow>>,
    },
    FindStation {
        network: NetworkId,
        mac: Mac,
        reply: Sender<Option<FdbRow>>,
    },
    ReadFdb {
        reply: Sender<Vec<FdbRow>>,
    },
    ReadRings {
        reply: Sender<Vec<RingRow>>,
    },
    Stop,
}

/// A queue of commands that wakes its reader.
#[derive(Debug)]
pub(super) struct Mailbox {
    commands: SegQueue<Command>,
    /// Snapshots that the worker is done with, on their way back to the control thread, which frees them.
    pub(super) retired: SegQueue<Arc<Snapshot>>,
    /// The generation that the worker works with.
    pub(super) adopted: AtomicU64,
    waiting: AtomicBool,
    wake: EventFd,
}

impl Mailbox {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            commands: SegQueue::new(),
            retired: SegQueue::new(),
            adopted: AtomicU64::new(0),
            waiting: AtomicBool::new(false),
            wake: EventFd::new()?,
        })
    }

    pub(super) fn send(&self, command: Command) {
        self.commands.push(command);
        // Release: pairs with `take`'s acquire; who sees the flag sees the command.
        self.waiting.store(true, Ordering::Release);
        // Our own eventfd: the write fails only when the counter is full, and then it is readable anyway.
        let _ = self.wake.signal();
    }

    /// Whether there may be a command. One load of a line that hardly ever changes.
    #[inline]
    pub(super) fn is_waiting(&self) -> bool {
        self.waiting.load(Ordering::Relaxed)
    }

    pub(super) fn take(&self) -> Option<Command> {
        // Cleared before the queue is looked at: a command that comes in between sets it again.
        self.waiting.swap(false, Ordering::Acquire);
        let command = self.commands.pop();
        if command.is_some() {
            self.waiting.store(true, Ordering::Relaxed);
        }
        command
    }

    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }
}
