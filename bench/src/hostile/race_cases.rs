//! What changes while it is looked at: descriptors and headers between two reads, rings and memory under a running
//! worker.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EfdFlags;

use super::attack::{
    Failure, ask, borrowed, eventfd, frame, reset_ring, ring_addresses, ring_number, start_ring, submit_frame, words,
};
use super::{Attack, Card, Case, Outcome};
use crate::front_end::layout::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};
use crate::front_end::position::{DESC_AVAIL, DESC_USED};
use crate::front_end::{FrontEnd, RawDriver};

/// How long two threads race.
const RACE: Duration = Duration::from_millis(200);
/// Rounds of those that race with messages.
const ROUNDS: usize = 60;

pub(super) fn all() -> Vec<Case> {
    let mut cases = split_rings();
    cases.extend(packed_rings());
    for card in Card::LAYOUTS {
        cases.extend(buffers(card));
        cases.extend(messages(card));
        cases.extend(quarantines(card));
    }
    cases
}

const TWICE: &str = "CVE-2020-14374 to 14378; DPDK 134228ca39, 93ed2f49de, af584d21bf";

fn split_rings() -> Vec<Case> {
    let case = |name, change| race(Card::SPLIT, name, TWICE, change);
    vec![
        case("length_changes_while_it_is_read", |raw, address, turn| {
            let bytes = [76, 0, u32::MAX, 11, 65_000][turn % 5];
            raw.write_descriptor(0, Descriptor { address, bytes, flags: 0, next: 0 });
        }),
        case("address_changes_while_it_is_read", |raw, address, turn| {
            let address = [address, 0, u64::MAX, address + 4096][turn % 4];
            raw.write_descriptor(0, Descriptor { address, bytes: 76, flags: 0, next: 0 });
        }),
        case("flags_change_while_they_are_read", |raw, address, turn| {
            let flags = [0, DESC_NEXT, DESC_WRITE, DESC_INDIRECT, 0xffff][turn % 5];
            raw.write_descriptor(0, Descriptor { address, bytes: 80, flags, next: (turn % 70) as u16 });
        }),
        case("indirect_table_changes_while_it_is_walked", |raw, address, turn| {
            raw.write_descriptor(0, Descriptor { address, bytes: 64, flags: DESC_INDIRECT, next: 0 });
            let offset = (address - raw.memory().regions()[0].guest_address) as usize;
            for entry in 0..4 {
                let flags = if (turn + entry).is_multiple_of(3) { 0 } else { DESC_NEXT };
                let next = ((turn + entry) % 5) as u16;
                raw.write_descriptor_at(
                    offset + 16 * entry,
                    Descriptor { address: address + 4096, bytes: 40, flags, next },
                );
            }
        }),
        case("available_index_changes_while_it_is_read", |raw, _, turn| {
            raw.set_available_index((turn * 7919) as u16);
        }),
        case("available_entries_change_while_they_are_read", |raw, _, turn| {
            raw.write_available_entry(turn as u16, (turn % 66) as u16);
        }),
        case("used_index_changes_while_it_is_written", |raw, _, turn| raw.set_used_index((turn * 31) as u16)),
    ]
}

/// In a packed ring the racer goes round behind, before and beside the driver.
fn packed_rings() -> Vec<Case> {
    let case = |name, change| race(Card::PACKED, name, TWICE, change);
    vec![
        case("length_changes_while_it_is_read", |raw, _, turn| {
            let bytes = [76, 0, u32::MAX, 11, 65_000][turn % 5];
            raw.memory().store_u32(raw.layout().descriptor((turn % 64) as u16) + 8, bytes);
        }),
        case("address_changes_while_it_is_read", |raw, address, turn| {
            let address = [address, 0, u64::MAX, address + 4096][turn % 4];
            raw.memory().store_u64(raw.layout().descriptor((turn % 64) as u16), address);
        }),
        case("flags_change_while_they_are_read", |raw, _, turn| {
            let flags = [0, DESC_NEXT, DESC_WRITE, DESC_INDIRECT, 0x7f78][turn % 5];
            raw.set_packed_flags((turn % 64) as u16, flags | [DESC_AVAIL, DESC_USED][turn / 64 % 2]);
        }),
        case("available_and_used_flip_while_they_are_read", |raw, _, turn| {
            let flags = [DESC_AVAIL, DESC_USED, DESC_AVAIL | DESC_USED, 0][turn % 4];
            raw.set_packed_flags((turn / 4 % 64) as u16, flags);
        }),
        case("id_changes_while_it_is_read", |raw, _, turn| {
            raw.memory().store_u16(raw.layout().descriptor((turn % 64) as u16) + 12, turn as u16, Ordering::Relaxed);
        }),
        // The wrong way round: available before address, length and id say anything.
        case("available_before_the_rest_is_written", |raw, address, turn| {
            let (index, lap) = ((turn % 64) as u16, [DESC_AVAIL, DESC_USED][turn / 64 % 2]);
            raw.write_packed_as(index, u64::MAX, u32::MAX, 0xffff, [DESC_USED, DESC_AVAIL][turn / 64 % 2]);
            raw.set_packed_flags(index, lap);
            raw.write_packed_as(index, address, 76, index, lap);
        }),
        case("chain_is_made_longer_while_it_is_walked", |raw, _, turn| {
            let next = if turn.is_multiple_of(2) { DESC_NEXT } else { 0 };
            raw.set_packed_flags((turn / 2 % 64) as u16, next | [DESC_AVAIL, DESC_USED][turn / 128 % 2]);
        }),
        case("indirect_table_changes_while_it_is_walked", |raw, address, turn| {
            let offset = (address - raw.memory().regions()[0].guest_address) as usize + 8192;
            for entry in 0..4 {
                let (bytes, flags) = [(40, 0), (0, 0), (u32::MAX, 0), (40, DESC_WRITE)][(turn + entry) % 4];
                let entry_at = offset + 16 * entry;
                raw.write_descriptor_at(entry_at, Descriptor { address: address + 4096, bytes, flags: 0, next: flags });
            }
            let lap = [DESC_AVAIL, DESC_USED][turn / 64 % 2];
            raw.write_packed_as((turn % 64) as u16, address + 8192, 64, 0, DESC_INDIRECT | lap);
        }),
        case("events_change_while_they_are_read", |raw, _, turn| {
            raw.set_driver_event((turn * 0x9e37_79b9) as u32);
            raw.memory().store_u32(raw.layout().used_ring, (turn * 0x85eb_ca6b) as u32);
        }),
    ]
}

fn buffers(card: Card) -> Vec<Case> {
    const HEADER: &str = "DPDK 285e6b8b18";
    vec![
        race(card, "header_changes_while_it_is_judged", HEADER, |raw, address, turn| {
            let offset = (address - raw.memory().regions()[0].guest_address) as usize;
            let byte = if turn.is_multiple_of(2) { 0 } else { 0xff };
            raw.memory().write(offset, &[byte; 12]);
        }),
        race(card, "frame_changes_while_it_is_judged", HEADER, |raw, address, turn| {
            let offset = (address - raw.memory().regions()[0].guest_address) as usize;
            raw.memory().write(offset + 12, &frame(64, turn as u64));
            raw.memory().write(offset + 12 + 12, &(turn as u16).to_be_bytes());
        }),
    ]
}

fn messages(card: Card) -> Vec<Case> {
    const STOPS: &str = "DPDK 1c80a404fd, 943daec05c";
    let case = |name, class, interfere| busy(card, name, class, interfere);
    vec![
        case("ring_stopped_and_started_under_load", STOPS, |front_end| {
            ask(front_end, 11, &ring_number(1, 0), &[]);
            start(front_end);
        }),
        case("memory_table_sent_under_load", STOPS, |front_end| {
            let memory = front_end.memory().clone();
            let known = memory.regions()[0];
            let region = [1, known.guest_address, known.bytes, known.front_end_address, known.file_offset];
            ask(front_end, 5, &words(&region), &[memory.fd()]);
        }),
        case("ring_disabled_and_enabled_under_load", STOPS, |front_end| {
            ask(front_end, 18, &ring_number(1, 0), &[]);
            ask(front_end, 18, &ring_number(1, 1), &[]);
        }),
        case("ring_addresses_sent_under_load", STOPS, |front_end| {
            let (layout, memory) = (front_end.raw(1).layout(), front_end.memory().clone());
            ask(front_end, 9, &ring_addresses(1, layout, &memory), &[]);
        }),
        case("device_reset_under_load", STOPS, |front_end| {
            ask(front_end, 34, &[], &[]);
            ask(front_end, 2, &words(&[front_end.negotiated().features]), &[]);
            start(front_end);
        }),
        case("kick_sent_again_under_load", "DPDK 943daec05c", |front_end| {
            let mut raw = front_end.raw(1);
            ask(front_end, 12, &words(&[1]), &[raw.doorbell().kick_fd()]);
        }),
        card.case("connection_closed_under_load", STOPS, Outcome::Contained, move |attack| {
            for _ in 0..20 {
                let mut front_end = attack.connect(card.options())?;
                let at = front_end.take_memory(4096, 64)?;
                let mut raw = front_end.raw(1);
                (0..64).for_each(|number| submit_frame(&mut raw, at, &frame(60, number)));
                // Closed without a word: Drop's GET_VRING_BASE finds a socket that is shut.
                front_end.connection().stream().shutdown(std::net::Shutdown::Both)?;
            }
            Ok(())
        }),
    ]
}

fn quarantines(card: Card) -> Vec<Case> {
    const ESCAPE: &str = "quarantine_is_not_escaped_by_a_new_call";
    vec![
        card.case(ESCAPE, "not in any peer", Outcome::Quarantined("outside guest memory"), move |attack| {
            let mut front_end = attack.connect(card.options())?;
            front_end.raw(1).submit_chain(&[(0x10, 76, 0)]);
            for _ in 0..1000 {
                let event = eventfd(EfdFlags::EFD_NONBLOCK)?;
                front_end.connection().send(13, super::attack::NO_REPLY, &words(&[1]), &[borrowed(&event)])?;
            }
            ask(&mut front_end, 18, &ring_number(1, 1), &[]);
            attack.hold(front_end);
            Ok(())
        }),
        card.case("broken_and_reset_again_and_again", "not in any peer (log flood)", Outcome::Served, move |attack| {
            let mut front_end = attack.connect(card.options())?;
            for _ in 0..200 {
                front_end.raw(1).submit_chain(&[(0x10, 76, 0)]);
                reset_ring(&mut front_end, 1)?;
            }
            attack.hold(front_end);
            Ok(())
        }),
    ]
}

/// One thread offers one buffer over and over, in a split ring always with descriptor 0; another runs `change`.
fn race(card: Card, name: &str, class: &'static str, change: fn(&RawDriver, u64, usize)) -> Case {
    card.case(name, class, Outcome::Contained, move |attack| {
        let mut front_end = attack.connect(card.options())?;
        let at = front_end.take_memory(64 << 10, 4096)?;
        let address = front_end.memory().guest_address(at);
        let mut raw = front_end.raw(1);
        raw.memory().write(at + 12, &frame(64, 1));
        raw.write_descriptor(0, card.pick(Descriptor { address, bytes: 76, flags: 0, next: 0 }, Descriptor::default()));
        let stop = Arc::new(AtomicBool::new(false));
        let racer = std::thread::spawn({
            let (raw, stop) = (raw.clone(), stop.clone());
            move || {
                for turn in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    change(&raw, address, turn);
                }
            }
        });
        let end = Instant::now() + RACE;
        while Instant::now() < end {
            for _ in 0..16 {
                if card.is_packed() { raw.submit_chain(&[(address, 76, 0)]) } else { raw.submit(0) }
            }
            if raw.doorbell().broken() {
                raw = reset_ring(&mut front_end, 1)?;
            }
            std::thread::yield_now();
        }
        stop.store(true, Ordering::Relaxed);
        attack.hold_thread(racer);
        attack.hold(front_end);
        Ok(())
    })
}

/// A thread keeps the transmitq full while `interfere` sends its messages.
fn busy(card: Card, name: &str, class: &'static str, interfere: fn(&mut FrontEnd)) -> Case {
    card.case(name, class, Outcome::Contained, move |attack: &mut Attack<'_>| -> Result<(), Failure> {
        let mut front_end = attack.connect(card.options())?;
        let at = front_end.take_memory(64 << 10, 4096)?;
        let address = front_end.memory().guest_address(at);
        let mut raw = front_end.raw(1);
        if !card.is_packed() {
            for index in 0..64 {
                raw.write_descriptor(index, Descriptor { address, bytes: 76, flags: 0, next: 0 });
                raw.write_available_entry(index, index);
            }
        }
        let stop = Arc::new(AtomicBool::new(false));
        let loader = std::thread::spawn({
            let stop = stop.clone();
            move || {
                while !stop.load(Ordering::Relaxed) {
                    if card.is_packed() {
                        (0..64).for_each(|_| raw.submit_chain(&[(address, 76, 0)]));
                    } else {
                        raw.set_available_index(raw.used_index().wrapping_add(64));
                        raw.doorbell().kick();
                    }
                    std::thread::yield_now();
                }
            }
        });
        (0..ROUNDS).for_each(|_| interfere(&mut front_end));
        stop.store(true, Ordering::Relaxed);
        attack.hold_thread(loader);
        attack.hold(front_end);
        Ok(())
    })
}

/// Starts the transmitq again, with whatever is in it; refused or not, the case goes on.
fn start(front_end: &mut FrontEnd) {
    let mut raw = front_end.raw(1);
    let base = if raw.is_packed() { raw.base() } else { u32::from(raw.used_index()) };
    let _ = start_ring(front_end, &mut raw, 1, base);
}
