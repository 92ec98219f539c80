//! Frames of flows that have leases, looked up burst by burst.

use dreamwire_vhost::frame::RawFrame;
use dreamwire_vhost::ring::BURST;

use super::Perimeters;
use super::flow_key::{FlowKey, IPV4_HEADERS, Unpadded4, WORDS4, has_key4, same_key4};
use super::leases::{Look, Opened, Way};
use crate::burst::{Burst, NextHop, bits};
use crate::snapshot::{PortId, Snapshot};

/// How far frames have come by leases; a bit for each.
#[derive(Debug, Default)]
pub(crate) struct Recalled {
    /// Those that are past both perimeters.
    pub(crate) passed: u32,
    /// Those that are past their sender's, and the switch, alone.
    pub(crate) sent: u32,
    /// Those whose lease is to be renewed.
    pub(crate) due: u32,
}

const _: () = assert!(BURST <= u32::BITS as usize);

/// Connections of a port whose leases lie in a core's own caches, or hardly beyond: 1 MiB. (Flows that have none, at a port that
/// only meters, are not counted; with 100,000 flows one step takes 4 to 7 % longer than two.)
const FEW_FLOWS: u32 = 16_384;

/// A flow whose lease is being looked for.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Asked {
    place: u32,
    /// A bit for each of its frames.
    frames: u32,
}

impl Asked {
    /// Its key, from its first frame.
    #[inline]
    fn key(self, frames: &[RawFrame]) -> FlowKey<WORDS4> {
        FlowKey::of(ipv4_headers(&frames[self.frames.trailing_zeros() as usize]))
    }
}

/// The headers of a frame that has as many bytes, or of none.
#[inline]
fn ipv4_headers(frame: &RawFrame) -> &[u8; IPV4_HEADERS] {
    frame.header.first_chunk().expect("a header copy has room for more")
}

/// What [`seek`] has seen.
struct Sought {
    /// Flows: what is asked is in `asked` from its second place on.
    count: usize,
    /// A flow that has no lease.
    unknown: bool,
    /// Frames that are not IPv4, or have no key.
    others: bool,
}

/// Asks for the leases of all IPv4 flows among frames whose next hop is not decided, those in a row once. Where it does not check
/// first whether a flow can have a lease, it may touch a page that nobody has. Not inlined: it needs all registers that there are.
#[inline(never)]
fn seek<const CHECKS: bool>(
    leases: Opened<'_, WORDS4, 8>,
    frames: &[RawFrame],
    next_hops: &[NextHop; BURST],
    asked: &mut [Asked; BURST + 1],
) -> Sought {
    // None has the key of the header that is none.
    let (mut count, mut last) = (0, &[0; IPV4_HEADERS]);
    let (mut others, mut unknown, mut bit) = (false, false, 1);
    for (frame, next_hop) in frames.iter().zip(next_hops) {
        let header = ipv4_headers(frame);
        let is_undecided = *next_hop == NextHop::Undecided;
        if !is_undecided || !has_key4(header, frame.frame_bytes) {
            others |= is_undecided;
        } else if same_key4(header, last) {
            asked[count].frames |= bit;
        } else {
            let place = leases.first_place(&FlowKey::of(header));
            if CHECKS && !leases.was_taken(place) {
                unknown = true;
            } else {
                leases.prefetch(place);
                (count, last) = (count + 1, header);
                asked[count] = Asked { place, frames: bit };
            }
        }
        bit <<= 1;
    }
    Sought { count, unknown, others }
}

/// [`has_key4`], not inlined: for the few whose lengths do not say so.
#[cold]
#[inline(never)]
fn has_key(header: &[u8; IPV4_HEADERS], frame_bytes: u32) -> bool {
    has_key4(header, frame_bytes)
}

/// Those of the frames, none of which has a next hop yet, that pass by a lease for `way`, which is not TCP's, in one of
/// their flow's first two places; a bit for each. In one step, for leases that need not be asked for. Not
/// inlined: as [`seek`].
#[inline(never)]
fn pass_alike(leases: Opened<'_, WORDS4, 8>, frames: &[RawFrame], way: Way, now_ns: u64) -> u32 {
    debug_assert!(!way.is_tcp(), "each segment moves its connections' state");
    let (mut passed, mut usual) = (0, Unpadded4::new(0));
    // The first frame's bit is the lowest.
    for frame in frames.iter().rev() {
        let header = ipv4_headers(frame);
        if frame.frame_bytes != usual.frame_bytes() {
            usual = Unpadded4::new(frame.frame_bytes);
        }
        let passes = (usual.has(header) || has_key(header, frame.frame_bytes))
            && leases
                .held_near(&FlowKey::of(header))
                .is_some_and(|lease| lease.way() == way && now_ns < lease.until_ns());
        passed = passed << 1 | u32::from(passes);
    }
    passed
}

/// What is found out about the frames of flows with leases.
struct Settled {
    /// Where the last lease leads and what it must have been made from: the same for most of a burst.
    way: Way,
    next_hop: NextHop,
    /// Frames that go there.
    frames: u32,
    /// Flows that are left.
    left: u32,
    /// There is one that has no lease.
    unknown: bool,
}

impl Perimeters {
    /// Sets the next hop of every frame of port `from` whose flow has a lease.
    #[inline]
    pub(crate) fn recall(&mut self, from: PortId, burst: &mut Burst, fdb_epoch: u64, snapshot: &Snapshot) -> Recalled {
        let mut recalled = Recalled::default();
        let Some(own) = self.slots[usize::from(from.0)].as_deref() else { return recalled };
        let leases = own.leases.open();
        // Most frames of a burst by leases that lead one way: the next one's probably too.
        let mut alike = None;
        if own.conntrack.len() <= FEW_FLOWS
            && burst.are_undecided
            && let Some(next_hop) = self.next_hop(from, own.way, fdb_epoch)
        {
            debug_assert!(burst.next_hops[..burst.length].iter().all(|hop| *hop == NextHop::Undecided));
            recalled.passed = pass_alike(leases, &burst.frames[..burst.length], own.way, self.now_ns);
            burst.decide(recalled.passed, next_hop);
            if recalled.passed.count_ones() as usize == burst.length {
                return recalled;
            }
            alike = Some((own.way, recalled.passed));
        }
        // First all places, so that memory is waited for once.
        let (frames, next_hops) = (&burst.frames[..burst.length], &burst.next_hops);
        let seek = if own.all_known { seek::<false> } else { seek::<true> };
        let Sought { count, unknown, others } = seek(leases, frames, next_hops, &mut self.asked);
        let settled = self.settle(leases, from, burst, count, fdb_epoch, &mut recalled);
        let all_known = !unknown && !settled.unknown && (count != 0 || own.all_known);
        let (way, alike) = alike.unwrap_or((settled.way, settled.frames));
        if settled.left != 0 {
            self.recall_left(from, burst, settled.left, fdb_epoch, snapshot, &mut recalled);
        }
        if others {
            self.recall_ipv6(from, burst, fdb_epoch, snapshot, &mut recalled);
        }
        if let Some(own) = self.get(from) {
            own.all_known = all_known;
            own.way = if all_known && 2 * alike.count_ones() as usize > burst.length { way } else { Way::NONE };
        }
        recalled
    }

    /// Where a lease of port `from` leads, if nothing has changed that it was made from.
    #[inline]
    pub(super) fn next_hop(&self, from: PortId, way: Way, fdb_epoch: u64) -> Option<NextHop> {
        let next_hop = self.hops.next_hop(way.hop())?;
        (way.epoch() == fdb_epoch + self.epoch_between(Some(from), next_hop)).then_some(next_hop)
    }

    /// Sets the next hop of the frames of `count` flows asked for, if their leases are where they are looked for first. Not
    /// inlined: it needs all registers that there are.
    #[inline(never)]
    fn settle(
        &self,
        leases: Opened<'_, WORDS4, 8>,
        from: PortId,
        burst: &mut Burst,
        count: usize,
        fdb_epoch: u64,
        recalled: &mut Recalled,
    ) -> Settled {
        let mut settled = Settled { way: Way::NONE, next_hop: NextHop::Undecided, frames: 0, left: 0, unknown: false };
        for (slot, asked) in self.asked[1..=count].iter().enumerate() {
            let look = leases.look(asked.place, &asked.key(&burst.frames));
            let lease = leases.held(asked.place);
            if look == Look::Here && lease.way() == settled.way && self.now_ns < lease.until_ns() {
                settled.frames |= asked.frames;
            } else {
                self.settle_other(leases, from, burst, slot, look, fdb_epoch, &mut settled, recalled);
            }
        }
        burst.decide(settled.frames, settled.next_hop);
        recalled.passed |= settled.frames;
        settled
    }

    /// The same for a flow that is not like the last one.
    #[allow(clippy::too_many_arguments, reason = "what `settle` knows")]
    #[inline(never)]
    fn settle_other(
        &self,
        leases: Opened<'_, WORDS4, 8>,
        from: PortId,
        burst: &mut Burst,
        slot: usize,
        look: Look,
        fdb_epoch: u64,
        settled: &mut Settled,
        recalled: &mut Recalled,
    ) {
        let asked = self.asked[1 + slot];
        let lease = leases.held(asked.place);
        match look {
            Look::Here if !lease.way().is_tcp() => {}
            Look::Nowhere => {
                settled.unknown = true;
                return;
            }
            _ => {
                if look == Look::Elsewhere {
                    leases.look_elsewhere(asked.place);
                }
                settled.left |= 1 << slot;
                return;
            }
        }
        if lease.way() != settled.way {
            let Some(next_hop) = self.next_hop(from, lease.way(), fdb_epoch) else { return };
            burst.decide(settled.frames, settled.next_hop);
            recalled.passed |= settled.frames;
            (settled.way, settled.next_hop, settled.frames) = (lease.way(), next_hop, 0);
        }
        if self.now_ns < lease.until_ns() {
            settled.frames |= asked.frames;
        } else {
            recalled.due |= asked.frames;
        }
    }

    /// The same for the flows that `left` has a bit for: TCP, and those whose leases are not in their first places. Frame by frame:
    /// what a segment ends may be what others' leases were made from.
    #[inline(never)]
    fn recall_left(
        &mut self,
        from: PortId,
        burst: &mut Burst,
        left: u32,
        fdb_epoch: u64,
        snapshot: &Snapshot,
        recalled: &mut Recalled,
    ) {
        for slot in bits(left) {
            let asked = self.asked[1 + slot];
            let key = asked.key(&burst.frames);
            for index in bits(asked.frames) {
                let Some(own) = self.slots[usize::from(from.0)].as_deref() else { return };
                let Some(lease) = own.leases.open().find(&key) else { break };
                let (until_ns, connections) = (lease.until_ns(), lease.connections());
                let Some(next_hop) = self.next_hop(from, lease.way(), fdb_epoch) else { break };
                if self.now_ns >= until_ns {
                    recalled.due |= 1 << index;
                } else if key.is_tcp() {
                    self.pass(from, burst, index, next_hop, connections, snapshot, recalled);
                } else {
                    burst.next_hops[index] = next_hop;
                    recalled.passed |= 1 << index;
                }
            }
        }
    }

    /// The same for IPv6, frame by frame.
    fn recall_ipv6(
        &mut self,
        from: PortId,
        burst: &mut Burst,
        fdb_epoch: u64,
        snapshot: &Snapshot,
        recalled: &mut Recalled,
    ) {
        for index in 0..burst.length {
            let frame = &burst.frames[index];
            if burst.next_hops[index] != NextHop::Undecided || recalled.due & 1 << index != 0 {
                continue;
            }
            let Some(key) = FlowKey::ipv6(frame.headers(), frame.frame_bytes) else { continue };
            let Some(own) = self.slots[usize::from(from.0)].as_deref() else { return };
            let Some(lease) = own.leases6.open().find(&key) else { continue };
            let Some(next_hop) = self.next_hop(from, lease.way(), fdb_epoch) else { continue };
            if self.now_ns >= lease.until_ns() {
                recalled.due |= 1 << index;
            } else if key.is_tcp() {
                self.pass(from, burst, index, next_hop, lease.connections(), snapshot, recalled);
            } else {
                burst.next_hops[index] = next_hop;
                recalled.passed |= 1 << index;
            }
        }
    }
}
