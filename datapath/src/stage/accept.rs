//! The accept stage: frames that another worker has decided on go to their ends here.

use super::transmit::flood_here;
use crate::drop_reason::DropReason;
use crate::snapshot::Snapshot;
use crate::worker::handoff::{Parcel, Target};
use crate::worker::outlets::Outlets;

/// Sends or counts every frame of `parcel`. None is handed on: where two workers know different snapshots, a frame would
/// go back and forth. `outlets` must be flushed afterwards.
pub(crate) fn accept(parcel: &Parcel, snapshot: &Snapshot, outlets: &mut Outlets) {
    let mut index = 0;
    while index < parcel.len() {
        let target = parcel.target(index);
        let first = index;
        index += 1;
        match target {
            Target::Port(port) => {
                // As the transmit stage: a run shares what has to be looked up.
                while index < parcel.len() && parcel.target(index) == target {
                    index += 1;
                }
                outlets.deliver_to_port(snapshot, port, (first..index).map(|index| parcel.frame(index)));
            }
            Target::Vtep(vtep) => {
                let frame = parcel.frame(first);
                if !outlets.deliver_to_vtep(snapshot, vtep, frame) {
                    outlets.count_removed(snapshot, frame.network);
                }
            }
            Target::Flood(origin) => {
                let frame = parcel.frame(first);
                let Some(network) = snapshot.network(frame.network) else {
                    outlets.count_removed(snapshot, frame.network);
                    continue;
                };
                match flood_here(network, origin, frame, snapshot, outlets) {
                    0 => network.counters.drops.add(DropReason::NoDestination, 1),
                    copies => network.counters.flood_copies.add(copies - 1),
                }
            }
        }
    }
}
