//! Messages that are too long, too short, too many, out of turn, or none at all.

use std::io::{IoSlice, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::sys::eventfd::EfdFlags;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::attack::{Failure, addresses, ask, borrowed, eventfd, ring_number, small, words};
use super::{Case, Outcome};
use crate::front_end::{FrontEnd, Options};

/// Requests of docs/interop/vhost-user.rst, and the length of each one's payload.
const REQUESTS: [(u32, &str, usize); 44] = [
    (1, "GET_FEATURES", 0),
    (2, "SET_FEATURES", 8),
    (3, "SET_OWNER", 0),
    (4, "RESET_OWNER", 0),
    (5, "SET_MEM_TABLE", 40),
    (6, "SET_LOG_BASE", 16),
    (7, "SET_LOG_FD", 0),
    (8, "SET_VRING_NUM", 8),
    (9, "SET_VRING_ADDR", 40),
    (10, "SET_VRING_BASE", 8),
    (11, "GET_VRING_BASE", 8),
    (12, "SET_VRING_KICK", 8),
    (13, "SET_VRING_CALL", 8),
    (14, "SET_VRING_ERR", 8),
    (15, "GET_PROTOCOL_FEATURES", 0),
    (16, "SET_PROTOCOL_FEATURES", 8),
    (17, "GET_QUEUE_NUM", 0),
    (18, "SET_VRING_ENABLE", 8),
    (19, "SEND_RARP", 8),
    (20, "NET_SET_MTU", 8),
    (21, "SET_BACKEND_REQ_FD", 0),
    (22, "IOTLB_MSG", 40),
    (23, "SET_VRING_ENDIAN", 8),
    (24, "GET_CONFIG", 268),
    (25, "SET_CONFIG", 268),
    (26, "CREATE_CRYPTO_SESSION", 600),
    (27, "CLOSE_CRYPTO_SESSION", 8),
    (28, "POSTCOPY_ADVISE", 0),
    (29, "POSTCOPY_LISTEN", 0),
    (30, "POSTCOPY_END", 0),
    (31, "GET_INFLIGHT_FD", 24),
    (32, "SET_INFLIGHT_FD", 24),
    (33, "GPU_SET_SOCKET", 0),
    (34, "RESET_DEVICE", 0),
    (35, "VRING_KICK", 8),
    (36, "GET_MAX_MEM_SLOTS", 0),
    (37, "ADD_MEM_REG", 40),
    (38, "REM_MEM_REG", 40),
    (39, "SET_STATUS", 8),
    (40, "GET_STATUS", 0),
    (41, "GET_SHARED_OBJECT", 16),
    (42, "SET_DEVICE_STATE_FD", 8),
    (43, "CHECK_DEVICE_STATE", 0),
    (0xffff_ffff, "NOTHING_KNOWN", 8),
];

pub(super) fn all() -> Vec<Case> {
    let mut cases = streams();
    cases.extend(REQUESTS.map(|(request, name, bytes)| with_descriptors(request, name, bytes)));
    cases.extend(REQUESTS.map(|(request, name, _)| of_every_size(request, name)));
    cases.extend(indices());
    cases.extend(ring_sizes());
    cases.extend(numbers());
    cases
}

/// For messages that may turn answers off.
fn impatient() -> Options {
    Options { timeout: Duration::from_millis(300), ..small() }
}

/// CVE-2022-0669, 09c2856301, 218daf1664: surplus descriptors are closed, and the message judged.
fn with_descriptors(request: u32, name: &str, bytes: usize) -> Case {
    Case::new(format!("descriptors_with_{name}"), "CVE-2022-0669", Outcome::Contained, move |attack| {
        let event = eventfd(EfdFlags::EFD_NONBLOCK)?;
        for count in [0, 1, 2, 8, 33] {
            let mut front_end = attack.connect(impatient())?;
            ask(&mut front_end, request, &vec![0; bytes], &vec![borrowed(&event); count]);
        }
        Ok(())
    })
}

/// CVE-2020-10724, CVE-2020-14377: the length of a payload is its own, and no other.
fn of_every_size(request: u32, name: &str) -> Case {
    Case::new(format!("sizes_of_{name}"), "CVE-2020-10724, CVE-2020-14377", Outcome::Contained, move |attack| {
        for bytes in [0, 1, 7, 8, 9, 41, 4096] {
            let mut front_end = attack.connect(impatient())?;
            ask(&mut front_end, request, &vec![0; bytes], &[]);
        }
        Ok(())
    })
}

/// A case that writes to a fresh connection whatever it likes.
fn stream(
    name: &str,
    class: &'static str,
    words: &'static str,
    deed: fn(&mut UnixStream) -> Result<(), Failure>,
) -> Case {
    Case::new(name, class, Outcome::Disconnected(words), move |attack| {
        let mut stream = attack.dial()?;
        deed(&mut stream)?;
        attack.hold_stream(stream);
        Ok(())
    })
}

fn header(request: u32, flags: u32, bytes: u32) -> Vec<u8> {
    [request, flags, bytes].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn streams() -> Vec<Case> {
    const RUBBISH: &str = "not a vhost-user message";
    const LENGTH: &str = "CVE-2020-10724";
    vec![
        stream("http_on_the_socket", "not in any peer", RUBBISH, |stream| {
            Ok(stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")?)
        }),
        stream("version_0", "spec", RUBBISH, |stream| Ok(stream.write_all(&header(1, 0, 0))?)),
        stream("version_2", "spec", RUBBISH, |stream| Ok(stream.write_all(&header(1, 2, 0))?)),
        stream("reply_that_nobody_asked_for", "spec", RUBBISH, |stream| {
            Ok(stream.write_all(&[header(1, 5, 8), words(&[0])].concat())?)
        }),
        stream("payload_of_4_gib_announced", LENGTH, RUBBISH, |stream| {
            Ok(stream.write_all(&header(2, 1, u32::MAX))?)
        }),
        stream("payload_of_4097_bytes_announced", LENGTH, RUBBISH, |stream| Ok(stream.write_all(&header(2, 1, 4097))?)),
        stream("half_a_header_and_the_end", "DPDK 585283f9a7", "middle of a message", |stream| {
            stream.write_all(&[1, 0, 0])?;
            Ok(stream.shutdown(Shutdown::Write)?)
        }),
        stream("half_a_payload_and_the_end", "DPDK 585283f9a7", "middle of a message", |stream| {
            stream.write_all(&[header(2, 1, 8), vec![0; 5]].concat())?;
            Ok(stream.shutdown(Shutdown::Write)?)
        }),
        stream("253_descriptors_with_a_header", "DPDK 218daf1664", "descriptors", |stream| {
            send_descriptors(stream, &header(1, 1, 0), 253)
        }),
        stream("32_descriptors_with_half_a_header_and_the_end", "DPDK 585283f9a7", "middle of a message", |stream| {
            send_descriptors(stream, &[1, 0, 0], 32)?;
            Ok(stream.shutdown(Shutdown::Write)?)
        }),
        stream("descriptors_with_each_byte_of_a_message", "DPDK 218daf1664", "descriptors", |stream| {
            for byte in header(1, 1, 0) {
                send_descriptors(stream, &[byte], 8)?;
            }
            Ok(())
        }),
        Case::new("nothing_is_ever_said", "not in any peer", Outcome::Served, |attack| {
            let stream = attack.dial()?;
            attack.hold_stream(stream);
            Ok(())
        }),
        Case::new("half_a_message_and_silence", "not in any peer", Outcome::Served, |attack| {
            let mut stream = attack.dial()?;
            stream.write_all(&header(2, 1, 8))?;
            attack.hold_stream(stream);
            Ok(())
        }),
        Case::new("replies_are_never_read", "not in any peer (stalled socket)", Outcome::Served, |attack| {
            let mut stream = attack.dial()?;
            stream.set_nonblocking(true)?;
            let message = header(1, 1, 0);
            let end = Instant::now() + Duration::from_millis(300);
            while Instant::now() < end {
                let _ = stream.write(&message);
            }
            attack.hold_stream(stream);
            Ok(())
        }),
    ]
}

fn send_descriptors(stream: &UnixStream, bytes: &[u8], count: usize) -> Result<(), Failure> {
    let event = eventfd(EfdFlags::EFD_NONBLOCK)?;
    let descriptors = vec![event.as_fd().as_raw_fd(); count];
    let rights = [ControlMessage::ScmRights(&descriptors)];
    sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// A message, judged with an answer asked for.
pub(super) fn message(
    name: impl Into<String>,
    class: &'static str,
    outcome: Outcome,
    request: u32,
    body: Vec<u8>,
) -> Case {
    Case::new(name, class, outcome, move |attack| {
        let mut front_end = attack.connect(small())?;
        let event = eventfd(EfdFlags::EFD_NONBLOCK)?;
        let events = [borrowed(&event)];
        let descriptors: &[BorrowedFd<'_>] = if (12..=14).contains(&request) { &events } else { &[] };
        if ask(&mut front_end, request, &body, descriptors) == Some(0) && outcome != Outcome::Served {
            return Err(Failure::Wrong("it was accepted".into()));
        }
        attack.hold(front_end);
        Ok(())
    })
}

/// CVE-2020-10723: an index of 32 bits cut to 16 is another ring.
fn indices() -> Vec<Case> {
    const CLASS: &str = "CVE-2020-10723";
    const REFUSED: Outcome = Outcome::Refused("does not exist");
    let mut cases = Vec::new();
    for index in [2, 255, 0x100, 0x1_0000, 0x1_0001, u32::MAX] {
        cases.extend([
            message(format!("num_of_ring_{index:#x}"), CLASS, REFUSED, 8, ring_number(index, 64)),
            message(format!("base_of_ring_{index:#x}"), CLASS, REFUSED, 10, ring_number(index, 0)),
            message(format!("enable_of_ring_{index:#x}"), CLASS, REFUSED, 18, ring_number(index, 1)),
            message(format!("addresses_of_ring_{index:#x}"), CLASS, REFUSED, 9, addresses(index, [0; 3])),
        ]);
        // Its answer has no way to say no.
        let closed = Outcome::Disconnected("GET_VRING_BASE");
        cases.push(message(format!("get_base_of_ring_{index:#x}"), CLASS, closed, 11, ring_number(index, 0)));
    }
    for (name, request) in [("kick", 12), ("call", 13), ("err", 14)] {
        cases.extend([
            message(format!("{name}_of_ring_2"), CLASS, REFUSED, request, words(&[2])),
            message(format!("{name}_of_ring_255"), CLASS, REFUSED, request, words(&[255])),
            message(format!("{name}_with_bit_9"), CLASS, Outcome::Refused("bits above 8"), request, words(&[0x201])),
            message(
                format!("{name}_with_high_bits"),
                CLASS,
                Outcome::Refused("bits above 8"),
                request,
                words(&[1 << 63]),
            ),
            message(
                format!("{name}_with_descriptor_and_without"),
                "CVE-2022-0669",
                Outcome::Refused("contradict"),
                request,
                words(&[0x101]),
            ),
        ]);
    }
    cases
}

fn ring_sizes() -> Vec<Case> {
    const CLASS: &str = "DPDK eb7c574b21";
    let refused = [0, 3, 63, 32769, 65535, 65536, 65600, u32::MAX].map(|size| {
        message(format!("ring_of_{size}"), CLASS, Outcome::Refused("cannot have"), 8, ring_number(1, size))
    });
    // Sizes that are right, with a ring that has not room for them, or with hardly any ring.
    let accepted = [1, 2, 32768].map(|size| {
        Case::new(format!("ring_of_{size}_where_64_were"), CLASS, Outcome::Contained, move |attack| {
            let mut front_end = attack.connect(small())?;
            ask(&mut front_end, 8, &ring_number(1, size), &[]);
            (0..3).for_each(|_| front_end.raw(1).submit(0));
            attack.hold(front_end);
            Ok(())
        })
    });
    refused.into_iter().chain(accepted).collect()
}

fn numbers() -> Vec<Case> {
    let own = |name: &'static str, class, outcome, deed: fn(&mut FrontEnd)| {
        Case::new(name, class, outcome, move |attack| {
            let mut front_end = attack.connect(small())?;
            deed(&mut front_end);
            front_end.raw(1).doorbell().kick();
            attack.hold(front_end);
            Ok(())
        })
    };
    const RANGE: &str = "CVE-2018-1059";
    const NOT_MEMORY: Outcome = Outcome::Refused("not in guest memory");
    vec![
        message("base_65536", "CVE-2020-10723", Outcome::Refused("no index"), 10, ring_number(1, 65536)),
        message("enable_2", "spec", Outcome::Refused("neither enable"), 18, ring_number(1, 2)),
        message("features_that_were_not_offered", "spec", Outcome::Refused("not offered"), 2, words(&[u64::MAX])),
        message(
            "protocol_features_that_were_not_offered",
            "spec",
            Outcome::Refused("not offered"),
            16,
            words(&[u64::MAX]),
        ),
        message("ring_at_address_0", RANGE, NOT_MEMORY, 9, addresses(1, [0; 3])),
        message("ring_at_the_last_address", RANGE, NOT_MEMORY, 9, addresses(1, [u64::MAX - 15; 3])),
        own("ring_at_the_end_of_memory", RANGE, Outcome::Served, |front_end| {
            // Starts inside, ends outside: not served, and said so.
            let memory = front_end.memory().clone();
            let end = memory.front_end_address(memory.bytes() - 64);
            ask(front_end, 9, &addresses(1, [end, end, end]), &[]);
        }),
        own("ring_inside_a_word", RANGE, Outcome::Refused("not aligned"), |front_end| {
            let user = front_end.memory().front_end_address(0);
            ask(front_end, 9, &addresses(1, [user + 1, user + 1, user + 1]), &[]);
        }),
        own("ring_parts_in_one_place", "not in any peer", Outcome::Contained, |front_end| {
            let user = front_end.memory().front_end_address(0);
            ask(front_end, 9, &addresses(1, [user; 3]), &[]);
        }),
        own("both_rings_in_one_place", "not in any peer", Outcome::Contained, |front_end| {
            let layout = front_end.raw(0).layout();
            let memory = front_end.memory().clone();
            ask(front_end, 9, &super::attack::ring_addresses(1, layout, &memory), &[]);
        }),
        own("unknown_flags_with_the_addresses", "spec", Outcome::Refused("flags"), |front_end| {
            let (layout, memory) = (front_end.raw(1).layout(), front_end.memory().clone());
            let mut body = super::attack::ring_addresses(1, layout, &memory);
            body[4..8].copy_from_slice(&0xffff_fffe_u32.to_le_bytes());
            ask(front_end, 9, &body, &[]);
        }),
        own("base_far_from_the_rings_index", "DPDK 5a4fbe79e6", Outcome::Quarantined("ahead of"), |front_end| {
            ask(front_end, 10, &ring_number(1, 30_000), &[]);
        }),
        own("rings_stopped_twice", "DPDK 943daec05c", Outcome::Served, |front_end| {
            for ring in [0, 1, 1, 0, 1] {
                ask(front_end, 11, &ring_number(ring, 0), &[]);
            }
        }),
        own("device_reset_while_it_runs", "DPDK 1c80a404fd", Outcome::Contained, |front_end| {
            ask(front_end, 34, &[], &[]);
        }),
        own("owner_set_twice_and_reset", "vhost-user-backend 0.24", Outcome::Served, |front_end| {
            for request in [3, 4, 3, 3, 4] {
                ask(front_end, request, &[], &[]);
            }
        }),
        own("features_taken_back_while_it_runs", "CVE-2023-6693", Outcome::Contained, |front_end| {
            ask(front_end, 2, &words(&[1 << 30]), &[]);
            ask(front_end, 2, &words(&[0]), &[]);
            ask(front_end, 2, &words(&[1 << 30 | 1 << 32]), &[]);
        }),
        own("mtu_of_everything", "spec", Outcome::Contained, |front_end| {
            for mtu in [0, 1, 67, 68, 1501, 65535, 65536, u64::MAX] {
                ask(front_end, 20, &words(&[mtu]), &[]);
            }
        }),
    ]
}
