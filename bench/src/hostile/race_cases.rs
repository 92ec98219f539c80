//! What changes while it is looked at: descriptors and headers between two reads, rings and memory under a running
//! worker.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EfdFlags;

use super::attack::{Failure, ask, borrowed, eventfd, frame, ring_addresses, ring_number, small, submit_frame, words};
use super::{Attack, Case, Outcome};
use crate::front_end::layout::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, Descriptor};
use crate::front_end::{FrontEnd, RawDriver};

/// How long two threads race.
const RACE: Duration = Duration::from_millis(200);
/// Rounds of those that race with messages.
const ROUNDS: usize = 60;

pub(super) fn all() -> Vec<Case> {
    const TWICE: &str = "CVE-2020-14374 to 14378; DPDK 134228ca39, 93ed2f49de, af584d21bf";
    const HEADER: &str = "DPDK 285e6b8b18";
    const STOPS: &str = "DPDK 1c80a404fd, 943daec05c";
    vec![
        race("length_changes_while_it_is_read", TWICE, |raw, address, turn| {
            let bytes = [76, 0, u32::MAX, 11, 65_000][turn % 5];
            raw.write_descriptor(0, Descriptor { address, bytes, flags: 0, next: 0 });
        }),
        race("address_changes_while_it_is_read", TWICE, |raw, address, turn| {
            let address = [address, 0, u64::MAX, address + 4096][turn % 4];
            raw.write_descriptor(0, Descriptor { address, bytes: 76, flags: 0, next: 0 });
        }),
        race("flags_change_while_they_are_read", TWICE, |raw, address, turn| {
            let flags = [0, DESC_NEXT, DESC_WRITE, DESC_INDIRECT, 0xffff][turn % 5];
            raw.write_descriptor(0, Descriptor { address, bytes: 80, flags, next: (turn % 70) as u16 });
        }),
        race("indirect_table_changes_while_it_is_walked", TWICE, |raw, address, turn| {
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
        race("header_changes_while_it_is_judged", HEADER, |raw, address, turn| {
            let offset = (address - raw.memory().regions()[0].guest_address) as usize;
            let byte = if turn.is_multiple_of(2) { 0 } else { 0xff };
            raw.memory().write(offset, &[byte; 12]);
        }),
        race("frame_changes_while_it_is_judged", HEADER, |raw, address, turn| {
            let offset = (address - raw.memory().regions()[0].guest_address) as usize;
            raw.memory().write(offset + 12, &frame(64, turn as u64));
            raw.memory().write(offset + 12 + 12, &(turn as u16).to_be_bytes());
        }),
        race("available_index_changes_while_it_is_read", TWICE, |raw, _, turn| {
            raw.set_available_index((turn * 7919) as u16);
        }),
        race("available_entries_change_while_they_are_read", TWICE, |raw, _, turn| {
            raw.write_available_entry(turn as u16, (turn % 66) as u16);
        }),
        race("used_index_changes_while_it_is_written", TWICE, |raw, _, turn| raw.set_used_index((turn * 31) as u16)),
        busy("ring_stopped_and_started_under_load", STOPS, |front_end| {
            ask(front_end, 11, &ring_number(1, 0), &[]);
            start(front_end, 1);
        }),
        busy("memory_table_sent_under_load", STOPS, |front_end| {
            let memory = front_end.memory().clone();
            let known = memory.regions()[0];
            let region = [1, known.guest_address, known.bytes, known.front_end_address, known.file_offset];
            ask(front_end, 5, &words(&region), &[memory.fd()]);
        }),
        busy("ring_disabled_and_enabled_under_load", STOPS, |front_end| {
            ask(front_end, 18, &ring_number(1, 0), &[]);
            ask(front_end, 18, &ring_number(1, 1), &[]);
        }),
        busy("ring_addresses_sent_under_load", STOPS, |front_end| {
            let (layout, memory) = (front_end.raw(1).layout(), front_end.memory().clone());
            ask(front_end, 9, &ring_addresses(1, layout, &memory), &[]);
        }),
        busy("device_reset_under_load", STOPS, |front_end| {
            ask(front_end, 34, &[], &[]);
            ask(front_end, 2, &words(&[front_end.negotiated().features]), &[]);
            start(front_end, 1);
        }),
        busy("kick_sent_again_under_load", "DPDK 943daec05c", |front_end| {
            let mut raw = front_end.raw(1);
            ask(front_end, 12, &words(&[1]), &[raw.doorbell().kick_fd()]);
        }),
        Case::new("connection_closed_under_load", STOPS, Outcome::Contained, |attack| {
            for _ in 0..20 {
                let mut front_end = attack.connect(small())?;
                let at = front_end.take_memory(4096, 64)?;
                let mut raw = front_end.raw(1);
                (0..64).for_each(|number| submit_frame(&mut raw, at, &frame(60, number)));
                // Closed without a word: Drop's GET_VRING_BASE finds a socket that is shut.
                front_end.connection().stream().shutdown(std::net::Shutdown::Both)?;
            }
            Ok(())
        }),
        Case::new(
            "quarantine_is_not_escaped_by_a_new_call",
            "not in any peer",
            Outcome::Quarantined("outside the table"),
            |attack| {
                let mut front_end = attack.connect(small())?;
                front_end.raw(1).submit(9999);
                for _ in 0..1000 {
                    let event = eventfd(EfdFlags::EFD_NONBLOCK)?;
                    front_end.connection().send(13, super::attack::NO_REPLY, &words(&[1]), &[borrowed(&event)])?;
                }
                ask(&mut front_end, 18, &ring_number(1, 1), &[]);
                attack.hold(front_end);
                Ok(())
            },
        ),
        Case::new("broken_and_reset_again_and_again", "not in any peer (log flood)", Outcome::Served, |attack| {
            let mut front_end = attack.connect(small())?;
            for _ in 0..200 {
                front_end.raw(1).submit(9999);
                super::attack::reset_ring(&mut front_end, 1)?;
            }
            attack.hold(front_end);
            Ok(())
        }),
    ]
}

/// One thread offers descriptor 0 over and over, another runs `change`.
fn race(name: &str, class: &'static str, change: fn(&RawDriver, u64, usize)) -> Case {
    Case::new(name, class, Outcome::Contained, move |attack| {
        let mut front_end = attack.connect(small())?;
        let at = front_end.take_memory(64 << 10, 4096)?;
        let address = front_end.memory().guest_address(at);
        let mut raw = front_end.raw(1);
        raw.memory().write(at + 12, &frame(64, 1));
        raw.write_descriptor(0, Descriptor { address, bytes: 76, flags: 0, next: 0 });
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
                raw.submit(0);
            }
            if raw.doorbell().broken() {
                super::attack::reset_ring(&mut front_end, 1)?;
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
fn busy(name: &str, class: &'static str, interfere: fn(&mut FrontEnd)) -> Case {
    Case::new(name, class, Outcome::Contained, move |attack: &mut Attack<'_>| -> Result<(), Failure> {
        let mut front_end = attack.connect(small())?;
        let at = front_end.take_memory(64 << 10, 4096)?;
        let address = front_end.memory().guest_address(at);
        let raw = front_end.raw(1);
        for index in 0..64 {
            raw.write_descriptor(index, Descriptor { address, bytes: 76, flags: 0, next: 0 });
            raw.write_available_entry(index, index);
        }
        let stop = Arc::new(AtomicBool::new(false));
        let loader = std::thread::spawn({
            let (mut raw, stop) = (raw.clone(), stop.clone());
            move || {
                while !stop.load(Ordering::Relaxed) {
                    raw.set_available_index(raw.used_index().wrapping_add(64));
                    raw.doorbell().kick();
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

/// SET_VRING_NUM to SET_VRING_ENABLE with whatever is in the ring.
fn start(front_end: &mut FrontEnd, index: u32) {
    let (layout, memory) = (front_end.raw(index as usize).layout(), front_end.memory().clone());
    let mut raw = front_end.raw(index as usize);
    let base = raw.used_index();
    let number = u64::from(index);
    ask(front_end, 8, &ring_number(index, u32::from(layout.size)), &[]);
    ask(front_end, 10, &ring_number(index, u32::from(base)), &[]);
    ask(front_end, 9, &ring_addresses(index, layout, &memory), &[]);
    ask(front_end, 13, &words(&[number]), &[raw.doorbell().call_fd()]);
    ask(front_end, 12, &words(&[number]), &[raw.doorbell().kick_fd()]);
    ask(front_end, 18, &ring_number(index, 1), &[]);
}
