//! Outer headers by VTEP, network and sender's group, with the next hop's card in them.

use std::hash::BuildHasher;
use std::net::IpAddr;

use dreamwire_vhost::frame::RawFrame;
use foldhash::quality::RandomState;

use super::neighbours::{Ask, Neighbours};
use super::open::Station;
use super::outer::{BeforeInner, Ends, OuterHeader};
use crate::drop_reason::DropReason;
use crate::mac::Mac;
use crate::vxlan;

/// Headers that are kept; a power of two. Two that want one place are made anew in turns, some 50 ns each.
const HEADERS: usize = 4096;

#[derive(Debug)]
struct Kept {
    vtep: IpAddr,
    tunnel: vxlan::Header,
    next_hop: IpAddr,
    neighbour: u16,
    header: OuterHeader,
}

/// What a wire without the kernel needs for sending. Owned by a worker.
#[derive(Debug)]
pub(crate) struct Encap {
    pub(super) station: Station,
    pub(super) neighbours: Neighbours,
    gateway: Option<IpAddr>,
    /// Bytes of an IP packet that the wire takes.
    mtu: usize,
    kept: Box<[Option<Kept>]>,
    /// The place of the header that was found last: frames come in runs.
    aimed: usize,
    /// A question that is to be asked on the wire. Kept here, so that a frame that asks nothing returns nothing.
    pub(super) ask: Option<Ask>,
    hasher: RandomState,
}

impl Encap {
    pub(crate) fn new(station: Station, neighbours: Neighbours, gateway: Option<IpAddr>, mtu: u16) -> Self {
        let kept = (0..HEADERS).map(|_| None).collect();
        Self {
            station,
            neighbours,
            gateway,
            mtu: usize::from(mtu),
            kept,
            aimed: 0,
            ask: None,
            hasher: RandomState::default(),
        }
    }

    /// Finds the header for the frames that come next, to `vtep`; or why there is none. What is to be asked for it is in `ask`.
    #[inline]
    pub(crate) fn aim(&mut self, vtep: &IpAddr, tunnel: vxlan::Header, now_ns: u64) -> Result<(), DropReason> {
        let is_for =
            |kept: &Option<Kept>| kept.as_ref().is_some_and(|kept| kept.vtep == *vtep && kept.tunnel == tunnel);
        let mut place = self.aimed;
        if !is_for(&self.kept[place]) {
            place = self.hasher.hash_one((vtep, tunnel)) as usize % HEADERS;
            if !is_for(&self.kept[place]) {
                self.kept[place] = Some(self.make(*vtep, tunnel, now_ns)?);
            }
            self.aimed = place;
        }
        let kept = self.kept[place].as_mut().expect("it was just made");
        let mac = match self.neighbours.fresh(kept.neighbour, &kept.next_hop, now_ns) {
            Some(mac) => mac,
            None => {
                let (mac, ask) = self.neighbours.resolve(kept.neighbour, kept.next_hop, now_ns);
                self.ask = ask;
                let Some(mac) = mac else {
                    // Its row may have become another's.
                    if let Some(row) = self.neighbours.row(kept.next_hop, now_ns) {
                        kept.neighbour = row;
                    }
                    return Err(DropReason::Unresolved);
                };
                mac
            }
        };
        if kept.header.destination() != mac {
            kept.header.redirect(mac);
        }
        Ok(())
    }

    /// The header that was found last, for a frame of `inner_bytes`.
    #[inline]
    pub(crate) fn header(&mut self, inner_bytes: usize) -> Result<&mut OuterHeader, DropReason> {
        match &mut self.kept[self.aimed] {
            Some(kept) if kept.header.packet_bytes(inner_bytes) <= self.mtu => Ok(&mut kept.header),
            _ => Err(DropReason::UnderlayRefused),
        }
    }

    /// The header that was found last, for a run of frames whose hashes are `flow_hash`'s. `None` where each has to be summed.
    #[inline]
    pub(crate) fn before<F: Fn(&RawFrame) -> u32>(&mut self, flow_hash: F) -> Option<BeforeInner<'_, F>> {
        self.kept[self.aimed].as_mut()?.header.before(self.mtu, flow_hash)
    }

    #[cold]
    fn make(&mut self, vtep: IpAddr, tunnel: vxlan::Header, now_ns: u64) -> Result<Kept, DropReason> {
        let ends = Ends {
            source: (self.station.mac, self.station.address),
            destination: (Mac([0; 6]), vtep),
            udp_port: self.station.udp_port,
        };
        let header = OuterHeader::new(&ends, tunnel).ok_or(DropReason::UnderlayRefused)?;
        // Without a gateway every VTEP is on the wire; with one, those that are configured as neighbours are.
        let next_hop = self.gateway.filter(|_| !self.neighbours.is_fixed(vtep)).unwrap_or(vtep);
        let neighbour = self.neighbours.row(next_hop, now_ns).ok_or(DropReason::Unresolved)?;
        Ok(Kept { vtep, tunnel, next_hop, neighbour, header })
    }
}
