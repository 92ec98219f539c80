//! The receiving half of the `socket` driver: one system call takes up to a burst of datagrams.

use std::io::IoSliceMut;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use dreamwire_vhost::frame::RawFrame;
use dreamwire_vhost::ring::BURST;
use nix::sys::socket::{AddressFamily, MsgFlags, MultiHeaders, SockaddrLike, SockaddrStorage, recvmmsg};
use socket2::Socket;

use super::{Arrival, SLOT_BYTES, copy_header};
use crate::drop_reason::DropReason;
use crate::vxlan;

/// The socket and its buffers.
#[derive(Debug)]
pub(crate) struct SocketRx {
    socket: Socket,
    headers: MultiHeaders<SockaddrStorage>,
    buffers: Box<[u8]>,
    received: [(usize, Option<IpAddr>); BURST],
}

impl SocketRx {
    pub(super) fn new(socket: Socket) -> Self {
        Self {
            socket,
            headers: MultiHeaders::preallocate(BURST, None),
            buffers: vec![0; BURST * SLOT_BYTES].into_boxed_slice(),
            received: [(0, None); BURST],
        }
    }

    /// Receives up to a burst of datagrams; returns how many. Errors other than "nothing there" end the burst only.
    #[inline]
    pub(crate) fn receive(&mut self) -> usize {
        let mut chunks = self.buffers.chunks_exact_mut(SLOT_BYTES);
        let mut slices: [[IoSliceMut<'_>; 1]; BURST] =
            std::array::from_fn(|_| [IoSliceMut::new(chunks.next().expect("a slot for each datagram"))]);
        let fd = self.socket.as_raw_fd();
        let Ok(results) = recvmmsg(fd, &mut self.headers, &mut slices, MsgFlags::MSG_DONTWAIT, None) else {
            return 0;
        };
        let mut count = 0;
        for (message, slot) in results.zip(&mut self.received) {
            *slot = (message.bytes, message.address.as_ref().and_then(ip_of));
            count += 1;
        }
        count
    }

    /// Datagram `index` of the last burst and the address it came from.
    #[inline]
    pub(crate) fn datagram(&self, index: usize) -> (&[u8], Option<IpAddr>) {
        let (bytes, source) = self.received[index];
        (&self.buffers[index * SLOT_BYTES..][..bytes], source)
    }

    /// Writes the frame in datagram `slot` to `frame`.
    #[inline]
    pub(super) fn open(&self, slot: usize, frame: &mut RawFrame) -> Arrival {
        let (datagram, source) = self.datagram(slot);
        let (Some((tunnel, inner)), Some(vtep)) = (vxlan::decapsulate(datagram), source) else {
            return Arrival::Drop(DropReason::BadEncapsulation);
        };
        copy_header(inner, frame);
        Arrival::Inner(tunnel, vtep)
    }

    /// For epoll.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn ip_of(address: &SockaddrStorage) -> Option<IpAddr> {
    match address.family()? {
        AddressFamily::Inet => address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip())),
        AddressFamily::Inet6 => address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())),
        _ => None,
    }
}
