//! Memory tables that lie, and files that are taken away.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::attack::{Failure, PATIENCE, ask, frame, ring_addresses, small, submit_frame, words};
use super::{Attack, Card, Case, Outcome};
use crate::front_end::layout::{DESC_NEXT, DESC_WRITE, Descriptor};
use crate::front_end::{FrontEnd, Options};

const SET_MEM_TABLE: u32 = 5;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
/// CONFIGURE_MEM_SLOTS, with MQ and REPLY_ACK.
const MEMORY_SLOTS: u64 = 1 << 15 | 1 << 3 | 1;

const MIB: u64 = 1 << 20;
/// Where the tables of lies begin, for guest and front-end.
const GUEST: u64 = 0x10_0000_0000;
const USER: u64 = 0x7000_0000_0000;

/// Guest address, bytes, front-end address, file offset.
type Region = [u64; 4];

const fn region(guest: u64, bytes: u64) -> Region {
    [GUEST + guest, bytes, USER + guest, 0]
}

fn file(bytes: u64) -> Result<OwnedFd, Failure> {
    let file = File::from(memfd_create("hostile", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
    file.set_len(bytes)?;
    Ok(file.into())
}

/// "Multiple memory regions description".
fn table(count: u64, regions: &[Region]) -> Vec<u8> {
    [words(&[count]), regions.iter().flat_map(|region| words(region)).collect()].concat()
}

/// Makes a descriptor of some kind.
type Make = fn() -> Result<OwnedFd, Failure>;

pub(super) fn all() -> Vec<Case> {
    let mut cases = tables();
    cases.extend(slots());
    cases.extend(wrong_files());
    cases.extend(neighbours());
    cases.extend(Card::LAYOUTS.into_iter().flat_map(truncated_under_a_ring));
    cases.extend(truncated());
    cases
}

/// A table with `files` descriptors of 1 MiB to a session that has a good one. All of it must be refused, and the good
/// table stay.
fn lie(
    name: &'static str,
    class: &'static str,
    outcome: Outcome,
    count: u64,
    regions: &'static [Region],
    files: usize,
) -> Case {
    Case::new(name, class, outcome, move |attack| {
        let mut front_end = attack.connect(small())?;
        let file = file(MIB)?;
        ask(&mut front_end, SET_MEM_TABLE, &table(count, regions), &vec![file.as_fd(); files]);
        attack.hold(front_end);
        Ok(())
    })
}

fn tables() -> Vec<Case> {
    const COUNT: &str = "DPDK 0fe99cf73e";
    const SIZE: &str = "DPDK 4d490c7ce3, c6420a3632";
    const RUBBISH: Outcome = Outcome::Disconnected("SET_MEM_TABLE");
    const REFUSED: Outcome = Outcome::Refused("SET_MEM_TABLE");
    static ONE: [Region; 1] = [region(0, MIB)];
    static NONE: [Region; 0] = [];
    static EMPTY: [Region; 1] = [region(0, 0)];
    static LONG: [Region; 1] = [region(0, 2 * MIB)];
    static HUGE: [Region; 1] = [region(0, u64::MAX)];
    static WRAP_GUEST: [Region; 1] = [[u64::MAX - 4095, MIB, USER, 0]];
    static WRAP_USER: [Region; 1] = [[GUEST, MIB, u64::MAX - 4095, 0]];
    static WRAP_OFFSET: [Region; 1] = [[GUEST, MIB, USER, u64::MAX - 4095]];
    static INSIDE_A_PAGE: [Region; 1] = [[GUEST, 4096, USER, 100]];
    static SAME_GUEST: [Region; 2] = [[GUEST, MIB, USER, 0], [GUEST + 4096, MIB, USER + 16 * MIB, 0]];
    static SAME_USER: [Region; 2] = [[GUEST, MIB, USER, 0], [GUEST + 16 * MIB, MIB, USER + 4096, 0]];
    static TWO: [Region; 2] = [region(0, MIB), region(16 * MIB, MIB)];
    vec![
        lie("table_of_no_regions", COUNT, REFUSED, 0, &NONE, 0),
        lie("table_says_9_regions_and_has_1", COUNT, RUBBISH, 9, &ONE, 1),
        lie("table_says_33_regions_and_has_1", COUNT, RUBBISH, 33, &ONE, 1),
        lie("table_says_4294967295_regions", COUNT, RUBBISH, 0xffff_ffff, &ONE, 1),
        lie("table_says_0_regions_and_has_1", COUNT, RUBBISH, 0, &ONE, 1),
        lie("table_with_fewer_descriptors_than_regions", COUNT, REFUSED, 2, &TWO, 1),
        lie("table_with_more_descriptors_than_regions", "CVE-2022-0669", REFUSED, 1, &ONE, 2),
        lie("table_without_descriptors", COUNT, REFUSED, 1, &ONE, 0),
        lie("region_of_size_0", SIZE, REFUSED, 1, &EMPTY, 1),
        lie("region_longer_than_its_file", "vm-memory 320", REFUSED, 1, &LONG, 1),
        lie("region_of_2_to_the_64", SIZE, REFUSED, 1, &HUGE, 1),
        lie("region_wraps_around_in_the_guest", SIZE, REFUSED, 1, &WRAP_GUEST, 1),
        lie("region_wraps_around_in_the_front_end", SIZE, REFUSED, 1, &WRAP_USER, 1),
        lie("region_wraps_around_in_its_file", SIZE, REFUSED, 1, &WRAP_OFFSET, 1),
        lie("region_starts_inside_a_page", "DPDK f83e0199c8", REFUSED, 1, &INSIDE_A_PAGE, 1),
        lie("regions_overlap_in_the_guest", "DPDK 0fe99cf73e", REFUSED, 2, &SAME_GUEST, 2),
        lie("regions_overlap_in_the_front_end", "DPDK 0fe99cf73e", REFUSED, 2, &SAME_USER, 2),
        Case::new("good_table_without_the_rings", "vhost-user-backend 0.24", Outcome::Contained, |attack| {
            let mut front_end = attack.connect(small())?;
            let file = file(MIB)?;
            ask(&mut front_end, SET_MEM_TABLE, &table(1, &ONE), &[file.as_fd()]);
            front_end.raw(1).submit(0);
            attack.hold(front_end);
            Ok(())
        }),
    ]
}

fn slots() -> Vec<Case> {
    let session = |attack: &mut Attack<'_>| attack.connect(Options { protocol_features: MEMORY_SLOTS, ..small() });
    let single = |region: Region| [words(&[0]), words(&region)].concat();
    vec![
        Case::new(
            "slots_until_none_is_left",
            "CVE-2021-3544",
            Outcome::Refused("memory slots are taken"),
            move |attack| {
                let mut front_end = session(attack)?;
                let file = file(4096)?;
                for slot in 0..600 {
                    if ask(&mut front_end, ADD_MEM_REG, &single(region(slot * 4096, 4096)), &[file.as_fd()]) != Some(0)
                    {
                        break;
                    }
                }
                attack.hold(front_end);
                Ok(())
            },
        ),
        Case::new(
            "slot_without_a_descriptor",
            "CVE-2022-0669",
            Outcome::Refused("without a descriptor"),
            move |attack| {
                let mut front_end = session(attack)?;
                ask(&mut front_end, ADD_MEM_REG, &single(region(0, 4096)), &[]);
                attack.hold(front_end);
                Ok(())
            },
        ),
        Case::new("slot_over_another", "DPDK 0fe99cf73e", Outcome::Refused("overlap"), move |attack| {
            let mut front_end = session(attack)?;
            let known = front_end.memory().regions()[0];
            let over = [known.guest_address + 4096, 4096, USER, 0];
            let file = file(4096)?;
            ask(&mut front_end, ADD_MEM_REG, &single(over), &[file.as_fd()]);
            attack.hold(front_end);
            Ok(())
        }),
        Case::new(
            "slot_that_is_not_there_removed",
            "spec REM_MEM_REG",
            Outcome::Refused("no memory region"),
            move |attack| {
                let mut front_end = session(attack)?;
                ask(&mut front_end, REM_MEM_REG, &single(region(0, 4096)), &[]);
                attack.hold(front_end);
                Ok(())
            },
        ),
        Case::new("slots_come_and_go", "CVE-2019-14818", Outcome::Served, move |attack| {
            let mut front_end = session(attack)?;
            let file = file(4096)?;
            for _ in 0..200 {
                ask(&mut front_end, ADD_MEM_REG, &single(region(0, 4096)), &[file.as_fd()]);
                ask(&mut front_end, REM_MEM_REG, &single(region(0, 4096)), &[file.as_fd()]);
            }
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("slot_of_the_rings_removed", "DPDK 1c80a404fd", Outcome::Contained, move |attack| {
            let mut front_end = session(attack)?;
            let known = front_end.memory().regions()[0];
            let all = [known.guest_address, known.bytes, known.front_end_address, known.file_offset];
            ask(&mut front_end, REM_MEM_REG, &single(all), &[]);
            front_end.raw(1).submit(0);
            attack.hold(front_end);
            Ok(())
        }),
    ]
}

fn wrong_files() -> Vec<Case> {
    let kinds: [(&str, &str, Make); 5] = [
        ("pipe", "not a memfd or file", || Ok(nix::unistd::pipe()?.0)),
        ("directory", "not a memfd or file", || Ok(File::open("/proc/self")?.into())),
        ("device", "not a memfd or file", || Ok(File::open("/dev/zero")?.into())),
        ("socket", "not a memfd or file", || Ok(std::os::unix::net::UnixStream::pair()?.0.into())),
        ("read_only_file", "reading and writing", || Ok(File::open("/proc/self/exe")?.into())),
    ];
    let case = |(kind, words, make): (&str, &'static str, Make)| {
        Case::new(format!("memory_is_a_{kind}"), "not in any peer", Outcome::Refused(words), move |attack| {
            let mut front_end = attack.connect(small())?;
            let file = make()?;
            ask(&mut front_end, SET_MEM_TABLE, &table(1, &[region(0, 4096)]), &[file.as_fd()]);
            attack.hold(front_end);
            Ok(())
        })
    };
    kinds.into_iter().map(case).collect()
}

/// CVE-2018-1059: regions that are neighbours for the guest and not for us. A frame across the seam arrives whole; a
/// ring across it is refused.
fn neighbours() -> Vec<Case> {
    vec![
        Case::new("frame_across_two_neighbouring_regions", "CVE-2018-1059", Outcome::Served, |attack| {
            let (front_end, seam) = split_in_the_middle(attack)?;
            let wanted = frame(1000, 77);
            let at = seam - 500;
            let mut raw = front_end.raw(1);
            raw.memory().write(at, &[&[0; 12][..], &wanted].concat());
            let address = GUEST + at as u64;
            raw.write_descriptor(0, Descriptor { address, bytes: 412, flags: DESC_NEXT, next: 1 });
            raw.write_descriptor(1, Descriptor { address: address + 412, bytes: 600, flags: 0, next: 0 });
            raw.submit(0);
            attack.friend_receives(&wanted)?;
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("ring_across_two_neighbouring_regions", "CVE-2018-1059", Outcome::Served, |attack| {
            let (mut front_end, seam) = split_in_the_middle(attack)?;
            let user = front_end.memory().front_end_address(0);
            let at = user + seam as u64 - 64;
            let body = super::attack::addresses(1, [at, user, user + 8192]);
            ask(&mut front_end, 9, &body, &[]);
            attack.hold(front_end);
            Ok(())
        }),
    ]
}

/// A session whose memory is told anew as two regions that meet at the returned offset, guest addresses from `GUEST` on.
fn split_in_the_middle(attack: &mut Attack<'_>) -> Result<(FrontEnd, usize), Failure> {
    let mut front_end = attack.connect(small())?;
    let memory = front_end.memory().clone();
    // Behind rings and buffers.
    let seam = (front_end.take_memory(64 << 10, 4096)? + (32 << 10)).next_multiple_of(4096);
    let user = memory.front_end_address(0);
    let (low, high) = (seam as u64, (memory.bytes() - seam) as u64);
    let regions = [[GUEST, low, user, 0], [GUEST + low, high, user + low, low]];
    let told = ask(&mut front_end, SET_MEM_TABLE, &table(2, &regions), &[memory.fd(), memory.fd()]);
    for index in [0, 1] {
        let layout = front_end.raw(index as usize).layout();
        ask(&mut front_end, 9, &ring_addresses(index, layout, &memory), &[]);
    }
    if told != Some(0) {
        return Err(Failure::Wrong(format!("two neighbouring regions were answered {told:?}")));
    }
    Ok((front_end, seam))
}

const TRUNCATED: Outcome = Outcome::Lost("its memory file was truncated");

/// Not in any peer: the file is cut under the mapping, and the next access is a SIGBUS.
const SIGBUS: &str = "not in any peer (SIGBUS)";

fn truncated_under_a_ring(card: Card) -> Vec<Case> {
    vec![
        card.case("memory_file_truncated_to_nothing", SIGBUS, TRUNCATED, move |attack| {
            let front_end = served(attack, card)?;
            let mut raw = front_end.raw(1);
            front_end.memory().file()?.set_len(0)?;
            raw.doorbell().kick();
            attack.hold(front_end);
            Ok(())
        }),
        card.case("memory_file_truncated_behind_the_rings", SIGBUS, TRUNCATED, move |attack| {
            let mut front_end = served(attack, card)?;
            let at = front_end.take_memory(64 << 10, 4096)?;
            let mut raw = front_end.raw(1);
            let address = front_end.memory().guest_address(at);
            front_end.memory().file()?.set_len(at as u64)?;
            raw.submit_chain(&[(address, 1000, 0)]);
            attack.hold(front_end);
            Ok(())
        }),
        card.case("memory_file_truncated_under_a_tail", SIGBUS, TRUNCATED, move |attack| {
            let mut front_end = served(attack, card)?;
            let at = front_end.take_memory(64 << 10, 4096)?;
            let mut raw = front_end.raw(1);
            let address = front_end.memory().guest_address(at);
            raw.memory().write(at + 4096 - 212, &[&[0; 12][..], &frame(200, 1)].concat());
            front_end.memory().file()?.set_len(at as u64 + 4096)?;
            raw.submit_chain(&[(address + 4096 - 212, 1000, 0)]);
            attack.hold(front_end);
            Ok(())
        }),
        card.case("memory_file_truncated_under_a_receiveq", SIGBUS, TRUNCATED, move |attack| {
            let options = Options { seal: false, fill_receive: false, ..card.options() };
            let mut front_end = attack.connect(options)?;
            let at = front_end.take_memory(64 << 10, 4096)?;
            let mut raw = front_end.raw(0);
            let address = front_end.memory().guest_address(at);
            raw.submit_chain(&[(address, 2048, DESC_WRITE)]);
            front_end.memory().file()?.set_len(at as u64)?;
            attack.friend_sends(&frame(1000, 1))?;
            attack.hold(front_end);
            Ok(())
        }),
        card.case("memory_file_truncated_while_it_is_used", SIGBUS, TRUNCATED, move |attack| {
            let mut front_end = attack.connect(Options { seal: false, ..card.options() })?;
            let at = front_end.take_memory(64 << 10, 4096)?;
            // Its own pages go as well, so whoever drives the ring keeps to the part that stays.
            let rest = at as u64;
            let mut raw = front_end.raw(1);
            let address = front_end.memory().guest_address(at);
            let cut = Instant::now() + Duration::from_millis(20);
            let end = cut + Duration::from_millis(50);
            let memory_file = front_end.memory().file()?;
            let (mut is_cut, mut sent) = (false, 0);
            while Instant::now() < end {
                if sent == 0 || raw.has_used(sent) {
                    (0..32).for_each(|_| raw.submit_chain(&[(address, 1000, 0)]));
                    sent += 32;
                }
                if !is_cut && Instant::now() > cut {
                    memory_file.set_len(rest)?;
                    is_cut = true;
                }
            }
            attack.hold(front_end);
            Ok(())
        }),
    ]
}

fn truncated() -> Vec<Case> {
    let options = || Options { seal: false, ..small() };
    vec![
        Case::new("memory_file_truncated_before_the_addresses", SIGBUS, Outcome::Contained, move |attack| {
            let stream = attack.dial()?;
            let mut front_end = FrontEnd::prepare(stream, options())?;
            let memory = front_end.memory().clone();
            let known = memory.regions()[0];
            let region = [known.guest_address, known.bytes, known.front_end_address, 0];
            let features = front_end.negotiated().features;
            ask(&mut front_end, 2, &words(&[features]), &[]);
            ask(&mut front_end, SET_MEM_TABLE, &table(1, &[region]), &[memory.fd()]);
            memory.file()?.set_len(0)?;
            let layout = front_end.raw(1).layout();
            ask(&mut front_end, 8, &super::attack::ring_number(1, 64), &[]);
            ask(&mut front_end, 9, &ring_addresses(1, layout, &memory), &[]);
            let mut raw = front_end.raw(1);
            let kick: BorrowedFd<'_> = raw.doorbell().kick_fd();
            ask(&mut front_end, 12, &words(&[1]), &[kick]);
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("memory_file_truncated_and_made_long_again", SIGBUS, Outcome::Contained, move |attack| {
            let mut front_end = attack.connect(options())?;
            let at = front_end.take_memory(64 << 10, 4096)?;
            let file = front_end.memory().file()?;
            let bytes = front_end.memory().bytes() as u64;
            for number in 0..20 {
                file.set_len(at as u64)?;
                file.set_len(bytes)?;
                submit_frame(&mut front_end.raw(1), at, &frame(200, number));
            }
            attack.hold(front_end);
            Ok(())
        }),
        Case::new("holes_punched_into_the_memory_file", SIGBUS, Outcome::Served, move |attack| {
            let mut front_end = attack.connect(options())?;
            let at = front_end.take_memory(64 << 10, 4096)?;
            let file = front_end.memory().file()?;
            let mode = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            let deadline = Instant::now() + PATIENCE;
            for number in 0..20 {
                fallocate(&file, mode, at as i64, 4096)?;
                let wanted = frame(200, number);
                submit_frame(&mut front_end.raw(1), at, &wanted);
                attack.friend_receives(&wanted)?;
                if Instant::now() > deadline {
                    break;
                }
            }
            attack.hold(front_end);
            Ok(())
        }),
    ]
}

/// A session with unsealed memory whose transmitq is in use already.
fn served(attack: &mut Attack<'_>, card: Card) -> Result<FrontEnd, Failure> {
    let mut front_end = attack.connect(Options { seal: false, ..card.options() })?;
    let first = frame(60, 0x7a7a);
    front_end.send_burst(&[&first])?;
    attack.friend_receives(&first)?;
    Ok(front_end)
}
