//! The police stage: what a guarded port may not send ends here.

use crate::burst::{Burst, NextHop};
use crate::claim::claim;
use crate::drop_reason::DropReason;
use crate::snapshot::Port;
use crate::stage::parse;

/// Drops every frame of a burst from `port` that its source guard does not allow.
#[inline]
pub(crate) fn police(burst: &mut Burst, port: &Port) {
    let Some(guard) = &port.guard else { return };
    for index in 0..burst.length {
        let frame = &burst.frames[index];
        if burst.next_hops[index] == NextHop::Undecided
            && !guard.allows(parse::source(frame.headers()).0, claim(frame.headers(), frame.frame_bytes))
        {
            burst.next_hops[index] = NextHop::Drop(DropReason::SourceGuard);
        }
    }
}
