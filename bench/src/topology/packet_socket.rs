//! A raw socket on one interface (`AF_PACKET`): what a test puts on a wire and takes from it.
//!
//! The kernel takes the outer 802.1Q tag out of a frame before a raw reader sees it; it is put back here from the auxiliary
//! data, so that bytes sent and bytes received compare equal. Frames that this host sent itself are left out.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::ifaddrs::getifaddrs;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SetSockOpt as _, SockFlag, SockProtocol, SockType, bind,
    recvmsg, send, socket, sockopt,
};

use super::error::during;
use super::{Frame, FrameFilter, TopologyError};

/// Longest frame: 64 KiB as GRO makes them, with an Ethernet header and two tags.
const FRAME_BYTES_MAX: usize = 65_536 + 22;
/// Room for frames that arrive before they are asked for. Half of it counts as bookkeeping.
const RECEIVE_BUFFER_BYTES: usize = 16 << 20;
/// `struct tpacket_auxdata`, linux/if_packet.h: status, len, snaplen (u32 each), mac, net, vlan_tci, vlan_tpid (u16 each).
const AUXDATA_BYTES: usize = 20;

#[derive(Debug, Clone, Copy)]
struct PacketAuxdata;
nix::setsockopt_impl!(PacketAuxdata, libc::SOL_PACKET, libc::PACKET_AUXDATA, bool, sockopt::SetBool);

/// A raw socket bound to one interface.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    interface: String,
}

impl PacketSocket {
    /// Opens it in the calling thread's network namespace; what arrives from now on can be received.
    ///
    /// # Errors
    /// Without `CAP_NET_RAW`, or when there is no such interface.
    pub fn open(interface: &str) -> Result<Self, TopologyError> {
        let doing = |what: &'static str| during(move || format!("{what} {interface}"));
        let address = link_address(interface)?;
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
            SockProtocol::EthAll,
        )
        .map_err(doing("raw socket for"))?;
        // getifaddrs leaves the protocol 0; packet(7)'s bind then keeps the socket's own, which is "all".
        bind(socket.as_raw_fd(), &address).map_err(doing("bind raw socket to"))?;
        PacketAuxdata.set(&socket, &true).map_err(doing("PACKET_AUXDATA on"))?;
        sockopt::RcvBufForce.set(&socket, &RECEIVE_BUFFER_BYTES).map_err(doing("SO_RCVBUFFORCE on"))?;
        let this = Self { socket, interface: interface.to_owned() };
        // Between socket() and bind() it heard every interface.
        while this.receive_one()?.is_some() {}
        Ok(this)
    }

    /// Name of the interface.
    #[must_use]
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// Puts one frame on the wire; waits while the queue is full.
    ///
    /// # Errors
    /// The interface is down, or the frame longer than its MTU allows.
    pub fn send(&self, frame: &[u8]) -> Result<(), TopologyError> {
        loop {
            match send(self.socket.as_raw_fd(), frame, MsgFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::EAGAIN | Errno::ENOBUFS) => std::thread::sleep(Duration::from_micros(100)),
                Err(error) => {
                    return Err(during(|| format!("send {} bytes on {}", frame.len(), self.interface))(error));
                }
            }
        }
    }

    /// Takes matching frames until there are `count` or `limit` has passed; fewer is not an error.
    ///
    /// # Errors
    /// When the interface goes away.
    pub fn receive(&self, filter: &FrameFilter, count: usize, limit: Duration) -> Result<Vec<Frame>, TopologyError> {
        let deadline = Instant::now() + limit;
        let mut frames = Vec::new();
        while frames.len() < count {
            match self.receive_one()? {
                Some(frame) if filter.matches(&frame.bytes) => frames.push(frame),
                Some(_) => {}
                None if !self.wait_readable(deadline)? => break,
                None => {}
            }
        }
        Ok(frames)
    }

    /// False when the deadline came first.
    fn wait_readable(&self, deadline: Instant) -> Result<bool, TopologyError> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let timeout = PollTimeout::try_from(left.min(Duration::from_secs(1))).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => Ok(true),
            Err(error) => Err(during(|| format!("poll {}", self.interface))(error)),
        }
    }

    /// The next frame that came from outside, if one is there.
    fn receive_one(&self) -> Result<Option<Frame>, TopologyError> {
        loop {
            let mut buffer = vec![0; FRAME_BYTES_MAX];
            let mut control = nix::cmsg_space!([u8; AUXDATA_BYTES]);
            let (length, outgoing, tag, checksum_pending) = {
                let mut slices = [IoSliceMut::new(&mut buffer)];
                let flags = MsgFlags::MSG_DONTWAIT;
                match recvmsg::<LinkAddr>(self.socket.as_raw_fd(), &mut slices, Some(&mut control), flags) {
                    Ok(message) => {
                        let outgoing = message.address.is_some_and(|from| from.pkttype() == libc::PACKET_OUTGOING);
                        let auxdata = message
                            .cmsgs()
                            .ok()
                            .and_then(|mut messages| messages.find_map(auxdata_of))
                            .unwrap_or([0; AUXDATA_BYTES]);
                        let (tag, pending) = read_auxdata(&auxdata);
                        (message.bytes, outgoing, tag, pending)
                    }
                    Err(Errno::EAGAIN) => return Ok(None),
                    // The link went down; what comes after it is up again is still ours.
                    Err(Errno::ENETDOWN | Errno::EINTR) => continue,
                    Err(error) => return Err(during(|| format!("receive on {}", self.interface))(error)),
                }
            };
            if outgoing {
                continue;
            }
            buffer.truncate(length);
            buffer.shrink_to_fit();
            if let Some(tag) = tag
                && buffer.len() >= 12
            {
                buffer.splice(12..12, tag);
            }
            return Ok(Some(Frame { bytes: buffer, checksum_pending }));
        }
    }
}

fn auxdata_of(message: ControlMessageOwned) -> Option<[u8; AUXDATA_BYTES]> {
    match message {
        ControlMessageOwned::Unknown(unknown)
            if unknown.cmsg_header.cmsg_level == libc::SOL_PACKET
                && unknown.cmsg_header.cmsg_type == libc::PACKET_AUXDATA =>
        {
            unknown.data_bytes.get(..AUXDATA_BYTES)?.try_into().ok()
        }
        _ => None,
    }
}

/// The tag that the kernel took out (four bytes as on the wire), and whether the checksum is still to be made.
fn read_auxdata(auxdata: &[u8; AUXDATA_BYTES]) -> (Option<[u8; 4]>, bool) {
    // linux/if_packet.h, TP_STATUS_*.
    const CSUMNOTREADY: u32 = 1 << 3;
    const VLAN_VALID: u32 = 1 << 4;
    const VLAN_TPID_VALID: u32 = 1 << 6;
    let status = u32::from_ne_bytes([auxdata[0], auxdata[1], auxdata[2], auxdata[3]]);
    let tci = u16::from_ne_bytes([auxdata[16], auxdata[17]]);
    let tpid = if status & VLAN_TPID_VALID != 0 { u16::from_ne_bytes([auxdata[18], auxdata[19]]) } else { 0x8100 };
    let tag = (status & VLAN_VALID != 0).then(|| {
        let ([tpid_high, tpid_low], [tci_high, tci_low]) = (tpid.to_be_bytes(), tci.to_be_bytes());
        [tpid_high, tpid_low, tci_high, tci_low]
    });
    (tag, status & CSUMNOTREADY != 0)
}

fn link_address(interface: &str) -> Result<LinkAddr, TopologyError> {
    getifaddrs()
        .map_err(during(|| "list interfaces".to_owned()))?
        .filter(|entry| entry.interface_name == interface)
        .find_map(|entry| entry.address?.as_link_addr().copied())
        .ok_or_else(|| TopologyError::Unavailable(format!("no interface {interface} in this network namespace")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auxdata_gives_the_tag_back() {
        let mut auxdata = [0; AUXDATA_BYTES];
        auxdata[..4].copy_from_slice(&(1_u32 << 4 | 1 << 6 | 1 << 3).to_ne_bytes());
        auxdata[16..18].copy_from_slice(&0x6005_u16.to_ne_bytes());
        auxdata[18..].copy_from_slice(&0x88a8_u16.to_ne_bytes());
        assert_eq!(read_auxdata(&auxdata), (Some([0x88, 0xa8, 0x60, 0x05]), true));
        assert_eq!(read_auxdata(&[0; AUXDATA_BYTES]), (None, false));
    }
}
