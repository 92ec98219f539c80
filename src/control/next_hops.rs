//! Which cards the next hops to other hosts have, from the kernel's tables.
//!
//! Theory of operation. For an underlay that goes past the kernel (`af_xdp`) one thread follows the kernel's routes and
//! neighbours by netlink. Whenever one of them changes it asks for everything again: the route to each remote, and all
//! neighbours on the device. That is simpler than applying changes, and right after lost messages too. What it finds goes
//! to the worker. A neighbour that is missing, failed or stale the kernel is asked to find (NTF_USE, as if something had
//! been sent to it), once a second, so the kernel ages and confirms neighbours that it sees no traffic of.
//!
//! Limits: one next hop of each route; a route through another device counts as none.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::snapshot::UnderlayId;
use dreamwire_vhost::eventfd::EventFd;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::inventory::Workers;
use super::kernel_tables::{KernelTables, Seen};

/// rtnetlink(7): links, neighbours, IPv4 addresses and routes, IPv6 addresses and routes.
const GROUPS: [u32; 6] = [1, 3, 5, 7, 9, 11];
/// How often neighbours that are not certain are asked for.
const ASK_INTERVAL_MS: u16 = 1000;
/// How often everything is looked at although nothing was said.
const LOOK_INTERVAL_MS: u16 = 10_000;
/// Between two looks at least: somebody else's table may change all the time.
const REST: Duration = Duration::from_millis(10);

/// The thread. Dropping this ends it.
#[derive(Debug)]
pub(super) struct NextHops {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    device: String,
    remotes: Mutex<Vec<IpAddr>>,
    ends: AtomicBool,
    wake: EventFd,
}

impl NextHops {
    /// Begins to follow the kernel for `underlay`, which is on `device` and has that worker.
    pub(super) fn follow(device: &str, underlay: UnderlayId, workers: &Workers, worker: u16) -> io::Result<Self> {
        let (tables, hears) = (KernelTables::open()?, hearing_socket()?);
        let shared = Arc::new(Shared {
            device: device.to_owned(),
            remotes: Mutex::default(),
            ends: AtomicBool::new(false),
            wake: EventFd::new()?,
        });
        let thread = Builder::new().name(format!("next-hops-{device}")).spawn({
            let (shared, workers) = (Arc::clone(&shared), Arc::clone(workers));
            move || run(&shared, tables, &hears, |told| workers[usize::from(worker)].set_next_hops(underlay, told))
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// The hosts that the underlay's networks send to.
    pub(super) fn set_remotes(&self, remotes: Vec<IpAddr>) {
        let mut held = self.shared.remotes.lock().unwrap_or_else(PoisonError::into_inner);
        if *held != remotes {
            *held = remotes;
            // Our own eventfd: fails only when it is signalled anyway.
            let _ = self.shared.wake.signal();
        }
    }
}

impl Drop for NextHops {
    fn drop(&mut self) {
        self.shared.ends.store(true, Ordering::Release);
        let _ = self.shared.wake.signal();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!(device = self.shared.device, "the thread that follows the kernel's next hops has panicked");
        }
    }
}

fn run(shared: &Shared, mut tables: KernelTables, hears: &Socket, mut tell: impl FnMut(Box<[(IpAddr, Mac)]>)) {
    let mut told = BTreeMap::new();
    let mut complained = false;
    while !shared.ends.load(Ordering::Acquire) {
        let looked = Instant::now();
        let remotes = shared.remotes.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let timeout_ms = match tables.look(&shared.device, &remotes) {
            Ok(Seen { cards, is_certain }) => {
                complained = false;
                if cards != told {
                    tracing::debug!(device = shared.device, ?cards, "next hops have changed");
                    tell(cards.iter().map(|(address, mac)| (*address, *mac)).collect());
                    told = cards;
                }
                if is_certain { LOOK_INTERVAL_MS } else { ASK_INTERVAL_MS }
            }
            Err(error) => {
                if !std::mem::replace(&mut complained, true) {
                    tracing::warn!(device = shared.device, %error, "the kernel does not tell its next hops");
                }
                ASK_INTERVAL_MS
            }
        };
        wait(shared, hears, timeout_ms);
        std::thread::sleep(REST.saturating_sub(looked.elapsed()));
        drain(hears);
    }
}

/// Waits for a change, a wish of ours, or until it is time.
fn wait(shared: &Shared, hears: &Socket, timeout_ms: u16) {
    let mut descriptors = [hears.as_fd(), shared.wake.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    // An interrupted wait is a look too many.
    let _ = poll(&mut descriptors, PollTimeout::from(timeout_ms));
    shared.wake.drain();
}

/// Takes everything that was said: that something was is enough. Ends with "nothing there", or what was lost.
fn drain(hears: &Socket) {
    let mut buffer = [0u8; 8192];
    while hears.recv(&mut &mut buffer[..], 0).is_ok() {}
}

fn hearing_socket() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    for group in GROUPS {
        socket.add_membership(group)?;
    }
    socket.set_non_blocking(true)?;
    Ok(socket)
}
