//! The recall stage: frames of flows that hold a lease are past both perimeters and the switch.

use crate::burst::Burst;
use crate::fdb::Fdb;
use crate::perimeter::Perimeters;
use crate::snapshot::{Port, PortId, Snapshot};

/// Sets the next hop of every frame of port `id` whose flow has a lease; whether all of them are past both perimeters.
#[inline]
pub(crate) fn recall(
    burst: &mut Burst,
    id: PortId,
    port: &Port,
    snapshot: &Snapshot,
    perimeters: &mut Perimeters,
    fdb: &Fdb,
) -> bool {
    burst.unask();
    port.policy.is_some() && perimeters.recall(id, burst, fdb.epoch(port.network), snapshot) == burst.length
}
