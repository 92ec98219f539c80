//! The transmit stage: every frame of a burst is written once to each place it goes, or counted as dropped.

use dreamwire_vhost::frame::RawFrame;
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::Ring;

use crate::burst::{Burst, NextHop, Origin};
use crate::drop_reason::DropReason;
use crate::perimeter::Perimeters;
use crate::snapshot::Snapshot;
use crate::stage::flood::flood_here;
use crate::stage::parse;
use crate::underlay::Rx;
use crate::worker::handoff::Parcel;
use crate::worker::outgoing::{Outgoing, Run};
use crate::worker::outlets::Outlets;

/// Who keeps the bytes behind a burst's header copies.
#[derive(Clone, Copy)]
pub(crate) enum Tails<'a> {
    /// The ring that the burst was taken from.
    Ring(&'a Ring),
    /// The underlay's receive buffers.
    Datagrams(&'a Rx),
    /// The parcel that the burst is in.
    Parcel(&'a Parcel),
    /// Nobody: each frame is all in its header copy.
    None,
}

impl<'a> Tails<'a> {
    #[inline(never)]
    pub(crate) fn payload(self, frame: &RawFrame, datagram: u8) -> Payload<'a> {
        match self {
            Tails::Ring(ring) => ring.payload(frame),
            Tails::None => Payload::EMPTY,
            Tails::Datagrams(rx) => rx.payload(frame, usize::from(datagram)),
            Tails::Parcel(parcel) => parcel.payload(frame, usize::from(datagram)),
        }
    }
}

/// Sends or counts every frame of `burst`. `outlets` must be flushed afterwards.
#[inline]
pub(crate) fn transmit(
    burst: &Burst,
    tails: Tails<'_>,
    snapshot: &Snapshot,
    perimeters: &mut Perimeters,
    outlets: &mut Outlets,
) {
    let run = |frames| Run { burst, tails, frames };
    let mut index = 0;
    while index < burst.length {
        let next_hop = &burst.next_hops[index];
        let first = index;
        index += 1;
        // Frames in a row for one port or host share what has to be looked up for it.
        match next_hop {
            &NextHop::Port(port) => {
                index = burst.end_of_port(first, port);
                outlets.send_to_port(snapshot, port, run(first..index));
            }
            NextHop::Vtep(vtep) => {
                index = burst.end_of_vtep(first, vtep);
                outlets.send_to_vtep(snapshot, vtep, burst.networks[first], run(first..index));
            }
            NextHop::Flood => flood(Outgoing { burst, tails, index: first }, snapshot, perimeters, outlets),
            NextHop::Gone => {}
            &NextHop::Drop(reason) => count_drop(snapshot, perimeters, burst, first, reason),
            NextHop::Undecided => unreachable!("the switch stage decides on every frame"),
        }
    }
}

/// Sends a frame to everybody else in its network.
fn flood(frame: Outgoing<'_>, snapshot: &Snapshot, perimeters: &mut Perimeters, outlets: &mut Outlets) {
    let Some(network) = snapshot.network(frame.network()) else { return };
    let mut copies = flood_here(network, frame, snapshot, perimeters, outlets);
    let is_group = parse::destination(frame.header()).is_group();
    // One copy for each worker, which makes the others.
    for &worker in if is_group { &network.beyond.groups } else { &network.beyond.unknown } {
        outlets.hand_off(snapshot, worker, NextHop::Flood, frame.into());
        copies += 1;
    }
    match copies {
        0 => count_drop(snapshot, perimeters, frame.burst, frame.index, DropReason::NoDestination),
        _ => network.counters.flood_copies.add(copies - 1),
    }
}

/// Counts the end of frame `index` where it came from.
#[inline]
fn count_drop(snapshot: &Snapshot, perimeters: &mut Perimeters, burst: &Burst, index: usize, reason: DropReason) {
    perimeters.sample(burst, index, reason);
    if let Origin::Port(id) = burst.origins[index]
        && let Some(port) = snapshot.port(id)
    {
        port.counters.drops.add(reason, 1);
    } else if let Some(network) = snapshot.network(burst.networks[index]) {
        network.counters.drops.add(reason, 1);
    }
}
