//! The decap stage: a burst of inner frames out of an underlay's datagrams.

use super::parse::ETHERNET_BYTES;
use crate::burst::{Burst, NextHop, Origin};
use crate::counters::UnderlayCounters;
use crate::drop_reason::DropReason;
use crate::offload::Offload;
use crate::snapshot::{Snapshot, UnderlayId};
use crate::underlay::{Arrival, Rx};
use crate::worker::outlets::Outlets;

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
        let network_id = snapshot.by_vni.get(&(underlay, tunnel.vni())).copied();
        let Some((network_id, network)) = network_id.and_then(|id| Some((id, snapshot.network(id)?))) else {
            unclaimed(DropReason::UnknownVni);
            continue;
        };
        let inner_bytes = burst.frames[index].frame_bytes;
        network.counters.tunnel_rx.add(1, u64::from(inner_bytes));
        let known = network.tunnel.as_ref().is_some_and(|tunnel| tunnel.remotes.contains(&vtep));
        burst.length += 1;
        burst.networks[index] = network_id;
        burst.origins[index] = Origin::Vtep(vtep);
        burst.offloads[index] = Offload::NONE;
        burst.groups[index] = tunnel.group();
        burst.datagrams[index] = slot as u8;
        burst.next_hops[index] = if !known {
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
