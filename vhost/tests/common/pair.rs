//! A hostile ring and a sound one in the same memory, of either layout: what a fault has to do to the one, and must not do
//! to the other.

use dreamwire_vhost::eventfd::EventFd;
use dreamwire_vhost::frame::{FrameFault, NetHeader};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{Ring, RingFault, RingSetup, SendError};

use super::packed::{PackedGuestRing, Piece};
use super::{F_INDIRECT, F_VERSION_1, Guest, GuestRing, WRITE, frame_bytes, frames};

pub(crate) const FEATURES: u64 = F_VERSION_1 | F_INDIRECT;
pub(crate) const SIZE: u16 = 256;

/// Two regions that are neighbours for the guest, then a hole, then a third.
pub(crate) const LEFT_END: u64 = 0x10_0000;
pub(crate) const RIGHT_END: u64 = 0x20_0000;
pub(crate) const BUFFER: u64 = 0x4_0000;
pub(crate) const TABLE: u64 = 0x3_0000;
const OTHER_FRAME: &[u8] = b"a frame of the ring beside it";
const OTHER_BUFFER: u64 = 0x5_0000;

/// What these tests ask of a driver, whatever its ring's layout.
pub(crate) trait Driver: Sized {
    /// SET_VRING_BASE's number at the start.
    const START: u16;
    fn at(guest: &Guest, base: u64, size: u16) -> Self;
    fn setup_with(&self, features: u64) -> RingSetup;
    /// Posts one buffer as a chain, the ring's first.
    fn post_first(&mut self, piece: Piece);
    /// The ring's first used chain of one descriptor, if it is there: id or head, and length.
    fn first_used(&self) -> Option<(u16, u32)>;
    /// Where the device has to stand when it has given back all that was posted.
    fn end(&self) -> u16;
}

impl Driver for GuestRing {
    const START: u16 = 0;

    fn at(guest: &Guest, base: u64, size: u16) -> Self {
        Self::new(guest, base, size, 0)
    }

    fn setup_with(&self, features: u64) -> RingSetup {
        self.setup(features)
    }

    fn post_first(&mut self, (address, bytes, flags): Piece) {
        self.descriptor(0, address, bytes, flags, 0);
        self.post(0);
    }

    fn first_used(&self) -> Option<(u16, u32)> {
        (self.used_index() != 0).then(|| {
            let (head, bytes) = self.used_entry(0);
            (head as u16, bytes)
        })
    }

    fn end(&self) -> u16 {
        self.available_index
    }
}

impl Driver for PackedGuestRing {
    const START: u16 = 0x8000;

    fn at(guest: &Guest, base: u64, size: u16) -> Self {
        Self::new(guest, base, size, 0)
    }

    fn setup_with(&self, features: u64) -> RingSetup {
        self.setup(features)
    }

    fn post_first(&mut self, piece: Piece) {
        self.post(0, &[piece]);
    }

    fn first_used(&self) -> Option<(u16, u32)> {
        self.clone().reap(|_| 1)
    }

    fn end(&self) -> u16 {
        self.next.bits()
    }
}

/// A hostile ring and a sound one in the same memory.
pub(crate) struct Pair<D> {
    pub(crate) guest: Guest,
    pub(crate) ring: D,
    pub(crate) device: Ring,
    error: EventFd,
    pub(crate) other: D,
    pub(crate) other_device: Ring,
}

impl<D: Driver> Pair<D> {
    pub(crate) fn new(features: u64) -> Self {
        Self::with_size(features, SIZE)
    }

    pub(crate) fn with_size(features: u64, size: u16) -> Self {
        let guest = Guest::new(&[(0, LEFT_END as usize), (LEFT_END, 0x10_0000), (0x40_0000, 0x1000)]);
        let (ring, other) = (D::at(&guest, 0, size), D::at(&guest, 0x2_0000, SIZE));
        let error = EventFd::new().expect("a descriptor");
        let mut setup = ring.setup_with(features);
        setup.error = Some(error.try_clone().expect("a descriptor"));
        let device = Ring::new(setup).expect("a sound ring");
        let other_device = Ring::new(other.setup_with(features)).expect("a sound ring");
        Self { guest, ring, device, error, other, other_device }
    }

    /// Stopped at the start, with nothing given back.
    #[track_caller]
    fn assert_stopped(&mut self, fault: RingFault) {
        assert_eq!(self.device.fault(), Some(fault));
        assert!(self.error.drain(), "the error eventfd is signalled");
        assert_eq!(self.device.receive(&mut frames()), Err(fault), "it stays stopped");
        assert!(!self.device.complete(), "nothing to tell the guest");
        assert!(!self.device.enable_kicks());
        assert_eq!((self.device.next_avail(), self.device.next_used()), (D::START, D::START));
        assert_eq!(self.ring.first_used(), None, "nothing was used");
        assert!(!self.error.drain(), "once");
    }

    /// The guest's transmitq is found to have `fault`, and the one beside it works.
    #[track_caller]
    pub(crate) fn assert_receive_fault(mut self, fault: RingFault) {
        assert_eq!(self.device.receive(&mut frames()), Err(fault));
        self.assert_stopped(fault);
        self.guest.write(OTHER_BUFFER, &[0; 12]);
        self.guest.write(OTHER_BUFFER + 12, OTHER_FRAME);
        self.other.post_first((OTHER_BUFFER, 12 + OTHER_FRAME.len() as u32, 0));
        let mut frames = frames();
        assert_eq!(self.other_device.receive(&mut frames), Ok(1));
        assert_eq!(frame_bytes(&self.other_device, &frames[0]), OTHER_FRAME);
    }

    /// The guest's receiveq is found to have `fault`, and the one beside it works.
    #[track_caller]
    pub(crate) fn assert_send_fault(mut self, fault: RingFault) {
        assert_eq!(send(&mut self.device, OTHER_FRAME), Err(SendError::Fault(fault)));
        self.assert_stopped(fault);
        assert_eq!(send(&mut self.device, OTHER_FRAME), Err(SendError::Fault(fault)), "it stays stopped");
        self.other.post_first((OTHER_BUFFER, 2048, WRITE));
        assert_eq!(send(&mut self.other_device, OTHER_FRAME), Ok(()));
        self.other_device.flush();
        assert_eq!(self.other.first_used(), Some((0, 12 + OTHER_FRAME.len() as u32)));
        assert_eq!(self.guest.read(OTHER_BUFFER + 12, OTHER_FRAME.len()), OTHER_FRAME);
    }

    #[track_caller]
    pub(crate) fn assert_fault(self, receive: bool, fault: RingFault) {
        if receive { self.assert_receive_fault(fault) } else { self.assert_send_fault(fault) }
    }

    /// The posted chain is taken as one frame with this fault; the ring goes on, the chain is given back.
    #[track_caller]
    pub(crate) fn assert_frame_fault(mut self, fault: FrameFault) {
        let mut frames = frames();
        assert_eq!(self.device.receive(&mut frames), Ok(1));
        assert_eq!(frames[0].fault, Some(fault));
        assert_eq!(frame_bytes(&self.device, &frames[0]), b"");
        self.device.complete();
        assert_eq!(self.ring.first_used(), Some((0, 0)));
        assert_eq!(self.device.fault(), None);
        assert_eq!(self.device.next_avail(), self.ring.end());
    }
}

pub(crate) fn send(ring: &mut Ring, frame: &[u8]) -> Result<(), SendError> {
    ring.send(NetHeader::default(), frame, Payload::EMPTY)
}
