//! Questions to the kernel about routes and neighbours, one at a time, by rtnetlink(7).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::IpAddr;

use dreamwire_datapath::mac::Mac;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteVia};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use nix::net::if_::if_nametoindex;

/// What the kernel knows now.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// The next hop's card, by remote.
    pub(super) cards: BTreeMap<IpAddr, Mac>,
    /// Every next hop's card is known and confirmed.
    pub(super) is_certain: bool,
}

/// A connection to the kernel's tables.
pub(super) struct KernelTables {
    socket: Socket,
    sequence: u32,
}

impl KernelTables {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Looks up the next hops to `remotes` on a device; what is missing or stale the kernel is asked to find.
    pub(super) fn look(&mut self, device: &str, remotes: &[IpAddr]) -> io::Result<Seen> {
        let Ok(index) = if_nametoindex(device) else { return Ok(Seen::default()) };
        let neighbours = self.neighbours(index)?;
        let mut seen = Seen { cards: BTreeMap::new(), is_certain: true };
        let mut uncertain = BTreeSet::new();
        for &remote in remotes {
            let Some(next_hop) = self.next_hop(index, remote)? else {
                seen.is_certain = false;
                continue;
            };
            let known = neighbours.get(&next_hop);
            if let Some((_, mac)) = known {
                seen.cards.insert(remote, *mac);
            }
            if known.is_none_or(|(state, _)| *state == NeighbourState::Stale) {
                uncertain.insert(next_hop);
            }
        }
        for next_hop in uncertain {
            seen.is_certain = false;
            self.find(index, next_hop)?;
        }
        Ok(seen)
    }

    /// The neighbours on a device whose card is known.
    fn neighbours(&mut self, device: u32) -> io::Result<HashMap<IpAddr, (NeighbourState, Mac)>> {
        let mut found = HashMap::new();
        let request = RouteNetlinkMessage::GetNeighbour(NeighbourMessage::default());
        self.ask(request, NLM_F_DUMP, |answer| {
            let RouteNetlinkMessage::NewNeighbour(row) = answer else { return };
            let has_card = matches!(
                row.header.state,
                NeighbourState::Reachable
                    | NeighbourState::Stale
                    | NeighbourState::Delay
                    | NeighbourState::Probe
                    | NeighbourState::Permanent
                    | NeighbourState::Noarp
            );
            let (mut address, mut mac) = (None, None);
            for attribute in &row.attributes {
                match attribute {
                    NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => address = Some(IpAddr::V4(*v4)),
                    NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => address = Some(IpAddr::V6(*v6)),
                    NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok().map(Mac),
                    _ => {}
                }
            }
            if let (Some(address), Some(mac)) = (address, mac)
                && has_card
                && row.header.ifindex == device
            {
                found.insert(address, (row.header.state, mac));
            }
        })?;
        Ok(found)
    }

    /// Whom a packet to `remote` goes to first. `None`: nobody on that device.
    fn next_hop(&mut self, device: u32, remote: IpAddr) -> io::Result<Option<IpAddr>> {
        let mut request = RouteMessage::default();
        request.header.address_family = family(remote);
        request.header.destination_prefix_length = if remote.is_ipv4() { 32 } else { 128 };
        request.attributes.push(RouteAttribute::Destination(remote.into()));
        let (mut is_there, mut gateway) = (false, None);
        let asked = self.ask(RouteNetlinkMessage::GetRoute(request), 0, |answer| {
            let RouteNetlinkMessage::NewRoute(route) = answer else { return };
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Oif(oif) => is_there = *oif == device,
                    RouteAttribute::Gateway(RouteAddress::Inet(v4)) | RouteAttribute::Via(RouteVia::Inet(v4)) => {
                        gateway = Some(IpAddr::V4(*v4));
                    }
                    RouteAttribute::Gateway(RouteAddress::Inet6(v6)) | RouteAttribute::Via(RouteVia::Inet6(v6)) => {
                        gateway = Some(IpAddr::V6(*v6));
                    }
                    _ => {}
                }
            }
        });
        match asked {
            Ok(()) => Ok(is_there.then(|| gateway.unwrap_or(remote))),
            // No route: unreachable network or host, or the device is down.
            Err(error) if error.raw_os_error().is_some() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Has the kernel find or confirm a neighbour, as if it had something to send there.
    fn find(&mut self, device: u32, address: IpAddr) -> io::Result<()> {
        let mut request = NeighbourMessage::default();
        request.header.family = family(address);
        request.header.ifindex = device;
        request.header.state = NeighbourState::None;
        request.header.flags = NeighbourFlags::Use;
        let destination = match address {
            IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
            IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
        };
        request.attributes.push(NeighbourAttribute::Destination(destination));
        let flags = NLM_F_CREATE | NLM_F_REPLACE | NLM_F_ACK;
        match self.ask(RouteNetlinkMessage::NewNeighbour(request), flags, |_| {}) {
            // Refused while the device is down: asked again in a second.
            Err(error) if error.raw_os_error().is_none() => Err(error),
            _ => Ok(()),
        }
    }

    /// Sends one request, and gives `take` the answers. The kernel answers at once.
    fn ask(
        &mut self,
        request: RouteNetlinkMessage,
        flags: u16,
        mut take: impl FnMut(&RouteNetlinkMessage),
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0)?;
        let is_many = flags & (NLM_F_DUMP | NLM_F_ACK) != 0;
        loop {
            let (answers, _) = self.socket.recv_from_full()?;
            let mut rest = &answers[..];
            while !rest.is_empty() {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest)
                    .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error.to_string()))?;
                // Aligned to 4 bytes, netlink(7).
                let bytes = (answer.header.length as usize).next_multiple_of(4).max(4);
                rest = rest.get(bytes..).unwrap_or_default();
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::Done(_) => return Ok(()),
                    NetlinkPayload::Error(error) => {
                        return error.code.map_or(Ok(()), |code| Err(io::Error::from_raw_os_error(-code.get())));
                    }
                    NetlinkPayload::InnerMessage(inner) => {
                        take(&inner);
                        if !is_many {
                            return Ok(());
                        }
                    }
                    _ => {}
                }
            }
        }
    }
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}
