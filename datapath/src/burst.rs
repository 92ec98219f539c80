//! The frames that go through the pipeline together, and what the stages found out about each.

use std::net::IpAddr;
use std::ops::Range;

use dreamwire_policy::{Parsed, Sought, parse_into};
use dreamwire_vhost::frame::RawFrame;
use dreamwire_vhost::ring::BURST;

use crate::drop_reason::DropReason;
use crate::offload::Offload;
use crate::perimeter::Stand;
use crate::snapshot::{NetworkId, PortId};

/// Where a frame goes. Set to its final value by the switch stage at the latest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NextHop {
    /// Not known yet.
    Undecided,
    /// Its end, before it reached anybody.
    Drop(DropReason),
    /// Its end at its receiver, where it was counted.
    Gone,
    /// A local port.
    Port(PortId),
    /// Another host's VTEP.
    Vtep(IpAddr),
    /// Everybody else in its network.
    Flood,
}

/// Where the frames of a burst came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A local port.
    Port(PortId),
    /// A VTEP.
    Vtep(IpAddr),
}

/// Up to [`BURST`] frames. Allocated once per worker. The arrays run in parallel; only the first `length` of each count.
#[derive(Debug)]
pub struct Burst {
    pub(crate) frames: Box<[RawFrame]>,
    pub(crate) networks: [NetworkId; BURST],
    pub(crate) origins: [Origin; BURST],
    /// What the sender left undone of each frame whose bit is set in `unfinished`.
    offloads: [Offload; BURST],
    unfinished: u32,
    pub(crate) next_hops: [NextHop; BURST],
    /// Of frames just received from a port: none was dropped as it came.
    pub(crate) are_undecided: bool,
    /// For frames from an underlay: the datagram that the frame is in.
    pub(crate) datagrams: [u8; BURST],
    /// For frames from an underlay: the group that its tunnel header names; 0: none.
    pub(crate) groups: [u16; BURST],
    /// What the perimeters on its way have said, by direction. Kept up where the snapshot has policies.
    pub(crate) egress: [Stand; BURST],
    pub(crate) ingress: [Stand; BURST],
    /// What policy sees of each frame whose bit is set in `is_parsed`.
    parsed: Box<[Parsed]>,
    is_parsed: u32,
    /// Where the perimeter that looks at them next seeks their connections: see [`Perimeters::look_ahead`](crate::perimeter::Perimeters::look_ahead).
    pub(crate) sought: [Option<Sought>; BURST],
    pub(crate) length: usize,
}

const _: () = assert!(BURST <= u32::BITS as usize);

/// The frames that a mask has a bit for.
#[inline]
pub(crate) fn bits(mut frames: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let first = frames.trailing_zeros() as usize;
        frames &= frames.wrapping_sub(1);
        (first < BURST).then_some(first)
    })
}

impl Burst {
    /// Decides where these frames go, a bit for each.
    #[inline]
    pub(crate) fn decide(&mut self, frames: u32, next_hop: NextHop) {
        match next_hop {
            // Two short stores each, not a copy of the longest kind.
            NextHop::Port(port) if frames.count_ones() as usize == self.length => {
                self.next_hops[..self.length].iter_mut().for_each(|next_hop| *next_hop = NextHop::Port(port));
            }
            NextHop::Port(port) => bits(frames).for_each(|index| self.next_hops[index] = NextHop::Port(port)),
            _ => bits(frames).for_each(|index| self.next_hops[index] = next_hop),
        }
    }

    /// No perimeter has looked at the frames, or said anything, yet.
    #[inline]
    pub(crate) fn unask(&mut self) {
        self.is_parsed = 0;
        self.egress[..self.length].fill(Stand::UNASKED);
        self.ingress[..self.length].fill(Stand::UNASKED);
    }

    /// No sender has left anything undone.
    #[inline]
    pub(crate) fn all_finished(&mut self) {
        self.unfinished = 0;
    }

    /// The sender of frame `index` has left that undone.
    #[inline]
    pub(crate) fn set_offload(&mut self, index: usize, offload: Offload) {
        self.offloads[index] = offload;
        self.unfinished |= 1 << index;
    }

    /// What the sender of frame `index` has left undone.
    #[inline]
    pub(crate) fn offload(&self, index: usize) -> Option<&Offload> {
        (self.unfinished & 1 << index != 0).then(|| &self.offloads[index])
    }

    /// Whether no sender of these frames has left anything undone.
    #[inline]
    pub(crate) fn are_finished(&self, frames: &Range<usize>) -> bool {
        debug_assert!(!frames.is_empty());
        self.unfinished >> frames.start & ((1u64 << frames.len()) - 1) as u32 == 0
    }

    /// Has policy look at frame `index`, once.
    #[inline]
    pub(crate) fn parse(&mut self, index: usize) {
        if self.is_parsed & 1 << index == 0 {
            let frame = &self.frames[index];
            parse_into(frame.headers(), frame.frame_bytes as usize, &mut self.parsed[index]);
            self.is_parsed |= 1 << index;
        }
    }

    /// What policy sees of frame `index`; of one that was not parsed nothing, and that is not allowed.
    #[inline]
    pub(crate) fn parsed(&self, index: usize) -> &Parsed {
        if self.is_parsed & 1 << index == 0 { &Parsed::Unreadable } else { &self.parsed[index] }
    }

    /// The end of the frames in a row from `first` on that go to a port.
    #[inline]
    pub(crate) fn end_of_port(&self, first: usize, port: PortId) -> usize {
        let rest = &self.next_hops[first + 1..self.length];
        first + 1 + rest.iter().take_while(|next| matches!(next, NextHop::Port(next) if *next == port)).count()
    }

    /// The end of the frames in a row from `first` on that go to a VTEP, all in one network.
    #[inline]
    pub(crate) fn end_of_vtep(&self, first: usize, vtep: &IpAddr) -> usize {
        let network = self.networks[first];
        let rest = self.next_hops[first + 1..self.length].iter().zip(&self.networks[first + 1..]);
        let same = |(next, other): &(&NextHop, &NetworkId)| **next == NextHop::Vtep(*vtep) && **other == network;
        first + 1 + rest.take_while(same).count()
    }
}

impl Default for Burst {
    fn default() -> Self {
        Self {
            frames: vec![RawFrame::EMPTY; BURST].into_boxed_slice(),
            networks: [NetworkId(0); BURST],
            origins: [Origin::Port(PortId(0)); BURST],
            offloads: [Offload::NONE; BURST],
            unfinished: 0,
            next_hops: [NextHop::Undecided; BURST],
            are_undecided: false,
            datagrams: [0; BURST],
            groups: [0; BURST],
            egress: [Stand::UNASKED; BURST],
            ingress: [Stand::UNASKED; BURST],
            parsed: vec![Parsed::Unreadable; BURST].into_boxed_slice(),
            is_parsed: 0,
            sought: [None; BURST],
            length: 0,
        }
    }
}
