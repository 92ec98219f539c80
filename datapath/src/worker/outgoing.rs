//! Frames on their way out, where the burst has them.

use std::ops::Range;

use dreamwire_vhost::frame::{NetHeader, RawFrame};
use dreamwire_vhost::memory::Payload;

use crate::burst::{Burst, Origin};
use crate::offload::Offload;
use crate::snapshot::{NetworkId, Snapshot};
use crate::stage::transmit::Tails;

/// One of them.
#[derive(Clone, Copy)]
pub(crate) struct Outgoing<'a> {
    pub(crate) burst: &'a Burst,
    pub(crate) tails: Tails<'a>,
    pub(crate) index: usize,
}

impl<'a> Outgoing<'a> {
    /// The network that it is in.
    #[inline]
    pub(crate) fn network(self) -> NetworkId {
        self.burst.networks[self.index]
    }

    /// The group that other hosts are told it is from; 0: none.
    pub(super) fn group(self, snapshot: &Snapshot) -> u16 {
        match self.burst.origins[self.index] {
            Origin::Port(port) => snapshot.port(port).map_or(0, |port| port.group),
            Origin::Vtep(_) => 0,
        }
    }

    /// What its sender left undone.
    #[inline]
    pub(crate) fn offload(self) -> Option<&'a Offload> {
        self.burst.offload(self.index)
    }

    /// What tells a receiver of that, which takes it as it is.
    #[inline(always)]
    pub(super) fn net_header(self) -> Option<NetHeader> {
        self.offload().map(|offload| offload.to_net_header())
    }

    /// The private copy of its first bytes.
    #[inline]
    pub(crate) fn header(self) -> &'a [u8] {
        self.burst.frames[self.index].headers()
    }

    /// The rest.
    #[inline(always)]
    pub(crate) fn payload(self) -> Payload<'a> {
        let frame = &self.burst.frames[self.index];
        if frame.tail_bytes() == 0 {
            Payload::EMPTY
        } else {
            self.tails.payload(frame, self.burst.datagrams[self.index])
        }
    }
}

/// Some in a row.
#[derive(Clone)]
pub(crate) struct Run<'a> {
    pub(crate) burst: &'a Burst,
    pub(crate) tails: Tails<'a>,
    pub(crate) frames: Range<usize>,
}

impl<'a> Run<'a> {
    /// Frame `index` of the burst.
    #[inline(always)]
    fn at(&self, index: usize) -> Outgoing<'a> {
        Outgoing { burst: self.burst, tails: self.tails, index }
    }

    /// The next one.
    #[inline]
    pub(super) fn first(&self) -> Option<Outgoing<'a>> {
        (!self.frames.is_empty()).then(|| self.at(self.frames.start))
    }

    /// How many come first that are from where the next one is from.
    pub(super) fn of_one_origin(&self) -> usize {
        let origins = &self.burst.origins[self.frames.clone()];
        origins.iter().take_while(|origin| **origin == origins[0]).count()
    }

    /// How many come first that a receiver with the negotiated `features` takes as they are.
    #[inline]
    pub(super) fn suited(&self, features: u64) -> usize {
        if self.burst.are_finished(&self.frames) {
            return self.frames.len();
        }
        let suits = |index: &usize| self.burst.offload(*index).is_none_or(|offload| offload.suits(features));
        self.frames.clone().take_while(suits).count()
    }

    /// The frames.
    #[inline]
    pub(super) fn raw(&self) -> &'a [RawFrame] {
        &self.burst.frames[self.frames.clone()]
    }

    /// The frame `ahead` of the next one.
    #[inline(always)]
    pub(super) fn ahead(&self, ahead: usize) -> Outgoing<'a> {
        self.at(self.frames.start + ahead)
    }

    /// Leaves the next `count` out.
    #[inline]
    pub(super) fn leave_out(&mut self, count: usize) {
        self.frames.start += count;
    }

    /// Leaves the next `count` out, and returns them.
    #[inline]
    pub(super) fn split_off(&mut self, count: usize) -> Run<'a> {
        let first = self.frames.start;
        self.leave_out(count);
        Run { frames: first..self.frames.start, ..self.clone() }
    }
}

impl<'a> From<Outgoing<'a>> for Run<'a> {
    fn from(Outgoing { burst, tails, index }: Outgoing<'a>) -> Self {
        Self { burst, tails, frames: index..index + 1 }
    }
}

impl<'a> Iterator for Run<'a> {
    type Item = Outgoing<'a>;

    #[inline]
    fn next(&mut self) -> Option<Outgoing<'a>> {
        self.frames.next().map(|index| self.at(index))
    }

    #[inline]
    fn size_hint(&self) -> (usize, Option<usize>) {
        self.frames.size_hint()
    }
}

impl ExactSizeIterator for Run<'_> {}
