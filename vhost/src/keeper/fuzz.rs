//! A front-end's messages from arbitrary bytes, for the fuzz target `session_messages` and its regression test.
//!
//! Each message is: request, flags and descriptors, payload length, payload. Descriptors are real: an eventfd, a memfd of
//! 64 KiB, or a pipe, so that what is forwarded was really vetted.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::config_space::ConfigSpace;
use super::filter::{Action, Filter, RING_SIZE_MAX};
use super::message::{self, HEADER_BYTES, Header, Message, request as req};
use super::offer::{Offer, protocol};
use super::vet;
use crate::eventfd::EventFd;

/// Messages of one case.
const MESSAGES_MAX: usize = 64;
const MEMORY_BYTES: i64 = 1 << 16;

/// An eventfd, a memfd and a pipe, made once.
fn descriptors() -> &'static [OwnedFd; 3] {
    static DESCRIPTORS: OnceLock<[OwnedFd; 3]> = OnceLock::new();
    DESCRIPTORS.get_or_init(|| {
        let event = EventFd::new().and_then(|event| event.as_fd().try_clone_to_owned()).expect("an eventfd");
        let memory = memfd_create("fuzz", MFdFlags::MFD_CLOEXEC).expect("a memfd");
        nix::unistd::ftruncate(&memory, MEMORY_BYTES).expect("room for it");
        let (pipe, _) = nix::unistd::pipe().expect("a pipe");
        [event, memory, pipe]
    })
}

/// Plays `bytes` to a filter and checks what it lets pass.
///
/// # Panics
/// When it lets something pass that the session would have to refuse.
pub fn session_messages(mut bytes: &[u8]) {
    let queue_pairs = 2;
    let mut filter = Filter::new(Offer {
        features: 1 << 32 | 0x3f,
        protocol_features: protocol::ALL | protocol::CONFIG,
        queue_pairs,
        mtu: 1500,
        config_space: Some(ConfigSpace::default()),
    });
    for _ in 0..MESSAGES_MAX {
        let [request, flags, length, rest @ ..] = bytes else { return };
        let (payload, rest) = rest.split_at(rest.len().min(usize::from(*length)));
        bytes = rest;
        let kinds = descriptors();
        let count = usize::from(flags >> 4);
        let kind = usize::from(flags >> 2 & 3);
        let duplicate =
            |index: usize| kinds[(kind + index * usize::from(kind == 3)) % 3].try_clone().expect("a descriptor");
        let words = [u32::from(*request), 1 | u32::from(flags & 1) << 3, payload.len() as u32];
        let mut header = [0; HEADER_BYTES];
        for (field, word) in header.chunks_exact_mut(4).zip(words) {
            field.copy_from_slice(&word.to_ne_bytes());
        }
        let header = Header::decode(&header);
        let descriptors = (0..count).map(duplicate).collect();
        for action in filter.judge(Message { header, payload: payload.to_vec(), descriptors }) {
            match action {
                Action::Forward { request, payload, descriptors } => {
                    check(&filter, request, &payload, descriptors.len());
                }
                Action::StopRing { index } => {
                    assert!(index < 2 * queue_pairs);
                    filter.ring_stopped(index, index);
                }
                Action::Disconnect { .. } => return,
                Action::Reply { .. }
                | Action::Report(_)
                | Action::DriverReset
                | Action::ReplyWithFile { .. }
                | Action::SetInflight(_)
                | Action::SetLogging(_)
                | Action::SetUsedLog { .. } => {}
            }
        }
        if filter.memory_is_awaited() {
            assert!(!filter.memory_is_overdue().is_empty());
        }
        let record = filter.record();
        assert!(record.memory.is_sorted_by_key(|mapped| mapped.region.guest_address));
        for (at, one) in record.memory.iter().enumerate() {
            vet::region(&one.region).expect("only sound regions are kept");
            assert!(one.region.file_offset + one.region.bytes <= MEMORY_BYTES as u64, "inside of its file");
            for other in &record.memory[..at] {
                vet::disjoint(&one.region, &other.region).expect("only disjoint regions are kept");
            }
        }
    }
}

/// What the session relies on.
fn check(filter: &Filter, request: u32, payload: &[u8], descriptors: usize) {
    let rings = filter.record().rings.len() as u32;
    let number = || message::decode_ring_number(payload).expect("a ring and a number");
    match request {
        req::SET_VRING_NUM => {
            let number = number();
            assert!(number.index < rings && number.number.is_power_of_two());
            assert!(number.number <= u32::from(RING_SIZE_MAX));
        }
        req::SET_VRING_BASE => assert!(number().index < rings && number().number <= 0xffff),
        req::SET_VRING_ENABLE => assert!(number().index < rings && number().number <= 1),
        req::SET_VRING_ADDR => {
            let addresses = message::decode_ring_addresses(payload).expect("addresses");
            assert!(addresses.index < rings);
            for part in [addresses.descriptors, addresses.available, addresses.used] {
                assert!(filter.record().region_of(part, 4).is_some());
            }
        }
        req::SET_MEM_TABLE => assert_eq!(message::decode_regions(payload).map(|r| r.len()), Some(descriptors)),
        req::ADD_MEM_REG => assert_eq!(descriptors, 1),
        req::SET_VRING_KICK | req::SET_VRING_CALL | req::SET_VRING_ERR => {
            let value = message::decode_u64(payload).expect("a number");
            assert!(value & 0xff < u64::from(rings) && (value >> 8 == 1) == (descriptors == 0));
        }
        _ => assert_eq!(descriptors, 0),
    }
}
