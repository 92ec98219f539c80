//! A front-end that migrates its guest: the dirty log over a real socket, with rings that run meanwhile.
#![allow(clippy::unwrap_used, reason = "a test")]

mod support;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use dreamwire_vhost::frame::NetHeader;
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::owner::SessionEvent;
use dreamwire_vhost::ring::SendError;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::uio::{pread, pwrite};
use support::*;

const PAGE: u64 = 4096;
/// Pages of ring 0's used ring and of the buffer that the tests post.
const USED_PAGE: u64 = 0x1_4000 / PAGE;
const BUFFER: u64 = 0x8_0000;
/// Memory that is plugged in: right behind what is there.
const PLUGGED: u64 = MEMORY_BYTES;

fn file(name: &str, bytes: u64) -> OwnedFd {
    let file = memfd_create(name, MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&file, bytes as i64).unwrap();
    file
}

/// A guest of which one receive buffer at a time is of interest.
struct Migrating {
    port: Port,
    front_end: FrontEnd,
    memory: OwnedFd,
    posted: u16,
}

impl Migrating {
    fn start() -> Self {
        let port = Port::server();
        let mut front_end = FrontEnd::connect(&port.socket);
        front_end.negotiate();
        let memory = file("memory", MEMORY_BYTES);
        assert_eq!(front_end.ask(SET_MEM_TABLE, &memory_table(MEMORY_BYTES), &[memory.as_raw_fd()]), 0);
        front_end.start_ring(0);
        front_end.start_ring(1);
        Self { port, front_end, memory, posted: 0 }
    }

    fn set_features(&mut self, more: u64) {
        let features = (VERSION_1 | PROTOCOL_FEATURES | more).to_ne_bytes();
        assert_eq!(self.front_end.ask(SET_FEATURES, &features, &[]), 0);
    }

    /// SET_LOG_BASE; returns after its answer.
    fn set_log(&mut self, log: &OwnedFd, bytes: u64) {
        let range = [bytes.to_ne_bytes(), 0u64.to_ne_bytes()].concat();
        self.front_end.send([SET_LOG_BASE, 1, 16], &range, &[log.as_raw_fd()]);
        let mut answer = [0; 28];
        std::io::Read::read_exact(&mut self.front_end.stream, &mut answer).unwrap();
        assert_eq!(answer[..12], [SET_LOG_BASE, 5, 16].map(u32::to_ne_bytes).concat());
    }

    fn set_used_log(&mut self, on: bool) {
        let mut addresses = ring_addresses(0);
        addresses[4] = on.into();
        addresses[32..].copy_from_slice(&(USED_PAGE * PAGE).to_ne_bytes());
        assert_eq!(self.front_end.ask(SET_VRING_ADDR, &addresses, &[]), 0);
    }

    /// A frame into a buffer at guest address `address`.
    fn receive_at(&mut self, address: u64) {
        let slot = i64::from(self.posted % RING_ENTRIES);
        let descriptor = [&address.to_le_bytes()[..], &2048u32.to_le_bytes(), &[2, 0, 0, 0]].concat();
        pwrite(&self.memory, &descriptor, 0x1_0000 + 16 * slot).unwrap();
        pwrite(&self.memory, &(slot as u16).to_le_bytes(), 0x1_2004 + 2 * slot).unwrap();
        self.posted += 1;
        pwrite(&self.memory, &self.posted.to_le_bytes(), 0x1_2002).unwrap();
        self.port.owner.with_ring(0, |ring| {
            ring.send(NetHeader::default(), &[1; 60], Payload::EMPTY).unwrap();
            ring.flush();
        });
    }
}

/// The pages marked since the last call; they are cleared, as QEMU does.
fn take_pages(log: &OwnedFd) -> Vec<u64> {
    let mut bytes = [0; 4096];
    let length = pread(log, &mut bytes, 0).unwrap();
    pwrite(log, &vec![0; length], 0).unwrap();
    (0..8 * length as u64).filter(|page| bytes[(page / 8) as usize] & 1 << (page % 8) != 0).collect()
}

fn is_mapped(name: &str) -> bool {
    std::fs::read_to_string("/proc/self/maps").unwrap().contains(name)
}

#[test]
fn a_migration_logs_while_it_lasts_and_leaves_nothing_behind() {
    let mut guest = Migrating::start();
    let log = file("log-of-one-migration", PAGE);
    guest.receive_at(BUFFER);
    // QEMU's order.
    guest.set_log(&log, PAGE);
    guest.receive_at(BUFFER);
    assert!(take_pages(&log).is_empty());
    guest.set_features(LOG_ALL);
    guest.receive_at(BUFFER);
    assert_eq!(take_pages(&log), [BUFFER / PAGE]);
    guest.set_used_log(true);
    guest.receive_at(BUFFER + PAGE - 10);
    assert_eq!(take_pages(&log), [USED_PAGE, BUFFER / PAGE, BUFFER / PAGE + 1]);
    eventually("the state", || guest.port.endpoint.state().logging);
    // The indices were carried through every change.
    let indices = guest.port.owner.with_ring(0, |ring| (ring.next_avail(), ring.next_used()));
    assert_eq!(indices, (4, 4));

    // Aborted, and begun anew: each time the last ring's hold on the log ends with it.
    guest.set_features(0);
    assert!(!is_mapped("log-of-one-migration"));
    guest.set_used_log(false);
    guest.receive_at(BUFFER);
    assert!(take_pages(&log).is_empty());
    guest.set_log(&log, PAGE);
    guest.set_features(LOG_ALL);
    guest.receive_at(BUFFER);
    assert_eq!(take_pages(&log), [BUFFER / PAGE]);
    assert!(is_mapped("log-of-one-migration"));
    // Completed: the rings are stopped, then the front-end goes.
    assert_eq!(guest.front_end.stop_ring(0), 6);
    drop(guest.front_end);
    guest.port.owner.await_disconnect(1);
    assert!(!is_mapped("log-of-one-migration"));
    let logged = |event: &SessionEvent| matches!(event, SessionEvent::DirtyLog { .. });
    let events = guest.port.owner.events();
    let expected = [true, false, true].map(|on| SessionEvent::DirtyLog { on });
    assert_eq!(events.into_iter().filter(logged).collect::<Vec<_>>(), expected);
}

/// QEMU starts a device in the middle of a migration (reboot, reconnect) with the log last.
#[test]
fn rings_stand_still_until_the_log_is_there() {
    let mut guest = Migrating::start();
    guest.set_features(LOG_ALL);
    assert!(guest.port.owner.holds().is_empty());
    let log = file("log", PAGE);
    guest.set_log(&log, PAGE);
    assert_eq!(guest.port.owner.holds(), [0, 1]);
    guest.receive_at(BUFFER);
    assert_eq!(take_pages(&log), [BUFFER / PAGE]);
    // Never mind, then.
    guest.set_features(0);
    assert_eq!(guest.port.owner.holds(), [0, 1]);
}

/// Memory that comes while the log is on is logged: vhost-user-backend 0.24 would not.
#[test]
fn memory_plugged_in_while_the_log_is_on_is_logged() {
    let mut guest = Migrating::start();
    let (short, long) = (file("short", PAGE), file("long", PAGE));
    guest.set_log(&short, MEMORY_BYTES / PAGE / 8);
    guest.set_features(LOG_ALL);
    guest.receive_at(BUFFER);
    assert_eq!(take_pages(&short), [BUFFER / PAGE]);
    // QEMU: first a longer log, then the memory.
    guest.set_log(&long, PAGE);
    guest.receive_at(BUFFER);
    assert_eq!((take_pages(&short), take_pages(&long)), (vec![], vec![BUFFER / PAGE]));
    let plugged = file("plugged", MEMORY_BYTES);
    let region = [0, PLUGGED, MEMORY_BYTES, USER_ADDRESS + PLUGGED, 0].map(u64::to_ne_bytes).concat();
    assert_eq!(guest.front_end.ask(ADD_MEM_REG, &region, &[plugged.as_raw_fd()]), 0);
    guest.receive_at(PLUGGED + 5 * PAGE);
    assert_eq!(take_pages(&long), [PLUGGED / PAGE + 5]);
    // Across the border of the two, which are neighbours for the guest alone.
    guest.receive_at(PLUGGED - 20);
    assert_eq!(take_pages(&long), [PLUGGED / PAGE - 1, PLUGGED / PAGE]);
}

#[test]
fn memory_comes_and_goes_while_a_ring_is_served() {
    let mut guest = Migrating::start();
    let plugged = file("plugged-and-pulled", MEMORY_BYTES);
    let region = [0, PLUGGED, MEMORY_BYTES, USER_ADDRESS + PLUGGED, 0].map(u64::to_ne_bytes).concat();
    for round in 0..20 {
        guest.receive_at(BUFFER);
        assert_eq!(guest.front_end.ask(ADD_MEM_REG, &region, &[plugged.as_raw_fd()]), 0);
        guest.receive_at(PLUGGED + PAGE * round);
        let mut bytes = [0; 13];
        pread(plugged.as_fd(), &mut bytes, (PAGE * round) as i64).unwrap();
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 1]);
        guest.receive_at(BUFFER);
        // The answer means that no ring refers to it any more.
        assert_eq!(guest.front_end.ask(REM_MEM_REG, &region, &[]), 0);
        assert!(!is_mapped("plugged-and-pulled"));
    }
    let indices = guest.port.owner.with_ring(0, |ring| (ring.next_avail(), ring.next_used()));
    assert_eq!(indices, (60, 60));
    // A buffer where memory was: the guest's mistake, which its ring pays for.
    let descriptor = [&PLUGGED.to_le_bytes()[..], &2048u32.to_le_bytes(), &[2, 0, 0, 0]].concat();
    pwrite(&guest.memory, &descriptor, 0x1_0000 + 16 * 60).unwrap();
    pwrite(&guest.memory, &60u16.to_le_bytes(), 0x1_2004 + 2 * 60).unwrap();
    pwrite(&guest.memory, &61u16.to_le_bytes(), 0x1_2002).unwrap();
    let sent = guest.port.owner.with_ring(0, |ring| ring.send(NetHeader::default(), &[1; 60], Payload::EMPTY));
    assert!(matches!(sent, Err(SendError::Fault(_))), "{sent:?}");
}

#[test]
fn a_bad_log_sends_its_front_end_away_and_the_next_is_served() {
    let guest = Migrating::start();
    let log = file("log", PAGE);
    let range = [(2 * PAGE).to_ne_bytes(), 0u64.to_ne_bytes()].concat();
    guest.front_end.send([SET_LOG_BASE, 1, 16], &range, &[log.as_raw_fd()]);
    assert!(guest.port.owner.await_disconnect(1).contains("which has 0x1000 bytes"));
    guest.front_end.assert_closed();
    drop(guest.port.session());
}

#[test]
fn an_announcement_reaches_the_owner() {
    let mut guest = Migrating::start();
    let payload = [0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0];
    assert_eq!(guest.front_end.ask(SEND_RARP, &payload, &[]), 0);
    let announced = SessionEvent::Announce { mac: [0x52, 0x54, 0, 0x12, 0x34, 0x56] };
    assert!(guest.port.owner.events().contains(&announced));
}
