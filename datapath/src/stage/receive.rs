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
    burst.all_finished();
    let mut bytes = 0;
    for index in 0..burst.length {
        let frame = &burst.frames[index];
        bytes += u64::from(frame.frame_bytes);
        burst.next_hops[index] = if frame.fault.is_some() {
            NextHop::Drop(DropReason::BadChain)
        } else if !ring.enabled() {
            // vhost-user, "Ring states": a disabled transmitq is consumed without side effects.
            NextHop::Drop(DropReason::SenderDisabled)
        } else if frame.frame_bytes < ETHERNET_BYTES as u32 {
            NextHop::Drop(DropReason::TooShort)
        } else {
            match Offload::read(frame, ring.features()) {
                Err(_) => NextHop::Drop(DropReason::BadOffload),
                // Of a large frame it is the pieces that have to fit.
                Ok(offload) if offload.largest_piece_bytes(frame.frame_bytes) > frame_bytes_max => {
                    NextHop::Drop(DropReason::TooLong)
                }
                Ok(offload) => {
                    if !offload.is_none() {
                        burst.set_offload(index, offload);
                    }
                    NextHop::Undecided
                }
            }
        };
    }
    port.counters.rings[usize::from(queue)].traffic.add(burst.length as u64, bytes);
    Ok(())
}
