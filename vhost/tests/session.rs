//! Whole sessions over a real socket: rings come to their owner complete, and leave it before anything changes.

mod support;

use std::os::fd::AsRawFd;

use dreamwire_vhost::eventfd::EventFd;
use dreamwire_vhost::keeper::{SignalStatus, SocketMode};
use dreamwire_vhost::owner::SessionEvent;
use dreamwire_vhost::ring::RingFault;
use support::*;

#[test]
fn rings_are_attached_once_they_are_complete() {
    let port = Port::server();
    let front_end = port.session();
    let attached = port.owner.attached();
    for queue in [0, 1] {
        let first = attached.iter().find(|attached| attached.queue == queue).unwrap();
        let expected = Attached {
            queue,
            size: RING_ENTRIES,
            next_avail: 0,
            next_used: 0,
            features: VERSION_1,
            enabled: true,
            kicked: true,
        };
        assert_eq!(*first, expected);
    }
    let events = port.owner.events();
    assert_eq!(events, [SessionEvent::Connected, SessionEvent::Negotiated { features: VERSION_1 }]);
    // The state for people is written after the answer.
    eventually("the call descriptor", || port.endpoint.state().rings[1].call == SignalStatus::Eventfd);
    let state = port.endpoint.state();
    assert!(state.connected);
    assert_eq!(state.peer_pid, Some(std::process::id() as i32));
    assert_eq!((state.features, state.pairs_enabled), (Some(VERSION_1), 1));
    assert_eq!((state.memory_regions, state.memory_bytes), (1, MEMORY_BYTES));
    drop(front_end);
    assert!(port.owner.await_disconnect(1).contains("closed the connection"));
}

#[test]
fn a_new_call_descriptor_reaches_an_attached_ring() {
    let port = Port::server();
    let mut front_end = port.session();
    port.owner.serve(1, |ring| (ring.next_avail, ring.next_used) = (7, 5));
    let call = EventFd::new().unwrap();
    assert_eq!(front_end.ask(SET_VRING_CALL, &1u64.to_ne_bytes(), &[raw(&call)]), 0);
    let last = port.owner.attached().pop().unwrap();
    assert_eq!((last.queue, last.next_avail, last.next_used), (1, 7, 5));
    port.owner.serve(1, |ring| ring.call.as_ref().unwrap().signal().unwrap());
    assert!(call.drain());
    assert!(!front_end.calls[1].drain());
}

#[test]
fn disabling_a_ring_reaches_its_owner_and_repeating_it_does_not() {
    let port = Port::server();
    let mut front_end = port.session();
    assert_eq!(front_end.ask(SET_VRING_ENABLE, &ring_number(0, 0), &[]), 0);
    let attaches = port.owner.attached();
    assert!(!attaches.last().unwrap().enabled);
    assert_eq!(front_end.ask(SET_VRING_ENABLE, &ring_number(0, 0), &[]), 0);
    assert_eq!(port.owner.attached(), attaches);
}

#[test]
fn stopping_a_ring_answers_the_index_it_reached() {
    let port = Port::server();
    let mut front_end = port.session();
    port.owner.serve(1, |ring| (ring.next_avail, ring.next_used) = (65535, 65535));
    assert_eq!(front_end.stop_ring(1), 65535);
    assert_eq!(port.owner.holds(), [0]);
    // It starts again where the front-end says.
    front_end.tell(SET_VRING_BASE, &ring_number(1, 3), &[]);
    let kick = raw(&front_end.kicks[1]);
    assert_eq!(front_end.ask(SET_VRING_KICK, &1u64.to_ne_bytes(), &[kick]), 0);
    assert_eq!(port.owner.attached().last().unwrap().next_avail, 3);
    assert_eq!(front_end.stop_ring(0), 0);
}

#[test]
fn a_ring_without_a_kick_descriptor_is_polled() {
    let port = Port::server();
    let mut front_end = port.session();
    assert_eq!(front_end.stop_ring(0), 0);
    assert_eq!(port.owner.holds(), [1]);
    assert_eq!(front_end.ask(SET_VRING_KICK, &0x100u64.to_ne_bytes(), &[]), 0);
    let last = port.owner.attached().pop().unwrap();
    assert_eq!((last.queue, last.kicked), (0, false));
}

#[test]
fn a_new_memory_table_is_acked_after_the_rings_were_let_go() {
    let port = Port::server();
    let mut front_end = port.session();
    port.owner.serve(0, |ring| ring.next_avail = 9);
    let before = port.owner.attached().len();
    port.owner.hold_detach(true);
    let file = memfd(MEMORY_BYTES);
    front_end.send([SET_MEM_TABLE, 9, 40], &memory_table(MEMORY_BYTES), &[file.as_raw_fd()]);
    eventually("the session waits for its ring", || port.owner.detaches_waiting() == 1);
    assert!(front_end.is_waiting());
    port.owner.hold_detach(false);
    assert_eq!(front_end.answer_to(SET_MEM_TABLE), 0);
    let again = &port.owner.attached()[before..];
    assert_eq!(again.iter().map(|ring| (ring.queue, ring.next_avail)).collect::<Vec<_>>(), [(0, 9), (1, 0)]);
}

#[test]
fn reset_device_takes_all_rings_back_and_zeroes_them() {
    let port = Port::server();
    let mut front_end = port.session();
    port.owner.serve(0, |ring| ring.next_avail = 9);
    assert_eq!(front_end.ask(RESET_DEVICE, &[], &[]), 0);
    assert!(port.owner.holds().is_empty());
    assert_eq!(front_end.stop_ring(0), 0);
    // And everything can be set up anew on the same connection.
    front_end.tell(SET_FEATURES, &(VERSION_1 | PROTOCOL_FEATURES).to_ne_bytes(), &[]);
    front_end.start_ring(0);
    assert_eq!(port.owner.holds(), [0]);
    assert!(!port.owner.attached().last().unwrap().enabled);
}

#[test]
fn a_disconnect_detaches_everything_and_the_next_front_end_is_served() {
    let port = Port::server();
    for round in 1..=3 {
        let front_end = port.session();
        assert_eq!(port.owner.holds(), [0, 1]);
        drop(front_end);
        port.owner.await_disconnect(round);
        assert!(port.owner.holds().is_empty());
        let state = port.endpoint.state();
        assert!(!state.connected);
        assert_eq!(state.connections, round as u64);
    }
}

#[test]
fn as_a_client_we_connect_and_connect_again() {
    let port = Port::start(SocketMode::Client, 1);
    eventually("a reason", || port.endpoint.state().last_reason.is_some_and(|reason| reason.contains("vm1.sock")));
    let listener = std::os::unix::net::UnixListener::bind(&port.socket).unwrap();
    for round in 1..=2 {
        let mut front_end = FrontEnd::new(listener.accept().unwrap().0);
        front_end.negotiate();
        front_end.set_memory();
        front_end.start_ring(0);
        assert_eq!(port.owner.holds(), [0]);
        drop(front_end);
        port.owner.await_disconnect(round);
    }
    port.endpoint.stop();
    assert!(port.socket.exists(), "the front-end's socket is not ours to remove");
}

#[test]
fn memory_that_never_comes_is_explained() {
    let port = Port::server();
    let mut front_end = FrontEnd::connect(&port.socket);
    front_end.negotiate();
    eventually("a warning", || port.owner.warned_of("share=on"));
}

/// QEMU with `queues=` above the port's.
#[test]
fn a_front_end_that_asks_and_leaves_is_told_the_ports_queues_and_served_when_it_comes_to_stay() {
    let port = Port::start(SocketMode::Server, 2);
    let mut front_end = FrontEnd::connect(&port.socket);
    let offered = front_end.ask(GET_PROTOCOL_FEATURES, &[], &[]);
    front_end.tell(SET_PROTOCOL_FEATURES, &offered.to_ne_bytes(), &[]);
    assert_eq!(front_end.ask(GET_QUEUE_NUM, &[], &[]), 2);
    front_end.tell(SET_OWNER, &[], &[]);
    drop(front_end);
    let reason = port.owner.await_disconnect(1);
    assert!(reason.contains("queues= must be the port's: 2"), "{reason}");
    let mut front_end = FrontEnd::connect(&port.socket);
    front_end.negotiate();
    drop(front_end);
    let reason = port.owner.await_disconnect(2);
    assert!(!reason.contains("queues="), "{reason}");
}

#[test]
fn the_rust_vmm_front_end_gets_along() {
    use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
    use vhost::vhost_user::{Frontend, VhostUserFrontend};
    use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
    use vmm_sys_util::eventfd::EventFd as VmmEventFd;

    let port = Port::start(SocketMode::Server, 2);
    let mut front_end = Frontend::connect(&port.socket, 4).unwrap();
    front_end.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    front_end.set_owner().unwrap();
    let offered = front_end.get_features().unwrap();
    // LOG_ALL is acked while a migration lasts.
    front_end.set_features(offered & !LOG_ALL).unwrap();
    let protocol = front_end.get_protocol_features().unwrap();
    assert!(protocol.contains(VhostUserProtocolFeatures::STATUS | VhostUserProtocolFeatures::MTU));
    front_end.set_protocol_features(protocol).unwrap();
    assert_eq!(front_end.get_max_mem_slots().unwrap(), 64);
    let file = memfd(MEMORY_BYTES);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: MEMORY_BYTES,
        userspace_addr: USER_ADDRESS,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    front_end.add_mem_region(&region).unwrap();
    let event = VmmEventFd::new(0).unwrap();
    for ring in 0..4usize {
        let base = USER_ADDRESS + (ring as u64 + 1) * 0x1_0000;
        front_end.set_vring_num(ring, RING_ENTRIES).unwrap();
        front_end.set_vring_base(ring, 0).unwrap();
        let parts = VringConfigData {
            queue_max_size: RING_ENTRIES,
            queue_size: RING_ENTRIES,
            flags: 0,
            desc_table_addr: base,
            used_ring_addr: base + 0x4000,
            avail_ring_addr: base + 0x2000,
            log_addr: None,
        };
        front_end.set_vring_addr(ring, &parts).unwrap();
        front_end.set_vring_call(ring, &event).unwrap();
        front_end.set_vring_kick(ring, &event).unwrap();
        front_end.set_vring_enable(ring, true).unwrap();
    }
    assert_eq!(port.owner.holds(), [0, 1, 2, 3]);
    assert_eq!(front_end.get_vring_base(2).unwrap(), 0);
    assert_eq!(port.owner.holds(), [0, 1, 3]);
    let log = memfd(4096);
    let log_region = VhostUserDirtyLogRegion { mmap_size: 4096, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
    front_end.set_log_base(0, Some(log_region)).unwrap();
    front_end.set_features(offered).unwrap();
    eventually("the log is on", || port.endpoint.state().logging);
    front_end.remove_mem_region(&region).unwrap();
    // Last, for this front-end takes it for the number of rings, where QEMU takes it for pairs.
    assert_eq!(front_end.get_queue_num().unwrap(), 2);
}

#[test]
fn a_ring_that_does_not_fit_its_memory_is_reported_and_not_attached() {
    let port = Port::server();
    let mut front_end = FrontEnd::connect(&port.socket);
    front_end.negotiate();
    front_end.set_memory();
    let error = EventFd::new().unwrap();
    front_end.tell(SET_VRING_ERR, &0u64.to_ne_bytes(), &[raw(&error)]);
    front_end.start_ring(0);
    assert_eq!(port.owner.holds(), [0]);
    assert!(!error.drain());
    // The used ring begins inside the memory and ends outside.
    let mut addresses = ring_addresses(0);
    addresses[16..24].copy_from_slice(&(USER_ADDRESS + MEMORY_BYTES - 64).to_ne_bytes());
    assert_eq!(front_end.ask(SET_VRING_ADDR, &addresses, &[]), 0);
    assert!(port.owner.holds().is_empty());
    assert!(error.drain());
    eventually("a warning", || port.owner.warned_of("ring 0 is not served: the used ring"));
    // Put right, it is served again: its descriptors were not lost.
    assert_eq!(front_end.ask(SET_VRING_ADDR, &ring_addresses(0), &[]), 0);
    assert_eq!(port.owner.holds(), [0]);
    port.owner.serve(0, |ring| assert!(ring.kick.is_some() && ring.call.is_some()));
}

#[test]
fn rings_leave_memory_that_shrinks_and_come_back_when_it_grows() {
    let port = Port::server();
    let mut front_end = port.session();
    let file = memfd(MEMORY_BYTES);
    // Ring 0 lies in the first 128 KiB, ring 1 beyond.
    assert_eq!(front_end.ask(SET_MEM_TABLE, &memory_table(0x2_0000), &[file.as_raw_fd()]), 0);
    assert_eq!(port.owner.holds(), [0]);
    front_end.set_memory();
    assert_eq!(port.owner.holds(), [0, 1]);
}

/// What a front-end may do while a ring runs must not serve as a way out of quarantine; what a driver's reset looks like
/// from here must.
#[test]
fn a_broken_ring_stays_broken_until_its_driver_resets() {
    let port = Port::server();
    let mut front_end = port.session();
    let fault = Some(RingFault::Loop { head: 3 });
    let index = 1u64.to_ne_bytes();
    let (kick, call) = (raw(&front_end.kicks[1]), raw(&front_end.calls[1]));
    type Restart<'a> = &'a dyn Fn(&mut FrontEnd);
    let restarts: [(&str, Restart<'_>); 3] = [
        ("GET_VRING_BASE", &|front_end| {
            front_end.stop_ring(1);
            assert_eq!(front_end.ask(SET_VRING_KICK, &index, &[kick]), 0);
        }),
        ("SET_VRING_BASE", &|front_end| assert_eq!(front_end.ask(SET_VRING_BASE, &ring_number(1, 0), &[]), 0)),
        ("SET_STATUS 0", &|front_end| assert_eq!(front_end.ask(SET_STATUS, &0u64.to_ne_bytes(), &[]), 0)),
    ];
    for (name, restart) in restarts {
        port.owner.serve(1, |ring| ring.fault = fault);
        assert_eq!(front_end.ask(SET_VRING_CALL, &index, &[call]), 0);
        assert_eq!(front_end.ask(SET_VRING_ENABLE, &ring_number(1, 0), &[]), 0);
        assert_eq!(front_end.ask(SET_VRING_ENABLE, &ring_number(1, 1), &[]), 0);
        assert_eq!(front_end.ask(SET_VRING_ADDR, &ring_addresses(1), &[]), 0);
        front_end.set_memory();
        assert_eq!(port.owner.fault(1), fault, "before {name}");
        restart(&mut front_end);
        assert_eq!(port.owner.fault(1), None, "after {name}");
    }
    port.owner.serve(1, |ring| ring.fault = fault);
    assert_eq!(front_end.ask(RESET_DEVICE, &[], &[]), 0);
    front_end.tell(SET_FEATURES, &(VERSION_1 | PROTOCOL_FEATURES).to_ne_bytes(), &[]);
    front_end.start_ring(1);
    assert_eq!(port.owner.fault(1), None, "after RESET_DEVICE");
}
