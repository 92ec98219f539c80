//! The `socket` driver: outer packets pass through the kernel.
//!
//! Receiving is a UDP socket bound to the VTEP's address and port; the kernel checks the outer UDP checksum (zero is
//! accepted: RFC 7348 §4.1.1 for IPv4, RFC 6935 for IPv6). Sending is a raw IP socket, because every flow has an outer
//! source port of its own and a UDP socket has one; the UDP header is written here, the kernel routes and fragments. The
//! outer checksum is zero over IPv4 as RFC 7348 recommends. Over IPv6 it is computed, since receivers take zero only
//! where they were told to (RFC 6935 §5), the Linux vxlan device among them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::RcvBufForce;
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use super::sockopt::{IpMtuDiscover, Ipv6MtuDiscover, UdpNoCheck6Rx};
use super::{KERNEL_BUFFER_BYTES, SocketRx, SocketTx};
use crate::counters::UnderlayCounters;

/// An underlay's two sockets, open and bound.
#[derive(Debug)]
pub struct SocketUnderlay {
    receives: Socket,
    sends: Socket,
    address: IpAddr,
    port: u16,
    counters: Arc<UnderlayCounters>,
}

impl SocketUnderlay {
    /// Opens both sockets at `address`, this host's VTEP, and UDP `port`; bound to network device `device` if given.
    ///
    /// Errors: the address is not on this host, the port is in use, the device is missing, or the process may not open
    /// raw sockets (CAP_NET_RAW).
    pub fn bind(address: IpAddr, port: u16, device: Option<&str>, counters: Arc<UnderlayCounters>) -> io::Result<Self> {
        let receives = receiving_socket(address, port, device)?;
        let sends = sending_socket(address, device)?;
        Ok(Self { receives, sends, address, port, counters })
    }

    /// Where its packets are counted.
    pub fn counters(&self) -> &Arc<UnderlayCounters> {
        &self.counters
    }

    /// The halves, with their buffers; they stay on the thread that asks for them.
    pub(crate) fn into_halves(self) -> (SocketRx, SocketTx) {
        (SocketRx::new(self.receives), SocketTx::new(self.sends, self.address, self.port))
    }
}

fn receiving_socket(address: IpAddr, port: u16, device: Option<&str>) -> io::Result<Socket> {
    let socket = Socket::new(domain(address), Type::DGRAM, Some(Protocol::UDP))?;
    if let Some(device) = device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        setsockopt(&socket, UdpNoCheck6Rx, &true)?;
    }
    socket.set_nonblocking(true)?;
    if setsockopt(&socket, RcvBufForce, &KERNEL_BUFFER_BYTES).is_err() {
        // Without CAP_NET_ADMIN: what `net.core.rmem_max` allows.
        socket.set_recv_buffer_size(KERNEL_BUFFER_BYTES)?;
    }
    socket.bind(&SocketAddr::new(address, port).into())?;
    Ok(socket)
}

fn sending_socket(address: IpAddr, device: Option<&str>) -> io::Result<Socket> {
    let socket = Socket::new(domain(address), Type::RAW, Some(Protocol::UDP))?;
    // A raw socket receives a copy of every UDP packet to this host. This one wants none: the filter accepts nothing, and
    // with this host as its peer (below) the kernel does not even make the copies of other hosts' packets. Sending to
    // other addresses is not affected.
    socket.attach_filter(&[SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0)])?;
    if let Some(device) = device {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    socket.bind(&SocketAddr::new(address, 0).into())?;
    socket.connect(&SocketAddr::new(address, 0).into())?;
    socket.set_nonblocking(true)?;
    socket.set_send_buffer_size(KERNEL_BUFFER_BYTES)?;
    // Never the DF bit: what exceeds the path's MTU is fragmented, as the Linux vxlan device does it, rather than lost
    // without a word to the guest.
    if address.is_ipv6() {
        setsockopt(&socket, Ipv6MtuDiscover, &libc::IPV6_PMTUDISC_DONT)?;
    } else {
        setsockopt(&socket, IpMtuDiscover, &libc::IP_PMTUDISC_DONT)?;
    }
    Ok(socket)
}

fn domain(address: IpAddr) -> Domain {
    if address.is_ipv6() { Domain::IPV6 } else { Domain::IPV4 }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use dreamwire_vhost::memory::Payload;

    use super::*;
    use crate::snapshot::NetworkId;
    use crate::underlay::Inner;
    use crate::vni::Vni;
    use crate::vxlan;

    /// Two VTEPs on the loopback device: needs CAP_NET_RAW, as the daemon does.
    fn carries_frames(here: &str, there: &str) {
        let (here, there): (IpAddr, IpAddr) = (here.parse().unwrap(), there.parse().unwrap());
        let port = 14789;
        let bind =
            |address, port| SocketUnderlay::bind(address, port, None, Arc::default()).expect("needs CAP_NET_RAW");
        let receiver = bind(there, port);
        let sender = SocketUnderlay { port, ..bind(here, port + 1) };
        let ((_, mut tx), (mut rx, _)) = (sender.into_halves(), receiver.into_halves());
        let vni = Vni::new(0xabcdef).unwrap();
        let frame: Vec<u8> = (0..1514).map(|n| n as u8).collect();
        tx.aim(there, vni.into()).unwrap();
        for hash in 0..3 {
            let (header, tail) = frame.split_at(128);
            let payload = Payload::private(tail);
            tx.stage(Inner { network: NetworkId(7), flow_hash: hash, header, payload }).unwrap();
        }
        let mut fates = Vec::new();
        tx.flush(|network, bytes, fate| fates.push((network, bytes, fate)));
        assert_eq!(fates, [(NetworkId(7), 1514, Ok(())); 3]);
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut seen = 0;
        while seen < 3 {
            assert!(Instant::now() < deadline, "{seen} of 3 arrived");
            for index in 0..rx.receive() {
                let (datagram, source) = rx.datagram(index);
                assert_eq!(source, Some(here));
                assert_eq!(vxlan::decapsulate(datagram), Some((vni.into(), &frame[..])));
                seen += 1;
            }
        }
    }

    #[test]
    fn carries_frames_over_ipv4() {
        carries_frames("127.0.0.1", "127.0.0.2");
    }

    #[test]
    fn carries_frames_over_ipv6_with_a_checksum_that_the_kernel_accepts() {
        carries_frames("::1", "::1");
    }

    #[test]
    fn an_address_of_another_host_is_refused() {
        let error = SocketUnderlay::bind("192.0.2.77".parse().unwrap(), 4789, None, Arc::default()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrNotAvailable);
    }
}
