//! The decap stage: a burst of inner frames out of an underlay's datagrams.

use dreamwire_vhost::frame::{HEADER_COPY_BYTES, NetHeader};

use super::parse::ETHERNET_BYTES;
use crate::burst::{Burst, NextHop, Origin};
use crate::counters::UnderlayCounters;
use crate::drop_reason::DropReason;
use crate::offload::Offload;
use crate::snapshot::{Snapshot, UnderlayId};
use crate::underlay::SocketRx;
use crate::vxlan;

/// Takes the frames of the underlay's next datagrams into `burst` and counts them: at their network, or where they have
/// none, at the underlay. Returns the number of datagrams.
#[inline]
pub(crate) fn decap(
    burst: &mut Burst,
    underlay: UnderlayId,
    rx: &mut SocketRx,
    counters: &UnderlayCounters,
    snapshot: &Snapshot,
) -> usize {
    let datagrams = rx.receive();
    counters.rx_calls.add(1);
    burst.length = 0;
    for slot in 0..datagrams {
        let (datagram, source) = rx.datagram(slot);
        let unclaimed = |reason| {
            counters.rx_unclaimed.add(1);
            counters.drops.add(reason, 1);
        };
        let (Some((vni, inner)), Some(vtep)) = (vxlan::decapsulate(datagram), source) else {
            unclaimed(DropReason::BadEncapsulation);
            continue;
        };
        let network_id = snapshot.by_vni.get(&(underlay, vni)).copied();
        let Some((network_id, network)) = network_id.and_then(|id| Some((id, snapshot.network(id)?))) else {
            unclaimed(DropReason::UnknownVni);
            continue;
        };
        network.counters.tunnel_rx.add(1, inner.len() as u64);
        let known = network.tunnel.as_ref().is_some_and(|tunnel| tunnel.remotes.contains(&vtep));
        let index = burst.length;
        burst.length += 1;
        let frame = &mut burst.frames[index];
        let header_bytes = inner.len().min(HEADER_COPY_BYTES);
        frame.header[..header_bytes].copy_from_slice(&inner[..header_bytes]);
        frame.header_bytes = header_bytes as u16;
        frame.frame_bytes = inner.len() as u32;
        frame.net = NetHeader::default();
        frame.fault = None;
        burst.networks[index] = network_id;
        burst.origins[index] = Origin::Vtep(vtep);
        burst.offloads[index] = Offload::NONE;
        burst.datagrams[index] = slot as u8;
        burst.next_hops[index] = if !known {
            NextHop::Drop(DropReason::UnknownVtep)
        } else if inner.len() < ETHERNET_BYTES {
            NextHop::Drop(DropReason::TooShort)
        } else if inner.len() as u64 > u64::from(network.frame_bytes_max()) {
            NextHop::Drop(DropReason::TooLong)
        } else {
            NextHop::Undecided
        };
    }
    datagrams
}
