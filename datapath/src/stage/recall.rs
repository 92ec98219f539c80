//! The recall stage: frames of flows that hold a lease are past both perimeters and the switch.

use super::switch::decide;
use crate::burst::Burst;
use crate::fdb::Fdb;
use crate::perimeter::Perimeters;
use crate::snapshot::{Port, PortId, Snapshot};

/// Sets the next hop of every frame of port `id` whose flow has a lease; whether all of them are past both perimeters. A
/// lease whose time is over is renewed if the switch decides as before.
#[inline]
pub(crate) fn recall(
    burst: &mut Burst,
    id: PortId,
    port: &Port,
    snapshot: &Snapshot,
    perimeters: &mut Perimeters,
    fdb: &mut Fdb,
) -> bool {
    burst.unask();
    if port.policy.is_none() {
        return false;
    }
    let mut recalled = perimeters.recall(id, burst, fdb.epoch(port.network), snapshot);
    while recalled.due != 0 {
        let index = recalled.due.trailing_zeros() as usize;
        recalled.due &= recalled.due - 1;
        let (next_hop, until_ns) = decide(burst, index, snapshot, fdb, perimeters.now_ns());
        let epoch = fdb.epoch(port.network);
        recalled.passed += usize::from(perimeters.renew(id, burst, index, next_hop, until_ns, epoch, snapshot));
    }
    recalled.passed == burst.length
}
