//! What only a packed ring can be told: flags, wrap counters, buffer ids, event suppression structures, sizes, and a ring
//! that is found in the middle of something.

use std::time::Instant;

use super::attack::{Failure, PATIENCE, ask, frame, ring_number, start_ring, stop_ring, submit_frame};
use super::transmit_cases::{Ground, INDIRECT, LOOPS, OUTSIDE_MEMORY, spoil, spoil_with};
use super::{Attack, Card, Case, Outcome};
use crate::front_end::header::HEADER_BYTES_MAX;
use crate::front_end::layout::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE};
use crate::front_end::packed::EVENT_DESC;
use crate::front_end::position::{DESC_AVAIL, DESC_USED, Position};
use crate::front_end::{FrontEnd, Options, RawDriver};

const START: Position = Position::START;
/// Neither available nor used in the first lap, as memory that nobody wrote to.
const UNTOUCHED: u16 = 0;
/// Available, and used, in the first lap.
const AVAILABLE: u16 = DESC_AVAIL;
const USED: u16 = DESC_AVAIL | DESC_USED;

pub(super) fn all() -> Vec<Case> {
    let mut cases = chains();
    cases.extend(flags());
    cases.extend(ids());
    cases.extend(batches());
    cases.extend(events());
    cases.extend(sizes());
    cases.extend(positions());
    cases.extend(restarts());
    cases
}

/// A case that spoils a packed transmitq; `deed` kicks where it does not submit.
fn packed(name: &str, class: &'static str, outcome: Outcome, deed: fn(&mut Ground)) -> Case {
    spoil(Card::PACKED, name, class, outcome, deed)
}

/// As [`packed`]; then a frame at the ring's start has to arrive.
fn packed_and_sound(
    name: &str,
    class: &'static str,
    options: Options,
    deed: impl Fn(&mut Ground) + Send + 'static,
) -> Case {
    Card::PACKED.case(name, class, Outcome::Served, move |attack| {
        let mut front_end = attack.connect(options.clone())?;
        let spare = front_end.take_memory(256 << 10, 4096)?;
        let address = front_end.memory().guest_address(spare);
        let mut ground = Ground { raw: front_end.raw(1), spare, address };
        deed(&mut ground);
        let sound = frame(100, 0x50d);
        ground.submit_frame(&sound);
        attack.friend_receives(&sound)?;
        attack.hold(front_end);
        Ok(())
    })
}

/// What comes after shows if it never does.
fn until_used(raw: &RawDriver, count: u32) {
    let deadline = Instant::now() + PATIENCE;
    while !raw.has_used(count) && Instant::now() < deadline {
        std::thread::yield_now();
    }
}

fn chains() -> Vec<Case> {
    const CLASS: &str = "DPDK a436f53ebf, c687b0b635, 623bc47054";
    let near_the_end = Options { ring_base: 62, ..Card::PACKED.options() };
    vec![
        packed("chain_without_an_end", CLASS, LOOPS, |ground| {
            ground.raw.submit_chain(&[(ground.address, 1, DESC_NEXT); 64]);
        }),
        packed("chain_of_empty_descriptors_without_an_end", CLASS, LOOPS, |ground| {
            ground.raw.submit_chain(&[(0, 0, DESC_NEXT); 64]);
        }),
        // It ends behind a lap, at the sound one: a chain of the whole ring.
        packed("chain_that_goes_round_to_a_sound_one", CLASS, Outcome::Served, |ground| {
            let rest = (1..64).map(|index| Position { index, ..START });
            rest.for_each(|at| ground.raw.write_packed(at, ground.address, 1, 0, DESC_NEXT));
            // Last: the device looks here, and may look at any time.
            ground.raw.write_packed(START, ground.address, 76, 0, 0);
            ground.raw.doorbell().kick();
        }),
        spoil_with(Card::PACKED, near_the_end, "chain_over_the_end_of_the_ring", CLASS, Outcome::Served, |ground| {
            ground.raw.submit_chain(&[(ground.address, 30, 0); 5]);
            ground.raw.submit_chain(&[(ground.address, 76, 0)]);
        }),
        // Its driver gets what it wrote: two descriptors, the second one of no bytes.
        packed_and_sound("chain_into_a_descriptor_that_is_not_available", CLASS, Card::PACKED.options(), |ground| {
            ground.raw.write_packed(START, ground.address, 76, 0, DESC_NEXT);
            ground.raw.doorbell().kick();
            until_used(&ground.raw, 1);
            // Two on, as the device.
            ground.raw.skip(2);
        }),
        packed("indirect_table_inside_a_chain", "VIRTIO 1.2 2.8.7.1", INDIRECT, |ground| {
            ground.table(&[(ground.address + 4096, 76, 0)]);
            ground.raw.submit_chain(&[(ground.address + 4096, 12, 0), (ground.address, 16, DESC_INDIRECT)]);
        }),
        packed("indirect_table_of_512_entries", "not in any peer", Outcome::Served, |ground| {
            ground.table(&[(ground.address + 0x2_0000, 1, 0); 512]);
            ground.raw.submit_chain(&[(ground.address, 512 * 16, DESC_INDIRECT)]);
        }),
        packed("indirect_table_of_513_entries", "not in any peer", LOOPS, |ground| {
            ground.table(&[(ground.address + 0x2_0000, 1, 0); 513]);
            ground.raw.submit_chain(&[(ground.address, 513 * 16, DESC_INDIRECT)]);
        }),
        packed("indirect_table_of_entries_with_next_and_indirect", "DPDK 48cae0bfa6", Outcome::Served, |ground| {
            ground.table(&[(ground.address + 4096, 40, DESC_NEXT | DESC_INDIRECT | 0xfff8); 2]);
            ground.raw.submit_chain(&[(ground.address, 32, DESC_INDIRECT)]);
        }),
    ]
}

/// Wrap-counter lies: what is not available in this lap is not looked at.
fn flags() -> Vec<Case> {
    const WRAP: &str = "VIRTIO 1.2 2.8.1; DPDK 48cae0bfa6";
    let options = || Card::PACKED.options();
    let unavailable = [
        ("available_in_another_lap", DESC_USED),
        ("available_and_used", DESC_AVAIL | DESC_USED),
        ("neither_available_nor_used", 0),
    ];
    let mut cases: Vec<Case> = unavailable
        .into_iter()
        .map(|(name, flags)| {
            packed_and_sound(name, WRAP, options(), move |ground| {
                // A bad address: looked at, it would break the ring.
                (0..64).for_each(|index| ground.raw.write_packed_as(index, 0x10, 76, index, flags));
                ground.raw.doorbell().kick();
            })
        })
        .collect();
    cases.extend([
        packed_and_sound("half_the_ring_in_the_lap_after", WRAP, options(), |ground| {
            for index in 0..64 {
                let at = Position { index, wrap: index < 32 };
                let address = if at.wrap { ground.address } else { 0x10 };
                ground.raw.write_packed(at, address, 76, index, 0);
            }
            ground.raw.doorbell().kick();
            until_used(&ground.raw, 32);
            ground.raw.skip(32);
        }),
        packed("the_whole_ring_available_in_each_lap_at_once", WRAP, Outcome::Served, |ground| {
            for lap in 0..40 {
                for index in 0..64 {
                    ground.raw.write_packed(Position { index, wrap: lap % 2 == 0 }, ground.address, 76, index, 0);
                }
                ground.raw.doorbell().kick();
            }
        }),
    ]);
    cases
}

/// Ids are the driver's own (§2.8.6): they come back as they are, whatever they are.
fn ids() -> Vec<Case> {
    let case = |name: &str, ids: fn(u16) -> u16| {
        Card::PACKED.case(name, "DPDK 450539b47e; VIRTIO 1.2 2.8.6", Outcome::Served, move |attack| {
            let mut front_end = attack.connect(Card::PACKED.options())?;
            let at = front_end.take_memory(4096, 64)?;
            let address = front_end.memory().guest_address(at);
            let mut raw = front_end.raw(1);
            let wanted = frame(64, 3);
            raw.memory().write(at + HEADER_BYTES_MAX, &wanted);
            for index in 0..8 {
                raw.submit_chain_as(ids(index), &[(address, 76, 0)]);
                attack.friend_receives(&wanted)?;
                until_used(&raw, u32::from(index) + 1);
                if raw.packed(index) != (0, ids(index), USED) {
                    return Err(Failure::Wrong(format!("given back as {:?}", raw.packed(index))));
                }
            }
            attack.hold(front_end);
            Ok(())
        })
    };
    vec![
        case("id_is_the_size_of_the_ring", |_| 64),
        case("id_is_65535", |_| 65535),
        case("id_is_repeated", |_| 7),
        case("ids_count_down", |index| 63 - index),
    ]
}

/// CVE-2020-10725: four descriptors were checked as one.
fn batches() -> Vec<Case> {
    const CLASS: &str = "CVE-2020-10725";
    let mut cases = Vec::new();
    for bad in 0..4 {
        let name = format!("bad_address_{bad}_in_a_batch_of_four");
        cases.push(Card::PACKED.case(&name, CLASS, OUTSIDE_MEMORY, move |attack| {
            let mut front_end = attack.connect(Card::PACKED.options())?;
            let at = front_end.take_memory(4096, 64)?;
            let address = front_end.memory().guest_address(at);
            let mut raw = front_end.raw(1);
            four_at_once(&mut raw, |index| (if index == bad { 0x10 } else { address }, 76, 0));
            attack.hold(front_end);
            Ok(())
        }));
        let name = format!("bad_length_{bad}_in_a_batch_of_four");
        cases.push(Card::PACKED.case(&name, CLASS, OUTSIDE_MEMORY, move |attack| {
            let mut front_end = attack.connect(Card::PACKED.options())?;
            let at = front_end.take_memory(4096, 64)?;
            let address = front_end.memory().guest_address(at);
            let mut raw = front_end.raw(1);
            four_at_once(&mut raw, |index| (address, if index == bad { u32::MAX } else { 76 }, 0));
            attack.hold(front_end);
            Ok(())
        }));
        let name = format!("bad_receive_address_{bad}_in_a_batch_of_four");
        cases.push(Card::PACKED.case(&name, CLASS, OUTSIDE_MEMORY, move |attack| {
            let mut front_end = attack.connect(Options { fill_receive: false, ..Card::PACKED.options() })?;
            let at = front_end.take_memory(16 << 10, 64)?;
            let address = front_end.memory().guest_address(at);
            let mut raw = front_end.raw(0);
            four_at_once(&mut raw, |index| (if index == bad { 0x10 } else { address }, 2048, DESC_WRITE));
            (0..4).try_for_each(|number| attack.friend_sends(&frame(60, number)))?;
            attack.hold(front_end);
            Ok(())
        }));
    }
    cases
}

/// Descriptors 0 to 3 as one batch: the device finds all of them, or none.
fn four_at_once(raw: &mut RawDriver, piece: impl Fn(u16) -> (u64, u32, u16)) {
    for index in (0..4).rev() {
        let (address, bytes, flags) = piece(index);
        raw.write_packed(Position { index, ..START }, address, bytes, index, flags);
    }
    raw.doorbell().kick();
}

/// Rubbish in the event suppression structures costs notifications, nothing else.
fn events() -> Vec<Case> {
    const CLASS: &str = "VIRTIO 1.2 2.8.10, 2.8.14";
    let driver = [
        ("event_flags_3", 3 << 16),
        ("event_flags_of_all_bits", 0xffff << 16),
        ("event_offset_is_the_size_of_the_ring", u32::from(EVENT_DESC) << 16 | 64),
        ("event_offset_is_32767_in_either_lap", u32::from(EVENT_DESC) << 16 | 0xffff),
        ("event_in_another_lap", u32::from(EVENT_DESC) << 16 | 5),
        ("event_is_all_ones", u32::MAX),
    ];
    let mut cases: Vec<Case> = driver
        .into_iter()
        .map(|(name, word)| {
            packed_and_sound(name, CLASS, Card::PACKED.options(), move |ground| {
                ground.raw.set_driver_event(word);
                (0..32).for_each(|_| ground.raw.submit_chain(&[(ground.address, 76, 0)]));
            })
        })
        .collect();
    cases.push(packed_and_sound("the_devices_events_are_scribbled_over", CLASS, Card::PACKED.options(), |ground| {
        let at = ground.raw.layout().used_ring;
        for word in [u32::MAX, 0, 3 << 16, 0x2_7fff] {
            ground.raw.memory().store_u32(at, word);
            ground.raw.submit_chain(&[(ground.address, 76, 0)]);
        }
    }));
    cases
}

/// DPDK eb7c574b21: sizes. Of a packed ring no power of two is asked; a few laps of each.
fn sizes() -> Vec<Case> {
    const CLASS: &str = "DPDK eb7c574b21";
    let served = [1, 2, 3, 63, 1000, 32768].map(|size| {
        let options = Options { ring_size: size, rx_buffer_bytes: 128, tx_buffer_bytes: 128, ..Card::PACKED.options() };
        Card::PACKED.case(&format!("ring_of_{size}"), CLASS, Outcome::Served, move |attack| {
            let mut front_end = attack.connect(options.clone())?;
            for number in 0..10 {
                let deadline = Instant::now() + PATIENCE;
                while front_end.send_burst(&[&frame(60, number)])? == 0 && Instant::now() < deadline {
                    std::thread::yield_now();
                }
                attack.friend_receives(&frame(60, number))?;
            }
            attack.hold(front_end);
            Ok(())
        })
    });
    let refused = [0, 32769, 65535, 65536, u32::MAX].map(|size| {
        let name = format!("ring_of_{size}");
        Card::PACKED.case(&name, CLASS, Outcome::Refused("cannot have"), move |attack| {
            let mut front_end = attack.connect(Card::PACKED.options())?;
            if ask(&mut front_end, 8, &ring_number(1, size), &[]) == Some(0) {
                return Err(Failure::Wrong("it was accepted".into()));
            }
            attack.hold(front_end);
            Ok(())
        })
    });
    served.into_iter().chain(refused).collect()
}

/// SET_VRING_BASE lies. The ring itself says where it stands; where it contradicts itself, nothing is believed that lies
/// outside.
fn positions() -> Vec<Case> {
    const CLASS: &str = "DPDK 5a4fbe79e6";
    let lies = [
        ("base_of_another_lap", 0u32),
        ("base_in_the_middle", 0x8010_8010),
        ("base_is_the_size_of_the_ring", 0x8040_8040),
        ("base_of_all_ones", u32::MAX),
        ("base_of_two_places", 0x8001_8007),
    ];
    let mut cases: Vec<Case> = lies
        .into_iter()
        .map(|(name, base)| {
            Card::PACKED.case(name, CLASS, Outcome::Served, move |attack| {
                let mut front_end = attack.connect(Card::PACKED.options())?;
                let mut raw = front_end.raw(1);
                stop_ring(&mut front_end, 1)?;
                start_ring(&mut front_end, &mut raw, 1, base)?;
                arrives(attack, front_end)
            })
        })
        .collect();
    cases.push(Card::PACKED.case(
        "base_outside_a_ring_that_contradicts_itself",
        CLASS,
        Outcome::Refused("outside the packed ring"),
        |attack| {
            let mut front_end = attack.connect(Card::PACKED.options())?;
            stop_ring(&mut front_end, 1)?;
            let mut raw = front_end.raw(1);
            [1, 3, 6].into_iter().for_each(|index| raw.set_packed_flags(index, AVAILABLE));
            start_ring(&mut front_end, &mut raw, 1, 0x8040_8040)?;
            attack.hold(front_end);
            Ok(())
        },
    ));
    cases
}

/// A frame at the ring's start.
fn arrives(attack: &mut Attack<'_>, mut front_end: FrontEnd) -> Result<(), Failure> {
    let at = front_end.take_memory(4096, 64)?;
    submit_frame(&mut front_end.raw(1), at, &frame(80, 9));
    attack.friend_receives(&frame(80, 9))?;
    attack.hold(front_end);
    Ok(())
}

/// A ring that is taken over in the middle of a burst (`vhost/src/ring/recover.rs`), with flags of the guest's making.
fn restarts() -> Vec<Case> {
    const CLASS: &str = "not in any peer (restart in mid-burst)";
    let case = |name: &str, flags: &'static [u16], given_back: &'static [u16]| {
        Card::PACKED.case(name, CLASS, Outcome::Contained, move |attack| {
            let mut front_end = attack.connect(Card::PACKED.options())?;
            let at = front_end.take_memory(4096, 64)?;
            let address = front_end.memory().guest_address(at);
            stop_ring(&mut front_end, 1)?;
            let mut raw = front_end.raw(1);
            for (index, &flags) in (0..).zip(flags) {
                raw.write_packed_as(index, address, 76, 100 + index, flags);
            }
            let base = raw.base();
            start_ring(&mut front_end, &mut raw, 1, base)?;
            for &index in given_back {
                let (bytes, _, flags) = raw.packed(index);
                if (bytes, flags & USED) != (0, USED) {
                    return Err(Failure::Wrong(format!("descriptor {index}: {bytes} bytes, flags {flags:#x}")));
                }
            }
            attack.hold(front_end);
            Ok(())
        })
    };
    const NEXT: u16 = AVAILABLE | DESC_NEXT;
    vec![
        case("restart_with_half_a_burst_given_back", &[AVAILABLE, USED, USED, AVAILABLE], &[0, 1, 2]),
        case("restart_inside_a_chain_without_an_end", &[NEXT, NEXT, USED, NEXT, NEXT], &[0, 1, 2]),
        case("restart_with_all_but_the_first_given_back", &[NEXT, USED], &[0, 1]),
        case("restart_with_a_ring_full_of_chains_without_an_end", &[NEXT; 64], &[]),
        case("restart_with_torn_flags", &[AVAILABLE, UNTOUCHED, AVAILABLE, UNTOUCHED, USED, DESC_USED], &[]),
        case("restart_with_all_flags_set", &[0xffff; 64], &[]),
        // Each says that it ends a batch of 76 (`FLAG_BATCH_END`).
        case("restart_behind_a_batch_longer_than_the_ring", &[AVAILABLE, USED | DESC_INDIRECT], &[]),
        case("restart_in_a_ring_full_of_ends_of_batches", &[USED | DESC_INDIRECT; 64], &[]),
        Card::PACKED.case("restarted_in_mid_burst_again_and_again", CLASS, Outcome::Served, |attack| {
            let mut front_end = attack.connect(Card::PACKED.options())?;
            let at = front_end.take_memory(4096, 64)?;
            for number in 0..60 {
                stop_ring(&mut front_end, 1)?;
                let mut raw = front_end.raw(1);
                raw.restart();
                // Half of what lies there was given back by "the device before".
                for index in 0..62 {
                    let flags = if index % 2 == 0 { AVAILABLE } else { USED };
                    raw.write_packed_as(index, 0x10, 76, index, flags);
                }
                let base = raw.base();
                start_ring(&mut front_end, &mut raw, 1, base)?;
                raw.skip(62);
                submit_frame(&mut raw, at, &frame(70, number));
                attack.friend_receives(&frame(70, number))?;
            }
            attack.hold(front_end);
            Ok(())
        }),
    ]
}
