//! The meter stage: what is beyond a port's packets or bits per second ends here.

use dreamwire_policy::Direction;

use super::admit::end;
use crate::burst::{Burst, NextHop, Origin};
use crate::drop_reason::DropReason;
use crate::perimeter::Perimeters;
use crate::snapshot::Snapshot;

/// Ends frames beyond what their port may send, or their receiver may receive. Those that another worker has taken were
/// metered there as they left their port.
pub(crate) fn meter(burst: &mut Burst, snapshot: &Snapshot, perimeters: &mut Perimeters, is_ours: bool) {
    if !perimeters.has_meters {
        return;
    }
    for index in 0..burst.length {
        let bytes = burst.frames[index].frame_bytes;
        if !matches!(burst.next_hops[index], NextHop::Port(_) | NextHop::Vtep(_) | NextHop::Flood) {
            continue;
        }
        if let Origin::Port(from) = burst.origins[index]
            && is_ours
            && !perimeters.meter(from, Direction::Egress, bytes)
        {
            burst.next_hops[index] = NextHop::Drop(DropReason::RateLimit);
            continue;
        }
        if let NextHop::Port(to) = burst.next_hops[index]
            && !perimeters.meter(to, Direction::Ingress, bytes)
        {
            end(burst, index, to, DropReason::RateLimit, snapshot, perimeters);
            burst.next_hops[index] = NextHop::Gone;
        }
    }
}
