//! Messages and connections in great numbers: nothing may be left of them.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use nix::sys::eventfd::EfdFlags;

use super::attack::{NO_REPLY, ask, borrowed, eventfd, ring_number, small, words};
use super::shared_file_cases::{inflight_body, inflight_file, with_everything};
use super::{Case, Outcome};
use crate::front_end::FrontEnd;

pub(super) fn all() -> Vec<Case> {
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
