//! Headers that lie about checksum and segmentation, on a card that was offered all of it: dropped and counted as
//! `bad_offload`, or carried where the kernel would carry it (`virtio_net_hdr_to_skb`), finished for a receiver that took no
//! offload. Of each the counters are exact, and the frame that follows is whole.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::attack::{Failure, PATIENCE, frame, submit_frame};
use super::{Attack, Card, Case, Outcome, Tally};
use crate::front_end::header::{HEADER_BYTES_MAX, VirtioNetHeader, bits};
use crate::front_end::{FrontEndError, Options, RawDriver, feature};

/// All that a sender can leave undone.
const OFFLOADS: u64 =
    feature::CSUM | feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN | feature::HOST_UFO | feature::HOST_USO;

/// How long header and device race.
const RACE: Duration = Duration::from_millis(200);

/// How a lie ends: dropped for a reason, or as so many frames.
#[derive(Clone, Copy)]
enum End {
    Dropped(&'static str),
    Carried(u64),
}

const BAD: End = End::Dropped("bad_offload");

struct Lie {
    name: &'static str,
    class: &'static str,
    net: VirtioNetHeader,
    frame: Vec<u8>,
    features: u64,
    end: End,
}

pub(super) fn all() -> Vec<Case> {
    let mut cases = Vec::new();
    for card in Card::LAYOUTS {
        cases.extend(checksums().into_iter().chain(segments()).map(|lie| case(card, lie)));
        cases.push(race(card));
    }
    cases
}

fn case(card: Card, lie: Lie) -> Case {
    let Lie { name, class, net, frame, features, end } = lie;
    let (dropped, delivered) = match end {
        End::Dropped(reason) => (Some(reason), 1),
        End::Carried(pieces) => (None, 1 + pieces),
    };
    let tally = Tally::Exactly { received: 2, dropped, delivered };
    let case = card.case(name, class, Outcome::Served, move |attack| tell(attack, card, features, net, &frame));
    Case { tally: Some(tally), ..case }
}

fn options(card: Card, features: u64) -> Options {
    let options = card.options();
    Options {
        features: options.features | features,
        features_required: options.features_required | features,
        ..options
    }
}

fn tell(attack: &mut Attack<'_>, card: Card, features: u64, net: VirtioNetHeader, told: &[u8]) -> Result<(), Failure> {
    // Room for all pieces on the other side.
    drain(attack)?;
    let mut front_end = attack.connect(options(card, features))?;
    let at = front_end.take_memory(16 << 10, 64)?;
    let mut raw = front_end.raw(card.transmitq());
    raw.memory().write(at, &net.to_bytes());
    raw.memory().write(at + HEADER_BYTES_MAX, told);
    let address = raw.memory().guest_address(at);
    raw.submit_chain(&[(address, (HEADER_BYTES_MAX + told.len()) as u32, 0)]);
    let next = frame(60, u64::from(net.csum_start) << 16 | u64::from(net.gso_size));
    submit_frame(&mut raw, at + (8 << 10), &next);
    attack.friend_receives(&next)?;
    attack.hold(front_end);
    Ok(())
}

/// A checksum to be finished from `csum_start` on.
fn csum(csum_start: u16, csum_offset: u16) -> VirtioNetHeader {
    VirtioNetHeader { flags: bits::NEEDS_CSUM, csum_start, csum_offset, ..VirtioNetHeader::default() }
}

fn checksums() -> Vec<Lie> {
    const START: &str = "CVE-2024-11614";
    let lie = |name, net, end| Lie { name, class: START, net, frame: frame(300, 7), features: OFFLOADS, end };
    vec![
        lie("checksum_starts_behind_the_frame", csum(300, 0), BAD),
        lie("checksum_starts_at_the_last_byte", csum(299, 0), BAD),
        lie("checksum_wraps_around", csum(65535, 65535), BAD),
        lie("checksum_start_and_offset_wrap_to_a_small_number", csum(65534, 40), BAD),
        lie("checksum_field_overlaps_the_end", csum(283, 16), BAD),
        lie("checksum_field_ends_with_the_frame", csum(282, 16), End::Carried(1)),
        lie("checksum_over_the_ethernet_header", csum(0, 0), BAD),
        lie("checksum_fields_without_the_flag", VirtioNetHeader { flags: 0, ..csum(300, 300) }, End::Carried(1)),
        lie(
            "checksum_called_valid_by_its_sender",
            VirtioNetHeader { flags: bits::DATA_VALID, ..csum(300, 300) },
            End::Carried(1),
        ),
        Lie { features: 0, ..lie("checksum_that_was_not_negotiated", csum(34, 16), BAD) },
    ]
}

/// Ethernet and IP before `transport`, whose checksums nobody looks at here.
fn ip(is_ipv6: bool, protocol: u8, transport: &[u8]) -> Vec<u8> {
    let mut packet = frame(14, 0);
    let bytes = transport.len() as u16;
    if is_ipv6 {
        packet[12..].copy_from_slice(&[0x86, 0xdd]);
        packet.extend([0x60, 0, 0, 0, (bytes >> 8) as u8, bytes as u8, protocol, 64]);
        packet.extend([0xfd; 16].into_iter().chain([0xfc; 16]));
    } else {
        packet[12..].copy_from_slice(&[8, 0]);
        packet.extend([0x45, 0]);
        packet.extend((20 + bytes).to_be_bytes());
        packet.extend([0, 1, 0x40, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    }
    [&packet, transport].concat()
}

fn tcp(is_ipv6: bool, payload_bytes: usize) -> Vec<u8> {
    let mut header = vec![0, 80, 0x9c, 0x40, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10, 1, 0, 0, 0, 0, 0];
    header.resize(header.len() + payload_bytes, 7);
    ip(is_ipv6, 6, &header)
}

fn udp(payload_bytes: usize) -> Vec<u8> {
    let mut header = [&[0, 80, 0x9c, 0x40][..], &(8 + payload_bytes as u16).to_be_bytes(), &[0, 0]].concat();
    header.resize(header.len() + payload_bytes, 7);
    ip(false, 17, &header)
}

/// A frame with one byte changed.
fn with(mut frame: Vec<u8>, at: usize, byte: u8) -> Vec<u8> {
    frame[at] = byte;
    frame
}

fn segments() -> Vec<Lie> {
    const TCP4: u8 = bits::GSO_TCPV4;
    const SIZES: &str = "DPDK 7023f3e532";
    let gso = |gso_type, gso_size, hdr_len| VirtioNetHeader { gso_type, gso_size, hdr_len, ..csum(34, 16) };
    let of_udp = |gso_type, gso_size| VirtioNetHeader { gso_type, gso_size, hdr_len: 42, ..csum(34, 6) };
    let lie = |name, net, frame: Vec<u8>, end| Lie { name, class: SIZES, net, frame, features: OFFLOADS, end };
    vec![
        // The truth, for comparison.
        lie("segments_as_they_should_be", gso(TCP4, 100, 54), tcp(false, 600), End::Carried(6)),
        lie(
            "segments_of_ipv6_as_they_should_be",
            VirtioNetHeader { csum_start: 54, ..gso(bits::GSO_TCPV6, 100, 74) },
            tcp(true, 600),
            End::Carried(6),
        ),
        lie("datagrams_as_they_should_be", of_udp(bits::GSO_UDP_L4, 100), udp(600), End::Carried(6)),
        lie("fragments_as_they_should_be", of_udp(bits::GSO_UDP, 104), udp(600), End::Carried(6)),
        lie("segments_of_0_bytes", gso(TCP4, 0, 54), tcp(false, 600), BAD),
        lie("segments_of_1_byte", gso(TCP4, 1, 54), tcp(false, 100), End::Carried(100)),
        lie("segments_of_65535_bytes", gso(TCP4, 65535, 54), tcp(false, 600), End::Carried(1)),
        lie("segments_beyond_the_mtu", gso(TCP4, 65535, 54), tcp(false, 4000), End::Dropped("too_long")),
        lie("segments_of_no_payload", gso(TCP4, 100, 54), tcp(false, 0), BAD),
        lie("fragments_of_7_bytes", of_udp(bits::GSO_UDP, 7), udp(600), BAD),
        lie("header_length_beyond_the_frame", gso(TCP4, 100, 65535), tcp(false, 600), BAD),
        lie("header_length_one_byte_beyond_the_frame", gso(TCP4, 100, 655), tcp(false, 600), BAD),
        // A hint, to the kernel too: it looks at the headers themselves.
        lie("header_length_of_0", gso(TCP4, 100, 0), tcp(false, 600), End::Carried(6)),
        lie("header_length_inside_the_headers", gso(TCP4, 100, 20), tcp(false, 600), End::Carried(6)),
        lie("type_is_tcp6_on_tcp4", gso(bits::GSO_TCPV6, 100, 74), tcp(false, 600), BAD),
        lie("type_is_tcp4_on_tcp6", VirtioNetHeader { csum_start: 54, ..gso(TCP4, 100, 74) }, tcp(true, 600), BAD),
        lie("type_is_tcp_on_udp", gso(TCP4, 100, 42), udp(600), BAD),
        lie("type_is_tcp_on_no_ip", gso(TCP4, 100, 54), frame(654, 7), BAD),
        lie("type_is_udp_fragmentation_on_tcp", of_udp(bits::GSO_UDP, 100), tcp(false, 600), BAD),
        lie("type_is_udp_segmentation_on_tcp", of_udp(bits::GSO_UDP_L4, 100), tcp(false, 600), BAD),
        lie("type_is_udp_segmentation_with_ecn", of_udp(bits::GSO_UDP_L4 | bits::GSO_ECN, 100), udp(600), BAD),
        lie("type_is_ecn_alone", gso(bits::GSO_ECN, 100, 54), tcp(false, 600), BAD),
        lie("type_is_unknown", gso(0x7f, 100, 54), tcp(false, 600), BAD),
        lie("segments_without_a_checksum", VirtioNetHeader { flags: 0, ..gso(TCP4, 100, 54) }, tcp(false, 600), BAD),
        lie(
            "segments_with_a_checksum_elsewhere",
            VirtioNetHeader { csum_start: 33, ..gso(TCP4, 100, 54) },
            tcp(false, 600),
            BAD,
        ),
        lie("segments_of_a_tcp_header_of_16_bytes", gso(TCP4, 100, 54), with(tcp(false, 600), 46, 0x40), BAD),
        lie("segments_of_a_tcp_header_behind_the_end", gso(TCP4, 100, 54), with(tcp(false, 10), 46, 0xf0), BAD),
        lie("segments_of_an_ip_header_of_16_bytes", gso(TCP4, 100, 54), with(tcp(false, 600), 14, 0x44), BAD),
        lie("segments_of_a_fragment", gso(TCP4, 100, 54), with(tcp(false, 600), 21, 1), BAD),
        lie("all_bits_of_the_header", VirtioNetHeader::from_bytes([0xff; 12]), tcp(false, 600), BAD),
        Lie {
            features: feature::CSUM,
            ..lie("segments_that_were_not_negotiated", gso(TCP4, 100, 54), tcp(false, 600), BAD)
        },
    ]
}

/// DPDK 285e6b8b18: the header changes between a NEEDS_CSUM that fits, others that do not, and none, while it is read. Each
/// frame is delivered or dropped for that.
fn race(card: Card) -> Case {
    let case = card.case("needs_csum_changes_while_it_is_judged", "DPDK 285e6b8b18", Outcome::Served, move |attack| {
        let mut front_end = attack.connect(options(card, OFFLOADS))?;
        let at = front_end.take_memory(8 << 10, 64)?;
        let mut raw = front_end.raw(card.transmitq());
        let memory = front_end.memory().clone();
        memory.write(at + HEADER_BYTES_MAX, &tcp(false, 600));
        let headers = [csum(34, 16), csum(65535, 16), csum(653, 0), VirtioNetHeader::default()];
        // One lap of each, so that there is some of both however the race goes.
        let mut laps = 0;
        for net in headers {
            memory.write(at, &net.to_bytes());
            laps += 1;
            lap(attack, &mut raw, at, laps)?;
        }
        let stop = Arc::new(AtomicBool::new(false));
        attack.hold_thread(std::thread::spawn({
            let stop = stop.clone();
            // Relaxed: it is seen a turn later at worst.
            move || {
                let turns = headers.into_iter().cycle().take_while(|_| !stop.load(Ordering::Relaxed));
                turns.for_each(|net| memory.write(at, &net.to_bytes()));
            }
        }));
        let end = Instant::now() + RACE;
        let mut raced = Ok(());
        while Instant::now() < end && raced.is_ok() {
            laps += 1;
            raced = lap(attack, &mut raw, at, laps);
        }
        stop.store(true, Ordering::Relaxed);
        attack.hold(front_end);
        raced
    });
    Case { tally: Some(Tally::Conserved("bad_offload")), ..case }
}

/// Offers what lies at `at` in every descriptor of the ring, and waits until all are given back for the `laps`th time.
fn lap(attack: &mut Attack<'_>, raw: &mut RawDriver, at: usize, laps: u32) -> Result<(), Failure> {
    let (size, address) = (raw.layout().size, raw.memory().guest_address(at));
    for _ in 0..size {
        raw.submit_chain(&[(address, 12 + 654, 0)]);
    }
    let deadline = Instant::now() + PATIENCE;
    while !raw.has_used(laps * u32::from(size)) {
        if Instant::now() > deadline {
            return Err(Failure::Wrong("a lap of frames was not given back".into()));
        }
        std::thread::yield_now();
    }
    drain(attack)
}

/// What the other side has received makes room there.
fn drain(attack: &mut Attack<'_>) -> Result<(), Failure> {
    while attack.friend.receive_burst(|_, _| ()).map_err(FrontEndError::from)? > 0 {}
    Ok(())
}
