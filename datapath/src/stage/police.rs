//! The police stage: what a port may not send ends here.

use dreamwire_policy::Direction;

use crate::burst::{Burst, NextHop};
use crate::claim::claim;
use crate::drop_reason::DropReason;
use crate::perimeter::Perimeters;
use crate::snapshot::{Port, PortId, Snapshot};
use crate::stage::parse;

/// Drops every frame of a burst from `port` that its source guard or its rules do not allow.
#[inline]
pub(crate) fn police(burst: &mut Burst, id: PortId, port: &Port, snapshot: &Snapshot, perimeters: &mut Perimeters) {
    if let Some(guard) = &port.guard {
        for index in 0..burst.length {
            let frame = &burst.frames[index];
            if burst.next_hops[index] == NextHop::Undecided
                && !guard.allows(parse::source(frame.headers()).0, claim(frame.headers(), frame.frame_bytes))
            {
                burst.next_hops[index] = NextHop::Drop(DropReason::SourceGuard);
            }
        }
    }
    if port.policy.is_some() {
        // First the headers and the places of all, so that memory is waited for once.
        for index in 0..burst.length {
            if burst.next_hops[index] == NextHop::Undecided {
                burst.parse(index);
                burst.sought[index] = perimeters.look_ahead(id, Direction::Egress, burst.parsed(index));
            }
        }
        for index in 0..burst.length {
            if burst.next_hops[index] == NextHop::Undecided {
                let (frame, parsed, sought) = (&burst.frames[index], burst.parsed(index), burst.sought[index]);
                match perimeters.judge(snapshot, id, Direction::Egress, None, frame, parsed, sought) {
                    Ok(stand) => burst.egress[index] = stand,
                    Err(reason) => burst.next_hops[index] = NextHop::Drop(reason),
                }
            }
        }
    }
}
