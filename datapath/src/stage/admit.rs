//! The admit stage: what a port may not receive ends here.
//!
//! Frames for one port. Copies of flooded ones are admitted one by one, as they are made.

use dreamwire_policy::{Direction, Parsed};

use crate::burst::{Burst, NextHop, Origin};
use crate::drop_reason::DropReason;
use crate::fdb::{Fdb, refresh_ns};
use crate::perimeter::{Perimeters, Stand, identity_of, parse_frame};
use crate::snapshot::{Port, PortId, Snapshot};

/// Judges every frame that goes to a port of this worker, unless a lease has let it pass, and gives leases to those that
/// may have one.
#[inline]
pub(crate) fn admit(burst: &mut Burst, snapshot: &Snapshot, perimeters: &mut Perimeters, fdb: &Fdb) {
    if !snapshot.has_policies {
        return;
    }
    // First the places of all, so that memory is waited for once.
    for index in 0..burst.length {
        if let NextHop::Port(to) = burst.next_hops[index]
            && burst.ingress[index] == Stand::UNASKED
            && snapshot.port(to).is_some_and(|port| is_judged_here(port, snapshot))
        {
            burst.parse(index);
            burst.sought[index] = perimeters.look_ahead(to, Direction::Ingress, burst.parsed(index));
        }
    }
    for index in 0..burst.length {
        let next_hop = burst.next_hops[index];
        let to = match next_hop {
            NextHop::Port(port) => Some(port),
            NextHop::Vtep(_) => None,
            _ => continue,
        };
        if let Some(to) = to
            && burst.ingress[index] == Stand::UNASKED
        {
            match ingress(burst, index, to, snapshot, perimeters, fdb) {
                Ok(stand) => burst.ingress[index] = stand,
                Err(reason) => {
                    end(burst, index, to, reason, snapshot, perimeters);
                    burst.next_hops[index] = NextHop::Gone;
                    continue;
                }
            }
        }
        lease(burst, index, snapshot, perimeters, fdb);
    }
}

/// A flooded frame of which copies are admitted one by one: looked at once for all of them.
pub(crate) struct Flooded<'a> {
    burst: &'a Burst,
    index: usize,
    identity: Option<u16>,
    parsed: Parsed,
}

impl<'a> Flooded<'a> {
    /// Frame `index` of a burst.
    pub(crate) fn new(burst: &'a Burst, index: usize, snapshot: &Snapshot) -> Self {
        let parsed = parse_frame(&burst.frames[index]);
        Self { burst, index, identity: identity(burst, index, snapshot), parsed }
    }

    /// Whether a copy may go to port `to`.
    pub(crate) fn may_enter(&self, to: PortId, snapshot: &Snapshot, perimeters: &mut Perimeters) -> bool {
        let &Self { burst, index, identity, ref parsed } = self;
        let frame = &burst.frames[index];
        let sought = perimeters.look_ahead(to, Direction::Ingress, parsed);
        let admitted =
            perimeters.judge(snapshot, to, Direction::Ingress, identity, frame, parsed, sought).and_then(|_| {
                let keeps = perimeters.meter(to, Direction::Ingress, frame.frame_bytes);
                if keeps { Ok(()) } else { Err(DropReason::RateLimit) }
            });
        admitted.inspect_err(|&reason| end(burst, index, to, reason, snapshot, perimeters)).is_ok()
    }
}

/// Whether a port has a policy, and is not another worker's: that judges.
#[inline]
fn is_judged_here(port: &Port, snapshot: &Snapshot) -> bool {
    port.policy.is_some() && port.worker == snapshot.worker
}

#[inline]
fn ingress(
    burst: &Burst,
    index: usize,
    to: PortId,
    snapshot: &Snapshot,
    perimeters: &mut Perimeters,
    fdb: &Fdb,
) -> Result<Stand, DropReason> {
    let Some(port) = snapshot.port(to).filter(|port| is_judged_here(port, snapshot)) else { return Ok(Stand::UNASKED) };
    let frame = &burst.frames[index];
    let identity = identity(burst, index, snapshot);
    if burst.egress[index] == Stand::UNASKED
        && perimeters.recall_inbound(to, frame, identity, fdb.epoch(port.network), snapshot)
    {
        return Ok(Stand::LEASED);
    }
    perimeters.judge(snapshot, to, Direction::Ingress, identity, frame, burst.parsed(index), burst.sought[index])
}

/// Gives frame `index` a lease if both ends have let it pass, and one of them only now.
#[inline]
fn lease(burst: &Burst, index: usize, snapshot: &Snapshot, perimeters: &mut Perimeters, fdb: &Fdb) {
    let (egress, ingress) = (burst.egress[index], burst.ingress[index]);
    if (egress, ingress) == (Stand::UNASKED, Stand::UNASKED) {
        return;
    }
    let (Some(sent), Some(received)) = (egress.keeps(), ingress.keeps()) else { return };
    let id = burst.networks[index];
    let Some(network) = snapshot.network(id) else { return };
    // The sender's perimeter keeps it, if it has one: then it stands for the switch too.
    let from = match burst.origins[index] {
        Origin::Port(port) if egress != Stand::UNASKED => Some(port),
        _ => None,
    };
    let identity = identity(burst, index, snapshot);
    let (frame, next_hop) = (&burst.frames[index], burst.next_hops[index]);
    let lease_ns = refresh_ns(network.age_ns);
    perimeters.grant(from, identity, frame, next_hop, [sent, received], fdb.epoch(id), lease_ns);
}

/// Who the sender of frame `index` is; `None`: its address says so.
#[inline]
fn identity(burst: &Burst, index: usize, snapshot: &Snapshot) -> Option<u16> {
    match burst.origins[index] {
        Origin::Port(from) => snapshot.port(from)?.identity,
        Origin::Vtep(vtep) => {
            let tunnel = snapshot.network(burst.networks[index])?.tunnel.as_ref()?;
            identity_of(&tunnel.trusted, vtep, burst.groups[index])
        }
    }
}

/// Counts the end of frame `index` at its receiver, and tells of it.
#[cold]
pub(super) fn end(
    burst: &Burst,
    index: usize,
    to: PortId,
    reason: DropReason,
    snapshot: &Snapshot,
    perimeters: &mut Perimeters,
) {
    perimeters.sample_received(burst, index, to, reason);
    if let Some(port) = snapshot.port(to) {
        port.counters.drops.add(reason, 1);
    }
}
