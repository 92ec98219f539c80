//! The decap stage: a burst of inner frames out of an underlay's datagrams.

use std::net::IpAddr;

use super::parse::ETHERNET_BYTES;
use crate::burst::{Burst, NextHop, Origin};
use crate::counters::UnderlayCounters;
use crate::drop_reason::DropReason;
use crate::snapshot::{Network, NetworkId, Snapshot, UnderlayId};
use crate::underlay::{Arrival, Rx};
use crate::vni::Vni;
use crate::worker::outlets::Outlets;

/// Where a packet is from. Packets come in runs.
#[derive(Clone, Copy)]
struct Source<'a> {
    vni: Vni,
    vtep: IpAddr,
    id: NetworkId,
    network: &'a Network,
    /// Whether the VTEP is one of the network's remotes.
    is_known: bool,
}

impl<'a> Source<'a> {
    /// `None`: no network has this VNI.
    fn find(snapshot: &'a Snapshot, underlay: UnderlayId, vni: Vni, vtep: IpAddr) -> Option<Self> {
        let id = *snapshot.by_vni.get(&(underlay, vni))?;
        let network = snapshot.network(id)?;
        let is_known = network.tunnel.as_ref().is_some_and(|tunnel| tunnel.remotes.contains(&vtep));
        Some(Self { vni, vtep, id, network, is_known })
    }
}

/// Takes the frames of the underlay's next packets into `burst` and counts them: at their network, or where they have
/// none, at the underlay. What is for this host itself is told to the underlay's sending half. Returns the number of
/// packets.
#[inline]
pub(crate) fn decap(
    burst: &mut Burst,
    underlay: UnderlayId,
    rx: &mut Rx,
    counters: &UnderlayCounters,
    snapshot: &Snapshot,
    outlets: &mut Outlets,
) -> usize {
    let packets = rx.receive(&mut burst.frames);
    counters.rx_calls.add(rx.calls());
    burst.length = 0;
    let mut last = None::<Source<'_>>;
    for slot in 0..packets {
        let unclaimed = |reason| {
            counters.rx_unclaimed.add(1);
            counters.drops.add(reason, 1);
        };
        let index = burst.length;
        let (tunnel, vtep) = match rx.open(slot, index, &mut burst.frames) {
            Arrival::Inner(tunnel, vtep) => (tunnel, vtep),
            Arrival::Host => {
                let frame = &burst.frames[slot];
                match outlets.hear(underlay, frame, rx.payload(frame, slot)) {
                    Ok(()) => counters.rx_host.add(1),
                    Err(reason) => unclaimed(reason),
                }
                continue;
            }
            Arrival::Drop(reason) => {
                unclaimed(reason);
                continue;
            }
        };
        let source = match last {
            Some(last) if (last.vni, last.vtep) == (tunnel.vni(), vtep) => last,
            _ => match Source::find(snapshot, underlay, tunnel.vni(), vtep) {
                Some(source) => *last.insert(source),
                None => {
                    unclaimed(DropReason::UnknownVni);
                    continue;
                }
            },
        };
        let network = source.network;
        let inner_bytes = burst.frames[index].frame_bytes;
        network.counters.tunnel_rx.add(1, u64::from(inner_bytes));
        burst.length += 1;
        burst.networks[index] = source.id;
        // Not the one that was just taken out of the packet, byte by byte.
        burst.origins[index] = Origin::Vtep(source.vtep);
        burst.groups[index] = tunnel.group();
        burst.datagrams[index] = slot as u8;
        burst.next_hops[index] = if !source.is_known {
            NextHop::Drop(DropReason::UnknownVtep)
        } else if inner_bytes < ETHERNET_BYTES as u32 {
            NextHop::Drop(DropReason::TooShort)
        } else if inner_bytes > network.frame_bytes_max() {
            NextHop::Drop(DropReason::TooLong)
        } else {
            NextHop::Undecided
        };
    }
    packets
}
