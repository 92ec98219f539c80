//! A guest's receiveq: buffers of the wrong kind, running out in the middle of a frame, memory that is in use otherwise.

use super::attack::{PATIENCE, frame, reset_ring, small};
use super::{Attack, Case, Failure, Outcome};
use crate::front_end::layout::{DESC_NEXT, DESC_WRITE, Descriptor};
use crate::front_end::{FrontEnd, Options, RawDriver, feature};
use std::time::{Duration, Instant};

const OUTSIDE_MEMORY: Outcome = Outcome::Quarantined("outside guest memory");

fn empty() -> Options {
    Options { fill_receive: false, ..small() }
}

/// A case that posts buffers of its own in the receiveq; a flooded frame of 1000 bytes then comes to it.
fn post(name: &str, class: &'static str, outcome: Outcome, deed: fn(&mut RawDriver, u64)) -> Case {
    post_with(name, class, outcome, empty(), deed)
}

fn post_with(
    name: &str,
    class: &'static str,
    outcome: Outcome,
    options: Options,
    deed: fn(&mut RawDriver, u64),
) -> Case {
    Case::new(name, class, outcome, move |attack| {
        let mut front_end = attack.connect(options.clone())?;
        let (mut raw, address) = ground(&mut front_end)?;
        deed(&mut raw, address);
        attack.friend_sends(&frame(1000, 1))?;
        attack.hold(front_end);
        Ok(())
    })
}

fn ground(front_end: &mut FrontEnd) -> Result<(RawDriver, u64), Failure> {
    let at = front_end.take_memory(64 << 10, 4096)?;
    Ok((front_end.raw(0), front_end.memory().guest_address(at)))
}

fn write(raw: &RawDriver, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
    raw.write_descriptor(index, Descriptor { address, bytes, flags: flags | DESC_WRITE, next });
}

pub(super) fn all() -> Vec<Case> {
    vec![
        post(
            "readable_descriptor_in_a_receiveq",
            "DPDK 06fc8545fd",
            Outcome::Quarantined("wrong direction"),
            |raw, at| {
                raw.write_descriptor(0, Descriptor { address: at, bytes: 2048, flags: 0, next: 0 });
                raw.submit(0);
            },
        ),
        post("receive_buffer_outside_of_memory", "CVE-2018-1059", OUTSIDE_MEMORY, |raw, _| {
            write(raw, 0, 0x10, 2048, 0, 0);
            raw.submit(0);
        }),
        post("receive_buffer_crosses_the_end_of_memory", "CVE-2018-1059", OUTSIDE_MEMORY, |raw, _| {
            let region = raw.memory().regions()[0];
            write(raw, 0, region.guest_address + region.bytes - 100, 2048, 0, 0);
            raw.submit(0);
        }),
        post("receive_chain_goes_round", "DPDK a436f53ebf", Outcome::Quarantined("loops"), |raw, at| {
            write(raw, 0, at, 16, DESC_NEXT, 0);
            raw.submit(0);
        }),
        post(
            "receive_head_outside_the_table",
            "DPDK 450539b47e",
            Outcome::Quarantined("outside the table"),
            |raw, _| {
                raw.submit(9999);
            },
        ),
        post("receive_index_jumps", "CVE-2016-5403", Outcome::Quarantined("ahead of"), |raw, _| {
            raw.set_available_index(1000);
        }),
        post("receive_buffer_of_no_bytes", "CVE-2022-2132", Outcome::Served, |raw, at| {
            write(raw, 0, at, 0, 0, 0);
            raw.submit(0);
        }),
        post("receive_buffer_of_11_bytes", "CVE-2022-2132", Outcome::Served, |raw, at| {
            write(raw, 0, at, 11, 0, 0);
            raw.submit(0);
        }),
        post("receive_buffer_of_a_header_alone", "CVE-2022-2132", Outcome::Served, |raw, at| {
            write(raw, 0, at, 12, 0, 0);
            raw.submit(0);
        }),
        post("receive_buffer_declares_4_gib", "CVE-2020-14374", OUTSIDE_MEMORY, |raw, at| {
            write(raw, 0, at, u32::MAX, 0, 0);
            raw.submit(0);
        }),
        post("receive_buffer_is_the_descriptor_table", "not in any peer", Outcome::Contained, |raw, _| {
            let table = raw.memory().guest_address(raw.layout().descriptor_table);
            for index in 0..64 {
                write(raw, index, table, 1024, 0, 0);
                raw.submit(index);
            }
        }),
        post("receive_buffer_is_the_used_ring", "not in any peer", Outcome::Contained, |raw, _| {
            let ring = raw.memory().guest_address(raw.layout().used_ring);
            for index in 0..64 {
                write(raw, index, ring, 516, 0, 0);
                raw.submit(index);
            }
        }),
        post("receive_buffer_is_the_available_ring", "not in any peer", Outcome::Contained, |raw, _| {
            let ring = raw.memory().guest_address(raw.layout().available_ring);
            for index in 0..64 {
                write(raw, index, ring, 132, 0, 0);
                raw.submit(index);
            }
        }),
        post_with(
            "receive_buffer_too_small_without_merging",
            "CVE-2020-14375",
            Outcome::Served,
            Options { features: small().features & !feature::MRG_RXBUF, ..empty() },
            |raw, at| {
                write(raw, 0, at, 100, 0, 0);
                raw.submit(0);
            },
        ),
        Case::new("buffers_run_out_in_the_middle_of_a_frame", "CVE-2021-3748", Outcome::Served, runs_out),
        Case::new("fault_in_the_middle_of_a_frame", "CVE-2022-26353, CVE-2022-26354", OUTSIDE_MEMORY, |attack| {
            let mut front_end = attack.connect(empty())?;
            for _ in 0..30 {
                fault_in_the_middle(attack, &mut front_end)?;
                reset_ring(&mut front_end, 0)?;
            }
            fault_in_the_middle(attack, &mut front_end)?;
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("receiveq_is_never_filled", "not in any peer", Outcome::Served, |attack| {
            let front_end = attack.connect(empty())?;
            (0..500).try_for_each(|number| attack.friend_sends(&frame(1400, number)))?;
            attack.hold(front_end);
            Ok(())
        }),
    ]
}

/// Half a frame's buffers: nothing of it may show. The rest: the next frame comes whole.
fn runs_out(attack: &mut Attack<'_>) -> Result<(), Failure> {
    let mut front_end = attack.connect(empty())?;
    let (mut raw, address) = ground(&mut front_end)?;
    for index in 0..4 {
        write(&raw, index, address + 256 * u64::from(index), 256, 0, 0);
    }
    (0..3).for_each(|index| raw.submit(index));
    attack.friend_sends(&frame(1000, 1))?;
    // A frame that another way round takes one buffer, and comes after it: then the first was judged.
    let end = Instant::now() + Duration::from_millis(100);
    while Instant::now() < end {
        if raw.used_index() != 0 {
            return Err(Failure::Wrong("a part of a frame was shown".into()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    raw.submit(3);
    let whole = frame(1000, 2);
    attack.friend_sends(&whole)?;
    let deadline = Instant::now() + PATIENCE;
    while raw.used_index() == 0 {
        if Instant::now() > deadline {
            return Err(Failure::Wrong("a frame for which there was room did not come".into()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let offset = (address - front_end.memory().regions()[0].guest_address) as usize;
    let mut got = vec![0; 1012];
    front_end.memory().read(offset, &mut got);
    if raw.used_index() != 4 || got[12..] != whole {
        return Err(Failure::Wrong(format!("used index {}, or other bytes", raw.used_index())));
    }
    attack.hold(front_end);
    Ok(())
}

fn fault_in_the_middle(attack: &mut Attack<'_>, front_end: &mut FrontEnd) -> Result<(), Failure> {
    let (mut raw, address) = (front_end.raw(0), front_end.memory().regions()[0]);
    write(&raw, 0, address.guest_address + address.bytes - 4096, 256, 0, 0);
    write(&raw, 1, 0x10, 256, 0, 0);
    raw.submit(0);
    raw.submit(1);
    attack.friend_sends(&frame(1000, 1))?;
    // Signalled when the ring was found broken.
    let deadline = Instant::now() + PATIENCE;
    while !raw.doorbell().broken() {
        if Instant::now() > deadline {
            return Err(Failure::Wrong("the broken ring was not reported on its error descriptor".into()));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}
