//! A vhost-user front-end: the driver's side of a virtio-net device, in plain process memory.
//!
//! Theory of operation. A [`FrontEnd`] pretends to be QEMU and guest in one: it owns the guest's memory (a sealed
//! memfd, [`memory`]), speaks vhost-user to a back-end ([`connection`], [`handshake`]), and drives the rings as a guest's
//! driver would ([`split`] or [`packed`], [`chains`], [`transmit`], [`receive`]). Any back-end will do: dreamwire, DPDK's vhost
//! library, VPP. One thread uses it; nothing here locks. It polls unless it is asked to wait for calls.
//!
//! ```text
//!  send_burst, repost_burst                                     receive_burst, receive_views
//!        v                                                                 ^
//!  transmit (templates) -> chains (slots) -> ring   |   ring -> chains (slots) -> receive (merge, refill)
//!                                          \      |      /
//!                                                back-end (device)
//! ```
//! Tests that play a hostile guest take [`FrontEnd::raw`] for the rings and [`FrontEnd::connection`] for the messages.
//!
//! Limits: no control queue, at most [`memory::REGIONS_MAX`] regions, 128 pairs.

pub mod chains;
pub mod connection;
pub mod doorbell;
pub mod error;
pub mod handshake;
pub mod header;
pub mod layout;
pub mod memory;
pub mod options;
pub mod packed;
pub mod position;
pub mod raw;
pub mod receive;
pub mod ring;
mod slots;
pub mod split;
pub mod transmit;

use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

pub use chains::ChainShape;
pub use connection::Connection;
pub use error::FrontEndError;
pub use handshake::Negotiated;
pub use header::{VirtioNetHeader, feature};
pub use options::{MessageOrder, Options};
pub use raw::RawDriver;
pub use receive::{Receive, Received, Taker};
pub use transmit::{BURST, Transmit};

use doorbell::Doorbell;
use handshake::RingDescription;
use memory::{Arena, GuestMemory};
use position::Position;
use ring::Ring;
use split::RingError;

/// How often a socket that is not there yet is tried.
const CONNECT_INTERVAL: Duration = Duration::from_millis(20);

/// Queue pairs at most: two rings each must stay below the 8 bits of ring index in SET_VRING_KICK.
const QUEUE_PAIRS_MAX: u16 = 128;

/// A receive and a transmit queue.
#[derive(Debug)]
pub struct QueuePair {
    /// Towards the guest.
    pub receive: Receive,
    /// From the guest.
    pub transmit: Transmit,
}

impl QueuePair {
    /// A pair laid out in `memory`, without a back-end: `features` says what was agreed.
    ///
    /// # Errors
    /// [`FrontEndError::MemoryExhausted`], or options that contradict each other.
    pub fn new(
        memory: &Arc<GuestMemory>,
        arena: &mut Arena,
        options: &Options,
        features: u64,
    ) -> Result<Self, FrontEndError> {
        let header_bytes = header::header_bytes(features);
        let size = options.ring_size;
        let fits = size.is_power_of_two() || features & feature::RING_PACKED != 0 && size != 0;
        if !fits || size > layout::RING_SIZE_MAX {
            return Err(FrontEndError::Options(format!(
                "a ring of {size}: up to {}, a power of two unless it is packed",
                layout::RING_SIZE_MAX
            )));
        }
        let ring = |arena: &mut Arena| {
            Ring::place(memory, arena, options, features)
                .ok_or(FrontEndError::MemoryExhausted { bytes: usize::from(size) * layout::DESCRIPTOR_BYTES })
        };
        let (rx_ring, tx_ring) = (ring(arena)?, ring(arena)?);
        let mergeable = features & feature::MRG_RXBUF != 0;
        let (rx_bytes, tx_bytes) = (options.rx_buffer_bytes, options.tx_buffer_bytes);
        let rx_doorbell = Doorbell::new()?;
        let mut receive =
            Receive::new(rx_ring, arena, options.rx_chain, header_bytes, rx_bytes, mergeable, rx_doorbell)?;
        let transmit = Transmit::new(tx_ring, arena, options.tx_chain, header_bytes, tx_bytes, Doorbell::new()?)?;
        if options.fill_receive {
            receive.fill();
        }
        Ok(Self { receive, transmit })
    }
}

/// A virtio-net driver connected to a vhost-user back-end.
#[derive(Debug)]
pub struct FrontEnd {
    connection: Connection,
    options: Options,
    negotiated: Negotiated,
    memory: Arc<GuestMemory>,
    arena: Arena,
    pairs: Vec<QueuePair>,
    bases: Vec<u16>,
    running: bool,
}

impl FrontEnd {
    /// Connects to a back-end that listens at `path` (waiting for it to appear) and starts the device.
    ///
    /// # Errors
    /// No connection within the timeout, or what [`Self::over`] says.
    pub fn connect(path: &Path, options: Options) -> Result<Self, FrontEndError> {
        Self::over(connect(path, options.timeout)?, options)
    }

    /// Listens at `path`, replacing a socket left there, until one back-end connects, and starts the device.
    ///
    /// # Errors
    /// No connection within the timeout, or what [`Self::over`] says.
    pub fn listen(path: &Path, options: Options) -> Result<Self, FrontEndError> {
        match fs::remove_file(path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(FrontEndError::System { doing: "removing an old socket", source });
            }
            _ => (),
        }
        let listener = UnixListener::bind(path).map_err(FrontEndError::system("listening for the back-end"))?;
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&listener), PollFlags::POLLIN)];
        let timeout = PollTimeout::try_from(options.timeout).unwrap_or(PollTimeout::MAX);
        if poll(&mut fds, timeout).map_err(FrontEndError::system("waiting for the back-end"))? == 0 {
            return Err(FrontEndError::Connect { path: path.into(), source: io::ErrorKind::TimedOut.into() });
        }
        let (stream, _) = listener.accept().map_err(FrontEndError::system("accepting the back-end"))?;
        Self::over(stream, options)
    }

    /// Negotiates over a connected socket and starts the device.
    ///
    /// # Errors
    /// A back-end that refuses, closes or breaks the protocol; options that contradict each other.
    pub fn over(stream: UnixStream, options: Options) -> Result<Self, FrontEndError> {
        let mut front_end = Self::prepare(stream, options)?;
        front_end.start()?;
        Ok(front_end)
    }

    /// Negotiates and lays out the rings, but does not start: for tests that have something to spoil before.
    ///
    /// # Errors
    /// As [`Self::over`].
    pub fn prepare(stream: UnixStream, options: Options) -> Result<Self, FrontEndError> {
        if !(1..=QUEUE_PAIRS_MAX).contains(&options.queue_pairs) {
            return Err(FrontEndError::Options(format!("{} queue pairs", options.queue_pairs)));
        }
        let mut connection = Connection::new(stream, options.timeout)?;
        let negotiated = handshake::negotiate(&mut connection, &options)?;
        let indirect = options.rx_chain.indirect || options.tx_chain.indirect;
        if indirect && negotiated.features & feature::INDIRECT_DESC == 0 {
            return Err(FrontEndError::Options("indirect chains, but INDIRECT_DESC was not negotiated".into()));
        }
        let make = if options.seal { GuestMemory::new } else { GuestMemory::unsealed };
        let memory =
            make(options.memory_bytes(), options.regions).map_err(FrontEndError::system("making guest memory"))?;
        let memory = Arc::new(memory);
        let mut arena = Arena::new(&memory);
        let pairs = (0..options.queue_pairs)
            .map(|_| QueuePair::new(&memory, &mut arena, &options, negotiated.features))
            .collect::<Result<Vec<_>, _>>()?;
        let base = if negotiated.features & feature::RING_PACKED != 0 {
            Position::after_start(options.ring_base, options.ring_size).bits()
        } else {
            options.ring_base
        };
        let bases = vec![base; 2 * pairs.len()];
        Ok(Self { connection, options, negotiated, memory, arena, pairs, bases, running: false })
    }

    /// Tells the back-end of memory and rings, and enables them; also again after [`Self::stop`].
    ///
    /// # Errors
    /// As [`Self::over`].
    pub fn start(&mut self) -> Result<(), FrontEndError> {
        let doorbells = self.pairs.iter().flat_map(|pair| {
            [
                (pair.receive.ring().layout(), pair.receive.doorbell()),
                (pair.transmit.ring().layout(), pair.transmit.doorbell()),
            ]
        });
        let rings: Vec<_> = doorbells
            .zip(&self.bases)
            .map(|((layout, doorbell), base)| RingDescription { layout, base: *base, doorbell })
            .collect();
        handshake::start(&mut self.connection, &self.options, &self.negotiated, &self.memory, &rings)?;
        self.running = true;
        Ok(())
    }

    /// Goes on after the back-end was lost, with another one at `path` (waiting for it to appear), as QEMU does: features,
    /// memory and rings are the same. A split ring's base is read from its used ring; a packed ring has no such thing in
    /// memory, so the base is that of the last orderly start or stop (hw/virtio/virtio.c,
    /// virtio_queue_packed_restore_last_avail_idx), however long ago that was.
    ///
    /// # Errors
    /// As [`Self::connect`]; a back-end that offers less than the one before.
    pub fn reconnect(&mut self, path: &Path) -> Result<(), FrontEndError> {
        self.running = false;
        self.connection = Connection::new(connect(path, self.options.timeout)?, self.options.timeout)?;
        let before = self.negotiated;
        self.negotiated = handshake::negotiate(&mut self.connection, &self.options)?;
        let missing = before.features & !self.negotiated.features;
        if missing != 0 {
            return Err(FrontEndError::MissingFeatures { offered: self.negotiated.features, missing });
        }
        let rings = self.pairs.iter().flat_map(|pair| [pair.receive.ring(), pair.transmit.ring()]);
        for (base, ring) in self.bases.iter_mut().zip(rings) {
            if !ring.is_packed() {
                *base = self.memory.load_u16(ring.layout().used_index(), Ordering::Acquire);
            }
        }
        self.start()
    }

    /// Disables the rings and returns each one's index, receive before transmit: what the device would take next (of
    /// packed rings as [`Position::bits`]).
    /// What it has finished can still be received.
    ///
    /// # Errors
    /// As [`Self::over`].
    pub fn stop(&mut self) -> Result<Vec<u16>, FrontEndError> {
        self.running = false;
        self.bases = handshake::stop(&mut self.connection, &self.negotiated, 2 * self.pairs.len())?;
        Ok(self.bases.clone())
    }

    /// What was agreed upon.
    pub fn negotiated(&self) -> Negotiated {
        self.negotiated
    }

    /// Guest memory.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The socket, for messages of one's own.
    pub fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// The queue pairs; the slice can be split between threads.
    pub fn pairs(&mut self) -> &mut [QueuePair] {
        &mut self.pairs
    }

    pub(crate) fn first(&self) -> &QueuePair {
        &self.pairs[0]
    }

    /// Sends frames on the first pair until its ring is full; returns how many went in.
    ///
    /// # Errors
    /// A frame that is too long, or a broken ring.
    pub fn send_burst(&mut self, frames: &[&[u8]]) -> Result<usize, FrontEndError> {
        self.pairs[0].transmit.send_burst(frames)
    }

    /// Hands what has arrived on the first pair, up to a burst, to `sink`; returns how many.
    ///
    /// # Errors
    /// A broken ring.
    pub fn receive_burst(&mut self, sink: impl FnMut(&[u8], VirtioNetHeader)) -> Result<usize, RingError> {
        self.pairs[0].receive.receive_burst(sink)
    }

    /// Writes frames into guest memory for [`Transmit::repost_burst`] of pair `pair`.
    ///
    /// # Errors
    /// [`FrontEndError::MemoryExhausted`].
    pub fn load_templates(
        &mut self,
        pair: usize,
        frames: &[Vec<u8>],
        header: VirtioNetHeader,
    ) -> Result<(), FrontEndError> {
        self.pairs[pair].transmit.load_templates(&mut self.arena, frames, header)
    }

    /// A handle for mischief on ring `index`: even receive, odd transmit.
    pub fn raw(&self, index: usize) -> RawDriver {
        let pair = &self.pairs[index / 2];
        let (ring, doorbell) = match index % 2 {
            0 => (pair.receive.ring(), pair.receive.doorbell()),
            _ => (pair.transmit.ring(), pair.transmit.doorbell()),
        };
        let (memory, layout, doorbell) = (self.memory.clone(), ring.layout(), doorbell.clone());
        match ring {
            Ring::Split(_) => RawDriver::new(memory, layout, doorbell),
            Ring::Packed(ring) => RawDriver::packed_at(memory, layout, doorbell, ring.next_offer()),
        }
    }

    /// `bytes` of guest memory that neither ring nor buffer uses, for mischief: its offset.
    ///
    /// # Errors
    /// [`FrontEndError::MemoryExhausted`].
    pub fn take_memory(&mut self, bytes: usize, align: usize) -> Result<usize, FrontEndError> {
        self.arena.take(bytes, align).ok_or(FrontEndError::MemoryExhausted { bytes })
    }
}

impl Drop for FrontEnd {
    /// A back-end should not be left with rings in memory that goes away: stop them if that is still possible.
    fn drop(&mut self) {
        if self.running {
            let _ = self.stop();
        }
    }
}

fn connect(path: &Path, timeout: Duration) -> Result<UnixStream, FrontEndError> {
    let deadline = Instant::now() + timeout;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(stream),
            Err(error) if not_there_yet(&error) && Instant::now() < deadline => thread::sleep(CONNECT_INTERVAL),
            Err(source) => return Err(FrontEndError::Connect { path: path.into(), source }),
        }
    }
}

fn not_there_yet(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}
