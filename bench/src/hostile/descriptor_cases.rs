//! Descriptors that are not what they should be: wrong kinds, full counters, blocking again, storms of kicks.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::attack::{ask, borrowed, eventfd, frame, small, submit_frame};
use super::{Attack, Card, Case, Failure, Outcome};
use crate::front_end::raw::Piece;
use crate::front_end::{FrontEnd, Options};

/// Longest that a storm lasts.
const STORM: Duration = Duration::from_millis(300);

const KICK: u32 = 12;
const CALL: u32 = 13;
const ERR: u32 = 14;

/// Makes a descriptor of some kind.
type Make = fn() -> Result<OwnedFd, Failure>;

pub(super) fn all() -> Vec<Case> {
    let mut cases = wrong_kinds();
    cases.extend([
        Case::new("call_counter_full_and_blocking", "not in any peer", Outcome::Served, |attack| {
            let call = eventfd(EfdFlags::empty())?;
            call.write(u64::MAX - 1)?;
            with_call(attack, &call, |call| Ok(fcntl(call, FcntlArg::F_SETFL(OFlag::O_RDWR)).map(drop)?))
        }),
        Case::new("call_made_blocking_again_and_again", "not in any peer", Outcome::Served, |attack| {
            let call = eventfd(EfdFlags::empty())?;
            call.write(u64::MAX - 1)?;
            let stop = Arc::new(AtomicBool::new(false));
            let (theirs, until) = (call.as_fd().try_clone_to_owned()?, stop.clone());
            let racer = std::thread::spawn(move || {
                while !until.load(Ordering::Relaxed) {
                    let _ = fcntl(&theirs, FcntlArg::F_SETFL(OFlag::O_RDWR));
                    let _ = nix::unistd::write(&theirs, &[]);
                }
            });
            let result = with_call(attack, &call, |_| Ok(()));
            stop.store(true, Ordering::Relaxed);
            attack.hold_thread(racer);
            result
        }),
        Case::new("error_counter_full_and_blocking", "not in any peer", Outcome::Quarantined("outside"), |attack| {
            let error = eventfd(EfdFlags::empty())?;
            error.write(u64::MAX - 1)?;
            let mut front_end = attack.connect(small())?;
            ask(&mut front_end, ERR, &1u64.to_le_bytes(), &[borrowed(&error)]);
            fcntl(&error, FcntlArg::F_SETFL(OFlag::O_RDWR))?;
            front_end.raw(1).submit(9999);
            attack.hold_descriptor(error);
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("call_is_a_semaphore", "not in any peer", Outcome::Served, |attack| {
            let call = eventfd(EfdFlags::EFD_SEMAPHORE)?;
            with_call(attack, &call, |_| Ok(()))
        }),
        Case::new("call_is_the_kick", "not in any peer", Outcome::Served, |attack| {
            let mut front_end = attack.connect(small())?;
            let own = front_end.raw(1);
            let mut raw = own.clone();
            ask(&mut front_end, CALL, &1u64.to_le_bytes(), &[raw.doorbell().kick_fd()]);
            raw.set_available_flags(0);
            let at = front_end.take_memory(4096, 64)?;
            raw.set_used_event(0);
            submit_frame(&mut raw, at, &frame(60, 99));
            attack.friend_receives(&frame(60, 99))?;
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("kick_is_drained_by_its_sender", "vhost-user-backend: worker ends", Outcome::Served, |attack| {
            let mut front_end = attack.connect(small())?;
            let at = front_end.take_memory(4096, 64)?;
            let kick = eventfd(EfdFlags::EFD_NONBLOCK)?;
            ask(&mut front_end, KICK, &1u64.to_le_bytes(), &[borrowed(&kick)]);
            for _ in 0..2000 {
                let _ = kick.write(1);
                let _ = kick.read();
            }
            let mut raw = front_end.raw(1);
            submit_frame(&mut raw, at, &frame(60, 5));
            kick.write(1)?;
            attack.friend_receives(&frame(60, 5))?;
            attack.hold_descriptor(kick);
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("kick_counter_full", "not in any peer", Outcome::Served, |attack| {
            let mut front_end = attack.connect(small())?;
            let at = front_end.take_memory(4096, 64)?;
            let kick = eventfd(EfdFlags::EFD_NONBLOCK)?;
            kick.write(u64::MAX - 1)?;
            ask(&mut front_end, KICK, &1u64.to_le_bytes(), &[borrowed(&kick)]);
            submit_frame(&mut front_end.raw(1), at, &frame(60, 6));
            attack.friend_receives(&frame(60, 6))?;
            attack.hold_descriptor(kick);
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("one_eventfd_for_everything", "not in any peer", Outcome::Served, |attack| {
            let event = eventfd(EfdFlags::EFD_NONBLOCK)?;
            let mut front_end = attack.connect(small())?;
            for (request, ring) in [(CALL, 0u64), (CALL, 1), (ERR, 0), (ERR, 1), (KICK, 0), (KICK, 1)] {
                ask(&mut front_end, request, &ring.to_le_bytes(), &[borrowed(&event)]);
            }
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("storm_of_kicks", "not in any peer", Outcome::Served, |attack| {
            let front_end = attack.connect(small())?;
            let end = Instant::now() + STORM;
            let (mut transmit, mut receive) = (front_end.raw(1), front_end.raw(0));
            while Instant::now() < end {
                transmit.doorbell().kick();
                receive.doorbell().kick();
            }
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("polled_rings_without_descriptors", "vhost-user-backend 0.24", Outcome::Served, |attack| {
            let options = Options { kick_descriptors: false, call_descriptors: false, ..small() };
            let mut front_end = attack.connect(options)?;
            let at = front_end.take_memory(4096, 64)?;
            submit_frame(&mut front_end.raw(1), at, &frame(60, 8));
            attack.friend_receives(&frame(60, 8))?;
            attack.hold(front_end);
            Ok(())
        }),
    ]);
    cases.extend(Card::LAYOUTS.into_iter().flat_map(full_rate));
    cases
}

fn full_rate(card: Card) -> Vec<Case> {
    let case = |name, piece| {
        card.case(name, "not in any peer", Outcome::Served, move |attack| offer_all_the_time(attack, card, piece))
    };
    vec![
        case("zero_length_chains_at_full_rate", (0, 0, 0)),
        // More than the MTU: read, judged, dropped.
        case("large_frames_at_full_rate_to_nobody", (0x4000_0000, 60_000, 0)),
    ]
}

/// A ring full of one buffer, over and over.
fn offer_all_the_time(attack: &mut Attack<'_>, card: Card, piece: Piece) -> Result<(), Failure> {
    let front_end = attack.connect(Options { ring_size: 256, ..card.options() })?;
    let mut raw = front_end.raw(1);
    let (end, mut sent) = (Instant::now() + STORM, 0);
    while Instant::now() < end {
        // Half of the ring is under way while the other half is written.
        if sent < 256 || raw.has_used(sent - 128) {
            (0..128).for_each(|_| raw.submit_chain(&[piece]));
            sent += 128;
        }
    }
    attack.hold(front_end);
    Ok(())
}

/// A session whose transmitq calls `call` for each of many frames; `spoil` changes it after it was accepted.
fn with_call(
    attack: &mut Attack<'_>,
    call: &EventFd,
    spoil: fn(&EventFd) -> Result<(), Failure>,
) -> Result<(), Failure> {
    let mut front_end: FrontEnd = attack.connect(small())?;
    let at = front_end.take_memory(4096, 64)?;
    ask(&mut front_end, CALL, &1u64.to_le_bytes(), &[borrowed(call)]);
    spoil(call)?;
    let mut raw = front_end.raw(1);
    for number in 0..50 {
        raw.set_used_event(raw.used_index());
        submit_frame(&mut raw, at, &frame(60, number));
        attack.friend_receives(&frame(60, number))?;
    }
    attack.hold_descriptor(call.as_fd().try_clone_to_owned()?);
    attack.hold(front_end);
    Ok(())
}

fn wrong_kinds() -> Vec<Case> {
    let kinds: [(&str, Make); 6] = [
        ("pipe", || Ok(nix::unistd::pipe()?.1)),
        ("read_end_of_a_pipe", || Ok(nix::unistd::pipe()?.0)),
        ("socket", || Ok(UnixStream::pair()?.0.into())),
        ("regular_file", || Ok(std::fs::File::open("/proc/self/exe")?.into())),
        ("memfd", || Ok(memfd_create("not-an-eventfd", MFdFlags::MFD_CLOEXEC)?)),
        ("epoll", || Ok(Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?.0)),
    ];
    let requests = [("kick", KICK), ("call", CALL), ("err", ERR)];
    let refused = Outcome::Refused("expected an eventfd");
    let case = |(signal, request): (&str, u32), (kind, make): (&str, Make)| {
        Case::new(format!("{signal}_is_a_{kind}"), "not in any peer", refused, move |attack| {
            let mut front_end = attack.connect(small())?;
            let descriptor = make()?;
            ask(&mut front_end, request, &1u64.to_le_bytes(), &[descriptor.as_fd()]);
            front_end.raw(1).doorbell().kick();
            attack.hold_descriptor(descriptor);
            attack.hold(front_end);
            Ok(())
        })
    };
    requests.into_iter().flat_map(|request| kinds.map(|kind| case(request, kind))).collect()
}
