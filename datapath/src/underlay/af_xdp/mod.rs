//! The `af_xdp` driver: tunnel packets pass between the network device and memory of ours, past the kernel's stack.
//!
//! An XDP program on the device takes this host's tunnel packets (`program.rs`) to one AF_XDP socket for each of the
//! device's queues (`socket.rs`); everything else goes to the kernel as before, so the host keeps its network on the same
//! device. Outer headers are written and read whole, as the `vhost-user` driver has it. Which card a next hop has is known
//! to the kernel, whose tables the control thread follows and tells the sending half.
//!
//! Detached when the receiving half is dropped, and by the kernel when the process ends, however it does. Limits: packets
//! of up to [`MTU_MAX`] bytes; packets over the MTU are dropped, not fragmented; fragments and IPv4 options go to the
//! kernel, and end there. The device's address is read once.

mod bpf;
mod program;
mod socket;

use std::io;
use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use dreamwire_vhost::frame::{HEADER_COPY_BYTES, RawFrame};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::BURST;
use nix::ifaddrs::getifaddrs;
use nix::net::if_::if_nametoindex;

use super::encap::Encap;
use super::neighbours::Neighbours;
use super::open::{Opened, Station, open};
use super::{Arrival, Inner, copy_header};
use crate::checksum::Sum;
use crate::counters::UnderlayCounters;
use crate::drop_reason::DropReason;
use crate::mac::Mac;
use crate::stage::parse::ETHERNET_BYTES;
use bpf::{Link, Mode, SocketMap};
use socket::{PACKET_BYTES_MAX, XskRx, XskTx};

/// Queues of one device that can be served.
pub const QUEUES_MAX: u16 = 64;

/// Bytes of an IP packet at most: what a page holds beside the kernel's headroom and the Ethernet header.
pub const MTU_MAX: u16 = (PACKET_BYTES_MAX - ETHERNET_BYTES) as u16;

/// Which device, and who this host is on it.
#[derive(Debug, Clone)]
pub struct XdpUnderlayConfig {
    /// The network device.
    pub device: String,
    /// Its queues, from 0 on.
    pub queues: u16,
    /// This host's VTEP.
    pub address: IpAddr,
    /// UDP port of the tunnels.
    pub udp_port: u16,
    /// Bytes of an IP packet that the wire takes, at most [`MTU_MAX`].
    pub mtu: u16,
}

/// Why a device cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum XdpError {
    /// It does not exist, or is no Ethernet device.
    #[error("there is no Ethernet device {0}: see `ip link`")]
    NoDevice(String),
    /// The VTEP is not this host's.
    #[error("{0} is no address of this host: give it to an interface, or correct it")]
    NoAddress(IpAddr),
    /// No socket for a queue.
    #[error("cannot open an AF_XDP socket on queue {queue} of {device}: {source}; {}", advice(source))]
    Socket {
        /// The device.
        device: String,
        /// Which queue.
        queue: u16,
        /// What the system said.
        source: io::Error,
    },
    /// The kernel does not take the XDP program.
    #[error("cannot load the XDP program: {0}; it needs CAP_BPF and CAP_NET_ADMIN")]
    Program(#[source] io::Error),
    /// The program cannot be put on the device.
    #[error("cannot put the XDP program on {device}: {source}; {}", advice(source))]
    Attach {
        /// The device.
        device: String,
        /// What the system said.
        source: io::Error,
    },
}

fn advice(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EINVAL) => "the device may have fewer queues: see `ethtool -l`, and set queues",
        Some(libc::EBUSY) => "another program has it: see `ip link` and end that",
        Some(libc::EPERM | libc::EACCES) => "it needs CAP_NET_RAW, CAP_NET_ADMIN and CAP_BPF",
        Some(libc::ENOBUFS | libc::ENOMEM) => "memory is locked for it: raise `ulimit -l`, or give CAP_IPC_LOCK",
        _ => "see `ip link` and the kernel's log",
    }
}

/// An underlay on a network device, open.
#[derive(Debug)]
pub struct XdpUnderlay {
    rx: XdpRx,
    tx: XdpTx,
    counters: Arc<UnderlayCounters>,
}

impl XdpUnderlay {
    /// Opens the sockets and puts the program on the device: from here on tunnel packets come here.
    pub fn open(config: &XdpUnderlayConfig, counters: Arc<UnderlayCounters>) -> Result<Self, XdpError> {
        let XdpUnderlayConfig { device, queues, address, udp_port, mtu } = config;
        let no_device = || XdpError::NoDevice(device.clone());
        let index = if_nametoindex(device.as_str()).map_err(|_| no_device())?;
        let mac = facts(device, *address)?;
        let station = Station { mac, address: *address, udp_port: *udp_port };
        let (mut receiving, mut sending, mut zero_copy) = (Vec::new(), Vec::new(), true);
        let map = SocketMap::new(u32::from(*queues)).map_err(XdpError::Program)?;
        for queue in 0..*queues {
            let failed = |source| XdpError::Socket { device: device.clone(), queue, source };
            let bytes = usize::from(*mtu) + ETHERNET_BYTES;
            let opened = once_free(|| socket::open(index, u32::from(queue), bytes));
            let (rx, tx, is_zero_copy) = opened.map_err(failed)?;
            map.set(u32::from(queue), rx.descriptor()).map_err(failed)?;
            zero_copy &= is_zero_copy;
            receiving.push(rx);
            sending.push(tx);
        }
        let code = program::assemble(*address, *udp_port, map.descriptor());
        let program = bpf::load(&code).map_err(XdpError::Program)?;
        let attached = once_free(|| Link::new(&program, index));
        let (link, mode) = attached.map_err(|source| XdpError::Attach { device: device.clone(), source })?;
        tracing::info!(device, queues, zero_copy, native = mode == Mode::Native, "AF_XDP sockets are open");
        let rx = XdpRx {
            queues: receiving,
            first: 0,
            packets: [(0, 0); BURST],
            inner: [(0, 0); BURST],
            station,
            _link: link,
            _map: map,
        };
        let neighbours = Neighbours::new(&[], false);
        let tx = XdpTx { queues: sending, encap: Encap::new(station, neighbours, None, *mtu) };
        Ok(Self { rx, tx, counters })
    }

    /// Where its packets are counted.
    pub fn counters(&self) -> &Arc<UnderlayCounters> {
        &self.counters
    }

    pub(crate) fn into_halves(self) -> (XdpRx, XdpTx) {
        (self.rx, self.tx)
    }
}

/// How long the kernel may take to give back what a daemon had that was killed.
const GIVEN_BACK: Duration = Duration::from_secs(1);

/// Opens what only one can have. If it is somebody's, waits for it.
fn once_free<T>(mut open: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let deadline = Instant::now() + GIVEN_BACK;
    loop {
        match open() {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(10));
            }
            result => return result,
        }
    }
}

/// The device's card, if the host has the address on some device.
fn facts(device: &str, address: IpAddr) -> Result<Mac, XdpError> {
    let interfaces = getifaddrs().map_err(|_| XdpError::NoDevice(device.to_owned()))?;
    let (mut mac, mut is_ours) = (None, false);
    for interface in interfaces {
        let Some(found) = interface.address else { continue };
        let ip = found.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
        let ip = ip.or_else(|| found.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())));
        is_ours |= ip == Some(address);
        if interface.interface_name == device {
            mac = mac.or_else(|| found.as_link_addr()?.addr().map(Mac));
        }
    }
    match mac.filter(|mac| mac.is_station()) {
        None => Err(XdpError::NoDevice(device.to_owned())),
        Some(_) if !is_ours => Err(XdpError::NoAddress(address)),
        Some(mac) => Ok(mac),
    }
}

/// Takes packets from the sockets. The program is on the device for as long as this lives.
#[derive(Debug)]
pub(crate) struct XdpRx {
    queues: Vec<XskRx>,
    /// The queue to begin with: each has its turn.
    first: usize,
    /// Queue and place of each packet of the burst.
    packets: [(u8, u8); BURST],
    /// Where the inner frame is in each packet: start and length.
    inner: [(u16, u16); BURST],
    station: Station,
    _link: Link,
    _map: SocketMap,
}

impl XdpRx {
    #[inline]
    pub(super) fn receive(&mut self) -> usize {
        let mut count = 0;
        for step in 0..self.queues.len() {
            let queue = (self.first + step) % self.queues.len();
            let taken = self.queues[queue].take(BURST - count);
            for place in 0..taken {
                self.packets[count + place] = (queue as u8, place as u8);
            }
            count += taken;
            if count == BURST {
                break;
            }
        }
        self.first = (self.first + 1) % self.queues.len();
        count
    }

    #[inline]
    fn packet(&self, slot: usize) -> &[u8] {
        let (queue, place) = self.packets[slot];
        self.queues[usize::from(queue)].packet(usize::from(place))
    }

    #[inline]
    pub(super) fn open(&mut self, slot: usize, frame: &mut RawFrame) -> Arrival {
        let packet = self.packet(slot);
        let headers = &packet[..packet.len().min(HEADER_COPY_BYTES)];
        let found = match open(&self.station, headers, packet.len()) {
            Opened::Tunnel(found) => found,
            Opened::Host => return Arrival::Drop(DropReason::NotForHost),
            Opened::Drop(reason) => return Arrival::Drop(reason),
        };
        if found.is_summed {
            let udp = &packet[found.udp_at..found.udp_at + found.udp_bytes];
            if !found.verify(headers, Sum::default().bytes(udp)) {
                return Arrival::Drop(DropReason::OuterChecksum);
            }
        }
        copy_header(&packet[found.inner_at()..found.inner_at() + found.inner_bytes()], frame);
        self.inner[slot] = (found.inner_at() as u16, found.inner_bytes() as u16);
        Arrival::Inner(found.tunnel, found.vtep)
    }

    #[inline]
    pub(super) fn payload(&self, frame: &RawFrame, slot: usize) -> Payload<'_> {
        let (start, bytes) = self.inner[slot];
        let inner = &self.packet(slot)[usize::from(start)..][..usize::from(bytes)];
        Payload::private(&inner[inner.len() - frame.tail_bytes() as usize..])
    }

    #[inline]
    pub(super) fn complete(&mut self) {
        self.queues.iter_mut().for_each(XskRx::release);
    }

    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.queues.iter().map(XskRx::descriptor)
    }
}

/// Puts packets into the sockets.
#[derive(Debug)]
pub(crate) struct XdpTx {
    queues: Vec<XskTx>,
    pub(super) encap: Encap,
}

impl XdpTx {
    /// One frame, at once.
    #[inline]
    pub(super) fn send(&mut self, inner: Inner<'_>) -> Result<(), DropReason> {
        let inner_bytes = inner.bytes();
        let outer = self.encap.header(inner_bytes)?;
        // One flow, one queue: its packets stay in order.
        let queue = inner.flow_hash as usize % self.queues.len();
        let tx = &mut self.queues[queue];
        let chunk = tx.chunk().ok_or(DropReason::UnderlayFull)?;
        let outer_bytes = outer.length();
        let (start, rest) = chunk.split_at_mut(outer_bytes);
        let (private, tail) = rest[..inner_bytes].split_at_mut(inner.header.len());
        private.copy_from_slice(inner.header);
        inner.payload.copy_out(tail);
        start.copy_from_slice(if outer.is_summed() {
            outer.finish_summed(inner_bytes, inner.flow_hash, Sum::default().bytes(&rest[..inner_bytes]))
        } else {
            outer.finish(inner_bytes, inner.flow_hash)
        });
        tx.commit(outer_bytes + inner_bytes);
        Ok(())
    }

    #[inline]
    pub(super) fn flush(&mut self) -> u64 {
        self.queues.iter_mut().map(XskTx::flush).sum()
    }
}
