//! A region from one back-end to the next over real sockets, and the front-end's channel and configuration space.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::io::IoSliceMut;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use dreamwire_vhost::frame::RawFrame;
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use support::*;

/// Ring 1's parts, as `ring_addresses` has them.
const DESCRIPTORS: u64 = 0x2_0000;
const AVAILABLE: u64 = DESCRIPTORS + 0x2000;
const USED: u64 = DESCRIPTORS + 0x4000;

/// "Inflight description": size, offset, queues, queue size, and C's padding.
fn inflight(bytes: u64, queues: u16) -> Vec<u8> {
    let mut payload = [bytes.to_ne_bytes(), 0u64.to_ne_bytes()].concat();
    payload.extend([queues, RING_ENTRIES, 0, 0].iter().flat_map(|half| half.to_ne_bytes()));
    payload
}

/// The answer to GET_INFLIGHT_FD: the region's bytes, and its file opened anew.
fn region_from(front_end: &FrontEnd) -> (u64, OwnedFd) {
    let mut bytes = [0; 12 + 24];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut iov = [IoSliceMut::new(&mut bytes)];
    let stream = front_end.stream.as_raw_fd();
    let received = recvmsg::<()>(stream, &mut iov, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC).unwrap();
    assert_eq!(received.bytes, 36);
    let Some(ControlMessageOwned::ScmRights(descriptors)) = received.cmsgs().unwrap().next() else {
        panic!("no descriptor")
    };
    let path = format!("/proc/self/fd/{}", descriptors[0]);
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    nix::unistd::close(descriptors[0]).unwrap();
    assert_eq!(bytes[..12], [GET_INFLIGHT_FD, 5, 24].map(u32::to_ne_bytes).concat());
    (u64::from_ne_bytes(bytes[12..20].try_into().unwrap()), file.into())
}

/// A connection that has negotiated and shared this memory.
fn connected(port: &Port, memory: &OwnedFd) -> FrontEnd {
    let mut front_end = FrontEnd::connect(&port.socket);
    front_end.negotiate();
    assert_eq!(front_end.ask(SET_MEM_TABLE, &memory_table(MEMORY_BYTES), &[memory.as_raw_fd()]), 0);
    front_end
}

/// Makes `heads` available in ring 1, a frame of 60 bytes each, behind those before them.
fn post(memory: &std::fs::File, heads: &[u16]) {
    for (slot, &head) in (0u64..).zip(heads) {
        let buffer = 0x8_0000 + 0x100 * u64::from(head);
        let entry = [buffer.to_le_bytes(), 72u64.to_le_bytes()].concat();
        memory.write_all_at(&entry, DESCRIPTORS + 16 * u64::from(head)).unwrap();
        memory.write_all_at(&[head as u8; 72], buffer + 12).unwrap();
        memory.write_all_at(&head.to_le_bytes(), AVAILABLE + 4 + 2 * slot).unwrap();
    }
    memory.write_all_at(&(heads.len() as u16).to_le_bytes(), AVAILABLE + 2).unwrap();
}

/// Takes what is there; the first byte of each frame.
fn take(port: &Port) -> Vec<u8> {
    let mut frames = vec![RawFrame::EMPTY; 32];
    let count = port.owner.with_ring(1, |ring| ring.receive(&mut frames)).unwrap();
    frames[..count].iter().map(|frame| frame.headers()[0]).collect()
}

#[test]
fn the_next_back_end_resumes_with_what_the_last_had_taken() {
    let memory = memfd(MEMORY_BYTES);
    let guest = std::fs::File::from(memory.try_clone().unwrap());
    post(&guest, &[7, 4, 9]);
    let (bytes, region) = {
        let port = Port::server();
        let mut front_end = connected(&port, &memory);
        front_end.tell(GET_INFLIGHT_FD, &inflight(0, 2), &[]);
        let (bytes, region) = region_from(&front_end);
        assert_eq!(bytes, 2 * (16 + 16 * u64::from(RING_ENTRIES)).next_multiple_of(64));
        assert_eq!(front_end.ask(SET_INFLIGHT_FD, &inflight(bytes, 2), &[region.as_raw_fd()]), 0);
        eventually("the state for people", || port.endpoint.state().inflight);
        front_end.start_ring(1);
        assert_eq!(take(&port), [7, 4, 9]);
        // They are not given back: the back-end goes as if it were killed.
        (bytes, region)
    };
    // Another device has finished the second of them since, and the driver has put a new chain into the place of the first.
    let file = std::fs::File::from(region.try_clone().unwrap());
    let part = bytes / 2;
    file.write_all_at(&[0], part + 16 + 16 * 4).unwrap();
    file.write_all_at(&1u16.to_ne_bytes(), part + 14).unwrap();
    guest.write_all_at(&[0, 0, 1, 0, 4, 0, 0, 0, 0, 0, 0, 0], USED).unwrap();
    let port = Port::server();
    let mut front_end = connected(&port, &memory);
    assert_eq!(front_end.ask(SET_INFLIGHT_FD, &inflight(bytes, 2), &[region.as_raw_fd()]), 0);
    front_end.start_ring(1);
    assert_eq!(take(&port), [7, 9]);
    port.owner.with_ring(1, |ring| ring.complete());
    let mut used = [0; 2 + 24];
    guest.read_exact_at(&mut used, USED + 2).unwrap();
    assert_eq!(used, [3, 0, 4, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    // Stopped in order: the region says nothing any more, and where the ring starts next is the front-end's to say.
    assert_eq!(front_end.stop_ring(1), 3);
    let mut version = [0xff; 2];
    file.read_exact_at(&mut version, part + 8).unwrap();
    assert_eq!(version, [0, 0]);
}

#[test]
fn a_ring_longer_than_its_region_is_served_without() {
    let port = Port::server();
    let mut front_end = connected(&port, &memfd(MEMORY_BYTES));
    let mut asked = inflight(0, 2);
    asked[18..20].copy_from_slice(&128u16.to_ne_bytes());
    front_end.tell(GET_INFLIGHT_FD, &asked, &[]);
    region_from(&front_end);
    front_end.start_ring(1);
    assert_eq!(port.owner.holds(), [1]);
    assert!(port.owner.warned_of("no place in the in-flight region"));
}

/// While a ring runs, and with a file that is truncated afterwards: the ring goes on.
#[test]
fn a_region_that_is_truncated_takes_nothing_with_it() {
    dreamwire_vhost::sigbus::install().unwrap();
    let port = Port::server();
    let memory = memfd(MEMORY_BYTES);
    let mut front_end = connected(&port, &memory);
    front_end.start_ring(1);
    let file = nix::sys::memfd::memfd_create("inflight", nix::sys::memfd::MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&file, 1 << 16).unwrap();
    assert_eq!(front_end.ask(SET_INFLIGHT_FD, &inflight(1 << 16, 2), &[file.as_raw_fd()]), 0);
    nix::unistd::ftruncate(&file, 0).unwrap();
    post(&std::fs::File::from(memory.try_clone().unwrap()), &[7, 4]);
    assert_eq!(take(&port), [7, 4]);
    port.owner.with_ring(1, |ring| ring.complete());
    assert_eq!(port.owner.fault(1), None);
    assert_eq!(front_end.stop_ring(1), 2);
}

#[test]
fn a_reset_device_forgets_its_region() {
    let port = Port::server();
    let mut front_end = connected(&port, &memfd(MEMORY_BYTES));
    front_end.tell(GET_INFLIGHT_FD, &inflight(0, 2), &[]);
    let (_, file) = region_from(&front_end);
    assert_eq!(front_end.ask(RESET_DEVICE, &[], &[]), 0);
    eventually("the region is forgotten", || !port.endpoint.state().inflight);
    front_end.tell(SET_FEATURES, &(VERSION_1 | PROTOCOL_FEATURES).to_ne_bytes(), &[]);
    front_end.start_ring(1);
    let mut part = [0; 4096];
    std::fs::File::from(file).read_exact_at(&mut part, 0).unwrap();
    assert_eq!(part, [0; 4096]);
}

/// The front-end never reads its channel, and is never waited for; when it goes, so does the channel.
#[test]
fn a_channel_is_held_for_as_long_as_the_front_end_is_there() {
    let port = Port::server();
    let mut front_end = port.session();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    assert_eq!(front_end.ask(SET_BACKEND_REQ_FD, &[], &[ours.as_raw_fd()]), 0);
    drop(ours);
    eventually("the state for people", || port.endpoint.state().backend_channel);
    assert_eq!(port.owner.holds(), [0, 1]);
    drop(front_end);
    port.owner.await_disconnect(1);
    theirs.set_read_timeout(Some(std::time::Duration::from_secs(10))).unwrap();
    assert_eq!(theirs.read(&mut [0; 1]).unwrap(), 0, "closed, and nothing was ever said");
}

#[test]
fn a_vmm_without_a_configuration_space_reads_ours() {
    let port = Port::server();
    let mut front_end = FrontEnd::connect(&port.socket);
    front_end.negotiate();
    // offset, size, flags
    let asked = [[0u32, 12, 0].map(u32::to_ne_bytes).concat(), vec![0; 12]].concat();
    front_end.tell(GET_CONFIG, &asked, &[]);
    let mut answer = [0; 12 + 24];
    front_end.stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..12], [GET_CONFIG, 5, 24].map(u32::to_ne_bytes).concat());
    assert_eq!(answer[24..30], CARD_MAC);
    assert_eq!(answer[30..], [1, 0, 1, 0, 0xdc, 5], "link up, one pair, MTU 1500");
    assert_ne!(front_end.ask(SET_CONFIG, &asked, &[]), 0);
    eventually("the warning, which comes after the answer", || port.owner.warned_of("the port's to say"));
}
