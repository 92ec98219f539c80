//! The sending half of the `socket` driver: packets are written one by one and sent by one system call.

use std::io::IoSlice;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;

use dreamwire_vhost::ring::BURST;
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};
use smoltcp::wire::{IpAddress, IpProtocol, checksum};
use socket2::Socket;

use super::{Inner, SLOT_BYTES};
use crate::drop_reason::DropReason;
use crate::snapshot::NetworkId;
use crate::vxlan;

const UDP_HEADER_BYTES: usize = 8;
const OUTER_BYTES: usize = UDP_HEADER_BYTES + vxlan::HEADER_BYTES;

/// The payload of an IPv4 packet at most (RFC 791 §3.1), and of an IPv6 packet with room to spare. What does not fit is
/// refused, not cut.
const PACKET_BYTES_MAX: usize = 65535 - 20;
const _: () = assert!(SLOT_BYTES >= PACKET_BYTES_MAX);

/// The socket and the packets that wait for it.
#[derive(Debug)]
pub(crate) struct SocketTx {
    socket: Socket,
    source: IpAddr,
    udp_port: u16,
    headers: MultiHeaders<SockaddrStorage>,
    buffers: Box<[u8]>,
    lengths: [usize; BURST],
    destinations: [Option<SockaddrStorage>; BURST],
    origins: [(NetworkId, u32); BURST],
    staged: usize,
    /// Where frames go, and the VXLAN header in front of them.
    aim: (IpAddr, [u8; vxlan::HEADER_BYTES]),
}

impl SocketTx {
    pub(super) fn new(socket: Socket, source: IpAddr, udp_port: u16) -> Self {
        Self {
            socket,
            source,
            udp_port,
            headers: MultiHeaders::preallocate(BURST, None),
            buffers: vec![0; BURST * SLOT_BYTES].into_boxed_slice(),
            lengths: [0; BURST],
            destinations: [const { None }; BURST],
            origins: [(NetworkId(0), 0); BURST],
            staged: 0,
            aim: (source, [0; vxlan::HEADER_BYTES]),
        }
    }

    /// Whether [`SocketTx::flush`] must come before the next [`SocketTx::stage`].
    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.staged == BURST
    }

    /// See [`super::Tx::aim`].
    #[inline]
    pub(super) fn aim(&mut self, vtep: IpAddr, tunnel: vxlan::Header) -> Result<(), DropReason> {
        self.aim = (vtep, vxlan::header(tunnel));
        if vtep.is_ipv6() == self.source.is_ipv6() { Ok(()) } else { Err(DropReason::UnderlayRefused) }
    }

    /// Writes one packet: outer UDP and VXLAN headers, then the inner frame. The one copy on the way out.
    #[inline]
    pub(crate) fn stage(&mut self, inner: Inner<'_>) -> Result<(), DropReason> {
        let Inner { network, flow_hash, header, payload } = inner;
        let (vtep, tunnel) = self.aim;
        let inner_bytes = inner.bytes();
        let bytes = OUTER_BYTES + inner_bytes;
        if bytes > PACKET_BYTES_MAX {
            return Err(DropReason::UnderlayRefused);
        }
        let slot = self.staged;
        let packet = &mut self.buffers[slot * SLOT_BYTES..][..bytes];
        packet[0..2].copy_from_slice(&vxlan::source_port(flow_hash).to_be_bytes());
        packet[2..4].copy_from_slice(&self.udp_port.to_be_bytes());
        packet[4..6].copy_from_slice(&(bytes as u16).to_be_bytes());
        packet[6..8].copy_from_slice(&[0, 0]);
        packet[UDP_HEADER_BYTES..OUTER_BYTES].copy_from_slice(&tunnel);
        let (private, tail) = packet[OUTER_BYTES..].split_at_mut(header.len());
        private.copy_from_slice(header);
        payload.copy_out(tail);
        if vtep.is_ipv6() {
            let sum = udp_checksum(self.source, vtep, packet);
            packet[6..8].copy_from_slice(&sum.to_be_bytes());
        }
        self.lengths[slot] = bytes;
        // Port 0: for a raw socket the field means the protocol, raw(7).
        self.destinations[slot] = Some(SockaddrStorage::from(SocketAddr::new(vtep, 0)));
        self.origins[slot] = (network, inner_bytes as u32);
        self.staged += 1;
        Ok(())
    }

    /// Sends everything staged. Tells `done` of each packet's network, inner bytes and fate; returns the number of
    /// system calls.
    #[inline]
    pub(crate) fn flush(&mut self, mut done: impl FnMut(NetworkId, u32, Result<(), DropReason>)) -> u64 {
        let mut calls = 0;
        let mut next = 0;
        while next < self.staged {
            calls += 1;
            match self.send_from(next) {
                Ok(sent) => {
                    for &(network, bytes) in &self.origins[next..next + sent] {
                        done(network, bytes, Ok(()));
                    }
                    next += sent;
                }
                Err(Errno::EAGAIN | Errno::ENOBUFS | Errno::ENOMEM) => {
                    // No room for the others either: trying each would cost a system call apiece.
                    for &(network, bytes) in &self.origins[next..self.staged] {
                        done(network, bytes, Err(DropReason::UnderlayFull));
                    }
                    next = self.staged;
                }
                Err(_) => {
                    // sendmmsg(2) fails for the first packet only: that one is dropped, the rest is tried again.
                    let (network, bytes) = self.origins[next];
                    done(network, bytes, Err(DropReason::UnderlayRefused));
                    next += 1;
                }
            }
        }
        self.staged = 0;
        calls
    }

    /// Sends the packets from `first` on; returns how many the kernel took, at least one.
    fn send_from(&mut self, first: usize) -> nix::Result<usize> {
        let count = self.staged - first;
        let (buffers, lengths) = (&self.buffers, &self.lengths);
        let slices: [[IoSlice<'_>; 1]; BURST] = std::array::from_fn(|index| {
            let slot = (first + index).min(BURST - 1);
            [IoSlice::new(&buffers[slot * SLOT_BYTES..][..lengths[slot]])]
        });
        let destinations = &self.destinations[first..self.staged];
        let fd = self.socket.as_raw_fd();
        let results = sendmmsg(fd, &mut self.headers, &slices[..count], destinations, [], MsgFlags::MSG_DONTWAIT)?;
        Ok(results.count().max(1))
    }
}

/// RFC 768 and RFC 8200 §8.1, over a packet whose checksum field is zero. Never zero: that means "none".
fn udp_checksum(source: IpAddr, destination: IpAddr, packet: &[u8]) -> u16 {
    let (source, destination) = (IpAddress::from(source), IpAddress::from(destination));
    let pseudo = checksum::pseudo_header(&source, &destination, IpProtocol::Udp, packet.len() as u32);
    match !checksum::combine(&[pseudo, checksum::data(packet)]) {
        0 => 0xffff,
        sum => sum,
    }
}

#[cfg(test)]
mod tests {
    use dreamwire_vhost::memory::Payload;
    use socket2::{Domain, Type};

    use super::*;
    use crate::vni::Vni;

    #[test]
    fn a_frame_too_long_for_ip_is_refused_not_cut() {
        let mut tx =
            SocketTx::new(Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap(), "127.0.0.1".parse().unwrap(), 4789);
        let tail = vec![0; 65500];
        let vni = Vni::new(1).unwrap();
        assert_eq!(tx.aim("::2".parse().unwrap(), vni.into()), Err(DropReason::UnderlayRefused));
        assert_eq!(tx.aim("127.0.0.2".parse().unwrap(), vni.into()), Ok(()));
        let payload = Payload::private(&tail);
        let staged = tx.stage(Inner { network: NetworkId(0), flow_hash: 0, header: &[0; 128], payload });
        assert_eq!(staged, Err(DropReason::UnderlayRefused));
    }
}
