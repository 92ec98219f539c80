//! Files and sockets that the front-end shares beside its memory: dirty log, in-flight region, the channel for requests of the
//! back-end; and the configuration space, which the port does not offer.

use std::io::{IoSlice, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::{UnixDatagram, UnixStream};

use nix::sys::eventfd::EfdFlags;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::attack::{Failure, ask, borrowed, eventfd, frame, small, submit_frame, words};
use super::message_cases::message;
use super::{Case, Outcome};
use crate::front_end::Options;

pub(super) fn all() -> Vec<Case> {
    let mut cases = shared_files();
    cases.extend(channels());
    cases
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
pub(super) fn with_everything() -> Options {
    Options { protocol_features: u64::MAX, ..small() }
}

pub(super) fn inflight_file(bytes: i64) -> Result<OwnedFd, Failure> {
    let file = nix::sys::memfd::memfd_create("inflight", nix::sys::memfd::MFdFlags::MFD_CLOEXEC)?;
    nix::unistd::ftruncate(&file, bytes)?;
    Ok(file)
}

/// "Inflight description", with C's padding.
pub(super) fn inflight_body(bytes: u64, offset: u64, queues: u16, entries: u16) -> Vec<u8> {
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
