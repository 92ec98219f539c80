//! A front-end that says what it likes, and a ring owner that remembers what it was told.
// Each test binary uses its own part of it, and only tests use any.
#![allow(dead_code, clippy::unwrap_used)]

use std::collections::HashMap;
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use dreamwire_vhost::eventfd::EventFd;
use dreamwire_vhost::keeper::{ConfigSpace, Endpoint, EndpointConfig, SocketMode};
use dreamwire_vhost::owner::{RingOwner, SessionEvent};
use dreamwire_vhost::ring::{Ring, RingFault, RingSetup};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const PROTOCOL_FEATURES: u64 = 1 << 30;
/// VHOST_F_LOG_ALL
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const MEMORY_BYTES: u64 = 1 << 20;
/// Where the front-end claims to have mapped its memory.
pub(crate) const USER_ADDRESS: u64 = 0x7f00_0000_0000;
pub(crate) const CARD_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
pub(crate) const RING_ENTRIES: u16 = 256;
/// Longer than any honest wait here; what fails, fails with a message.
const PATIENCE: Duration = Duration::from_secs(10);

// Request ids of docs/interop/vhost-user.rst.
pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_OWNER: u32 = 3;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_LOG_BASE: u32 = 6;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_ADDR: u32 = 9;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const SET_VRING_CALL: u32 = 13;
pub(crate) const SET_VRING_ERR: u32 = 14;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const SEND_RARP: u32 = 19;
pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const SET_CONFIG: u32 = 25;
pub(crate) const GET_INFLIGHT_FD: u32 = 31;
pub(crate) const SET_INFLIGHT_FD: u32 = 32;
pub(crate) const RESET_DEVICE: u32 = 34;
pub(crate) const ADD_MEM_REG: u32 = 37;
pub(crate) const REM_MEM_REG: u32 = 38;
pub(crate) const SET_STATUS: u32 = 39;

/// Waits for `condition`, and fails with `what` if it does not come true.
#[track_caller]
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in {PATIENCE:?}: {what}");
        std::thread::yield_now();
    }
}

/// What an attach brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attached {
    pub(crate) queue: u16,
    pub(crate) size: u16,
    pub(crate) next_avail: u16,
    pub(crate) next_used: u16,
    pub(crate) features: u64,
    pub(crate) enabled: bool,
    pub(crate) kicked: bool,
}

#[derive(Default)]
struct Log {
    rings: HashMap<u16, Ring>,
    attached: Vec<Attached>,
    events: Vec<SessionEvent>,
    detach_is_held: bool,
    detaches_waiting: usize,
    panics: bool,
}

/// Holds rings like a worker, and records.
#[derive(Default)]
pub(crate) struct Owner {
    log: Mutex<Log>,
    released: Condvar,
}

impl Owner {
    pub(crate) fn attached(&self) -> Vec<Attached> {
        self.log.lock().unwrap().attached.clone()
    }

    pub(crate) fn holds(&self) -> Vec<u16> {
        let mut queues: Vec<u16> = self.log.lock().unwrap().rings.keys().copied().collect();
        queues.sort_unstable();
        queues
    }

    pub(crate) fn events(&self) -> Vec<SessionEvent> {
        self.log.lock().unwrap().events.clone()
    }

    pub(crate) fn warned_of(&self, part: &str) -> bool {
        self.events().iter().any(|event| matches!(event, SessionEvent::Warning(text) if text.contains(part)))
    }

    /// Reasons of all disconnects so far.
    pub(crate) fn disconnects(&self) -> Vec<String> {
        let reason = |event| match event {
            SessionEvent::Disconnected { reason } => Some(reason),
            _ => None,
        };
        self.events().into_iter().filter_map(reason).collect()
    }

    #[track_caller]
    pub(crate) fn await_disconnect(&self, count: usize) -> String {
        eventually("a disconnect", || self.disconnects().len() >= count);
        self.disconnects()[count - 1].clone()
    }

    /// Changes an attached ring as a worker does that serves it.
    pub(crate) fn serve(&self, queue: u16, serve: impl FnOnce(&mut RingSetup)) {
        let mut log = self.log.lock().unwrap();
        let mut setup = log.rings.remove(&queue).unwrap().into_setup();
        serve(&mut setup);
        log.rings.insert(queue, Ring::new(setup).unwrap());
    }

    /// Lets an attached ring work.
    #[track_caller]
    pub(crate) fn with_ring<T>(&self, queue: u16, work: impl FnOnce(&mut Ring) -> T) -> T {
        work(self.log.lock().unwrap().rings.get_mut(&queue).unwrap())
    }

    /// How ring `queue` is broken, as it is held now.
    pub(crate) fn fault(&self, queue: u16) -> Option<RingFault> {
        self.log.lock().unwrap().rings[&queue].fault()
    }

    pub(crate) fn panic_from_now_on(&self) {
        self.log.lock().unwrap().panics = true;
    }

    /// From now on detach waits, as for a worker in the middle of a burst.
    pub(crate) fn hold_detach(&self, held: bool) {
        self.log.lock().unwrap().detach_is_held = held;
        self.released.notify_all();
    }

    pub(crate) fn detaches_waiting(&self) -> usize {
        self.log.lock().unwrap().detaches_waiting
    }
}

impl RingOwner for Owner {
    fn attach(&self, queue: u16, ring: Ring) {
        let mut log = self.log.lock().unwrap();
        if log.panics {
            drop(log);
            panic!("as the test wants it");
        }
        let setup = ring.into_setup();
        log.attached.push(Attached {
            queue,
            size: setup.size,
            next_avail: setup.next_avail,
            next_used: setup.next_used,
            features: setup.features,
            enabled: setup.enabled,
            kicked: setup.kick.is_some(),
        });
        let previous = log.rings.insert(queue, Ring::new(setup).unwrap());
        assert!(previous.is_none(), "ring {queue} was attached twice");
    }

    fn detach(&self, queue: u16) -> Option<Ring> {
        let mut log = self.log.lock().unwrap();
        if log.rings.contains_key(&queue) {
            log.detaches_waiting += 1;
            log = self.released.wait_while(log, |log| log.detach_is_held).unwrap();
            log.detaches_waiting -= 1;
        }
        log.rings.remove(&queue)
    }

    fn event(&self, event: SessionEvent) {
        self.log.lock().unwrap().events.push(event);
    }
}

/// An endpoint in a directory of its own.
pub(crate) struct Port {
    pub(crate) endpoint: Endpoint,
    pub(crate) owner: Arc<Owner>,
    pub(crate) socket: PathBuf,
    _directory: tempfile::TempDir,
}

impl Port {
    pub(crate) fn start(mode: SocketMode, queue_pairs: u16) -> Self {
        Self::start_offering(mode, queue_pairs, VERSION_1 | 1)
    }

    pub(crate) fn start_offering(mode: SocketMode, queue_pairs: u16, features: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("vm1.sock");
        let config = EndpointConfig {
            name: "vm1".into(),
            socket: socket.clone(),
            mode,
            queue_pairs,
            mtu: 1500,
            features,
            config_space: Some(ConfigSpace { mac: Some(CARD_MAC) }),
            private_dir: directory.path().join("private"),
        };
        let owner = Arc::new(Owner::default());
        let endpoint = Endpoint::start(config, owner.clone()).unwrap();
        Self { endpoint, owner, socket, _directory: directory }
    }

    pub(crate) fn server() -> Self {
        Self::start(SocketMode::Server, 1)
    }

    /// A front-end with both rings attached.
    #[track_caller]
    pub(crate) fn session(&self) -> FrontEnd {
        let mut front_end = FrontEnd::connect(&self.socket);
        front_end.negotiate();
        front_end.set_memory();
        front_end.start_ring(0);
        front_end.start_ring(1);
        assert_eq!(self.owner.holds(), [0, 1]);
        front_end
    }
}

/// A front-end's side of the socket.
pub(crate) struct FrontEnd {
    pub(crate) stream: UnixStream,
    pub(crate) kicks: [EventFd; 2],
    pub(crate) calls: [EventFd; 2],
}

impl FrontEnd {
    pub(crate) fn connect(socket: &Path) -> Self {
        Self::new(UnixStream::connect(socket).unwrap())
    }

    pub(crate) fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let events = || std::array::from_fn(|_| EventFd::new().unwrap());
        Self { stream, kicks: events(), calls: events() }
    }

    /// Sends without asking for an answer.
    pub(crate) fn tell(&mut self, request: u32, payload: &[u8], descriptors: &[RawFd]) {
        self.send([request, 1, payload.len() as u32], payload, descriptors);
    }

    /// Sends with NEED_REPLY; the acknowledgement.
    #[track_caller]
    pub(crate) fn ask(&mut self, request: u32, payload: &[u8], descriptors: &[RawFd]) -> u64 {
        self.send([request, 9, payload.len() as u32], payload, descriptors);
        self.answer_to(request)
    }

    #[track_caller]
    pub(crate) fn send(&self, words: [u32; 3], payload: &[u8], descriptors: &[RawFd]) {
        assert!(self.try_send(words, payload, descriptors));
    }

    /// False if the other side has closed.
    #[track_caller]
    pub(crate) fn try_send(&self, words: [u32; 3], payload: &[u8], descriptors: &[RawFd]) -> bool {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).chain(payload.iter().copied()).collect();
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control = if descriptors.is_empty() { &rights[..0] } else { &rights[..] };
        let iov = [IoSlice::new(&bytes)];
        match sendmsg::<()>(self.stream.as_raw_fd(), &iov, control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(sent) => assert_eq!(sent, bytes.len()),
            Err(Errno::EPIPE | Errno::ECONNRESET) => return false,
            Err(error) => panic!("sendmsg: {error}"),
        }
        true
    }

    #[track_caller]
    pub(crate) fn answer_to(&mut self, request: u32) -> u64 {
        let mut bytes = [0; 20];
        self.stream.read_exact(&mut bytes).unwrap();
        assert_eq!(bytes[..12], [request, 5, 8].map(u32::to_ne_bytes).concat(), "answer to {request}");
        u64::from_ne_bytes(bytes[12..].try_into().unwrap())
    }

    /// Nothing has been answered so far.
    pub(crate) fn is_waiting(&self) -> bool {
        self.stream.set_nonblocking(true).unwrap();
        let peeked = nix::sys::socket::recv(self.stream.as_raw_fd(), &mut [0], MsgFlags::MSG_PEEK);
        self.stream.set_nonblocking(false).unwrap();
        peeked == Err(Errno::EAGAIN)
    }

    /// QEMU's way, with the enable before the features.
    #[track_caller]
    pub(crate) fn negotiate(&mut self) {
        self.negotiate_features(VERSION_1 | 1, VERSION_1);
    }

    #[track_caller]
    pub(crate) fn negotiate_features(&mut self, expected: u64, features: u64) {
        self.tell(GET_FEATURES, &[], &[]);
        let offered = self.answer_to(GET_FEATURES);
        assert_eq!(offered, expected | PROTOCOL_FEATURES | LOG_ALL);
        self.tell(GET_PROTOCOL_FEATURES, &[], &[]);
        let protocol = self.answer_to(GET_PROTOCOL_FEATURES);
        self.tell(SET_PROTOCOL_FEATURES, &protocol.to_ne_bytes(), &[]);
        self.tell(SET_OWNER, &[], &[]);
        for ring in 0..2 {
            assert_eq!(self.ask(SET_VRING_ENABLE, &ring_number(ring, 1), &[]), 0);
        }
        self.tell(SET_FEATURES, &(features | PROTOCOL_FEATURES).to_ne_bytes(), &[]);
    }

    #[track_caller]
    pub(crate) fn set_memory(&mut self) {
        let file = memfd(MEMORY_BYTES);
        assert_eq!(self.ask(SET_MEM_TABLE, &memory_table(MEMORY_BYTES), &[file.as_raw_fd()]), 0);
    }

    /// In QEMU's order; returns once the session has taken all of it.
    #[track_caller]
    pub(crate) fn start_ring(&mut self, ring: u32) {
        let index = u64::from(ring).to_ne_bytes();
        let (kick, call) = (raw(&self.kicks[ring as usize]), raw(&self.calls[ring as usize]));
        self.tell(SET_VRING_NUM, &ring_number(ring, u32::from(RING_ENTRIES)), &[]);
        self.tell(SET_VRING_BASE, &ring_number(ring, 0), &[]);
        self.tell(SET_VRING_ADDR, &ring_addresses(ring), &[]);
        self.tell(SET_VRING_KICK, &index, &[kick]);
        assert_eq!(self.ask(SET_VRING_CALL, &index, &[call]), 0);
    }

    /// GET_VRING_BASE.
    #[track_caller]
    pub(crate) fn stop_ring(&mut self, ring: u32) -> u32 {
        self.tell(GET_VRING_BASE, &ring_number(ring, 0), &[]);
        let answer = self.answer_to(GET_VRING_BASE).to_ne_bytes();
        assert_eq!(answer[..4], ring.to_ne_bytes());
        u32::from_ne_bytes(answer[4..].try_into().unwrap())
    }

    /// The other side has closed.
    #[track_caller]
    pub(crate) fn assert_closed(mut self) {
        let mut rest = Vec::new();
        // Unread bytes of ours make it a reset.
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}"),
        }
    }
}

pub(crate) fn raw(event: &EventFd) -> RawFd {
    event.as_fd().as_raw_fd()
}

pub(crate) fn memfd(bytes: u64) -> OwnedFd {
    let file = memfd_create("guest", MFdFlags::MFD_ALLOW_SEALING | MFdFlags::MFD_CLOEXEC).unwrap();
    nix::unistd::ftruncate(&file, bytes as i64).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    file
}

/// One region at guest address 0.
pub(crate) fn memory_table(bytes: u64) -> Vec<u8> {
    let words = [0, bytes, USER_ADDRESS, 0].map(u64::to_ne_bytes).concat();
    [&1u64.to_le_bytes()[..], &words].concat()
}

pub(crate) fn ring_number(ring: u32, number: u32) -> Vec<u8> {
    [ring.to_ne_bytes(), number.to_ne_bytes()].concat()
}

/// Ring 0 at 64 KiB, ring 1 at 128 KiB: descriptor table, available ring 8 KiB on, used ring 16 KiB on.
pub(crate) fn ring_addresses(ring: u32) -> Vec<u8> {
    let base = USER_ADDRESS + u64::from(ring + 1) * 0x1_0000;
    let words = [base, base + 0x4000, base + 0x2000, 0].map(u64::to_ne_bytes).concat();
    [ring_number(ring, 0), words].concat()
}
