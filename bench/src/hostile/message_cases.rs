//! Messages that are too long, too short, too many, out of turn, or none at all.

use std::io::{IoSlice, Write as _};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EfdFlags;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::attack::{
    Failure, NO_REPLY, addresses, ask, borrowed, eventfd, frame, ring_number, small, submit_frame, words,
};
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
    cases.extend(shared_files());
    cases.extend(channels());
    cases.extend(floods());
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
fn message(name: impl Into<String>, class: &'static str, outcome: Outcome, request: u32, body: Vec<u8>) -> Case {
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

/// Files that the front-end shares beside its memory: the dirty log, which is not negotiated here and leaves no trace, and
/// the in-flight region.
fn shared_files() -> Vec<Case> {
    let log = |name: &'static str, class, size: u64, offset: u64| {
        Case::new(name, class, Outcome::Contained, move |attack| {
            let mut front_end = attack.connect(small())?;
            let file = nix::sys::memfd::memfd_create("log", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
            nix::unistd::ftruncate(&file, 4096)?;
            for _ in 0..10 {
                ask(&mut front_end, 6, &words(&[size, offset]), &[file.as_fd()]);
            }
            front_end.raw(1).submit(0);
            attack.hold(front_end);
            Ok(())
        })
    };
    let inflight = |name: &'static str, class, request, size: u64, queues: u16, entries: u16| {
        Case::new(name, class, Outcome::Contained, move |attack| {
            // With its protocol feature, and without.
            for options in [with_everything(), small()] {
                let mut front_end = attack.connect(options)?;
                let file = inflight_file(0)?;
                let body = inflight_body(size, 0, queues, entries);
                let descriptors: &[BorrowedFd<'_>] = if request == 32 { &[file.as_fd()] } else { &[] };
                for _ in 0..10 {
                    ask(&mut front_end, request, &body, descriptors);
                }
            }
            Ok(())
        })
    };
    /// SET_INFLIGHT_FD that is refused, with 10 pages in the file.
    fn set(name: &str, class: &'static str, words: &'static str, size: u64, offset: u64, shape: (u16, u16)) -> Case {
        Case::new(name, class, Outcome::Refused(words), move |attack| {
            let mut front_end = attack.connect(with_everything())?;
            let file = inflight_file(40960)?;
            let body = inflight_body(size, offset, shape.0, shape.1);
            if ask(&mut front_end, 32, &body, &[file.as_fd()]) == Some(0) {
                return Err(Failure::Wrong("it was accepted".into()));
            }
            attack.hold(front_end);
            Ok(())
        })
    }
    const COUNTS: &str = "CVE-2021-3839";
    const SUMS: &str = "CVE-2020-10722";
    vec![
        log("log_of_2_to_the_64_bytes", "CVE-2020-10722", u64::MAX, 0),
        log("log_at_an_offset_near_2_to_the_64", "CVE-2020-10722", 4096, u64::MAX - 4095),
        log("log_at_an_offset_inside_a_page", "DPDK f83e0199c8, bdd96d8ac7", 4096, 7),
        log("log_smaller_than_guest_memory", "CVE-2020-10722", 1, 0),
        log("log_of_no_bytes", "CVE-2020-10722", 0, 0),
        inflight("inflight_asked_for_again_and_again", "CVE-2020-10726", 31, 0, 2, 256),
        inflight("inflight_of_65535_queues", "DPDK 6442c329b9", 31, 0, 65535, 65535),
        inflight("inflight_of_queues_of_0", "DPDK 6442c329b9", 31, 0, 2, 0),
        inflight("inflight_set_to_an_empty_file", "CVE-2020-10726", 32, 4096, 2, 256),
        inflight("inflight_set_with_65535_queues", "CVE-2021-3839", 32, 4096, 65535, 256),
        set("inflight_region_for_3_rings", COUNTS, "the port has 2", 40960, 0, (3, 64)),
        set("inflight_region_for_no_rings", COUNTS, "for 0 rings", 40960, 0, (0, 64)),
        set("inflight_region_of_rings_of_0", COUNTS, "for rings of 0", 40960, 0, (2, 0)),
        set("inflight_region_of_rings_of_65535", COUNTS, "for rings of 65535", 40960, 0, (2, 65535)),
        set("inflight_region_shorter_than_its_rings", "CVE-2020-10726", "need 0x", 64, 0, (2, 64)),
        set("inflight_region_longer_than_its_file", "CVE-2020-10726", "which has", 1 << 40, 0, (2, 64)),
        set("inflight_region_that_wraps_around", SUMS, "wraps around", 40960, !4095, (2, 64)),
        set("inflight_region_inside_a_page", SUMS, "inside a page", 8192, 7, (2, 64)),
        Case::new("inflight_region_that_is_no_file", "CVE-2020-10726", Outcome::Refused("not a memfd"), |attack| {
            let mut front_end = attack.connect(with_everything())?;
            let event = eventfd(EfdFlags::EFD_NONBLOCK)?;
            ask(&mut front_end, 32, &inflight_body(8192, 0, 2, 64), &[borrowed(&event)]);
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("inflight_region_full_of_lies", "DPDK 5a4fbe79e6", Outcome::Contained, |attack| {
            let mut front_end = attack.connect(with_everything())?;
            let file = std::fs::File::from(inflight_file(8192)?);
            // Each ring's part: version 1, 64 entries, everything in flight, every index past the end.
            for part in [0, 1088] {
                let header = [vec![0; 8], vec![1, 0, 64, 0], vec![0xff; 2], vec![0, 0]].concat();
                let entry = [vec![1], vec![0xff; 15]].concat();
                file.write_all_at(&[header, entry.repeat(64)].concat(), part)?;
            }
            ask(&mut front_end, 32, &inflight_body(8192, 0, 2, 64), &[file.as_fd()]);
            (0..3).for_each(|_| front_end.raw(1).submit(0));
            front_end.raw(1).doorbell().kick();
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("inflight_region_truncated_while_it_is_used", "not in any peer", Outcome::Served, |attack| {
            let mut front_end = attack.connect(with_everything())?;
            let file = inflight_file(8192)?;
            ask(&mut front_end, 32, &inflight_body(8192, 0, 2, 64), &[file.as_fd()]);
            nix::unistd::ftruncate(&file, 0)?;
            let at = front_end.take_memory(4096, 64)?;
            submit_frame(&mut front_end.raw(1), at, &frame(60, 1));
            front_end.raw(1).doorbell().kick();
            attack.hold(front_end);
            Ok(())
        }),
    ]
}

/// Everything that the port offers, so that the messages that belong to it are judged.
fn with_everything() -> Options {
    Options { protocol_features: u64::MAX, ..small() }
}

fn inflight_file(bytes: i64) -> Result<OwnedFd, Failure> {
    let file = nix::sys::memfd::memfd_create("inflight", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    nix::unistd::ftruncate(&file, bytes)?;
    Ok(file)
}

/// "Inflight description", with C's padding.
fn inflight_body(bytes: u64, offset: u64, queues: u16, entries: u16) -> Vec<u8> {
    [words(&[bytes, offset]), [queues.to_le_bytes(), entries.to_le_bytes()].concat(), vec![0; 4]].concat()
}

/// The channel for requests of the back-end, and the configuration space, which the port does not offer.
fn channels() -> Vec<Case> {
    fn channel(name: &str, words: &'static str, descriptor: fn() -> Result<OwnedFd, Failure>) -> Case {
        Case::new(name, "not in any peer", Outcome::Refused(words), move |attack| {
            let mut front_end = attack.connect(with_everything())?;
            let descriptor = descriptor()?;
            if ask(&mut front_end, 21, &[], &[descriptor.as_fd()]) == Some(0) {
                return Err(Failure::Wrong("it was accepted".into()));
            }
            attack.hold(front_end);
            Ok(())
        })
    }
    const NO_STREAM: &str = "not a UNIX stream socket";
    const NOT_NEGOTIATED: Outcome = Outcome::Refused("was not negotiated");
    let before = |name: &str, request, body| message(name, "spec", NOT_NEGOTIATED, request, body);
    vec![
        channel("channel_that_is_an_eventfd", NO_STREAM, || {
            Ok(eventfd(EfdFlags::EFD_NONBLOCK)?.as_fd().try_clone_to_owned()?)
        }),
        channel("channel_that_is_a_file", NO_STREAM, || inflight_file(4096)),
        channel("channel_of_datagrams", NO_STREAM, || Ok(UnixDatagram::pair()?.0.into())),
        channel("channel_to_the_network", NO_STREAM, || Ok(std::net::TcpListener::bind("127.0.0.1:0")?.into())),
        Case::new(
            "channel_that_is_full_and_never_read",
            "not in any peer (stalled socket)",
            Outcome::Served,
            |attack| {
                let mut front_end = attack.connect(with_everything())?;
                let (theirs, ours) = UnixStream::pair()?;
                for mut end in [&theirs, &ours] {
                    end.set_nonblocking(true)?;
                    while end.write(&[0; 4096]).is_ok() {}
                }
                ask(&mut front_end, 21, &[], &[theirs.as_fd()]);
                attack.hold_descriptor(ours);
                attack.hold(front_end);
                Ok(())
            },
        ),
        // Held by the back-end, it would keep the connection open when the front-end is gone.
        Case::new("channel_to_the_port_itself", "not in any peer", Outcome::Refused("socket pair"), |attack| {
            let mut front_end = attack.connect(with_everything())?;
            let own = front_end.connection().stream().as_fd().try_clone_to_owned()?;
            ask(&mut front_end, 21, &[], &[own.as_fd()]);
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("channel_with_the_port_itself_inside", "not in any peer", Outcome::Contained, |attack| {
            let mut front_end = attack.connect(with_everything())?;
            let (theirs, ours) = UnixStream::pair()?;
            let own = [front_end.connection().stream().as_fd().as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&own)];
            sendmsg::<()>(ours.as_raw_fd(), &[IoSlice::new(&[0])], &rights, MsgFlags::MSG_NOSIGNAL, None)?;
            if ask(&mut front_end, 21, &[], &[theirs.as_fd()]) != Some(0) {
                return Err(Failure::Wrong("a pair was refused".into()));
            }
            // It goes, and the next one must be served.
            Ok(())
        }),
        before("inflight_fd_asked_for_before_it_is_negotiated", 32, inflight_body(8192, 0, 2, 64)),
        before("channel_before_it_is_negotiated", 21, vec![]),
        before("config_written_without_it_being_offered", 25, [words(&[6 << 32, 0]), vec![0; 2]].concat()),
        // Its answer has no way to say no.
        message(
            "config_asked_for_without_it_being_offered",
            "spec",
            Outcome::Disconnected("was not negotiated"),
            24,
            [words(&[6 << 32, 0]), vec![0; 2]].concat(),
        ),
    ]
}

fn floods() -> Vec<Case> {
    const LEAK: &str = "CVE-2019-14818";
    vec![
        Case::new("ring_size_set_10000_times", LEAK, Outcome::Served, |attack| {
            let mut front_end = attack.connect(small())?;
            for _ in 0..10_000 {
                // Without answers: as fast as they are taken.
                front_end.connection().send(8, NO_REPLY, &ring_number(1, 64), &[])?;
            }
            ask(&mut front_end, 8, &ring_number(1, 64), &[]);
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("call_set_2000_times", "DPDK 549de54c4f", Outcome::Served, |attack| {
            let mut front_end = attack.connect(small())?;
            for _ in 0..2000 {
                let event = eventfd(EfdFlags::EFD_NONBLOCK)?;
                front_end.connection().send(13, NO_REPLY, &words(&[1]), &[borrowed(&event)])?;
            }
            ask(&mut front_end, 8, &ring_number(1, 64), &[]);
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("inflight_regions_asked_for_and_set_10000_times", "CVE-2020-10726", Outcome::Served, |attack| {
            let mut front_end = attack.connect(with_everything())?;
            let (file, wrong) = (inflight_file(8192)?, eventfd(EfdFlags::EFD_NONBLOCK)?);
            let body = inflight_body(8192, 0, 2, 64);
            for _ in 0..5000 {
                // The answer brings a descriptor, which is not wanted: `ask` lets the kernel close it.
                ask(&mut front_end, 31, &body, &[]);
                ask(&mut front_end, 32, &body, &[file.as_fd()]);
            }
            (0..100).for_each(|_| {
                ask(&mut front_end, 32, &body, &[borrowed(&wrong)]);
            });
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("channels_set_10000_times", "CVE-2020-10726", Outcome::Served, |attack| {
            let mut front_end = attack.connect(with_everything())?;
            for _ in 0..10_000 {
                let (theirs, _ours) = UnixStream::pair()?;
                front_end.connection().send(21, NO_REPLY, &[], &[theirs.as_fd()])?;
            }
            ask(&mut front_end, 8, &ring_number(1, 64), &[]);
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("refusals_10000_times", LEAK, Outcome::Refused("cannot have"), |attack| {
            let mut front_end = attack.connect(small())?;
            for _ in 0..10_000 {
                ask(&mut front_end, 8, &ring_number(1, 3), &[]);
            }
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("surplus_descriptors_200_connections_long", LEAK, Outcome::Contained, |attack| {
            let event = eventfd(EfdFlags::EFD_NONBLOCK)?;
            for _ in 0..200 {
                let mut front_end = FrontEnd::prepare(attack.dial()?, small())?;
                ask(&mut front_end, 8, &ring_number(1, 64), &[borrowed(&event); 8]);
            }
            Ok(())
        }),
        Case::new("connections_come_while_one_is_served", "not in any peer", Outcome::Served, |attack| {
            let front_end = attack.connect(small())?;
            for _ in 0..200 {
                drop(attack.dial()?);
            }
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("connections_come_and_go", "CVE-2019-14818", Outcome::Contained, |attack| {
            (0..100).try_for_each(|_| attack.dial().map(drop))
        }),
    ]
}
