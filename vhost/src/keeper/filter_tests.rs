//! The filter alone: messages in, actions out.

use std::os::fd::{AsFd, OwnedFd};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::filter::{Action, Filter};
use super::message::{Header, Message, Region, encode_region, encode_regions, encode_ring_number, request as req};
use super::offer::{Offer, VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, protocol};
use crate::eventfd::EventFd;
use crate::owner::SessionEvent;
use crate::session;

const VERSION_1: u64 = 1 << 32;
const REGION: Region = Region { guest_address: 0, bytes: 0x10000, front_end_address: 0x7f00_0000, file_offset: 0 };

/// What an action is, short enough to compare.
#[derive(Debug, PartialEq)]
enum Seen {
    Forwarded(u32, Vec<u8>, usize),
    Stopped(u16),
    Replied(u32, u64),
    Negotiated(u64),
    /// SET_LOG_BASE's answer.
    Echoed,
    Logging(&'static str),
    UsedLog(u16, Option<u64>),
    DirtyLog(bool),
    Announced([u8; 6]),
    Warned(String),
    Disconnected(String),
    DriverReset,
}
use Seen::{
    Announced, DirtyLog, Disconnected, Echoed, Forwarded, Logging, Negotiated, Replied, Stopped, UsedLog, Warned,
};

fn filter() -> Filter {
    Filter::new(Offer {
        features: VERSION_1 | 1,
        protocol_features: protocol::ALL,
        queue_pairs: 2,
        mtu: 1500,
        config_space: None,
    })
}

/// A filter whose front-end has negotiated all protocol features.
fn negotiated() -> Filter {
    let mut filter = filter();
    assert_eq!(tell(&mut filter, req::SET_PROTOCOL_FEATURES, &protocol::ALL.to_ne_bytes(), vec![]), []);
    filter
}

/// A message that asks for no answer, as most of QEMU's.
fn tell(filter: &mut Filter, request: u32, payload: &[u8], descriptors: Vec<OwnedFd>) -> Vec<Seen> {
    // version 1, no flags
    judge(filter, [request, 1, payload.len() as u32], payload, descriptors)
}

/// A message with NEED_REPLY.
fn ask(filter: &mut Filter, request: u32, payload: &[u8], descriptors: Vec<OwnedFd>) -> Vec<Seen> {
    judge(filter, [request, 9, payload.len() as u32], payload, descriptors)
}

fn judge(filter: &mut Filter, words: [u32; 3], payload: &[u8], descriptors: Vec<OwnedFd>) -> Vec<Seen> {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    let header = Header::decode(bytes[..].try_into().unwrap());
    let actions = filter.judge(Message { header, payload: payload.to_vec(), descriptors });
    let see = |action| match action {
        Action::DriverReset => Seen::DriverReset,
        Action::SetInflight(_) | Action::ReplyWithFile { .. } => panic!("see channel_tests.rs"),
        Action::Forward { request, payload, descriptors } => Forwarded(request, payload, descriptors.len()),
        Action::StopRing { index } => Stopped(index),
        Action::SetLogging(session::Logging::Off) => Logging("off"),
        Action::SetLogging(session::Logging::Awaited) => Logging("awaited"),
        Action::SetLogging(session::Logging::On(_)) => Logging("on"),
        Action::SetUsedLog { index, address } => UsedLog(index, address),
        Action::Reply { request: req::SET_LOG_BASE, payload: answer } => {
            assert_eq!(answer, payload);
            Echoed
        }
        Action::Reply { request, payload } => Replied(request, u64::from_ne_bytes(payload[..].try_into().unwrap())),
        Action::Report(SessionEvent::Negotiated { features }) => Negotiated(features),
        Action::Report(SessionEvent::DirtyLog { on }) => DirtyLog(on),
        Action::Report(SessionEvent::Announce { mac }) => Announced(mac),
        Action::Report(SessionEvent::Warning(text)) => Warned(text),
        Action::Report(event) => panic!("{event:?}"),
        Action::Disconnect { reason } => Disconnected(reason),
    };
    actions.into_iter().map(see).collect()
}

fn event() -> OwnedFd {
    EventFd::new().unwrap().as_fd().try_clone_to_owned().unwrap()
}

fn memfd(bytes: u64) -> OwnedFd {
    let file = memfd_create("guest", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&file, bytes as i64).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    file
}

fn ring_addresses(index: u32, parts: [u64; 3]) -> Vec<u8> {
    let [descriptors, used, available] = parts;
    let mut payload = encode_ring_number(index, 0);
    [descriptors, used, available, 0].iter().for_each(|word| payload.extend_from_slice(&word.to_ne_bytes()));
    payload
}

/// The one disconnect that must be all that happened, by a part of its reason.
#[track_caller]
fn assert_disconnected(seen: &[Seen], part: &str) {
    assert!(matches!(seen, [Disconnected(reason)] if reason.contains(part)), "{part}: {seen:?}");
}

#[test]
fn qemus_start_before_a_driver_forwards_no_enable() {
    let mut filter = filter();
    let offered = VERSION_1 | 1 | VHOST_USER_F_PROTOCOL_FEATURES | VHOST_F_LOG_ALL;
    assert_eq!(tell(&mut filter, req::GET_FEATURES, &[], vec![]), [Replied(req::GET_FEATURES, offered)]);
    let protocol_reply = [Replied(req::GET_PROTOCOL_FEATURES, protocol::ALL)];
    assert_eq!(tell(&mut filter, req::GET_PROTOCOL_FEATURES, &[], vec![]), protocol_reply);
    assert_eq!(tell(&mut filter, req::SET_PROTOCOL_FEATURES, &protocol::ALL.to_ne_bytes(), vec![]), []);
    assert_eq!(tell(&mut filter, req::GET_QUEUE_NUM, &[], vec![]), [Replied(req::GET_QUEUE_NUM, 2)]);
    assert_eq!(tell(&mut filter, req::GET_MAX_MEM_SLOTS, &[], vec![]), [Replied(req::GET_MAX_MEM_SLOTS, 64)]);
    assert_eq!(tell(&mut filter, req::SET_OWNER, &[], vec![]), []);
    for ring in 0..4u64 {
        for request in [req::SET_VRING_CALL, req::SET_VRING_ERR] {
            let payload = ring.to_ne_bytes();
            let forwarded = [Forwarded(request, payload.to_vec(), 1)];
            assert_eq!(tell(&mut filter, request, &payload, vec![event()]), forwarded);
        }
    }
    // Pair 0 on, pair 1 off: answered at once, held back from the session.
    for (ring, enabled) in [(0, 1), (1, 1), (2, 0), (3, 0)] {
        let acked = [Replied(req::SET_VRING_ENABLE, 0)];
        assert_eq!(ask(&mut filter, req::SET_VRING_ENABLE, &encode_ring_number(ring, enabled), vec![]), acked);
    }
    // The driver comes: the features pass, the held-back rings right behind them.
    let features = (VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES).to_ne_bytes();
    let enable = |ring| Forwarded(req::SET_VRING_ENABLE, encode_ring_number(ring, 1), 0);
    let passed = Forwarded(req::SET_FEATURES, features.to_vec(), 0);
    let all = [passed, enable(0), enable(1), Negotiated(VERSION_1)];
    assert_eq!(tell(&mut filter, req::SET_FEATURES, &features, vec![]), all);
    // Repeated for pair 1, when pair 0 runs: nothing is disturbed.
    assert_eq!(tell(&mut filter, req::SET_FEATURES, &features, vec![]), []);
    assert_eq!(tell(&mut filter, req::SET_VRING_ENABLE, &encode_ring_number(2, 1), vec![]), [enable(2)]);
    assert_eq!(filter.record().pairs_enabled(), 2);
}

#[test]
fn a_front_end_without_protocol_features_finds_its_rings_enabled() {
    let mut filter = filter();
    let private = (VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES).to_ne_bytes().to_vec();
    let mut expected = vec![Forwarded(req::SET_FEATURES, private, 0)];
    expected.extend((0..4).map(|ring| Forwarded(req::SET_VRING_ENABLE, encode_ring_number(ring, 1), 0)));
    expected.push(Negotiated(VERSION_1));
    assert_eq!(tell(&mut filter, req::SET_FEATURES, &VERSION_1.to_ne_bytes(), vec![]), expected);
}

#[test]
fn the_keeper_answers_what_the_engine_would_refuse() {
    let mut filter = negotiated();
    assert_eq!(ask(&mut filter, req::NET_SET_MTU, &1500u64.to_ne_bytes(), vec![]), [Replied(req::NET_SET_MTU, 0)]);
    let large = ask(&mut filter, req::NET_SET_MTU, &9000u64.to_ne_bytes(), vec![]);
    assert!(matches!(&large[..], [Replied(_, 1), Warned(text)] if text.contains("host_mtu=1500")), "{large:?}");
    // A network card's MTU of no use is no reason to take the card away.
    let large = tell(&mut filter, req::NET_SET_MTU, &9000u64.to_ne_bytes(), vec![]);
    assert!(matches!(&large[..], [Warned(_)]), "{large:?}");
    assert_eq!(filter.record().mtu, Some(1500));
    // As QEMU writes it: the address, then two bytes of nothing.
    let announced = [Announced([0x52, 0x54, 0, 0x12, 0x34, 0x56])];
    let rarp = [0x52, 0x54, 0, 0x12, 0x34, 0x56, 0, 0];
    assert_eq!(tell(&mut filter, req::SEND_RARP, &rarp, vec![]), announced);
    assert_eq!(tell(&mut filter, req::SET_STATUS, &11u64.to_ne_bytes(), vec![]), []);
    assert_eq!(tell(&mut filter, req::GET_STATUS, &[], vec![]), [Replied(req::GET_STATUS, 11)]);
    assert_disconnected(&tell(&mut filter, req::SET_STATUS, &256u64.to_ne_bytes(), vec![]), "8 bits");
    assert_eq!(ask(&mut filter, req::RESET_OWNER, &[], vec![]), [Replied(req::RESET_OWNER, 0)]);
    assert_eq!(ask(&mut filter, req::SET_LOG_FD, &[], vec![event()]), [Replied(req::SET_LOG_FD, 0)]);
}

#[test]
fn protocol_features_must_be_negotiated_before_their_messages() {
    let mut filter = filter();
    for request in [req::GET_QUEUE_NUM, req::GET_STATUS, req::GET_MAX_MEM_SLOTS, req::RESET_DEVICE] {
        assert_disconnected(&ask(&mut filter, request, &[], vec![]), "was not negotiated");
    }
    let unknown = (1u64 << 9).to_ne_bytes();
    assert_disconnected(&tell(&mut filter, req::SET_PROTOCOL_FEATURES, &unknown, vec![]), "were not offered");
    assert_disconnected(&tell(&mut filter, req::SET_FEATURES, &2u64.to_ne_bytes(), vec![]), "were not offered");
}

#[test]
fn ring_indices_are_not_truncated() {
    let mut filter = negotiated();
    for index in [4, 0x100, 0x10000, u32::MAX] {
        for request in [req::SET_VRING_NUM, req::SET_VRING_BASE, req::GET_VRING_BASE, req::SET_VRING_ENABLE] {
            let seen = tell(&mut filter, request, &encode_ring_number(index, 1), vec![]);
            assert_disconnected(&seen, "does not exist");
        }
        let seen = tell(&mut filter, req::SET_VRING_ADDR, &ring_addresses(index, [0; 3]), vec![]);
        assert_disconnected(&seen, "does not exist");
    }
    for value in [4u64, 0x200, 1 << 32, 1 << 63] {
        let seen = tell(&mut filter, req::SET_VRING_KICK, &value.to_ne_bytes(), vec![event()]);
        assert!(matches!(&seen[..], [Disconnected(_)]), "{value:#x}: {seen:?}");
    }
}

#[test]
fn a_ring_size_is_a_power_of_two() {
    let mut filter = negotiated();
    for size in [0, 3, 32767, 32769, 65536, 0x1_0001, u32::MAX] {
        let seen = ask(&mut filter, req::SET_VRING_NUM, &encode_ring_number(0, size), vec![]);
        assert!(matches!(&seen[..], [Replied(_, 1), Warned(_)]), "{size}: {seen:?}");
    }
    assert_eq!(filter.record().rings[0].size, None);
    for size in [1, 256, 32768] {
        let payload = encode_ring_number(0, size);
        let forwarded = Forwarded(req::SET_VRING_NUM, payload.clone(), 0);
        let expected = [forwarded, Replied(req::SET_VRING_NUM, 0)];
        assert_eq!(ask(&mut filter, req::SET_VRING_NUM, &payload, vec![]), expected);
    }
}

#[test]
fn only_eventfds_are_taken_for_signals() {
    let mut filter = negotiated();
    for request in [req::SET_VRING_KICK, req::SET_VRING_CALL, req::SET_VRING_ERR] {
        let (pipe, _other) = nix::unistd::pipe().unwrap();
        assert_disconnected(&tell(&mut filter, request, &0u64.to_ne_bytes(), vec![pipe]), "expected an eventfd");
        let contradiction = tell(&mut filter, request, &0x100u64.to_ne_bytes(), vec![event()]);
        assert_disconnected(&contradiction, "contradict");
        assert_disconnected(&tell(&mut filter, request, &0u64.to_ne_bytes(), vec![]), "contradict");
        let polled = 0x101u64.to_ne_bytes();
        assert_eq!(tell(&mut filter, request, &polled, vec![]), [Forwarded(request, polled.to_vec(), 0)]);
    }
}

#[test]
fn memory_tables_are_vetted_and_sorted() {
    let mut filter = negotiated();
    let high = Region { guest_address: 0x100000, front_end_address: 0x8f00_0000, ..REGION };
    let sorted = [REGION, high];
    let unsorted = encode_regions([high, REGION].iter());
    let expected = [Forwarded(req::SET_MEM_TABLE, encode_regions(sorted.iter()), 2), Replied(req::SET_MEM_TABLE, 0)];
    assert_eq!(ask(&mut filter, req::SET_MEM_TABLE, &unsorted, vec![memfd(0x10000), memfd(0x10000)]), expected);

    let refuse = |filter: &mut Filter, regions: &[Region], files: Vec<OwnedFd>, part: &str| {
        let seen = ask(filter, req::SET_MEM_TABLE, &encode_regions(regions.iter()), files);
        assert!(matches!(&seen[..], [Replied(_, 1), Warned(text)] if text.contains(part)), "{part}: {seen:?}");
        assert_eq!(filter.record().memory.len(), 2, "a refused table changes nothing");
    };
    refuse(&mut filter, &[], vec![], "share=on");
    refuse(&mut filter, &[REGION], vec![memfd(0xffff)], "which has 0xffff bytes");
    refuse(&mut filter, &[REGION], vec![], "1 regions came with 0 descriptors");
    refuse(&mut filter, &[REGION], vec![memfd(0x10000), memfd(0x10000)], "1 regions came with 2 descriptors");
    refuse(&mut filter, &[REGION, REGION], vec![memfd(0x10000), memfd(0x10000)], "overlap");
    let lying = [33u32.to_ne_bytes(), [0; 4]].concat();
    assert_disconnected(&ask(&mut filter, req::SET_MEM_TABLE, &lying, vec![]), "region count");
}

#[test]
fn single_regions_come_and_go() {
    let mut filter = negotiated();
    let payload = encode_region(&REGION);
    let added = [Forwarded(req::ADD_MEM_REG, payload.clone(), 1), Replied(req::ADD_MEM_REG, 0)];
    assert_eq!(ask(&mut filter, req::ADD_MEM_REG, &payload, vec![memfd(0x10000)]), added);
    let again = ask(&mut filter, req::ADD_MEM_REG, &payload, vec![memfd(0x10000)]);
    assert!(matches!(&again[..], [Replied(_, 1), Warned(_)]), "{again:?}");
    let other = encode_region(&Region { bytes: 0x8000, ..REGION });
    assert!(matches!(&ask(&mut filter, req::REM_MEM_REG, &other, vec![])[..], [Replied(_, 1), Warned(_)]));
    let removed = [Forwarded(req::REM_MEM_REG, payload.clone(), 0), Replied(req::REM_MEM_REG, 0)];
    assert_eq!(ask(&mut filter, req::REM_MEM_REG, &payload, vec![memfd(4096)]), removed);
    assert!(filter.record().memory.is_empty());
    // The 65th slot is one too many.
    for slot in 0..65 {
        let at = slot * 0x10000;
        let region = Region { guest_address: at, front_end_address: 0x7f00_0000 + at, ..REGION };
        let seen = ask(&mut filter, req::ADD_MEM_REG, &encode_region(&region), vec![memfd(0x10000)]);
        assert_eq!(matches!(&seen[..], [Forwarded(..), Replied(_, 0)]), slot < 64, "slot {slot}: {seen:?}");
    }
}

#[test]
fn ring_addresses_must_lie_in_memory_and_be_aligned() {
    let mut filter = negotiated();
    ask(&mut filter, req::SET_MEM_TABLE, &encode_regions([REGION].iter()), vec![memfd(0x10000)]);
    let base = REGION.front_end_address;
    let good = [base, base + 0x2000, base + 0x1000];
    let payload = ring_addresses(1, good);
    assert_eq!(tell(&mut filter, req::SET_VRING_ADDR, &payload, vec![]), [Forwarded(req::SET_VRING_ADDR, payload, 0)]);
    for (part, bad) in [(0, base - 16), (0, base + 8), (1, base + 0x10000), (1, base + 0xfffe), (1, base + 2)] {
        let mut parts = good;
        parts[part] = bad;
        let seen = tell(&mut filter, req::SET_VRING_ADDR, &ring_addresses(1, parts), vec![]);
        assert!(matches!(&seen[..], [Disconnected(_)]), "{bad:#x}: {seen:?}");
    }
    let seen = tell(&mut filter, req::SET_VRING_ADDR, &ring_addresses(1, [!15; 3]), vec![]);
    assert_disconnected(&seen, "not in guest memory");
}

/// CVE-2022-0669: every request with descriptors that do not belong to it; CVE-2020-10724: with wrong lengths.
#[test]
fn surplus_descriptors_and_wrong_lengths_end_the_connection() {
    let takes_none = (1..=44).filter(|request| {
        ![
            req::SET_MEM_TABLE,
            req::SET_LOG_BASE,
            req::SET_LOG_FD,
            req::SET_VRING_KICK,
            req::SET_VRING_CALL,
            req::SET_VRING_ERR,
            req::SET_BACKEND_REQ_FD,
            req::SET_INFLIGHT_FD,
            req::ADD_MEM_REG,
            req::REM_MEM_REG,
        ]
        .contains(request)
    });
    for request in takes_none {
        let mut filter = negotiated();
        assert_disconnected(&ask(&mut filter, request, &[0; 8], vec![event()]), "came with 1 descriptors");
    }
    for request in 1..=44 {
        let mut filter = negotiated();
        let seen = tell(&mut filter, request, &[0; 5], vec![]);
        assert!(matches!(&seen[..], [Disconnected(_)]), "{request}: {seen:?}");
    }
}

#[test]
fn unknown_requests_are_nacked_where_an_answer_is_asked_for() {
    let mut filter = negotiated();
    let seen = ask(&mut filter, 42, &[], vec![]);
    assert!(matches!(&seen[..], [Replied(42, 1), Warned(_)]), "{seen:?}");
    assert_disconnected(&tell(&mut filter, 42, &[], vec![]), "request 42");
}

#[test]
fn reset_device_holds_enables_back_again() {
    let mut filter = negotiated();
    let features = (VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES).to_ne_bytes();
    tell(&mut filter, req::SET_FEATURES, &features, vec![]);
    assert_eq!(tell(&mut filter, req::RESET_DEVICE, &[], vec![]), [Forwarded(req::RESET_DEVICE, vec![], 0)]);
    assert_eq!(tell(&mut filter, req::SET_VRING_ENABLE, &encode_ring_number(0, 1), vec![]), []);
    let seen = tell(&mut filter, req::SET_FEATURES, &features, vec![]);
    assert!(matches!(&seen[..], [Forwarded(..), Forwarded(req::SET_VRING_ENABLE, ..), Negotiated(_)]), "{seen:?}");
}

#[test]
fn stopping_a_ring_notes_where_it_stopped() {
    let mut filter = negotiated();
    assert_eq!(tell(&mut filter, req::GET_VRING_BASE, &encode_ring_number(1, 0), vec![]), [Stopped(1)]);
    filter.ring_stopped(1, 77);
    assert_eq!(filter.record().rings[1].base, 77);
}

#[test]
fn memory_is_awaited_between_features_and_the_first_region() {
    let mut filter = negotiated();
    assert!(!filter.memory_is_awaited());
    tell(&mut filter, req::SET_FEATURES, &VERSION_1.to_ne_bytes(), vec![]);
    assert!(filter.memory_is_awaited());
    tell(&mut filter, req::SET_MEM_TABLE, &encode_regions([REGION].iter()), vec![memfd(0x10000)]);
    assert!(!filter.memory_is_awaited());
}

#[test]
fn ring_addresses_without_any_memory_are_declined_once_it_is_explained() {
    let mut filter = negotiated();
    tell(&mut filter, req::SET_FEATURES, &VERSION_1.to_ne_bytes(), vec![]);
    let seen = tell(&mut filter, req::SET_VRING_ADDR, &ring_addresses(0, [0x1000; 3]), vec![]);
    assert!(matches!(&seen[..], [Warned(text)] if text.contains("share=on")), "{seen:?}");
    assert!(!filter.memory_is_awaited(), "it is explained already");
    assert_eq!(tell(&mut filter, req::SET_VRING_ADDR, &ring_addresses(1, [0x1000; 3]), vec![]), []);
}

#[test]
fn unsealed_memory_is_warned_of_once() {
    let mut filter = negotiated();
    let unsealed = || {
        let file = memfd_create("guest", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&file, 0x10000).unwrap();
        file
    };
    let table = encode_regions([REGION].iter());
    let first = tell(&mut filter, req::SET_MEM_TABLE, &table, vec![unsealed()]);
    assert!(matches!(&first[..], [Warned(text), Forwarded(..)] if text.contains("F_SEAL_SHRINK")), "{first:?}");
    let second = tell(&mut filter, req::SET_MEM_TABLE, &table, vec![unsealed()]);
    assert!(matches!(&second[..], [Forwarded(..)]), "{second:?}");
}

fn log_range(bytes: u64, offset: u64) -> Vec<u8> {
    [bytes.to_ne_bytes(), offset.to_ne_bytes()].concat()
}

fn features(more: u64) -> [u8; 8] {
    (VERSION_1 | VHOST_USER_F_PROTOCOL_FEATURES | more).to_ne_bytes()
}

/// A filter whose front-end has a ring 0 and no log.
fn running() -> Filter {
    let mut filter = negotiated();
    tell(&mut filter, req::SET_FEATURES, &features(0), vec![]);
    tell(&mut filter, req::SET_MEM_TABLE, &encode_regions([REGION].iter()), vec![memfd(0x10000)]);
    tell(&mut filter, req::SET_VRING_ADDR, &ring_addresses(0, [0x7f00_0000; 3]), vec![]);
    filter
}

fn logged_ring(index: u32, log: u64) -> Vec<u8> {
    let mut payload = ring_addresses(index, [0x7f00_0000; 3]);
    payload[4] = 1;
    payload[32..].copy_from_slice(&log.to_ne_bytes());
    payload
}

#[test]
fn a_migration_switches_the_log_on_and_off_past_the_session_engine() {
    let mut filter = running();
    let addresses = ring_addresses(0, [0x7f00_0000; 3]);
    let forwarded = || Forwarded(req::SET_VRING_ADDR, addresses.clone(), 0);
    // QEMU's order at the start: log, features, rings.
    assert_eq!(tell(&mut filter, req::SET_LOG_BASE, &log_range(4096, 0), vec![memfd(4096)]), [Echoed]);
    let seen = tell(&mut filter, req::SET_FEATURES, &features(VHOST_F_LOG_ALL), vec![]);
    assert_eq!(seen, [Logging("on"), DirtyLog(true)]);
    assert_eq!(filter.record().features, Some(VERSION_1), "drivers know of no log");
    let seen = tell(&mut filter, req::SET_VRING_ADDR, &logged_ring(0, 0x5000), vec![]);
    assert_eq!(seen, [UsedLog(0, Some(0x5000)), forwarded()]);
    assert_eq!(tell(&mut filter, req::SET_VRING_ADDR, &logged_ring(0, 0x5000), vec![]), [forwarded()]);
    // Memory grows: a longer log, and the old one is let go of before the answer.
    let seen = ask(&mut filter, req::SET_LOG_BASE, &log_range(8192, 4096), vec![memfd(12288)]);
    assert_eq!(seen, [Logging("on"), Echoed]);
    // Aborted.
    let seen = tell(&mut filter, req::SET_FEATURES, &features(0), vec![]);
    assert_eq!(seen, [Logging("off"), DirtyLog(false)]);
    assert!(filter.record().log.is_none(), "nothing stays mapped");
    assert_eq!(tell(&mut filter, req::SET_VRING_ADDR, &addresses, vec![]), [UsedLog(0, None), forwarded()]);
}

/// A device that starts in the middle of a migration: QEMU sends the log last.
#[test]
fn rings_wait_for_a_log_that_is_yet_to_come() {
    let mut filter = running();
    let seen = tell(&mut filter, req::SET_FEATURES, &features(VHOST_F_LOG_ALL), vec![]);
    assert_eq!(seen, [Logging("awaited"), DirtyLog(true)]);
    let seen = tell(&mut filter, req::SET_LOG_BASE, &log_range(4096, 0), vec![memfd(4096)]);
    assert_eq!(seen, [Logging("on"), Echoed]);
    tell(&mut filter, req::RESET_DEVICE, &[], vec![]);
    assert!(filter.record().log.is_none() && !filter.record().log_all);
}

#[test]
fn a_front_end_that_cannot_bring_a_log_is_not_waited_for() {
    let mut filter = filter();
    let seen = tell(&mut filter, req::SET_FEATURES, &features(VHOST_F_LOG_ALL), vec![]);
    assert_eq!(seen[..2], [Logging("off"), DirtyLog(true)]);
    let seen = tell(&mut filter, req::SET_LOG_BASE, &0x7f00_0000u64.to_ne_bytes(), vec![]);
    assert_disconnected(&seen, "was not negotiated");
}

/// CVE-2020-10722 at the socket: none of it is mapped, and a log that is there stays. There is no answer that says no: a
/// front-end that believed in its log would migrate a torn guest.
#[test]
fn a_log_that_cannot_be_right_ends_the_connection() {
    let mut filter = running();
    tell(&mut filter, req::SET_LOG_BASE, &log_range(4096, 0), vec![memfd(4096)]);
    tell(&mut filter, req::SET_FEATURES, &features(VHOST_F_LOG_ALL), vec![]);
    for (bytes, offset, part) in [
        (0, 0, "size 0"),
        (u64::MAX, 0, "which has 0x2000 bytes"),
        (u64::MAX, 0x1000, "wraps around"),
        (0x1000, !0xfff, "wraps around"),
        (0x1000, 0x1800, "inside a page"),
        (0x1000, 0x800, "inside a page"),
        (0x2000, 0x1000, "which has 0x2000 bytes"),
    ] {
        let seen = ask(&mut filter, req::SET_LOG_BASE, &log_range(bytes, offset), vec![memfd(0x2000)]);
        assert_disconnected(&seen, part);
    }
    assert_disconnected(&ask(&mut filter, req::SET_LOG_BASE, &log_range(4096, 0), vec![]), "without a descriptor");
    let seen = ask(&mut filter, req::SET_LOG_BASE, &log_range(4096, 0), vec![event()]);
    assert_disconnected(&seen, "not a memfd or file");
    assert!(filter.record().log.is_some());
}

#[test]
fn a_log_shorter_than_the_memory_is_warned_of() {
    let mut filter = running();
    // One byte: 8 pages of the guest's 16.
    let seen = tell(&mut filter, req::SET_LOG_BASE, &log_range(1, 0), vec![memfd(4096)]);
    assert!(matches!(&seen[..], [Warned(text), Echoed] if text.contains("covers 0x8000")), "{seen:?}");
    tell(&mut filter, req::SET_FEATURES, &features(VHOST_F_LOG_ALL), vec![]);
    filter.record().log.as_ref().unwrap().mark(0x8000, 0x2000);
    let seen = tell(&mut filter, req::SET_FEATURES, &features(0), vec![]);
    assert!(matches!(&seen[2..], [Warned(text)] if text.contains("no room for 2 ")), "{seen:?}");
}

#[test]
fn a_status_of_zero_is_the_drivers_reset_and_no_other_is() {
    let mut filter = negotiated();
    assert_eq!(tell(&mut filter, req::SET_STATUS, &15u64.to_ne_bytes(), vec![]), []);
    assert_eq!(tell(&mut filter, req::SET_STATUS, &0u64.to_ne_bytes(), vec![]), [Seen::DriverReset]);
    assert_eq!(filter.record().status, 0);
}
