//! Front-ends that break the rules: their own connection ends, with a reason, and the next one is served.

mod support;

use std::io::Write;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use dreamwire_vhost::owner::SessionEvent;
use support::*;

/// Does `offend` to a session with rings attached: it must be sent away with a reason that contains `part`, and the
/// port must serve the next one.
#[track_caller]
fn assert_sent_away(part: &str, offend: impl FnOnce(&mut FrontEnd)) {
    let port = Port::server();
    let mut front_end = port.session();
    offend(&mut front_end);
    let reason = port.owner.await_disconnect(1);
    assert!(reason.contains(part), "{reason}");
    assert!(port.owner.holds().is_empty());
    assert_eq!(port.endpoint.state().last_reason, Some(reason));
    front_end.assert_closed();
    drop(port.session());
}

#[test]
fn rubbish_bytes_end_the_connection() {
    assert_sent_away("not a vhost-user message", |front_end| {
        front_end.stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    });
}

#[test]
fn a_ring_size_of_three_is_refused() {
    assert_sent_away("SET_VRING_NUM: ring 0 cannot have 3 entries", |front_end| {
        front_end.tell(SET_VRING_NUM, &ring_number(0, 3), &[]);
    });
}

#[test]
fn a_pipe_as_call_descriptor_is_refused() {
    assert_sent_away("SET_VRING_CALL: ring 1: expected an eventfd, got pipe:", |front_end| {
        let (_read, write) = nix::unistd::pipe().unwrap();
        front_end.tell(SET_VRING_CALL, &1u64.to_ne_bytes(), &[write.as_raw_fd()]);
    });
}

#[test]
fn memory_past_the_end_of_its_file_is_refused() {
    assert_sent_away("SET_MEM_TABLE: the memory region at 0x0 ends at 0x200000", |front_end| {
        let file = memfd(MEMORY_BYTES);
        front_end.tell(SET_MEM_TABLE, &memory_table(2 * MEMORY_BYTES), &[file.as_raw_fd()]);
    });
}

#[test]
fn a_refusal_that_was_asked_for_keeps_the_session() {
    let port = Port::server();
    let mut front_end = port.session();
    let file = memfd(MEMORY_BYTES);
    let past_end = memory_table(2 * MEMORY_BYTES);
    assert_eq!(front_end.ask(SET_MEM_TABLE, &past_end, &[file.as_raw_fd()]), 1);
    assert_eq!(port.owner.holds(), [0, 1]);
    eventually("a warning", || port.owner.warned_of("SET_MEM_TABLE"));
    assert_eq!(front_end.stop_ring(0), 0);
}

#[test]
fn too_many_descriptors_end_the_connection() {
    assert_sent_away("more than 32 descriptors", |front_end| {
        let event = raw(&front_end.kicks[0]);
        front_end.tell(GET_FEATURES, &[], &[event; 33]);
    });
}

#[test]
fn a_half_message_and_a_hang_up_end_the_connection() {
    assert_sent_away("in the middle of a message", |front_end| {
        front_end.stream.write_all(&[1, 0, 0]).unwrap();
        front_end.stream.shutdown(std::net::Shutdown::Write).unwrap();
    });
}

#[test]
fn a_stalled_half_message_does_not_hold_up_a_stop() {
    let port = Port::server();
    let mut front_end = port.session();
    front_end.stream.write_all(&[1, 0, 0, 0, 1, 0]).unwrap();
    let began = Instant::now();
    port.endpoint.stop();
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    assert!(port.owner.holds().is_empty());
    assert!(!port.socket.exists());
    assert_eq!(port.owner.await_disconnect(1), "the port is being stopped");
    front_end.assert_closed();
}

#[test]
fn a_second_front_end_is_turned_away_by_name() {
    let port = Port::server();
    let mut first = port.session();
    FrontEnd::connect(&port.socket).assert_closed();
    let pid = std::process::id();
    let text = format!("a second front-end (pid {pid}) tried to attach to port vm1; it is in use by pid {pid}");
    eventually("a warning", || port.owner.warned_of(&text));
    assert_eq!(first.stop_ring(0), 0, "the first is not disturbed");
}

#[test]
fn a_flood_of_warnings_is_limited() {
    let port = Port::server();
    let mut front_end = port.session();
    for _ in 0..1000 {
        assert_eq!(front_end.ask(SET_VRING_NUM, &ring_number(0, 3), &[]), 1);
    }
    let warnings = |quiet| {
        let events = port.owner.events();
        events.iter().filter(|event| matches!(event, SessionEvent::QuietWarning(_)) == quiet).count()
    };
    // The last one is reported after its answer; connecting and negotiating are two events more.
    eventually("all of them shown", || warnings(false) + warnings(true) == 1002);
    assert!(warnings(false) < 50, "{}", warnings(false));
}

#[test]
fn a_panic_in_the_owner_costs_its_session_only() {
    let port = Port::server();
    let mut front_end = FrontEnd::connect(&port.socket);
    front_end.negotiate();
    front_end.set_memory();
    port.owner.panic_from_now_on();
    front_end.start_ring(0);
    drop(front_end);
    port.owner.await_disconnect(1);
    port.endpoint.stop();
}

/// splitmix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % limit
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

/// Sends one message that is right more often than not. False if the connection is gone.
fn say_something(random: &mut Random, front_end: &FrontEnd, memory: i32) -> bool {
    let kick = raw(&front_end.kicks[0]);
    let ring = random.of(&[0, 0, 0, 1, 1, 1, 2, 0x10000]);
    let number = random.of(&[0, 1, 1, 4, 256, 256, 3, 32768, 65536, u32::MAX]);
    let bytes = random.of(&[MEMORY_BYTES, MEMORY_BYTES, MEMORY_BYTES, 0, 4096, 2 * MEMORY_BYTES, u64::MAX]);
    let single = [&[0; 8], &memory_table(bytes)[8..]].concat();
    let mut addresses = ring_addresses(ring & 1);
    // a part moved: out of memory, out of line, to its very end
    let moved = random.of(&[0, 0, 0, 8, 2, 16, 0x10_0000 - 0x1_0000, 0x10_0000 - 0x1_0002, 1 << 40, u64::MAX]);
    let part = 8 + 8 * random.below(3) as usize;
    let at = u64::from_ne_bytes(addresses[part..part + 8].try_into().expect("8 bytes")).wrapping_add(moved);
    addresses[part..part + 8].copy_from_slice(&at.to_ne_bytes());
    let signal = u64::from(ring) | random.of(&[0, 0, 0, 0x100, 0x200]);
    let (request, payload, descriptor) = match random.below(100) {
        0 => (random.below(50) as u32, vec![0; random.below(48) as usize], None),
        1..10 => (SET_FEATURES, (VERSION_1 | random.of(&[PROTOCOL_FEATURES, 0, 2])).to_ne_bytes().to_vec(), None),
        10..12 => (SET_MEM_TABLE, memory_table(bytes), Some(memory)),
        12..14 => (37, single, Some(memory)), // ADD_MEM_REG
        14..16 => (38, single, None),         // REM_MEM_REG
        16..26 => (SET_VRING_NUM, ring_number(ring, number), None),
        26..46 => (SET_VRING_ADDR, addresses, None),
        46..52 => (SET_VRING_BASE, ring_number(ring, number), None),
        52..60 => (SET_VRING_ENABLE, ring_number(ring, number), None),
        60..76 => (SET_VRING_KICK, signal.to_ne_bytes().to_vec(), (signal & 0x100 == 0).then_some(kick)),
        76..84 => (SET_VRING_CALL, signal.to_ne_bytes().to_vec(), Some(random.of(&[kick, kick, memory]))),
        84..90 => (SET_VRING_ERR, signal.to_ne_bytes().to_vec(), (signal & 0x100 == 0).then_some(kick)),
        90 => (RESET_DEVICE, vec![], None),
        _ => (GET_VRING_BASE, ring_number(ring, 0), None),
    };
    front_end.try_send([request, 9, payload.len() as u32], &payload, descriptor.as_slice())
}

/// What passes the filter, the engine takes: its refusal would end a session that the front-end could have kept.
#[test]
fn the_session_never_refuses_what_the_filter_passed() {
    let port = Port::server();
    let seed =
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("after 1970").as_nanos() as u64;
    println!("seed {seed}");
    let mut random = Random(seed);
    let memory = memfd(MEMORY_BYTES);
    for round in 1..=200 {
        let mut front_end = FrontEnd::connect(&port.socket);
        front_end.negotiate();
        if random.below(4) > 0 {
            front_end.set_memory();
        }
        let _ = (0..50).all(|_| say_something(&mut random, &front_end, memory.as_raw_fd()));
        // Read to the end: closed with answers unread, the socket would forget what was said.
        front_end.stream.shutdown(std::net::Shutdown::Write).unwrap();
        front_end.assert_closed();
        let reason = port.owner.await_disconnect(round);
        assert!(!reason.contains("the session"), "round {round}, seed {seed}: {reason}");
        assert!(port.owner.holds().is_empty());
    }
    assert!(port.owner.attached().len() > 50, "hardly a ring was attached: {}", port.owner.attached().len());
}
