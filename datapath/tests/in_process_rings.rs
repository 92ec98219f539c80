//! Rings of guests at one worker: full, broken, disabled, taken away and given back, silent; and who is notified.

mod common;

use common::*;
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::snapshot::PortId;
use dreamwire_vhost::ring::RingFault;

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
fn a_flow_has_the_same_queue_in_another_process() {
    const CHILD: &str = "DREAMWIRE_TEST_PRINTS_QUEUES";
    let mut lan = acquainted(2, 2);
    for flow in 0..32 {
        lan.send(0, &udp(mac(2), mac(1), flow));
    }
    let by_queue = lan.stations[1].received_by_queue();
    let flows_of = |queue: &Vec<Vec<u8>>| queue.iter().map(|frame| u16::from(frame[35])).collect::<Vec<_>>();
    let queues = format!("queues: {:?}", by_queue.iter().map(flows_of).collect::<Vec<_>>());
    if std::env::var_os(CHILD).is_some() {
        println!("{queues}");
        return;
    }
    let program = std::env::current_exe().unwrap();
    let test = "a_flow_has_the_same_queue_in_another_process";
    let child = std::process::Command::new(program).args(["--exact", test, "--nocapture"]).env(CHILD, "1").output();
    let child = child.unwrap();
    let printed = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && printed.contains(&queues), "{queues} here, there: {printed}");
    assert!(by_queue.iter().all(|queue| !queue.is_empty()), "{queues}");
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

/// Guest 1's driver posts one buffer at a time, and to look for it takes long.
#[test]
#[cfg(target_arch = "x86_64")]
fn an_operator_sees_whose_driver_is_far() {
    let mut lan = acquainted(2, 1);
    let sent = frame(mac(2), mac(1), 60, 1);
    (0..RING_SIZE).for_each(|_| lan.send(0, &sent));
    let far = |lan: &Lan| {
        let mut rows = lan.worker.ring_rows();
        rows.sort_by_key(|row| (row.port.0, row.queue));
        rows.iter().map(|row| row.far).collect::<Vec<_>>()
    };
    assert_eq!(far(&lan), [Some(false), None, Some(false), None]);
    // One look in 61 is measured, and twelve have to agree.
    let became_far = (0..4 * 61 * 12).any(|_| {
        let queue = &mut lan.stations[1].queues[0];
        queue.post_buffer(2048);
        queue.ring.guest.unmap_page(queue.ring.available);
        lan.send(0, &sent);
        far(&lan) != [Some(false), None, Some(false), None]
    });
    assert!(became_far);
    assert_eq!(far(&lan), [Some(false), None, Some(true), None]);
}
