//! A tap device as an end: the kernel's own way to a VM, as QEMU uses it without vhost-net.
//!
//! One write(2) or read(2) per frame, each with a virtio-net header (IFF_VNET_HDR): a tap has no call for several. Both run on the
//! caller's core and copy there, which a vhost-net thread would do on a core of its own. What the kernel does with a frame
//! in between is run by write(2) too, unless receive packet steering (RPS) sends it to another CPU. Limits: one queue.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;

use super::end::End;
use super::frame::SEGMENTED_BYTES_MAX;
use super::sink::Sink;
use crate::front_end::header::HEADER_BYTES_MAX;
use crate::front_end::{BURST, FrontEndError, Received, VirtioNetHeader};

/// As long as VIRTIO's with num_buffers, so that both ends of a comparison move the same bytes.
static HEADER_BYTES: libc::c_int = HEADER_BYTES_MAX as libc::c_int;
/// Frames that wait to be read: the device's default txqueuelen is 1000, of tap devices 500.
const QUEUE_FRAMES: u16 = 500;

/// The receiveq that a vhost-user guest would have in the tap's place: as many frames as it holds are under way at most
/// ([`End::frames_held`]), so that all devices of a comparison are measured with the same.
#[derive(Clone, Copy, Debug)]
pub struct Receiveq {
    /// Buffers.
    pub buffers: u16,
    /// Of each, header included; a frame takes several.
    pub buffer_bytes: usize,
}

impl Receiveq {
    fn frames_held(self, bytes: usize) -> u16 {
        let buffers = (HEADER_BYTES_MAX + bytes).div_ceil(self.buffer_bytes);
        ((usize::from(self.buffers) / buffers) as u16).min(QUEUE_FRAMES)
    }
}

/// One tap device, open.
#[derive(Debug)]
pub struct Tap {
    file: File,
    receiveq: Receiveq,
    /// With their headers.
    templates: Vec<Vec<u8>>,
    next_template: usize,
    sent: u64,
    /// The frame that was read last, with its header.
    buffer: Box<[u8]>,
}

impl Tap {
    /// Opens tap `interface` of the calling thread's network namespace, or makes it. With `offloads` it gives out
    /// frames that are still to be segmented and checksums that are still to be made. It stands in for a guest with that `receiveq`.
    ///
    /// # Errors
    /// Without root's rights, or when the name is taken by something else.
    ///
    /// # Panics
    /// If the name has 16 bytes or more.
    pub fn open(interface: &str, offloads: bool, receiveq: Receiveq) -> Result<Self, FrontEndError> {
        let opening = FrontEndError::system("opening /dev/net/tun");
        let file = File::options()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(opening)?;
        let mut request = libc::ifreq {
            ifr_name: [0; libc::IFNAMSIZ],
            ifr_ifru: libc::__c_anonymous_ifr_ifru {
                ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short,
            },
        };
        assert!(interface.len() < libc::IFNAMSIZ, "{interface}: too long for an interface's name");
        for (to, from) in request.ifr_name.iter_mut().zip(interface.bytes()) {
            *to = from.cast_signed();
        }
        let offloads = if offloads { libc::TUN_F_CSUM | libc::TUN_F_TSO4 } else { 0 };
        let fd = file.as_raw_fd();
        // SAFETY: each call gets what linux/if_tun.h says: an ifreq, a pointer to an int, a number; all outlive the call.
        // JUSTIFICATION: nix has no safe names for them.
        let results = unsafe {
            [
                libc::ioctl(fd, libc::TUNSETIFF, &raw const request),
                libc::ioctl(fd, libc::TUNSETVNETHDRSZ, &raw const HEADER_BYTES),
                libc::ioctl(fd, libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)),
            ]
        };
        if results.iter().any(|result| *result < 0) {
            return Err(FrontEndError::system("setting up a tap")(io::Error::last_os_error()));
        }
        let buffer = vec![0; HEADER_BYTES_MAX + SEGMENTED_BYTES_MAX].into();
        Ok(Self { file, receiveq, templates: Vec::new(), next_template: 0, sent: 0, buffer })
    }

    #[inline]
    fn receive(&mut self, mut each: impl FnMut(Received<'_>)) -> Result<usize, FrontEndError> {
        for count in 0..usize::from(BURST) {
            let bytes = match self.file.read(&mut self.buffer) {
                Ok(bytes) => bytes,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(count),
                Err(error) => return Err(FrontEndError::system("reading from a tap")(error)),
            };
            let (header, frame) = self.buffer[..bytes].split_at_mut(HEADER_BYTES_MAX);
            let header = header.try_into().expect("the kernel writes the whole header");
            each(Received::private(frame, VirtioNetHeader::from_bytes(header)));
        }
        Ok(BURST.into())
    }
}

/// False if there was no room.
fn write(mut file: &File, frame: &[u8]) -> Result<bool, FrontEndError> {
    match file.write(frame) {
        Ok(_) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        Err(error) => Err(FrontEndError::system("writing to a tap")(error)),
    }
}

fn with_header(header: VirtioNetHeader, frame: &[u8]) -> Vec<u8> {
    [&header.to_bytes(), frame].concat()
}

impl End for Tap {
    fn load(&mut self, frames: &[Vec<u8>], header: VirtioNetHeader) -> Result<(), FrontEndError> {
        self.templates = frames.iter().map(|frame| with_header(header, frame)).collect();
        self.next_template = 0;
        Ok(())
    }

    fn repost(&mut self, most: u16) -> Result<u16, FrontEndError> {
        for count in 0..most {
            if !write(&self.file, &self.templates[self.next_template])? {
                return Ok(count);
            }
            self.next_template = (self.next_template + 1) % self.templates.len();
            self.sent += 1;
        }
        Ok(most)
    }

    fn next_template(&self) -> usize {
        self.next_template
    }

    fn skip_to(&mut self, index: usize) {
        assert!(index < self.templates.len(), "frame {index} of {}", self.templates.len());
        self.next_template = index;
    }

    fn sent(&self) -> u64 {
        self.sent
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), FrontEndError> {
        self.sent += u64::from(write(&self.file, &with_header(VirtioNetHeader::default(), frame))?);
        Ok(())
    }

    fn receive_into(&mut self, sink: &mut Sink<'_>) -> Result<usize, FrontEndError> {
        self.receive(|frame| {
            sink.take(frame);
        })
    }

    fn receive_each(&mut self, each: &mut dyn FnMut(Received<'_>)) -> Result<usize, FrontEndError> {
        self.receive(each)
    }

    fn frames_held(&self, bytes: usize) -> u16 {
        self.receiveq.frames_held(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::traffic::frame::SEGMENTED_BYTES;

    #[test]
    fn a_tap_holds_what_a_guests_receiveq_does() {
        let receiveq = |buffers| Receiveq { buffers, buffer_bytes: 4096 };
        assert_eq!(receiveq(1024).frames_held(SEGMENTED_BYTES), 64);
        assert_eq!(receiveq(1024).frames_held(64), QUEUE_FRAMES, "its own queue is shorter");
    }
}
