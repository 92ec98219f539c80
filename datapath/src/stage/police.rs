//! The police stage: what a port may not send ends here.

use dreamwire_policy::Direction;
use dreamwire_vhost::ring::BURST;

use crate::burst::{Burst, NextHop};
use crate::claim::claim;
use crate::drop_reason::DropReason;
use crate::perimeter::{Perimeters, parse_frame};
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
        let parsed: [_; BURST] = std::array::from_fn(|index| {
            (index < burst.length && burst.next_hops[index] == NextHop::Undecided).then(|| {
                let parsed = parse_frame(&burst.frames[index]);
                perimeters.look_ahead(id, Direction::Egress, &parsed);
                parsed
            })
        });
        for (index, parsed) in parsed.iter().enumerate() {
            if let Some(parsed) = parsed {
                match perimeters.judge(snapshot, id, Direction::Egress, None, &burst.frames[index], parsed) {
                    Ok(stand) => burst.egress[index] = stand,
                    Err(reason) => burst.next_hops[index] = NextHop::Drop(reason),
                }
            }
        }
    }
}
