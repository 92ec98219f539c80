//! The filter alone, on the messages that end at it with a descriptor or a structure of their own: the in-flight region,
//! the channel for requests of the back-end, the configuration space.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::config_space::{ConfigSpace, access};
use super::filter::{Action, Filter};
use super::inflight::InflightRange;
use super::message::{Header, Message, request as req};
use super::offer::{Offer, protocol};
use crate::eventfd::EventFd;
use crate::inflight::region_bytes;
use crate::owner::SessionEvent;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const FEATURES: u64 = 1 << 34 | 1 << 32;

/// What became of a message, in a line each.
#[derive(Debug, PartialEq)]
enum Seen {
    Inflight,
    Given(InflightRange, u64),
    Answered(Vec<u8>),
    Acked(u64),
    Warned(String),
    Disconnected(String),
}
use Seen::{Acked, Answered, Disconnected, Given, Inflight, Warned};

fn filter(protocol_features: u64) -> Filter {
    let offered = protocol::ALL | protocol::CONFIG;
    let config_space = Some(ConfigSpace { mac: Some(MAC) });
    let offer = Offer { features: FEATURES, protocol_features: offered, queue_pairs: 2, mtu: 1500, config_space };
    let mut filter = Filter::new(offer);
    assert_eq!(tell(&mut filter, req::SET_PROTOCOL_FEATURES, &protocol_features.to_ne_bytes(), vec![]), []);
    filter
}

fn negotiated() -> Filter {
    filter(protocol::ALL | protocol::CONFIG)
}

fn tell(filter: &mut Filter, request: u32, payload: &[u8], descriptors: Vec<OwnedFd>) -> Vec<Seen> {
    judge(filter, 1, request, payload, descriptors)
}

/// With NEED_REPLY.
fn ask(filter: &mut Filter, request: u32, payload: &[u8], descriptors: Vec<OwnedFd>) -> Vec<Seen> {
    judge(filter, 9, request, payload, descriptors)
}

fn judge(filter: &mut Filter, flags: u32, request: u32, payload: &[u8], descriptors: Vec<OwnedFd>) -> Vec<Seen> {
    let bytes: Vec<u8> = [request, flags, payload.len() as u32].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let header = Header::decode(bytes[..].try_into().unwrap());
    let see = |action| match action {
        Action::SetInflight(_) => Inflight,
        Action::ReplyWithFile { request: req::GET_INFLIGHT_FD, payload: answer, file } => {
            assert_eq!(answer.len(), payload.len());
            assert_eq!(fcntl(&file, FcntlArg::F_GETFD).unwrap(), FdFlag::FD_CLOEXEC.bits());
            Given(InflightRange::decode(&answer).unwrap(), nix::sys::stat::fstat(&file).unwrap().st_size as u64)
        }
        Action::Reply { request: req::GET_CONFIG, payload } => Answered(payload),
        Action::Reply { payload, .. } => Acked(u64::from_ne_bytes(payload[..].try_into().unwrap())),
        Action::Report(SessionEvent::Warning(text)) => Warned(text),
        Action::Disconnect { reason } => Disconnected(reason),
        other => panic!("{other:?}"),
    };
    filter.judge(Message { header, payload: payload.to_vec(), descriptors }).into_iter().map(see).collect()
}

#[track_caller]
fn assert_disconnected(seen: &[Seen], part: &str) {
    assert!(matches!(seen, [Disconnected(reason)] if reason.contains(part)), "{part}: {seen:?}");
}

/// A refusal that the front-end has asked to be told.
#[track_caller]
fn assert_refused(seen: &[Seen], part: &str) {
    assert!(matches!(seen, [Acked(1), Warned(reason)] if reason.contains(part)), "{part}: {seen:?}");
}

fn range(bytes: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    InflightRange { bytes, offset, queues, queue_size }.encode(24)
}

fn memfd(bytes: u64) -> OwnedFd {
    let file = memfd_create("inflight", MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&file, bytes as i64).unwrap();
    file
}

fn event() -> OwnedFd {
    EventFd::new().unwrap().as_fd().try_clone_to_owned().unwrap()
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_region_is_made_as_large_as_its_rings_need_and_sealed() {
    let mut filter = negotiated();
    // Before SET_FEATURES the rings may still become packed; what the front-end says of size and offset means nothing.
    let packed = region_bytes(true, 4, 256);
    let seen = ask(&mut filter, req::GET_INFLIGHT_FD, &range(7, 13, 4, 256), vec![]);
    let expected = InflightRange { bytes: packed, offset: 0, queues: 4, queue_size: 256 };
    assert_eq!(seen, [Inflight, Given(expected, packed)]);
    assert!(filter.record().inflight.is_some());
    // With 20 bytes as with 24.
    let asked = InflightRange { bytes: 0, offset: 0, queues: 1, queue_size: 32768 };
    let seen = tell(&mut filter, req::GET_INFLIGHT_FD, &asked.encode(20), vec![]);
    assert!(matches!(&seen[..], [Inflight, Given(InflightRange { queues: 1, .. }, _)]), "{seen:?}");
}

/// CVE-2021-3839, DPDK 6442c329b9: counts that the front-end makes up.
#[test]
fn a_region_for_rings_that_cannot_be_is_neither_made_nor_mapped() {
    for (queues, queue_size, part) in [
        (0, 256, "for 0 rings"),
        (5, 256, "the port has 4"),
        (u16::MAX, u16::MAX, "the port has 4"),
        (4, 0, "for rings of 0"),
        (4, 32769, "for rings of 32769"),
        (4, u16::MAX, "for rings of 65535"),
    ] {
        let mut filter = negotiated();
        let seen = ask(&mut filter, req::GET_INFLIGHT_FD, &range(0, 0, queues, queue_size), vec![]);
        assert_disconnected(&seen, part);
        let body = range(1 << 30, 0, queues, queue_size);
        assert_refused(&ask(&mut filter, req::SET_INFLIGHT_FD, &body, vec![memfd(1 << 30)]), part);
        assert!(filter.record().inflight.is_none());
    }
}

#[test]
fn a_region_that_comes_back_is_used_and_an_unsealed_one_warned_of() {
    let mut filter = negotiated();
    let bytes = region_bytes(false, 4, 256);
    let seen = ask(&mut filter, req::SET_INFLIGHT_FD, &range(bytes, 4096, 4, 256), vec![memfd(bytes + 4096)]);
    assert!(matches!(&seen[..], [Inflight, Warned(text), Acked(0)] if text.contains("in-flight region")), "{seen:?}");
    assert!(filter.record().inflight.is_some());
}

/// CVE-2020-10722's sums and CVE-2020-10726's descriptors, on this message: nothing is mapped that the file does not hold.
#[test]
fn a_region_that_its_file_does_not_hold_is_refused() {
    let bytes = region_bytes(false, 4, 256);
    let mut filter = negotiated();
    for (size, offset, part) in [
        (0, 0, "need 0x"),
        (bytes - 1, 0, "need 0x"),
        (u64::MAX, 0, "which has"),
        (u64::MAX, 4096, "wraps around"),
        (bytes, !4095, "wraps around"),
        (bytes, 7, "inside a page"),
        (bytes, 4096, "which has"),
        (bytes + 1, 0, "which has"),
    ] {
        let seen = ask(&mut filter, req::SET_INFLIGHT_FD, &range(size, offset, 4, 256), vec![memfd(bytes)]);
        assert_refused(&seen, part);
    }
    let body = range(bytes, 0, 4, 256);
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    let (socket, _peer) = UnixStream::pair().unwrap();
    for wrong in [event(), pipe, socket.into()] {
        assert_refused(&ask(&mut filter, req::SET_INFLIGHT_FD, &body, vec![wrong]), "not a memfd or file");
    }
    assert_refused(&ask(&mut filter, req::SET_INFLIGHT_FD, &body, vec![]), "without a descriptor");
    assert!(filter.record().inflight.is_none());
    // Nobody asked to be told: then only a disconnect tells.
    assert_disconnected(&tell(&mut filter, req::SET_INFLIGHT_FD, &body, vec![]), "without a descriptor");
}

#[test]
fn a_channel_is_kept_and_the_next_takes_its_place() {
    let mut filter = negotiated();
    let (ours, theirs) = UnixStream::pair().unwrap();
    assert_eq!(ask(&mut filter, req::SET_BACKEND_REQ_FD, &[], vec![ours.into()]), [Acked(0)]);
    theirs.set_nonblocking(true).unwrap();
    let hung_up = |stream: &UnixStream| matches!(std::io::Read::read(&mut &*stream, &mut [0; 1]), Ok(0));
    assert!(!hung_up(&theirs), "it is open");
    let (ours, next) = UnixStream::pair().unwrap();
    next.set_nonblocking(true).unwrap();
    assert_eq!(tell(&mut filter, req::SET_BACKEND_REQ_FD, &[], vec![ours.into()]), []);
    assert!(hung_up(&theirs) && !hung_up(&next));
    drop(filter);
    assert!(hung_up(&next));
}

#[test]
fn a_channel_of_the_wrong_kind_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (datagrams, _peer) = UnixDatagram::pair().unwrap();
    let network = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let mut filter = negotiated();
    let (pipe, _other) = nix::unistd::pipe().unwrap();
    for wrong in [event(), memfd(4096), pipe, datagrams.into(), network.into()] {
        assert_refused(&ask(&mut filter, req::SET_BACKEND_REQ_FD, &[], vec![wrong]), "not a UNIX stream socket");
    }
    assert_refused(&ask(&mut filter, req::SET_BACKEND_REQ_FD, &[], vec![]), "without a descriptor");
    // A front-end's own end of its connection, as client and as server: held by us, its end would never be heard of.
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    let (server, _) = listener.accept().unwrap();
    for named in [client.into(), server.into(), listener.into()] {
        assert_refused(&ask(&mut filter, req::SET_BACKEND_REQ_FD, &[], vec![named]), "not one end of a socket pair");
    }
    assert!(filter.record().backend_channel.is_none());
}

/// What waits in the channel would be kept open by us: the front-end's own end of the connection, for instance.
#[test]
fn descriptors_that_wait_in_a_channel_are_closed_and_none_can_be_added() {
    let mut filter = negotiated();
    let ((ours, theirs), (hostage, witness)) = (UnixStream::pair().unwrap(), UnixStream::pair().unwrap());
    let send = |stream: &UnixStream| {
        let descriptors = [hostage.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&descriptors)];
        let iov = [std::io::IoSlice::new(&[0])];
        sendmsg::<()>(stream.as_raw_fd(), &iov, &rights, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT, None)
    };
    (0..100).for_each(|_| assert_eq!(send(&theirs), Ok(1)));
    assert_eq!(ask(&mut filter, req::SET_BACKEND_REQ_FD, &[], vec![ours.into()]), [Acked(0)]);
    assert_eq!(send(&theirs), Err(nix::errno::Errno::EPIPE));
    drop(hostage);
    assert_eq!(std::io::Read::read(&mut &witness, &mut [0; 1]).unwrap(), 0, "nobody holds it any more");
    assert!(filter.record().backend_channel.is_some());
}

#[test]
fn the_configuration_space_is_read_and_not_written() {
    let mut filter = negotiated();
    let seen = tell(&mut filter, req::GET_CONFIG, &access(0, 0, &[0; 12]), vec![]);
    let expected = [&MAC[..], &[1, 0, 2, 0, 0xdc, 5]].concat();
    assert_eq!(seen, [Answered(access(0, 0, &expected))]);
    // "uses zero length of payload to indicate an error"
    let seen = ask(&mut filter, req::GET_CONFIG, &access(250, 0, &[0; 12]), vec![]);
    assert!(matches!(&seen[..], [Answered(answer), Warned(_)] if answer.is_empty()), "{seen:?}");
    // A guest can cause it, so nobody is sent away.
    let write = access(0, 0, &[2; 6]);
    assert_refused(&ask(&mut filter, req::SET_CONFIG, &write, vec![]), "the port's to say");
    let seen = tell(&mut filter, req::SET_CONFIG, &write, vec![]);
    assert!(matches!(&seen[..], [Warned(_)]), "{seen:?}");
    assert_eq!(ask(&mut filter, req::SET_CONFIG, &access(0, 1, &MAC), vec![]), [Acked(0)]);
    assert_refused(&ask(&mut filter, req::SET_CONFIG, &access(300, 1, &MAC), vec![]), "not in the configuration space");
}

#[test]
fn none_of_it_is_served_before_it_is_negotiated_or_with_a_wrong_length_or_surplus_descriptors() {
    for (request, feature, payload, descriptors) in [
        (req::GET_INFLIGHT_FD, protocol::INFLIGHT_SHMFD, range(0, 0, 2, 256), 0),
        (req::SET_INFLIGHT_FD, protocol::INFLIGHT_SHMFD, range(1 << 20, 0, 2, 256), 1),
        (req::SET_BACKEND_REQ_FD, protocol::BACKEND_REQ, vec![], 1),
        (req::GET_CONFIG, protocol::CONFIG, access(0, 0, &[0; 6]), 0),
        (req::SET_CONFIG, protocol::CONFIG, access(0, 1, &MAC), 0),
    ] {
        let files = |count| std::iter::repeat_with(|| memfd(1 << 20)).take(count).collect();
        let mut without = filter((protocol::ALL | protocol::CONFIG) & !feature);
        assert_disconnected(&tell(&mut without, request, &payload, files(descriptors)), "was not negotiated");
        let mut with = negotiated();
        for length in [payload.len() + 1, payload.len().saturating_sub(1), 4096] {
            let mut wrong = payload.clone();
            wrong.resize(length, 0);
            if length != payload.len() {
                assert_disconnected(&ask(&mut with, request, &wrong, files(descriptors)), "are not its length");
            }
        }
        for surplus in [descriptors + 1, 8, 32] {
            assert_disconnected(&ask(&mut with, request, &payload, files(surplus)), "descriptors, at most");
        }
        assert!(with.record().inflight.is_none() && with.record().backend_channel.is_none());
    }
}

/// CVE-2020-10726: each repetition leaked a mapping and a descriptor.
#[test]
fn repetition_leaks_neither_descriptors_nor_mappings() {
    let mut filter = negotiated();
    let bytes = region_bytes(true, 4, 256);
    let mappings = || std::fs::read_to_string("/proc/self/maps").unwrap().matches("/memfd:inflight").count();
    let repeat = |filter: &mut Filter| {
        let seen = ask(filter, req::GET_INFLIGHT_FD, &range(0, 0, 4, 256), vec![]);
        assert_eq!(seen.len(), 2);
        ask(filter, req::SET_INFLIGHT_FD, &range(bytes, 0, 4, 256), vec![memfd(bytes)]);
        ask(filter, req::SET_INFLIGHT_FD, &range(bytes, 0, 5, 256), vec![memfd(bytes)]);
        ask(filter, req::SET_BACKEND_REQ_FD, &[], vec![UnixStream::pair().unwrap().0.into()]);
        ask(filter, req::SET_BACKEND_REQ_FD, &[], vec![event()]);
    };
    repeat(&mut filter);
    let descriptors = open_descriptors();
    for _ in 0..10_000 {
        repeat(&mut filter);
    }
    // Other tests of this process have some open for a moment; a leak would be ten thousand.
    assert!(open_descriptors() < descriptors + 200, "{} became {}", descriptors, open_descriptors());
    assert!(mappings() < 100, "{}", mappings());
}
