//! Where a leased flow goes, in 16 bits.

use std::hash::BuildHasher;
use std::net::IpAddr;

use foldhash::quality::FixedState;

use crate::burst::NextHop;
use crate::snapshot::{PORTS_MAX, PortId};

/// VTEPs that have a number. One that finds its place taken has none: its flows are judged frame by frame.
const VTEPS: usize = 16384;

const _: () = assert!(PORTS_MAX + VTEPS < 1 << 15, "a lease has another use for the last bit");

/// Numbers for next hops: ports first, then VTEPs. Numbers of VTEPs hold until [`Hops::clear`].
#[derive(Debug)]
pub(crate) struct Hops {
    vteps: Box<[Option<IpAddr>]>,
}

impl Default for Hops {
    fn default() -> Self {
        Self { vteps: vec![None; VTEPS].into_boxed_slice() }
    }
}

impl Hops {
    /// The number of a next hop, if it can have one.
    pub(crate) fn number(&mut self, next_hop: NextHop) -> Option<u16> {
        match next_hop {
            NextHop::Port(port) => Some(port.0),
            NextHop::Vtep(vtep) => {
                let place = FixedState::default().hash_one(vtep) as usize % VTEPS;
                let known = *self.vteps[place].get_or_insert(vtep);
                (known == vtep).then_some((PORTS_MAX + place) as u16)
            }
            _ => None,
        }
    }

    /// The inverse.
    #[inline]
    pub(crate) fn next_hop(&self, number: u16) -> Option<NextHop> {
        match usize::from(number).checked_sub(PORTS_MAX) {
            None => Some(NextHop::Port(PortId(number))),
            Some(place) => self.vteps.get(place).copied().flatten().map(NextHop::Vtep),
        }
    }

    /// Forgets all VTEPs. No lease may be left that names one.
    pub(crate) fn clear(&mut self) {
        self.vteps.fill(None);
    }
}
