//! The recall stage: frames of flows that hold a lease are past both perimeters and the switch.

use crate::burst::{Burst, NextHop};
use crate::fdb::Fdb;
use crate::perimeter::{Perimeters, Stand};
use crate::snapshot::{Port, PortId, Snapshot};

/// Sets the next hop of every frame of port `id` whose flow has a lease.
#[inline]
pub(crate) fn recall(
    burst: &mut Burst,
    id: PortId,
    port: &Port,
    snapshot: &Snapshot,
    perimeters: &mut Perimeters,
    fdb: &Fdb,
) {
    burst.unask();
    if port.policy.is_none() {
        return;
    }
    let epoch = fdb.epoch(port.network);
    for index in 0..burst.length {
        if burst.next_hops[index] == NextHop::Undecided
            && let Some((next_hop, ingress)) = perimeters.recall(id, &burst.frames[index], epoch, snapshot)
        {
            burst.next_hops[index] = next_hop;
            (burst.egress[index], burst.ingress[index]) = (Stand::Leased, ingress);
        }
    }
}
