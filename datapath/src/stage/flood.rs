//! Copies of a flooded frame: made by the transmit stage for this worker's own frames, by the accept stage for others'.

use crate::burst::Origin;
use crate::perimeter::Perimeters;
use crate::snapshot::{Network, Snapshot};
use crate::stage::admit::Flooded;
use crate::stage::parse;
use crate::worker::outgoing::Outgoing;
use crate::worker::outlets::Outlets;

/// Sends a frame to everybody else in its network whom this worker reaches itself; returns how many that were.
pub(super) fn flood_here(
    network: &Network,
    frame: Outgoing<'_>,
    snapshot: &Snapshot,
    perimeters: &mut Perimeters,
    outlets: &mut Outlets,
) -> u64 {
    let mut copies = 0;
    let Outgoing { burst, index, .. } = frame;
    let origin = burst.origins[index];
    let is_group = parse::destination(frame.header()).is_group();
    let ports = if is_group { &network.ports } else { &network.hear_unknown };
    let flooded = snapshot.has_policies.then(|| Flooded::new(burst, index, snapshot));
    for &port in ports.iter().filter(|&&port| origin != Origin::Port(port)) {
        // One that its receiver's perimeter ends was counted there.
        copies += 1;
        if flooded.as_ref().is_none_or(|flooded| flooded.may_enter(port, snapshot, perimeters)) {
            outlets.send_to_port(snapshot, port, frame.into());
        }
    }
    for vtep in flood_list(network, origin, snapshot) {
        outlets.send_to_vtep(snapshot, vtep, frame.network(), frame.into());
        copies += 1;
    }
    copies
}

/// The VTEPs that a flooded frame is replicated to: none if it came from one (split horizon), or if another worker has
/// the underlay.
fn flood_list<'a>(network: &'a Network, origin: Origin, snapshot: &Snapshot) -> &'a [std::net::IpAddr] {
    match (&network.tunnel, origin) {
        (Some(tunnel), Origin::Port(_)) if snapshot.uplink_worker(tunnel.underlay) == snapshot.worker => {
            &tunnel.remotes
        }
        _ => &[],
    }
}
