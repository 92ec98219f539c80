//! A guest's receiveq: buffers of the wrong kind, running out in the middle of a frame, memory that is in use otherwise.

use std::time::{Duration, Instant};

use super::attack::{PATIENCE, frame, reset_ring};
use super::transmit_cases::{DIRECTION, LOOPS, OUTSIDE_MEMORY};
use super::{Attack, Card, Case, Failure, Outcome};
use crate::front_end::layout::{DESC_NEXT, DESC_WRITE, Descriptor};
use crate::front_end::{FrontEnd, Options, RawDriver, feature};

fn empty(card: Card) -> Options {
    Options { fill_receive: false, ..card.options() }
}

/// A case that posts buffers of its own in the receiveq; flooded frames of 1000 bytes then come to it.
fn post(card: Card, name: &str, class: &'static str, outcome: Outcome, deed: fn(&mut RawDriver, u64)) -> Case {
    post_with(card, empty(card), name, class, outcome, deed)
}

fn post_with(
    card: Card,
    options: Options,
    name: &str,
    class: &'static str,
    outcome: Outcome,
    deed: fn(&mut RawDriver, u64),
) -> Case {
    card.case(name, class, outcome, move |attack| {
        let mut front_end = attack.connect(options.clone())?;
        let (mut raw, at) = ground(&mut front_end, card)?;
        let address = raw.memory().guest_address(at);
        deed(&mut raw, address);
        flood(attack, card)?;
        attack.hold(front_end);
        Ok(())
    })
}

/// Which queue a flow goes to is not ours to say: with two pairs there are many flows.
fn flood(attack: &mut Attack<'_>, card: Card) -> Result<(), Failure> {
    let flows = if card.has_pairs() { 32 } else { 1 };
    (1..=flows).try_for_each(|flow| {
        let mut frame = frame(1000, 1);
        frame[11] = flow;
        attack.friend_sends(&frame)
    })
}

/// The receiveq, and the offset of memory that nobody uses.
fn ground(front_end: &mut FrontEnd, card: Card) -> Result<(RawDriver, usize), Failure> {
    let at = front_end.take_memory(64 << 10, 4096)?;
    Ok((front_end.raw(card.receiveq()), at))
}

/// A buffer as one piece.
fn submit(raw: &mut RawDriver, address: u64, bytes: u32) {
    raw.submit_chain(&[(address, bytes, DESC_WRITE)]);
}

/// Every descriptor refers to what lies at `offset`.
fn submit_all(raw: &mut RawDriver, offset: usize, bytes: u32) {
    let address = raw.memory().guest_address(offset);
    (0..raw.layout().size).for_each(|_| submit(raw, address, bytes));
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for card in Card::LAYOUTS.into_iter().chain(Card::PAIRS) {
        cases.extend(buffers(card));
    }
    for card in Card::LAYOUTS {
        cases.extend(sizes(card));
        cases.extend(parts_of_the_ring(card));
        cases.extend(in_the_middle_of_a_frame(card));
    }
    cases.extend(indices());
    cases
}

fn buffers(card: Card) -> Vec<Case> {
    let case = |name, class, outcome, deed| post(card, name, class, outcome, deed);
    vec![
        case("readable_descriptor_in_a_receiveq", "DPDK 06fc8545fd", DIRECTION, |raw, at| {
            raw.submit_chain(&[(at, 2048, 0)]);
        }),
        case("receive_buffer_outside_of_memory", "CVE-2018-1059", OUTSIDE_MEMORY, |raw, _| submit(raw, 0x10, 2048)),
        case("receive_buffer_crosses_the_end_of_memory", "CVE-2018-1059", OUTSIDE_MEMORY, |raw, _| {
            let region = raw.memory().regions()[0];
            submit(raw, region.guest_address + region.bytes - 100, 2048);
        }),
        case("receive_buffer_declares_4_gib", "CVE-2020-14374", OUTSIDE_MEMORY, |raw, at| submit(raw, at, u32::MAX)),
        case("receive_chain_goes_round", "DPDK a436f53ebf", LOOPS, |raw, at| {
            if raw.is_packed() {
                // The last of a ring of NEXT goes on with the first.
                raw.submit_chain(&[(at, 16, DESC_WRITE | DESC_NEXT); 64]);
            } else {
                raw.write_descriptor(0, Descriptor { address: at, bytes: 16, flags: DESC_WRITE | DESC_NEXT, next: 0 });
                raw.submit(0);
            }
        }),
    ]
}

/// Too little for a header, for a frame, for anything.
fn sizes(card: Card) -> Vec<Case> {
    let case = |name, class, outcome, deed| post(card, name, class, outcome, deed);
    let small = empty(card);
    let unmerged = Options { features: small.features & !feature::MRG_RXBUF, ..small };
    vec![
        case("receive_buffer_of_no_bytes", "CVE-2022-2132", Outcome::Served, |raw, at| submit(raw, at, 0)),
        case("receive_buffer_of_11_bytes", "CVE-2022-2132", Outcome::Served, |raw, at| submit(raw, at, 11)),
        case("receive_buffer_of_a_header_alone", "CVE-2022-2132", Outcome::Served, |raw, at| submit(raw, at, 12)),
        post_with(
            card,
            unmerged,
            "receive_buffer_too_small_without_merging",
            "CVE-2020-14375",
            Outcome::Served,
            |raw, at| submit(raw, at, 100),
        ),
    ]
}

/// The device is told to write frames over the ring; of a packed ring the two last are event suppression structures.
fn parts_of_the_ring(card: Card) -> Vec<Case> {
    let case = |name, deed| post(card, name, "not in any peer", Outcome::Contained, deed);
    vec![
        case("receive_buffer_is_the_descriptor_table", |raw, _| {
            submit_all(raw, raw.layout().descriptor_table, 1024);
        }),
        case("receive_buffer_is_the_used_ring", |raw, _| submit_all(raw, raw.layout().used_ring, 516)),
        case("receive_buffer_is_the_available_ring", |raw, _| submit_all(raw, raw.layout().available_ring, 132)),
    ]
}

fn indices() -> Vec<Case> {
    vec![
        post(
            Card::SPLIT,
            "receive_head_outside_the_table",
            "DPDK 450539b47e",
            Outcome::Quarantined("outside the table"),
            |raw, _| raw.submit(9999),
        ),
        post(Card::SPLIT, "receive_index_jumps", "CVE-2016-5403", Outcome::Quarantined("ahead of"), |raw, _| {
            raw.set_available_index(1000)
        }),
    ]
}

fn in_the_middle_of_a_frame(card: Card) -> Vec<Case> {
    vec![
        card.case("buffers_run_out_in_the_middle_of_a_frame", "CVE-2021-3748", Outcome::Served, move |attack| {
            runs_out(attack, card)
        }),
        // Room for 12 bytes is that of a header: nothing of the frame, and nothing behind it.
        card.case("a_buffer_is_too_small_in_the_middle_of_a_frame", "CVE-2021-3748", Outcome::Served, move |attack| {
            let mut front_end = attack.connect(empty(card))?;
            let (mut raw, at) = ground(&mut front_end, card)?;
            let address = raw.memory().guest_address(at);
            for (number, bytes) in (0..).zip([200, 0, 1, 0, 11, 800]) {
                submit(&mut raw, address + 1024 * number, bytes);
            }
            let whole = frame(1000, 3);
            attack.friend_sends(&whole)?;
            until(|| raw.has_used(6), "a frame for which there was room did not come")?;
            let pieces = [200, 0, 1, 0, 11, 800].into_iter().enumerate().flat_map(|(number, bytes)| {
                let mut piece = vec![0; bytes];
                raw.memory().read(at + 1024 * number, &mut piece);
                piece
            });
            let got: Vec<u8> = pieces.collect();
            if got[10..12] != [6, 0] || got[12..] != whole {
                return Err(Failure::Wrong("other bytes, or another number of buffers".into()));
            }
            attack.hold(front_end);
            Ok(())
        }),
        card.case("fault_in_the_middle_of_a_frame", "CVE-2022-26353, CVE-2022-26354", OUTSIDE_MEMORY, move |attack| {
            let mut front_end = attack.connect(empty(card))?;
            let mut raw = front_end.raw(card.receiveq());
            for _ in 0..30 {
                fault_in_the_middle(attack, &mut raw)?;
                raw = reset_ring(&mut front_end, card.receiveq() as u32)?;
            }
            fault_in_the_middle(attack, &mut raw)?;
            attack.hold(front_end);
            Ok(())
        }),
        card.case("receiveq_is_never_filled", "not in any peer", Outcome::Served, move |attack| {
            let front_end = attack.connect(empty(card))?;
            (0..500).try_for_each(|number| attack.friend_sends(&frame(1400, number)))?;
            attack.hold(front_end);
            Ok(())
        }),
    ]
}

/// Half a frame's buffers: nothing of it may show. The rest: the next frame comes whole.
fn runs_out(attack: &mut Attack<'_>, card: Card) -> Result<(), Failure> {
    let mut front_end = attack.connect(empty(card))?;
    let (mut raw, at) = ground(&mut front_end, card)?;
    let address = raw.memory().guest_address(at);
    (0..3).for_each(|number| submit(&mut raw, address + 256 * number, 256));
    attack.friend_sends(&frame(1000, 1))?;
    let end = Instant::now() + Duration::from_millis(100);
    while Instant::now() < end {
        if raw.has_used(1) {
            return Err(Failure::Wrong("a part of a frame was shown".into()));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    submit(&mut raw, address + 256 * 3, 256);
    let whole = frame(1000, 2);
    attack.friend_sends(&whole)?;
    until(|| raw.has_used(4), "a frame for which there was room did not come")?;
    let mut got = vec![0; 1012];
    raw.memory().read(at, &mut got);
    if raw.has_used(5) || got[12..] != whole {
        return Err(Failure::Wrong("more buffers were used than there were, or other bytes".into()));
    }
    attack.hold(front_end);
    Ok(())
}

fn until(is_so: impl Fn() -> bool, otherwise: &str) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        if Instant::now() > deadline {
            return Err(Failure::Wrong(otherwise.into()));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

fn fault_in_the_middle(attack: &mut Attack<'_>, raw: &mut RawDriver) -> Result<(), Failure> {
    let region = raw.memory().regions()[0];
    submit(raw, region.guest_address + region.bytes - 4096, 256);
    submit(raw, 0x10, 256);
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
