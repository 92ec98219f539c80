//! Guest to guest through real queues and one worker: what arrives, and which counters moved.

mod common;

use common::*;
use dreamwire_datapath::drop_reason::DropReason;
use dreamwire_datapath::fdb::{LEARNED_PER_PORT_MAX, Location};
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::rarp;
use dreamwire_datapath::snapshot::{NetworkId, PortId};
use dreamwire_policy::SourceGuard;

#[test]
fn a_unicast_frame_reaches_its_station_alone() {
    let mut lan = acquainted(3, 1);
    let sent = frame(mac(2), mac(1), 60, 1);
    lan.send(0, &sent);
    assert_eq!(lan.received(1), [sent]);
    assert!(lan.received(0).is_empty() && lan.received(2).is_empty());
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", 60), ("p1 tx", 1), ("p1 tx_bytes", 60)]);
    assert_eq!(lan.counters.busy_turns.get(), 1);
    assert_eq!(lan.counters.empty_turns.get(), 1);
}

#[test]
fn frames_of_every_length_arrive_byte_for_byte() {
    let mut lan = acquainted(2, 1);
    let mut bytes = 0;
    for length in 60..=1514 {
        let sent = frame(mac(2), mac(1), length, length as u8);
        lan.send(0, &sent);
        assert_eq!(lan.received(1), [sent], "{length}");
        bytes += length as u64;
    }
    let frames = 1514 - 60 + 1;
    lan.assert_moved(&[("p0 rx", frames), ("p0 rx_bytes", bytes), ("p1 tx", frames), ("p1 tx_bytes", bytes)]);
}

#[test]
fn a_burst_larger_than_one_turn_arrives_in_order() {
    let mut lan = acquainted(2, 1);
    let sent: Vec<_> = (0..RING_SIZE as u8).map(|n| frame(mac(2), mac(1), 60 + 20 * usize::from(n), n)).collect();
    sent.iter().for_each(|frame| lan.stations[0].send(frame));
    assert_eq!(lan.run(), usize::from(RING_SIZE));
    assert_eq!(lan.received(1), sent);
    assert_eq!(lan.counters.busy_turns.get(), 2);
}

#[test]
fn a_broadcast_reaches_everybody_else() {
    let mut lan = Lan::new(4, 1);
    let sent = frame(Mac::BROADCAST, mac(2), 300, 1);
    lan.send(1, &sent);
    for other in [0, 2, 3] {
        assert_eq!(lan.received(other), [&sent[..]]);
    }
    assert!(lan.received(1).is_empty());
    lan.assert_moved(&[
        ("p1 rx", 1),
        ("p1 rx_bytes", 300),
        ("blue copies", 2),
        ("p0 tx", 1),
        ("p0 tx_bytes", 300),
        ("p2 tx", 1),
        ("p2 tx_bytes", 300),
        ("p3 tx", 1),
        ("p3 tx_bytes", 300),
    ]);
}

#[test]
fn a_port_that_does_not_hear_unknown_stations_hears_groups_and_its_own_alone() {
    let mut lan = Lan::new(3, 1);
    lan.network(0).static_macs.insert(mac(3), PortId(2));
    lan.network(0).hear_unknown.retain(|&port| port != PortId(2));
    lan.publish();
    let (unknown, own) = (frame(mac(9), mac(1), 64, 1), frame(mac(3), mac(1), 64, 2));
    let everybody = frame(Mac::BROADCAST, mac(1), 64, 3);
    let group = frame(Mac([0x33, 0x33, 0, 0, 0, 1]), mac(1), 64, 4);
    for frame in [&unknown, &own, &everybody, &group] {
        lan.send(0, frame);
    }
    assert_eq!(lan.received(1), [unknown, everybody.clone(), group.clone()]);
    assert_eq!(lan.received(2), [own, everybody, group]);
    lan.assert_moved(&[
        ("p0 rx", 4),
        ("p0 rx_bytes", 256),
        ("blue copies", 2),
        ("p1 tx", 3),
        ("p1 tx_bytes", 192),
        ("p2 tx", 3),
        ("p2 tx_bytes", 192),
    ]);
    // A second address behind it is reached once it has spoken.
    lan.send(2, &frame(mac(8), mac(4), 64, 5));
    let answer = frame(mac(4), mac(1), 64, 6);
    lan.send(0, &answer);
    assert_eq!(lan.received(2), [answer]);
    lan.assert_moved(&[
        ("p0 rx", 1),
        ("p0 rx_bytes", 64),
        ("p2 rx", 1),
        ("p2 rx_bytes", 64),
        ("blue copies", 1),
        ("p0 tx", 1),
        ("p0 tx_bytes", 64),
        ("p1 tx", 1),
        ("p1 tx_bytes", 64),
        ("p2 tx", 1),
        ("p2 tx_bytes", 64),
    ]);
}

#[test]
fn an_unknown_frame_that_no_port_hears_has_no_destination() {
    let mut lan = Lan::new(2, 1);
    lan.network(0).hear_unknown.clear();
    lan.publish();
    lan.send(0, &frame(mac(9), mac(1), 64, 1));
    assert!(lan.received(1).is_empty());
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", 64), ("p0 drop no_destination", 1)]);
}

#[test]
fn an_unknown_station_is_flooded_to_until_it_speaks() {
    let mut lan = Lan::new(3, 1);
    let ask = frame(mac(2), mac(1), 64, 1);
    lan.send(0, &ask);
    assert_eq!((lan.received(1), lan.received(2)), (vec![ask.clone()], vec![ask.clone()]));
    lan.assert_moved(&[
        ("p0 rx", 1),
        ("p0 rx_bytes", 64),
        ("blue copies", 1),
        ("p1 tx", 1),
        ("p1 tx_bytes", 64),
        ("p2 tx", 1),
        ("p2 tx_bytes", 64),
    ]);
    let answer = frame(mac(1), mac(2), 64, 2);
    lan.send(1, &answer);
    assert_eq!(lan.received(0), [answer]);
    lan.send(0, &ask);
    assert_eq!(lan.received(1), [ask]);
    assert!(lan.received(2).is_empty());
    lan.assert_moved(&[
        ("p0 rx", 1),
        ("p0 rx_bytes", 64),
        ("p0 tx", 1),
        ("p0 tx_bytes", 64),
        ("p1 rx", 1),
        ("p1 rx_bytes", 64),
        ("p1 tx", 1),
        ("p1 tx_bytes", 64),
    ]);
}

#[test]
fn a_frame_to_where_it_came_from_ends() {
    let mut lan = acquainted(2, 1);
    lan.send(0, &frame(mac(1), mac(1), 60, 1));
    assert!(lan.received(0).is_empty() && lan.received(1).is_empty());
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", 60), ("p0 drop hairpin", 1)]);
}

#[test]
fn a_broadcast_in_an_empty_network_ends() {
    let mut lan = Lan::new(1, 1);
    lan.send(0, &frame(Mac::BROADCAST, mac(1), 60, 1));
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", 60), ("p0 drop no_destination", 1)]);
}

#[test]
fn tags_are_carried_as_they_are() {
    let mut lan = acquainted(2, 1);
    for tags in [&[0x81, 0, 0, 7][..], &[0x88, 0xa8, 0xe0, 5, 0x81, 0, 0, 7]] {
        for length in [60, 128, 1514] {
            let mut sent = frame(mac(2), mac(1), length, 1);
            sent.splice(12..12, tags.iter().copied());
            lan.send(0, &sent);
            assert_eq!(lan.received(1), [sent]);
        }
    }
}

#[test]
fn what_is_no_frame_of_the_network_ends_at_the_sender() {
    let mut lan = acquainted(2, 1);
    let longest = usize::from(MTU) + 14 + 8;
    lan.send(0, &frame(mac(2), mac(1), longest, 1));
    assert_eq!(lan.received(1).len(), 1);
    let bytes = longest as u64;
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", bytes), ("p1 tx", 1), ("p1 tx_bytes", bytes)]);
    lan.send(0, &frame(mac(2), mac(1), longest + 1, 1));
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", bytes + 1), ("p0 drop too_long", 1)]);
    for length in 0..14 {
        lan.send(0, &frame(mac(2), mac(1), 60, 1)[..length]);
    }
    lan.assert_moved(&[("p0 rx", 14), ("p0 rx_bytes", 91), ("p0 drop too_short", 14)]);
    for source in [Mac::BROADCAST, Mac([0; 6]), Mac([1, 0, 0x5e, 0, 0, 1])] {
        lan.send(0, &frame(mac(2), source, 60, 1));
    }
    lan.assert_moved(&[("p0 rx", 3), ("p0 rx_bytes", 180), ("p0 drop bad_source", 3)]);
    lan.send(0, &frame(Mac([1, 0x80, 0xc2, 0, 0, 1]), mac(1), 60, 1));
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", 60), ("p0 drop reserved", 1)]);
    for (at, value) in [(0, 1), (1, 1), (1, 3), (1, 0x80)] {
        let mut net = NET_HEADER;
        net[at] = value;
        lan.stations[0].queues[1].post_frame(&net, &frame(mac(2), mac(1), 60, 1));
    }
    assert_eq!(lan.run(), 4);
    lan.assert_moved(&[("p0 rx", 4), ("p0 rx_bytes", 240), ("p0 drop bad_offload", 4)]);
    let queue = &mut lan.stations[0].queues[1];
    queue.ring.descriptor(9, 0x8_0000, 11, 0, 0);
    queue.ring.post(9);
    assert_eq!(lan.run(), 1);
    lan.assert_moved(&[("p0 rx", 1), ("p0 drop bad_chain", 1)]);
    assert!(lan.received(1).is_empty());
}

#[test]
fn networks_do_not_hear_each_other() {
    let mut lan = Lan::new(3, 1);
    lan.network(0).ports = vec![PortId(0), PortId(1)];
    lan.network(0).hear_unknown = vec![PortId(0), PortId(1)];
    lan.snapshot.networks.push(Some(network("red", &[2])));
    lan.snapshot.ports[2].as_mut().unwrap().network = NetworkId(1);
    lan.publish();
    lan.send(2, &frame(Mac::BROADCAST, mac(3), 60, 1));
    lan.assert_moved(&[("p2 rx", 1), ("p2 rx_bytes", 60), ("p2 drop no_destination", 1)]);
    lan.send(0, &frame(mac(3), mac(1), 60, 1));
    assert_eq!((lan.received(1).len(), lan.received(2).len()), (1, 0));
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", 60), ("p1 tx", 1), ("p1 tx_bytes", 60)]);
}

#[test]
fn a_removed_port_is_neither_heard_nor_reached_and_its_addresses_are_forgotten() {
    let mut lan = Lan::new(3, 1);
    lan.send(1, &frame(Mac::BROADCAST, mac(2), 60, 1));
    assert_eq!(lan.worker.fdb_rows()[0].location, Location::Port(PortId(1)));
    lan.assert_moved(&[
        ("p1 rx", 1),
        ("p1 rx_bytes", 60),
        ("p0 tx", 1),
        ("p0 tx_bytes", 60),
        ("p2 tx", 1),
        ("p2 tx_bytes", 60),
        ("blue copies", 1),
    ]);
    (0..3).for_each(|station| drop(lan.received(station)));
    lan.network(0).ports = vec![PortId(0), PortId(2)];
    lan.network(0).hear_unknown = vec![PortId(0), PortId(2)];
    let removed = lan.snapshot.ports[1].take().unwrap();
    lan.publish();
    assert!(lan.worker.fdb_rows().is_empty());
    lan.stations[1].send(&frame(Mac::BROADCAST, mac(2), 60, 1));
    assert_eq!(lan.run(), 0, "its rings are attached, but nobody listens");
    let to_removed = frame(mac(2), mac(1), 60, 1);
    lan.send(0, &to_removed);
    assert_eq!(lan.received(2), [to_removed]);
    assert!(lan.received(1).is_empty());
    assert_eq!((removed.counters.rx(), removed.counters.tx(), removed.counters.drops.total()), ((1, 60), (0, 0), 0));
    // Until the control thread has taken it off the list of its network, too, its copy counts as removed.
    lan.network(0).ports.push(PortId(1));
    lan.network(0).hear_unknown.push(PortId(1));
    lan.publish();
    lan.send(0, &frame(Mac::BROADCAST, mac(1), 60, 1));
    assert_eq!(lan.network(0).counters.drops.get(DropReason::Removed), 1);
    let ring = lan.worker.detach(PortId(1), 1).expect("still attached");
    assert_eq!((ring.next_avail(), ring.next_used()), (1, 1), "the frame that nobody took is still the guest's");
}

#[test]
fn old_addresses_are_forgotten_under_load_too() {
    let mut lan = Lan::new(2, 1);
    let speak = |lan: &mut Lan, number: u32| {
        let [_, a, b, c] = number.to_be_bytes();
        lan.send(0, &frame(Mac::BROADCAST, Mac([2, 0, 1, a, b, c]), 60, 1));
        lan.received(1);
    };
    for number in 0..=u32::from(LEARNED_PER_PORT_MAX) {
        speak(&mut lan, number);
    }
    let refused = lan.network(0).counters.learn_refused.get();
    assert_eq!(refused, 1, "the quota is full");
    // Every turn from here on moves a frame.
    for second in 0..40 {
        lan.now_ns = AGE_NS + (1 + second) * SECOND_NS;
        lan.stations[0].send(&frame(mac(9), mac(8), 60, 1));
        assert_eq!(lan.worker.turn(lan.now_ns), 1);
        lan.received(1);
    }
    let refused = lan.network(0).counters.learn_refused.get();
    speak(&mut lan, 5000);
    assert_eq!(lan.network(0).counters.learn_refused.get(), refused, "there is room again");
    assert!(lan.worker.fdb_rows().iter().any(|row| row.mac == Mac([2, 0, 1, 0, 0x13, 0x88])));
}

#[test]
fn an_announcement_moves_its_station_to_another_port_and_is_conserved() {
    let mut lan = Lan::new(3, 1);
    // The station is at port 0, then it is announced at port 1.
    lan.send(0, &frame(Mac::BROADCAST, mac(9), 60, 1));
    lan.received(1);
    lan.received(2);
    lan.worker.originate(PortId(1), &rarp::announcement(mac(9)));
    let announced = rarp::announcement(mac(9)).to_vec();
    assert_eq!(lan.received(0), [&announced[..]]);
    assert_eq!(lan.received(2), [&announced[..]]);
    assert!(lan.received(1).is_empty());
    let [row] = &lan.worker.fdb_rows()[..] else { panic!("one station") };
    assert_eq!((row.mac, row.location), (mac(9), Location::Port(PortId(1))));
    let sent = frame(mac(9), mac(3), 60, 2);
    lan.send(2, &sent);
    assert_eq!(lan.received(1), [sent]);
    lan.assert_moved(&[
        ("p0 rx", 1),
        ("p0 rx_bytes", 60),
        ("p2 rx", 1),
        ("p2 rx_bytes", 60),
        ("p1 originated", 1),
        ("blue copies", 2),
        ("p0 tx", 1),
        ("p0 tx_bytes", 60),
        ("p1 tx", 2),
        ("p1 tx_bytes", 120),
        ("p2 tx", 2),
        ("p2 tx_bytes", 120),
    ]);
}

#[test]
fn a_guarded_port_is_announced_with_its_own_address_only() {
    let mut lan = Lan::new(2, 1);
    let guard = SourceGuard::new(mac(1).0, [std::net::Ipv4Addr::new(10, 0, 0, 1).into()]);
    lan.snapshot.ports[0].as_mut().unwrap().guard = Some(guard);
    lan.publish();
    lan.worker.originate(PortId(0), &rarp::announcement(mac(2)));
    assert!(lan.received(1).is_empty());
    lan.worker.originate(PortId(0), &rarp::announcement(mac(1)));
    assert_eq!(lan.received(1).len(), 1);
    // No frames: too short, too long, and of a port that does not exist.
    lan.worker.originate(PortId(0), &[0xff; 13]);
    lan.worker.originate(PortId(0), &[0xff; 129]);
    lan.worker.originate(PortId(7), &rarp::announcement(mac(1)));
    lan.assert_moved(&[("p0 originated", 2), ("p0 drop source_guard", 1), ("p1 tx", 1), ("p1 tx_bytes", 60)]);
}
