//! A guest whose network reaches another host over a wire that is a ring: this test is that wire, and the other host on it.
#![allow(clippy::unwrap_used)]

mod common;

use std::net::IpAddr;

use common::scene::*;
use common::*;
use dreamwire_datapath::drop_reason::DropReason;
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::vxlan;
use dreamwire_vhost::ring::Ring;
use smoltcp::wire::{Ipv4Packet, Ipv6Packet, UdpPacket};

impl Scene {
    /// The other host puts a packet on the wire.
    fn arrive(&mut self, packet: &[u8]) {
        self.wire.send(packet);
        assert_eq!(self.lan.run(), 1);
    }

    /// What the other host has been sent, as inner frames; every outer header is checked.
    fn tunnelled(&mut self) -> Vec<Vec<u8>> {
        let packets = self.wire.received();
        packets.iter().map(|packet| self.check(packet).to_vec()).collect()
    }

    fn check<'a>(&self, packet: &'a [u8]) -> &'a [u8] {
        assert_eq!(&packet[..12], [THEIRS.0, OURS.0].concat());
        let udp = if self.here.is_ipv4() {
            let ip = Ipv4Packet::new_checked(&packet[14..]).unwrap();
            assert!(ip.verify_checksum());
            assert_eq!((IpAddr::from(ip.src_addr()), IpAddr::from(ip.dst_addr())), (self.here, self.there));
            &packet[34..]
        } else {
            let ip = Ipv6Packet::new_checked(&packet[14..]).unwrap();
            assert_eq!((IpAddr::from(ip.src_addr()), IpAddr::from(ip.dst_addr())), (self.here, self.there));
            &packet[54..]
        };
        let checked = UdpPacket::new_checked(udp).unwrap();
        assert!(checked.verify_checksum(&self.here.into(), &self.there.into()));
        assert_eq!(checked.dst_port(), UDP_PORT);
        assert_eq!(usize::from(checked.len()), udp.len());
        let (found, inner) = vxlan::decapsulate(&udp[8..]).unwrap();
        assert_eq!(found, vni().into());
        inner
    }

    /// The question that our host has just put on the wire, answered by the other one.
    fn answer_the_question(&mut self) {
        let asked = self.wire.received();
        assert_eq!(asked.len(), 1);
        let answer = answer(&asked[0]);
        self.arrive(&answer);
    }

    #[track_caller]
    fn assert_unclaimed(&self, expected: &[(DropReason, u64)]) {
        let found: Vec<_> = DropReason::ALL
            .into_iter()
            .map(|reason| (reason, self.counters.drops.get(reason)))
            .filter(|(_, count)| *count > 0)
            .collect();
        assert_eq!(found, expected);
        assert_eq!(self.counters.rx_unclaimed.get(), self.counters.drops.total());
    }
}

/// What the other host says to an ARP request or a neighbour solicitation, byte by byte from the RFCs.
fn answer(asked: &[u8]) -> Vec<u8> {
    match asked[12..14] {
        [8, 6] => {
            assert_eq!(asked[20..22], [0, 1], "a request");
            let mut reply = [&OURS.0[..], &THEIRS.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &THEIRS.0].concat();
            reply.extend(&asked[38..42]);
            reply.extend(&asked[22..32]);
            // Ethernet pads to 60 bytes.
            reply.resize(60, 0);
            reply
        }
        [0x86, 0xdd] => {
            assert_eq!((asked[20], asked[21], asked[54]), (58, 255, 135), "a solicitation");
            let mut reply = [&OURS.0[..], &THEIRS.0, &[0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255]].concat();
            reply.extend(&asked[62..78]);
            reply.extend(&asked[22..38]);
            reply.extend([136, 0, 0, 0, 0x60, 0, 0, 0]);
            reply.extend(&asked[62..78]);
            reply.extend([2, 1]);
            reply.extend(THEIRS.0);
            let pseudo: u32 = words(&reply[22..54]) + 32 + 58;
            let mut sum = pseudo + words(&reply[54..]);
            while sum >> 16 != 0 {
                sum = (sum & 0xffff) + (sum >> 16);
            }
            reply[56..58].copy_from_slice(&(!(sum as u16)).to_be_bytes());
            reply
        }
        _ => panic!("no question: {asked:x?}"),
    }
}

fn words(bytes: &[u8]) -> u32 {
    bytes.as_chunks::<2>().0.iter().map(|&pair| u32::from(u16::from_be_bytes(pair))).sum()
}

/// The first frame asks, the next ones go; and what comes back is delivered.
fn frames_pass_both_ways(here: &str, there: &str) {
    let mut scene = Scene::new(here, there);
    let lengths = [60, 61, 128, 129, 177, 178, 200, 1000, 1500];
    let bytes: usize = lengths.iter().sum();
    scene.lan.send(0, &frame(mac(200), mac(1), 60, 0));
    scene.lan.received(1);
    scene.lan.assert_moved(&[
        ("p0 rx", 1),
        ("p0 rx_bytes", 60),
        ("p1 tx", 1),
        ("p1 tx_bytes", 60),
        ("blue copies", 1),
        ("blue drop unresolved", 1),
    ]);
    scene.answer_the_question();
    assert_eq!((scene.counters.tx_host.get(), scene.counters.rx_host.get()), (1, 1));

    // Back first, so that the address behind the tunnel is learned.
    for (number, &length) in lengths.iter().enumerate() {
        let inner = frame(mac(1), mac(200), length, number as u8);
        let packet = scene.outer(&inner);
        scene.arrive(&packet);
        assert_eq!(scene.lan.received(0), [inner], "{length} bytes");
    }
    scene.lan.assert_moved(&[("blue tunnel_rx", 9), ("p0 tx", 9), ("p0 tx_bytes", bytes as u64)]);
    let sent: Vec<_> =
        lengths.iter().enumerate().map(|(n, &length)| frame(mac(200), mac(1), length, n as u8)).collect();
    for frame in &sent {
        scene.lan.send(0, frame);
    }
    assert_eq!(scene.tunnelled(), sent);
    scene.lan.assert_moved(&[("p0 rx", 9), ("p0 rx_bytes", bytes as u64), ("blue tunnel_tx", 9)]);
    scene.assert_unclaimed(&[]);
}

#[test]
fn frames_pass_both_ways_over_ipv4_once_arp_has_answered() {
    frames_pass_both_ways("192.0.2.1", "192.0.2.2");
}

#[test]
fn frames_pass_both_ways_over_ipv6_once_neighbour_discovery_has_answered() {
    frames_pass_both_ways("2001:db8::1", "2001:db8::2");
}

#[test]
fn a_configured_neighbour_is_not_asked_for_and_a_gateway_is_for_all_others() {
    let there: IpAddr = "192.0.2.2".parse().unwrap();
    let mut scene = Scene::with("192.0.2.1", "192.0.2.2", |config| config.neighbours = vec![(there, THEIRS)]);
    let sent = frame(Mac::BROADCAST, mac(1), 100, 1);
    scene.lan.send(0, &sent);
    assert_eq!(scene.tunnelled(), std::slice::from_ref(&sent));

    let mut scene = Scene::with("192.0.2.1", "198.51.100.7", |config| {
        config.gateway = Some("192.0.2.254".parse().unwrap());
        config.neighbours = vec![(there, Mac([2, 0, 0, 0, 0, 0x66]))];
    });
    scene.lan.send(0, &sent);
    let asked = scene.wire.received();
    assert_eq!(asked[0][38..42], [192, 0, 2, 254]);
    scene.arrive(&answer(&asked[0]));
    scene.lan.send(0, &sent);
    assert_eq!(scene.tunnelled(), [sent]);
}

#[test]
fn whoever_is_not_known_is_asked_for_once_however_many_frames_a_burst_has_for_them() {
    let mut scene = Scene::new("192.0.2.1", "192.0.2.2");
    let other: IpAddr = "192.0.2.3".parse().unwrap();
    scene.lan.network(0).tunnel.as_mut().unwrap().remotes.push(other);
    scene.lan.publish();
    let sent = frame(Mac::BROADCAST, mac(1), 100, 1);
    (0..3).for_each(|_| scene.lan.stations[0].send(&sent));
    assert_eq!(scene.lan.run(), 3);
    let asked: Vec<_> = scene.wire.received().iter().map(|question| question[38..42].to_vec()).collect();
    assert_eq!(asked, [[192, 0, 2, 2], [192, 0, 2, 3]]);
    // And once more when it is due again.
    scene.lan.now_ns += SECOND_NS;
    (0..3).for_each(|_| scene.lan.stations[0].send(&sent));
    assert_eq!(scene.lan.run(), 3);
    assert_eq!(scene.wire.received().len(), 2);
}

#[test]
fn a_neighbour_that_moves_is_followed_and_one_that_falls_silent_is_forgotten() {
    let mut scene = Scene::new("192.0.2.1", "192.0.2.2");
    let sent = frame(Mac::BROADCAST, mac(1), 100, 1);
    scene.lan.send(0, &sent);
    scene.answer_the_question();
    // Asked again while it is in use; the answer comes from another card.
    scene.lan.now_ns += 40 * SECOND_NS;
    scene.lan.send(0, &sent);
    let packets = scene.wire.received();
    assert_eq!(packets.len(), 2, "the question, and the frame");
    scene.check(&packets[1]);
    let mut reply = answer(&packets[0]);
    let moved = [2, 0xaa, 0, 0, 0, 0x33];
    reply[6..12].copy_from_slice(&moved);
    reply[22..28].copy_from_slice(&moved);
    scene.arrive(&reply);
    scene.lan.send(0, &sent);
    assert_eq!(scene.wire.received()[0][..6], moved);
    scene.lan.now_ns += 60 * SECOND_NS;
    scene.lan.send(0, &sent);
    let asked = scene.wire.received();
    assert_eq!((asked.len(), &asked[0][..6]), (1, &[0xff; 6][..]), "everybody is asked");
}

#[test]
fn our_host_answers_arp_and_echo_requests() {
    let mut scene = Scene::new("192.0.2.1", "192.0.2.2");
    let mut request = [&[0xff; 6][..], &THEIRS.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &THEIRS.0].concat();
    request.extend([192, 0, 2, 2, 0, 0, 0, 0, 0, 0, 192, 0, 2, 1]);
    scene.arrive(&request);
    let mut reply = [&THEIRS.0[..], &OURS.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2], &OURS.0, &[192, 0, 2, 1]].concat();
    reply.extend(THEIRS.0);
    reply.extend([192, 0, 2, 2]);
    assert_eq!(scene.wire.received(), [reply]);

    // Longer than the private copy: the rest comes back from where it lies.
    let mut ping = scene.outer(&[0; 900]);
    let bytes = ping.len();
    ping[23] = 1;
    ping[34..36].copy_from_slice(&[8, 0]);
    ping[36..38].copy_from_slice(&[0, 0]);
    (38..bytes).for_each(|at| ping[at] = at as u8);
    for range in [14..34, 34..bytes] {
        let at = range.start + if range.start == 14 { 10 } else { 2 };
        ping[at..at + 2].copy_from_slice(&[0, 0]);
        let mut sum = words(&ping[range]);
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        ping[at..at + 2].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    }
    scene.arrive(&ping);
    let pong = scene.wire.received().remove(0);
    assert_eq!((pong.len(), pong[34]), (bytes, 0));
    assert_eq!(pong[38..], ping[38..]);
    for range in [14..34, 34..bytes] {
        let sum = words(&pong[range]);
        assert_eq!(((sum & 0xffff) + (sum >> 16)) % 0xffff, 0, "a right checksum");
    }
    assert_eq!((scene.counters.rx_host.get(), scene.counters.tx_host.get()), (2, 2));
    scene.assert_unclaimed(&[]);
    scene.lan.assert_moved(&[]);
}

#[test]
fn hostile_packets_are_counted_and_go_nowhere() {
    use DropReason::{BadEncapsulation, NotForHost, OuterChecksum, OuterFragment, TooShort, UnknownVni};
    let mut scene = Scene::new("192.0.2.1", "192.0.2.2");
    let inner = frame(mac(1), mac(200), 300, 1);
    let good = scene.outer(&inner);
    let fix = |packet: &mut Vec<u8>| {
        let bytes = 14 + 4 * usize::from(packet[14] & 0xf);
        packet[24..26].copy_from_slice(&[0, 0]);
        let mut sum = words(&packet[14..bytes]);
        while sum >> 16 != 0 {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        packet[24..26].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    };
    let changed = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut packet = good.clone();
        change(&mut packet);
        packet
    };
    let mut options = good[..34].to_vec();
    options.extend([1; 12]);
    options.extend(&good[34..]);
    options[14] = 0x48;
    options[17] += 12;
    fix(&mut options);

    let cases = [
        (TooShort, good[..13].to_vec()),
        (BadEncapsulation, good[..20].to_vec()),
        (BadEncapsulation, good[..200].to_vec()),
        (OuterChecksum, changed(&|packet| packet[24] ^= 0x40)),
        (OuterChecksum, {
            let mut packet = good.clone();
            scene.sum(&mut packet, 34);
            packet[200] ^= 1;
            packet
        }),
        (
            OuterFragment,
            changed(&|packet| {
                packet[20] = 0x20;
                fix(packet);
            }),
        ),
        (
            NotForHost,
            changed(&|packet| {
                packet[33] = 77;
                fix(packet);
            }),
        ),
        (NotForHost, changed(&|packet| packet[12..14].copy_from_slice(&[0x88, 0xcc]))),
        (BadEncapsulation, changed(&|packet| packet[42] = 0)),
        (UnknownVni, changed(&|packet| packet[48] ^= 1)),
    ];
    for (reason, packet) in &cases {
        let before = scene.counters.drops.get(*reason);
        scene.arrive(packet);
        assert_eq!(scene.counters.drops.get(*reason), before + 1, "{reason:?}");
    }
    scene.assert_unclaimed(&[
        (TooShort, 1),
        (BadEncapsulation, 3),
        (UnknownVni, 1),
        (NotForHost, 2),
        (OuterFragment, 1),
        (OuterChecksum, 2),
    ]);
    assert_eq!(scene.lan.received(0), Vec::<Vec<u8>>::new());
    scene.lan.assert_moved(&[]);

    // Unknown host, no room for an Ethernet header, too long: these have a network, and are counted there.
    scene.arrive(&changed(&|packet| {
        packet[29] = 66;
        fix(packet);
    }));
    let packet = scene.outer(&inner[..13]);
    scene.arrive(&packet);
    let packet = scene.outer(&frame(mac(1), mac(200), 1523, 1));
    scene.arrive(&packet);
    scene.lan.assert_moved(&[
        ("blue tunnel_rx", 3),
        ("blue drop unknown_vtep", 1),
        ("blue drop too_short", 1),
        ("blue drop too_long", 1),
    ]);
    // With options, and with a checksum that is right.
    let mut summed = good.clone();
    scene.sum(&mut summed, 34);
    for packet in [options, summed, good] {
        scene.arrive(&packet);
        assert_eq!(scene.lan.received(0), std::slice::from_ref(&inner));
    }
    // A front-end that leaves work undone that it was not offered to.
    scene.wire.queues[1].post_frame(&[1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0], &[0; 64]);
    scene.lan.run();
    assert_eq!(scene.counters.drops.get(DropReason::BadOffload), 1);
}

/// Those of one sender in a row are opened by what they have in common; what comes between them is not theirs.
#[test]
fn packets_of_all_kinds_in_one_burst_are_told_apart() {
    let mut scene = Scene::new("192.0.2.1", "192.0.2.2");
    let (near, far) = (scene.lan.stations[0].mac(), mac(200));
    let inner = |seed: u8| frame(near, far, 60 + usize::from(seed) * 40, seed);
    let known = |seed| scene.outer(&inner(seed));
    let changed = |seed, at: usize| {
        let mut packet = known(seed);
        packet[at] ^= 1;
        packet
    };
    // The header checksum, the VNI, and the source address with a header checksum that fits.
    let (damaged, foreign) = (changed(50, 24), changed(51, 48));
    let there = scene.there;
    scene.there = "192.0.2.3".parse().unwrap();
    let stranger = scene.outer(&inner(52));
    scene.there = there;
    let known = |seed| scene.outer(&inner(seed));
    let packets = [
        known(1),
        known(2),
        damaged,
        known(3),
        foreign.clone(),
        foreign.clone(),
        known(4),
        stranger.clone(),
        stranger,
        known(5),
        known(6),
        foreign,
        known(7),
    ];
    packets.iter().for_each(|packet| scene.wire.send(packet));
    assert_eq!(scene.lan.run(), packets.len());
    assert_eq!(scene.lan.received(0), (1..=7).map(inner).collect::<Vec<_>>());
    scene.assert_unclaimed(&[(DropReason::UnknownVni, 3), (DropReason::OuterChecksum, 1)]);
    let counters = &scene.lan.snapshot.networks[0].as_ref().unwrap().counters;
    assert_eq!((counters.tunnel_rx.frames.get(), counters.drops.get(DropReason::UnknownVtep)), (9, 2));
}

#[test]
fn without_a_front_end_or_room_frames_are_dropped_and_counted() {
    let there: IpAddr = "192.0.2.2".parse().unwrap();
    let mut scene = Scene::with("192.0.2.1", "192.0.2.2", |config| {
        config.neighbours = vec![(there, THEIRS)];
        config.mtu = 1000;
    });
    let inner = frame(mac(1), mac(200), 100, 1);
    let packet = scene.outer(&inner);
    scene.arrive(&packet);
    scene.lan.received(0);
    scene.lan.received(1);
    scene.lan.assert_moved(&[
        ("blue tunnel_rx", 1),
        ("blue copies", 1),
        ("p0 tx", 1),
        ("p0 tx_bytes", 100),
        ("p1 tx", 1),
        ("p1 tx_bytes", 100),
    ]);
    // 14 bytes of the inner Ethernet header are in the packet, as are 36 of IPv4, UDP and VXLAN.
    for (length, is_sent) in [(964, true), (965, false)] {
        scene.lan.send(0, &frame(mac(200), mac(1), length, 1));
        assert_eq!(scene.tunnelled().len(), usize::from(is_sent), "{length} bytes");
    }
    let spare = usize::from(RING_SIZE);
    for _ in 0..=spare {
        scene.lan.send(0, &frame(mac(200), mac(1), 60, 1));
    }
    assert_eq!(scene.tunnelled().len(), spare);
    scene.lan.assert_moved(&[
        ("p0 rx", 67),
        ("p0 rx_bytes", 964 + 965 + 60 * 65),
        ("blue tunnel_tx", 65),
        ("blue drop underlay_refused", 1),
        ("blue drop underlay_full", 1),
    ]);
    for queue in [0, 1] {
        assert!(scene.lan.worker.detach_wire(WIRE, queue).is_some());
    }
    scene.lan.send(0, &frame(mac(200), mac(1), 60, 1));
    scene.lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", 60), ("blue drop port_down", 1)]);
}

#[test]
fn a_wire_whose_rings_are_broken_stops_alone() {
    let there: IpAddr = "192.0.2.2".parse().unwrap();
    let mut scene = Scene::with("192.0.2.1", "192.0.2.2", |config| config.neighbours = vec![(there, THEIRS)]);
    for queue in &mut scene.wire.queues {
        // The next chain starts outside of the table; the receiveq is full, so that only its index can be wrong.
        let index = queue.ring.available_index;
        queue.ring.post(9999);
        queue.ring.set_available_index(index.wrapping_add(1000));
    }
    assert_eq!(scene.lan.run(), 0);
    scene.lan.send(0, &frame(Mac::BROADCAST, mac(1), 100, 1));
    assert_eq!(scene.lan.received(1).len(), 1, "the guests are served");
    assert_eq!(scene.wire.received(), Vec::<Vec<u8>>::new());
    scene.lan.assert_moved(&[
        ("p0 rx", 1),
        ("p0 rx_bytes", 100),
        ("p1 tx", 1),
        ("p1 tx_bytes", 100),
        ("blue copies", 1),
        ("blue drop bad_receive_chain", 1),
    ]);
    for queue in [0, 1] {
        assert!(scene.lan.worker.detach_wire(WIRE, queue).unwrap().fault().is_some());
    }
}

#[test]
fn a_worker_with_a_wire_sleeps_and_is_woken_by_its_kick() {
    let mut scene = Scene::new("192.0.2.1", "192.0.2.2");
    assert!(scene.lan.worker.may_sleep());
    let mut setup = scene.lan.worker.detach_wire(WIRE, 1).unwrap().into_setup();
    let kick = setup.kick.take();
    assert!(scene.lan.worker.attach_wire(WIRE, 1, Ring::new(setup).unwrap()).is_none());
    assert!(!scene.lan.worker.may_sleep(), "a ring without a kick is polled");
    let mut setup = scene.lan.worker.detach_wire(WIRE, 1).unwrap().into_setup();
    setup.kick = kick;
    assert!(scene.lan.worker.attach_wire(WIRE, 1, Ring::new(setup).unwrap()).is_none());
    let packet = scene.outer(&frame(mac(1), mac(200), 100, 1));
    assert!(!scene.lan.worker.enable_kicks());
    scene.wire.send(&packet);
    assert!(scene.lan.worker.enable_kicks(), "the packet came before the kick was asked for");
}
