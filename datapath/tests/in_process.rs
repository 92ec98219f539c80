//! Guest to guest through real queues and one worker: what arrives, and which counters moved.

mod common;

use common::*;
use dreamwire_datapath::drop_reason::DropReason;
use dreamwire_datapath::fdb::{LEARNED_PER_PORT_MAX, Location};
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::rarp;
use dreamwire_datapath::snapshot::{NetworkId, PortId};
use dreamwire_policy::SourceGuard;
use dreamwire_vhost::ring::RingFault;

/// Ports that know each other: unicast from the first frame on.
fn acquainted(ports: u16, queue_pairs: u16) -> Lan {
    let mut lan = Lan::new(ports, queue_pairs);
    for id in 0..ports {
        lan.network(0).static_macs.insert(mac(id as u8 + 1), PortId(id));
    }
    lan.publish();
    lan
}

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
fn a_frame_in_many_pieces_arrives_whole() {
    let mut lan = acquainted(2, 1);
    let sent = frame(mac(2), mac(1), 1000, 3);
    for sizes in [&[12, 1000][..], &[1, 11, 500, 500], &[4, 4, 4, 14, 114, 1, 0, 871], &[12, 127, 1, 1, 871]] {
        let queue = &mut lan.stations[0].queues[1];
        let (guest, at) = (queue.ring.guest.clone(), 0x10_0000);
        guest.write(at, &NET_HEADER);
        guest.write(at + 12, &sent);
        let (mut from, first) = (at, 40);
        for (index, &bytes) in sizes.iter().enumerate() {
            let index = index as u16;
            let flags = if usize::from(index) + 1 < sizes.len() { NEXT } else { 0 };
            queue.ring.descriptor(first + index, from, bytes, flags, first + index + 1);
            from += u64::from(bytes);
        }
        queue.ring.post(first);
        assert_eq!(lan.run(), 1);
        assert_eq!(lan.received(1), [&sent[..]], "{sizes:?}");
    }
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
fn flows_spread_over_a_receivers_queues_and_each_keeps_to_one() {
    let mut lan = acquainted(2, 2);
    for turn in 0..2 {
        for port in 0..16 {
            let mut sent = udp(mac(2), mac(1), port);
            sent[50] = turn;
            lan.send(0, &sent);
        }
    }
    let by_queue = lan.stations[1].received_by_queue();
    let flow = |frame: &Vec<u8>| u16::from_be_bytes([frame[34], frame[35]]);
    for queue in &by_queue {
        assert!(!queue.is_empty(), "sixteen flows on one of two queues: one seed in 2^15");
        let (first, second) = queue.split_at(queue.len() / 2);
        assert!(first.iter().all(|frame| frame[50] == 0) && second.iter().all(|frame| frame[50] == 1));
        assert!(first.iter().map(flow).eq(second.iter().map(flow)), "a flow has moved");
    }
    assert_eq!(by_queue.concat().len(), 32);
    lan.assert_moved(&[("p0 rx", 32), ("p0 rx_bytes", 1920), ("p1 tx", 32), ("p1 tx_bytes", 1920)]);
    let counters = &lan.snapshot.port(PortId(1)).unwrap().counters;
    for (pair, queue) in by_queue.iter().enumerate() {
        assert_eq!(counters.rings[2 * pair].traffic.frames.get(), queue.len() as u64);
    }
}

#[test]
fn a_disabled_queue_gets_nothing_and_its_flows_move() {
    let mut lan = acquainted(2, 2);
    lan.change_ring(1, 0, |setup| setup.enabled = false);
    for port in 0..16 {
        lan.send(0, &udp(mac(2), mac(1), port));
    }
    let by_queue = lan.stations[1].received_by_queue();
    assert_eq!((by_queue[0].len(), by_queue[1].len()), (0, 16));
    lan.assert_moved(&[("p0 rx", 16), ("p0 rx_bytes", 960), ("p1 tx", 16), ("p1 tx_bytes", 960)]);
}

#[test]
fn a_full_ring_drops_at_the_receiver_and_serves_again_when_emptied() {
    let mut lan = acquainted(2, 1);
    let sent: Vec<_> = (0..RING_SIZE as u8 + 6).map(|n| frame(mac(2), mac(1), 60, n)).collect();
    sent.iter().for_each(|frame| lan.send(0, frame));
    assert_eq!(lan.received(1), sent[..usize::from(RING_SIZE)]);
    let room = u64::from(RING_SIZE);
    lan.assert_moved(&[
        ("p0 rx", room + 6),
        ("p0 rx_bytes", 60 * (room + 6)),
        ("p1 tx", room),
        ("p1 tx_bytes", 60 * room),
        ("p1 drop ring_full", 6),
    ]);
    lan.send(0, &sent[0]);
    assert_eq!(lan.received(1), [&sent[0][..]]);
}

#[test]
fn a_buffer_too_small_drops_at_the_receiver() {
    let mut lan = acquainted(2, 1);
    lan.stations[1] = Station::new(1, 1);
    lan.worker.detach(PortId(1), 0);
    let receiveq = &mut lan.stations[1].queues[0];
    lan.worker.attach(PortId(1), 0, receiveq.ring.open(F_VERSION_1));
    receiveq.post_buffer(100);
    lan.send(0, &frame(mac(2), mac(1), 89, 1));
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", 89), ("p1 drop bad_receive_chain", 1)]);
    lan.send(0, &frame(mac(2), mac(1), 88, 1));
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", 88), ("p1 tx", 1), ("p1 tx_bytes", 88)]);
}

#[test]
fn a_disabled_transmitq_is_emptied_and_heard_by_nobody() {
    let mut lan = Lan::new(2, 1);
    lan.change_ring(0, 1, |setup| setup.enabled = false);
    lan.send(0, &frame(mac(2), mac(1), 60, 1));
    assert!(lan.received(1).is_empty());
    assert_eq!(lan.stations[0].queues[1].ring.used_index(), 1);
    assert!(lan.worker.fdb_rows().is_empty(), "nothing is learned from it");
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", 60), ("p0 drop sender_disabled", 1)]);
}

#[test]
fn a_port_without_a_receiveq_is_down() {
    let mut lan = acquainted(2, 1);
    lan.change_ring(1, 0, |setup| setup.enabled = false);
    lan.send(0, &frame(mac(2), mac(1), 60, 1));
    lan.assert_moved(&[("p0 rx", 1), ("p0 rx_bytes", 60), ("p1 drop port_down", 1)]);
    lan.worker.detach(PortId(1), 0);
    lan.send(0, &frame(mac(2), mac(1), 60, 1));
    lan.send(0, &frame(Mac::BROADCAST, mac(1), 60, 1));
    lan.assert_moved(&[("p0 rx", 2), ("p0 rx_bytes", 120), ("p1 drop port_down", 2)]);
}

#[test]
fn a_ring_that_is_taken_away_and_given_back_goes_on_where_it_stood() {
    let mut lan = acquainted(2, 1);
    for turn in 0..5u8 {
        let sent = frame(mac(2), mac(1), 200, turn);
        lan.send(0, &sent);
        assert_eq!(lan.received(1), [sent]);
        let index = u16::from(turn) + 1;
        lan.change_ring(0, 1, |setup| assert_eq!((setup.next_avail, setup.next_used), (index, index)));
        lan.change_ring(1, 0, |setup| assert_eq!((setup.next_avail, setup.next_used), (index, index)));
    }
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
fn one_broken_ring_stops_nobody_else() {
    let mut lan = acquainted(3, 1);
    let ring = &mut lan.stations[0].queues[1].ring;
    ring.descriptor(0, 0x8_0000, 100, NEXT, 0);
    ring.post(0);
    assert_eq!(lan.run(), 0);
    let row = lan.worker.ring_rows().into_iter().find(|row| (row.port, row.queue) == (PortId(0), 1)).unwrap();
    assert_eq!(row.quarantined, Some(RingFault::Loop { head: 0 }.to_string()));
    lan.send(1, &frame(mac(3), mac(2), 60, 1));
    lan.send(2, &frame(mac(1), mac(3), 60, 1));
    assert_eq!((lan.received(2).len(), lan.received(0).len()), (1, 1), "its other queue works");
    assert!(!lan.worker.enable_kicks(), "it keeps nobody awake");
}

#[test]
fn a_broken_receiveq_costs_its_own_port_alone() {
    let mut lan = Lan::new(3, 1);
    lan.stations[1].queues[0].ring.set_available_index(999);
    for _ in 0..2 {
        let sent = frame(Mac::BROADCAST, mac(1), 60, 1);
        lan.send(0, &sent);
        assert_eq!(lan.received(2), [sent]);
    }
    lan.assert_moved(&[
        ("p0 rx", 2),
        ("p0 rx_bytes", 120),
        ("blue copies", 2),
        ("p2 tx", 2),
        ("p2 tx_bytes", 120),
        ("p1 drop bad_receive_chain", 2),
    ]);
}

#[test]
fn a_guest_is_notified_once_per_burst_and_only_if_it_asked() {
    let mut lan = acquainted(2, 1);
    let calls =
        |lan: &Lan, id: u16, queue: usize| lan.snapshot.port(PortId(id)).unwrap().counters.rings[queue].calls.get();
    for _ in 0..10 {
        lan.stations[0].send(&frame(mac(2), mac(1), 60, 1));
    }
    lan.run();
    assert_eq!((calls(&lan, 0, 1), calls(&lan, 1, 0)), (1, 1));
    lan.stations[0].queues[1].ring.set_available_flags(1);
    lan.stations[1].queues[0].ring.set_available_flags(1);
    lan.send(0, &frame(mac(2), mac(1), 60, 1));
    assert_eq!((calls(&lan, 0, 1), calls(&lan, 1, 0)), (1, 1));
}

#[test]
fn the_worker_stays_awake_for_work_that_came_meanwhile() {
    for features in [F_VERSION_1, F_VERSION_1 | F_EVENT_IDX] {
        let mut lan = Lan::without_rings(Lan::new(2, 1).snapshot);
        lan.stations = vec![Station::new(0, 1), Station::new(1, 1)];
        lan.attach(0, features);
        lan.attach(1, features);
        assert!(lan.worker.may_sleep());
        assert!(!lan.worker.enable_kicks());
        let ring = &lan.stations[0].queues[1].ring;
        assert_eq!(ring.guest.read_u16(ring.used), 0, "VIRTQ_USED_F_NO_NOTIFY is off");
        lan.stations[0].send(&frame(Mac::BROADCAST, mac(1), 60, 1));
        assert!(lan.worker.enable_kicks());
        lan.worker.disable_kicks();
        let ring = &lan.stations[0].queues[1].ring;
        assert_eq!(ring.guest.read_u16(ring.used), u16::from(features & F_EVENT_IDX == 0));
        assert_eq!(lan.run(), 1);
        assert!(!lan.worker.enable_kicks());
    }
    let mut lan = Lan::new(1, 1);
    lan.change_ring(0, 1, |setup| setup.kick = None);
    assert!(!lan.worker.may_sleep(), "a guest that does not kick has to be polled");
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
fn a_ring_of_a_port_without_a_network_waits_and_keeps_nobody_awake() {
    let mut lan = Lan::new(2, 1);
    lan.stations[0].send(&frame(mac(2), mac(1), 60, 1));
    let blue = lan.snapshot.networks[0].take();
    lan.publish();
    assert_eq!(lan.run(), 0);
    assert!(!lan.worker.enable_kicks());
    lan.snapshot.networks[0] = blue;
    lan.publish();
    assert_eq!(lan.run(), 1);
    assert_eq!(lan.received(1).len(), 1);
}

#[test]
fn queues_that_a_new_snapshot_has_no_room_for_are_not_served() {
    let mut lan = acquainted(2, 2);
    for id in 0..2 {
        lan.snapshot.ports[usize::from(id)] = Some(port(id, 0, 1));
    }
    lan.publish();
    lan.stations[0].queues[3].post_frame(&NET_HEADER, &frame(mac(2), mac(1), 60, 1));
    assert_eq!(lan.run(), 0);
    assert!(!lan.worker.enable_kicks());
    (0..64).for_each(|flow| lan.send(0, &udp(mac(2), mac(1), flow)));
    let by_queue = lan.stations[1].received_by_queue();
    assert_eq!(by_queue[1].len(), 0);
    let port = lan.snapshot.port(PortId(1)).unwrap();
    assert_eq!(by_queue[0].len() as u64 + port.counters.drops.total(), 64);
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

#[test]
fn a_ring_attached_twice_is_one_source() {
    let mut lan = Lan::new(2, 1);
    lan.attach(0, F_VERSION_1);
    assert_eq!(lan.worker.ring_rows().iter().filter(|row| row.port == PortId(0)).count(), 2);
    lan.send(0, &frame(mac(2), mac(1), 60, 1));
    assert_eq!(lan.received(1).len(), 1);
    assert!(lan.worker.detach(PortId(0), 1).is_some());
    assert!(lan.worker.detach(PortId(0), 1).is_none());
}

#[test]
fn a_guest_that_was_silent_for_long_is_heard_among_busy_ones() {
    let mut lan = Lan::new(40, 1);
    let all: Vec<_> = (0..40u8).map(|station| mac(station + 1)).collect();
    // Long enough for all to count as idle; then every one of them speaks once, to the next.
    (0..3000).for_each(|_| assert_eq!(lan.worker.turn(0), 0));
    for station in 0..40 {
        lan.stations[station].send(&frame(all[(station + 1) % 40], all[station], 60, 0));
        // Station 0 is never silent meanwhile: no turn is empty.
        let mut turns = 0;
        while lan.received((station + 1) % 40).is_empty() {
            lan.stations[0].send(&frame(all[0], all[0], 60, 0));
            lan.worker.turn(0);
            turns += 1;
            assert!(turns < 20, "station {station} was not heard");
        }
    }
    // Detached in any order, each gives back its own ring.
    for station in [39, 0, 20, 1, 38] {
        assert!(lan.worker.detach(PortId(station), 1).is_some());
        assert!(lan.worker.detach(PortId(station), 1).is_none());
        assert!(lan.worker.ring_rows().iter().all(|row| row.port != PortId(station) || row.queue == 0));
    }
}
