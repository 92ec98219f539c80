//! What an attack has at hand: the port's socket, a front-end without scruples, and the port on the other side.

use std::io::Read as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::front_end::layout::RingLayout;
use crate::front_end::memory::GuestMemory;
use crate::front_end::{FrontEnd, FrontEndError, Options, RawDriver};

/// Version 1, an answer asked for.
pub const NEED_REPLY: u32 = 9;
/// Version 1.
pub const NO_REPLY: u32 = 1;

/// How long a frame or an answer may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// Why an attack did not go as written.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The target closed the connection, or refused: its good right.
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    /// A system call of ours failed, mostly for the same reason.
    #[error(transparent)]
    System(#[from] std::io::Error),
    /// The target did what no back-end may do.
    #[error("{0}")]
    Wrong(String),
}

impl From<nix::errno::Errno> for Failure {
    fn from(error: nix::errno::Errno) -> Self {
        Self::System(error.into())
    }
}

/// One attack under way.
#[derive(Debug)]
pub struct Attack<'a> {
    /// The socket under attack.
    pub socket: PathBuf,
    /// The port on the other side: what it floods comes to the attacked port, and the reverse.
    pub friend: &'a mut FrontEnd,
    /// Kept until the outcome was looked at.
    held: Vec<FrontEnd>,
    descriptors: Vec<OwnedFd>,
    streams: Vec<UnixStream>,
    threads: Vec<JoinHandle<()>>,
}

/// Small, for the many cases that only want a session.
pub fn small() -> Options {
    Options { ring_size: 64, spare_bytes: 1 << 20, timeout: Duration::from_secs(2), ..Options::default() }
}

/// A broadcast frame of `bytes` bytes, told from others by `number`.
pub fn frame(bytes: usize, number: u64) -> Vec<u8> {
    // From a locally administered address of no port; 0x88b5 is for experiments (IEEE 802).
    let mut frame = [&[0xff; 6][..], &[0x52, 0x54, 0, 0xba, 0xd0, 1], &[0x88, 0xb5], &number.to_le_bytes()].concat();
    frame.resize(bytes, number as u8);
    frame
}

impl<'a> Attack<'a> {
    pub(super) fn new(socket: PathBuf, friend: &'a mut FrontEnd) -> Self {
        Self { socket, friend, held: vec![], descriptors: vec![], streams: vec![], threads: vec![] }
    }

    /// A session with running rings.
    pub fn connect(&mut self, options: Options) -> Result<FrontEnd, Failure> {
        Ok(FrontEnd::connect(&self.socket, options)?)
    }

    /// A connection on which nothing was said.
    pub fn dial(&mut self) -> Result<UnixStream, Failure> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_write_timeout(Some(Duration::from_secs(1)))?;
        stream.set_read_timeout(Some(Duration::from_secs(1)))?;
        Ok(stream)
    }

    /// Keeps the session open until the outcome was looked at.
    pub fn hold(&mut self, front_end: FrontEnd) {
        self.held.push(front_end);
    }

    /// Keeps a connection open.
    pub fn hold_stream(&mut self, stream: UnixStream) {
        self.streams.push(stream);
    }

    /// Keeps a descriptor open.
    pub fn hold_descriptor(&mut self, descriptor: impl Into<OwnedFd>) {
        self.descriptors.push(descriptor.into());
    }

    /// Waits for a thread before the outcome is looked at.
    pub fn hold_thread(&mut self, thread: JoinHandle<()>) {
        self.threads.push(thread);
    }

    /// The session that was held last.
    pub(super) fn held(&mut self) -> Option<&mut FrontEnd> {
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
        self.held.last_mut()
    }

    /// Floods one frame from the other side.
    pub fn friend_sends(&mut self, frame: &[u8]) -> Result<(), Failure> {
        let deadline = Instant::now() + PATIENCE;
        while self.friend.send_burst(&[frame])? == 0 {
            if Instant::now() > deadline {
                return Err(Failure::Wrong("the other side's transmitq is stuck".into()));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// Waits until exactly `wanted` arrives at the other side; other frames there are passed over.
    pub fn friend_receives(&mut self, wanted: &[u8]) -> Result<(), Failure> {
        receives(self.friend, wanted)
    }
}

/// Waits until `front_end` has received exactly `wanted`; other frames are passed over.
pub fn receives(front_end: &mut FrontEnd, wanted: &[u8]) -> Result<(), Failure> {
    let deadline = Instant::now() + PATIENCE;
    let mut found = false;
    while !found {
        let count = front_end.receive_burst(|frame, _| found |= frame == wanted).map_err(FrontEndError::from)?;
        if count == 0 {
            if Instant::now() > deadline {
                return Err(Failure::Wrong(format!("a frame of {} bytes did not arrive", wanted.len())));
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }
    Ok(())
}

/// Sends any message and asks for a verdict: the acknowledgement (or the first word of another answer), `None` if the
/// connection was closed or nothing came.
pub fn ask(front_end: &mut FrontEnd, request: u32, body: &[u8], descriptors: &[BorrowedFd<'_>]) -> Option<u64> {
    front_end.connection().send(request, NEED_REPLY, body, descriptors).ok()?;
    let mut header = [0; 12];
    let mut stream = front_end.connection().stream();
    stream.read_exact(&mut header).ok()?;
    let mut answer = vec![0; u32::from_le_bytes([header[8], header[9], header[10], header[11]]) as usize];
    stream.read_exact(&mut answer).ok()?;
    answer.resize(8, 0);
    Some(u64::from_le_bytes(answer[..8].try_into().expect("eight bytes")))
}

/// `struct vhost_vring_state`.
pub fn ring_number(index: u32, number: u32) -> Vec<u8> {
    [index.to_le_bytes(), number.to_le_bytes()].concat()
}

/// `struct vhost_vring_addr` of ring `index` at `layout`.
pub fn ring_addresses(index: u32, layout: RingLayout, memory: &GuestMemory) -> Vec<u8> {
    let at = |offset| memory.front_end_address(offset);
    addresses(index, [at(layout.descriptor_table), at(layout.used_ring), at(layout.available_ring)])
}

/// `struct vhost_vring_addr`: descriptor table, used ring, available ring.
pub fn addresses(index: u32, [descriptors, used, available]: [u64; 3]) -> Vec<u8> {
    words(&[u64::from(index), descriptors, used, available, 0])
}

/// Little-endian.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// A new eventfd.
pub fn eventfd(flags: EfdFlags) -> Result<EventFd, Failure> {
    Ok(EventFd::from_flags(flags | EfdFlags::EFD_CLOEXEC)?)
}

/// Lets the "driver" of ring `index` reset it: stop, empty rings, start anew. Returns a handle on the new ring.
pub fn reset_ring(front_end: &mut FrontEnd, index: u32) -> Result<RawDriver, Failure> {
    let mut raw = front_end.raw(index as usize);
    stop_ring(front_end, index)?;
    raw.restart();
    let base = raw.base();
    start_ring(front_end, &mut raw, index, base)?;
    Ok(raw)
}

/// GET_VRING_BASE.
pub fn stop_ring(front_end: &mut FrontEnd, index: u32) -> Result<u64, Failure> {
    let stopped = ask(front_end, 11, &ring_number(index, 0), &[]);
    stopped.ok_or_else(|| Failure::Wrong(format!("ring {index} was not stopped")))
}

/// SET_VRING_NUM to SET_VRING_ENABLE with whatever is in the ring, SET_VRING_BASE with `base`.
pub fn start_ring(front_end: &mut FrontEnd, raw: &mut RawDriver, index: u32, base: u32) -> Result<(), Failure> {
    let (layout, memory) = (raw.layout(), front_end.memory().clone());
    let doorbell = raw.doorbell();
    let number = u64::from(index).to_le_bytes();
    let messages: [(u32, Vec<u8>, &[BorrowedFd<'_>]); 6] = [
        (8, ring_number(index, u32::from(layout.size)), &[]),
        (10, ring_number(index, base), &[]),
        (9, ring_addresses(index, layout, &memory), &[]),
        (13, number.to_vec(), &[doorbell.call_fd()]),
        (12, number.to_vec(), &[doorbell.kick_fd()]),
        (18, ring_number(index, 1), &[]),
    ];
    for (request, body, descriptors) in messages {
        match ask(front_end, request, &body, descriptors) {
            Some(0) => {}
            other => return Err(Failure::Wrong(format!("request {request} of a start was answered {other:?}"))),
        }
    }
    Ok(())
}

/// Writes a frame with an empty header to `offset` and submits it as a chain of one descriptor.
pub fn submit_frame(raw: &mut RawDriver, offset: usize, frame: &[u8]) {
    raw.memory().write(offset, &[0; 12]);
    raw.memory().write(offset + 12, frame);
    let address = raw.memory().guest_address(offset);
    raw.submit_chain(&[(address, 12 + frame.len() as u32, 0)]);
}

/// An eventfd as a plain borrowed descriptor.
pub fn borrowed(event: &EventFd) -> BorrowedFd<'_> {
    event.as_fd()
}
