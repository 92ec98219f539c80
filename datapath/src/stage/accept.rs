//! The accept stage: frames that another worker has decided on go to their ends here.

use super::flood::flood_here;
use super::transmit::Tails;
use crate::burst::NextHop;
use crate::drop_reason::DropReason;
use crate::perimeter::Perimeters;
use crate::snapshot::Snapshot;
use crate::worker::handoff::Parcel;
use crate::worker::outgoing::{Outgoing, Run};
use crate::worker::outlets::Outlets;

/// Sends or counts every frame of `parcel`. None is handed on: where two workers know different snapshots, a frame would
/// go back and forth. `outlets` must be flushed afterwards.
pub(crate) fn accept(parcel: &Parcel, snapshot: &Snapshot, perimeters: &mut Perimeters, outlets: &mut Outlets) {
    let burst = &parcel.burst;
    let tails = Tails::Parcel(parcel);
    let run = |frames| Run { burst, tails, frames };
    let mut index = 0;
    while index < burst.length {
        let next_hop = &burst.next_hops[index];
        let first = index;
        index += 1;
        let id = burst.networks[first];
        // As the transmit stage: a run shares what has to be looked up.
        match next_hop {
            &NextHop::Port(port) => {
                index = burst.end_of_port(first, port);
                outlets.deliver_to_port(snapshot, port, run(first..index));
            }
            NextHop::Vtep(vtep) => {
                index = burst.end_of_vtep(first, vtep);
                if !outlets.deliver_to_vtep(snapshot, vtep, id, run(first..index)) {
                    (first..index).for_each(|_| outlets.count_removed(snapshot, id));
                }
            }
            NextHop::Flood => {
                let Some(network) = snapshot.network(id) else {
                    outlets.count_removed(snapshot, id);
                    continue;
                };
                match flood_here(network, Outgoing { burst, tails, index: first }, snapshot, perimeters, outlets) {
                    0 => network.counters.drops.add(DropReason::NoDestination, 1),
                    copies => network.counters.flood_copies.add(copies - 1),
                }
            }
            NextHop::Gone => {}
            NextHop::Undecided | NextHop::Drop(_) => unreachable!("nobody hands these over"),
        }
    }
}
