//! The receive stage: a burst of frames out of a guest's transmitq.

use dreamwire_vhost::ring::{Ring, RingFault};

use super::parse::ETHERNET_BYTES;
use crate::burst::{Burst, NextHop, Origin};
use crate::drop_reason::DropReason;
use crate::offload::Offload;
use crate::snapshot::{Network, Port, PortId};

/// Takes frames of `port` from `ring` into `burst` and counts them. Those that cannot be a frame of this network are
/// marked as dropped.
#[inline]
pub(crate) fn receive(
    burst: &mut Burst,
    ring: &mut Ring,
    queue: u16,
    id: PortId,
    port: &Port,
    network: &Network,
) -> Result<(), RingFault> {
    burst.length = ring.receive(&mut burst.frames)?;
    let frame_bytes_max = network.frame_bytes_max();
    burst.networks[..burst.length].fill(port.network);
    burst.origins[..burst.length].fill(Origin::Port(id));
    burst.next_hops[..burst.length].fill(NextHop::Undecided);
    burst.all_finished();
    burst.are_undecided = true;
    let mut bytes = 0;
    for index in 0..burst.length {
        let frame = &burst.frames[index];
        bytes += u64::from(frame.frame_bytes);
        if let Err(reason) = check(burst, index, ring, frame_bytes_max) {
            burst.next_hops[index] = NextHop::Drop(reason);
            burst.are_undecided = false;
        }
    }
    port.counters.rings[usize::from(queue)].traffic.add(burst.length as u64, bytes);
    Ok(())
}

/// Whether frame `index` can be one of this network. Notes what its sender has left undone.
#[inline(always)]
fn check(burst: &mut Burst, index: usize, ring: &Ring, frame_bytes_max: u32) -> Result<(), DropReason> {
    let frame = &burst.frames[index];
    if frame.fault.is_some() {
        return Err(DropReason::BadChain);
    }
    if !ring.enabled() {
        // vhost-user, "Ring states": a disabled transmitq is consumed without side effects.
        return Err(DropReason::SenderDisabled);
    }
    if frame.frame_bytes < ETHERNET_BYTES as u32 {
        return Err(DropReason::TooShort);
    }
    if !frame.net.is_empty() {
        return check_offload(burst, index, ring.features(), frame_bytes_max);
    }
    if frame.frame_bytes > frame_bytes_max { Err(DropReason::TooLong) } else { Ok(()) }
}

#[inline(never)]
fn check_offload(burst: &mut Burst, index: usize, features: u64, frame_bytes_max: u32) -> Result<(), DropReason> {
    let frame = &burst.frames[index];
    let offload = Offload::read(frame, features).map_err(|_| DropReason::BadOffload)?;
    // Of a large frame it is the pieces that have to fit.
    if offload.largest_piece_bytes(frame.frame_bytes) > frame_bytes_max {
        return Err(DropReason::TooLong);
    }
    if !offload.is_none() {
        burst.set_offload(index, offload);
    }
    Ok(())
}
