//! The decap stage: a burst of inner frames out of an underlay's datagrams.

use std::net::IpAddr;
use std::ops::Range;

use super::parse::ETHERNET_BYTES;
use crate::burst::{Burst, NextHop, Origin};
use crate::counters::UnderlayCounters;
use crate::drop_reason::DropReason;
use crate::snapshot::{Network, NetworkId, Snapshot, UnderlayId};
use crate::underlay::{Arrival, Rx};
use crate::vxlan;
use crate::worker::outlets::Outlets;

/// Where packets in a row are from.
#[derive(Clone, Copy)]
struct Source<'a> {
    tunnel: vxlan::Header,
    vtep: IpAddr,
    id: NetworkId,
    network: &'a Network,
    /// Whether the VTEP is one of the network's remotes.
    is_known: bool,
    frame_bytes_max: u32,
}

impl<'a> Source<'a> {
    /// `None`: no network has this VNI.
    fn find(snapshot: &'a Snapshot, underlay: UnderlayId, tunnel: vxlan::Header, vtep: IpAddr) -> Option<Self> {
        let id = *snapshot.by_vni.get(&(underlay, tunnel.vni()))?;
        let network = snapshot.network(id)?;
        let is_known = network.tunnel.as_ref().is_some_and(|tunnel| tunnel.remotes.contains(&vtep));
        Some(Self { tunnel, vtep, id, network, is_known, frame_bytes_max: network.frame_bytes_max() })
    }

    /// Whether a frame of `bytes` may come from there.
    #[inline]
    fn check(&self, bytes: u32) -> Result<(), DropReason> {
        if !self.is_known {
            Err(DropReason::UnknownVtep)
        } else if bytes < ETHERNET_BYTES as u32 {
            Err(DropReason::TooShort)
        } else if bytes > self.frame_bytes_max {
            Err(DropReason::TooLong)
        } else {
            Ok(())
        }
    }

    /// Notes and counts `frames` as those that came from there.
    #[inline]
    fn claim(&self, burst: &mut Burst, frames: Range<usize>) {
        if frames.is_empty() {
            return;
        }
        burst.networks[frames.clone()].fill(self.id);
        burst.origins[frames.clone()].fill(Origin::Vtep(self.vtep));
        burst.groups[frames.clone()].fill(self.tunnel.group());
        let bytes = burst.frames[frames.clone()].iter().map(|frame| u64::from(frame.frame_bytes)).sum();
        self.network.counters.tunnel_rx.add(frames.len() as u64, bytes);
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
    burst.all_finished();
    burst.next_hops[..packets].fill(NextHop::Undecided);
    // Of the last inner frame, and of all before it back to this one.
    let mut source = None::<Source<'_>>;
    let mut first = 0;
    for slot in 0..packets {
        let unclaimed = |reason| {
            counters.rx_unclaimed.add(1);
            counters.drops.add(reason, 1);
        };
        let index = burst.length;
        match rx.open(slot, index, &mut burst.frames) {
            Arrival::Alike => {}
            Arrival::Inner(tunnel, vtep) => {
                if source.is_none_or(|source| (source.tunnel, source.vtep) != (tunnel, vtep)) {
                    if let Some(source) = source {
                        source.claim(burst, first..index);
                    }
                    (source, first) = (Source::find(snapshot, underlay, tunnel, vtep), index);
                }
            }
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
        }
        let Some(source) = &source else {
            unclaimed(DropReason::UnknownVni);
            continue;
        };
        if let Err(reason) = source.check(burst.frames[index].frame_bytes) {
            burst.next_hops[index] = NextHop::Drop(reason);
        }
        burst.datagrams[index] = slot as u8;
        burst.length += 1;
    }
    if let Some(source) = source {
        source.claim(burst, first..burst.length);
    }
    packets
}
