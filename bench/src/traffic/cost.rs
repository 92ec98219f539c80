//! What the harness costs by itself: generator and sink against a device that does nothing, in the same thread.
//!
//! The device only moves indices; its time is not counted. Caches are warm and no other core takes part, so this is the
//! least that a frame costs the harness: a bound on what it can measure, not a prediction.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::frame::{Endpoint, FlowSet};
use super::sink::{Arrived, Sink};
use super::throughput::Failure;
use crate::front_end::header::HEADER_BYTES_MAX;
use crate::front_end::layout::RingLayout;
use crate::front_end::memory::{Arena, GuestMemory};
use crate::front_end::packed::EVENT_DISABLE;
use crate::front_end::position::{DESC_AVAIL, DESC_USED, Position};
use crate::front_end::ring::Ring;
use crate::front_end::{BURST, FrontEndError, Options, QueuePair, VirtioNetHeader, feature};

/// Frames per measurement; the quickest counts, as the one that nothing else on the machine disturbed.
const SLICE_FRAMES: u64 = 1 << 16;

/// Nanoseconds per frame.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// Reaping and reposting.
    pub generator_ns: f64,
    /// Receiving, checking and refilling.
    pub sink_ns: f64,
    /// What the sink made of the frames.
    pub arrived: Arrived,
}

/// Sends and receives `frames` frames of `size` bytes in `flows` flows, over packed or split rings.
///
/// # Errors
/// No memory, or a ring gone wrong.
///
/// # Panics
/// If `size` or `flows` are outside of what [`FlowSet::new`] takes.
pub fn measure(size: usize, flows: usize, sample: u64, frames: u64, packed: bool) -> Result<Cost, Failure> {
    let mut options = Options { spare_bytes: (16 << 20) + flows * 2 * (size + 256), ..Options::default() };
    options.features |= if packed { feature::RING_PACKED } else { 0 };
    let memory = GuestMemory::new(options.memory_bytes(), 1)
        .map_err(|source| FrontEndError::System { doing: "making guest memory", source })?;
    let memory = Arc::new(memory);
    let mut arena = Arena::new(&memory);
    let mut pair = QueuePair::new(&memory, &mut arena, &options, options.features & !feature::PROTOCOL_FEATURES)?;

    let endpoint = |last| Endpoint { mac: [0x52, 0x54, 0, 0, 0, last], address: Ipv4Addr::new(10, 0, 0, last) };
    let set = FlowSet::new(endpoint(1), endpoint(2), size, flows, usize::from(options.ring_size));
    pair.transmit.load_templates(&mut arena, set.frames(), set.header())?;
    let generator_ns = generate(&mut pair, &memory, frames)?;
    let mut sink = Sink::new(&set, sample);
    let sink_ns = consume(&mut pair, &memory, &set, &mut sink, frames)?;
    Ok(Cost { generator_ns, sink_ns, arrived: sink.arrived() })
}

fn generate(pair: &mut QueuePair, memory: &GuestMemory, frames: u64) -> Result<f64, Failure> {
    let mut device = IdleDevice::new(pair.transmit.ring());
    let mut slices = Slices::default();
    while pair.transmit.sent() < frames {
        let started = Instant::now();
        let count = pair.transmit.repost_burst(BURST)?;
        slices.add(u64::from(count), started.elapsed());
        device.finish(memory, BURST, 0);
    }
    Ok(slices.quickest_ns())
}

fn consume(
    pair: &mut QueuePair,
    memory: &GuestMemory,
    set: &FlowSet,
    sink: &mut Sink<'_>,
    frames: u64,
) -> Result<f64, Failure> {
    let layout = pair.receive.ring().layout();
    let header = VirtioNetHeader { num_buffers: 1, ..VirtioNetHeader::default() }.to_bytes();
    let mut device = IdleDevice::new(pair.receive.ring());
    let mut slices = Slices::default();
    // The idle device leaves a buffer's frame as it is, so sequence numbers repeat with the ring: the sink sees gaps if
    // the set is longer than the ring, and they are of no concern here.
    for (slot, frame) in (0..layout.size).zip(set.frames()) {
        let region = memory.regions()[0];
        let address = memory.load_u64(layout.descriptor(slot)) - region.guest_address;
        memory.write(address as usize, &header);
        memory.write(address as usize + HEADER_BYTES_MAX, frame);
    }
    let bytes = (set.frames()[0].len() + HEADER_BYTES_MAX) as u32;
    while pair.receive.received() < frames {
        device.finish(memory, BURST, bytes);
        let started = Instant::now();
        let count = pair.receive.receive_views(sink)?;
        slices.add(count as u64, started.elapsed());
    }
    Ok(slices.quickest_ns())
}

/// Busy time in slices of [`SLICE_FRAMES`].
#[derive(Default)]
struct Slices {
    frames: u64,
    busy: Duration,
    quickest: Option<f64>,
}

impl Slices {
    fn add(&mut self, frames: u64, busy: Duration) {
        self.frames += frames;
        self.busy += busy;
        if self.frames >= SLICE_FRAMES {
            let ns = self.busy.as_nanos() as f64 / self.frames as f64;
            self.quickest = Some(self.quickest.map_or(ns, |quickest| quickest.min(ns)));
            (self.frames, self.busy) = (0, Duration::ZERO);
        }
    }

    fn quickest_ns(&self) -> f64 {
        self.quickest.unwrap_or(f64::NAN)
    }
}

/// Uses every chain, of one descriptor each, as it finds it.
enum IdleDevice {
    Split { layout: RingLayout, next: u16 },
    Packed { layout: RingLayout, next: Position },
}

impl IdleDevice {
    fn new(ring: &Ring) -> Self {
        let layout = ring.layout();
        if ring.is_packed() {
            // A device that polls: RING_EVENT_FLAGS_DISABLE.
            ring.memory().store_u32(layout.used_ring, u32::from(EVENT_DISABLE) << 16);
            Self::Packed { layout, next: Position::START }
        } else {
            Self::Split { layout, next: 0 }
        }
    }

    fn finish(&mut self, memory: &GuestMemory, most: u16, bytes: u32) {
        match self {
            Self::Split { layout, next } => {
                // Acquire: pairs with the driver's release store (in the same thread, for form's sake).
                let available = memory.load_u16(layout.available_index(), Ordering::Acquire);
                for _ in 0..available.wrapping_sub(*next).min(most) {
                    let head = memory.load_u16(layout.available_entry(*next), Ordering::Relaxed);
                    let entry = layout.used_entry(*next);
                    memory.store_u32(entry, u32::from(head));
                    memory.store_u32(entry + 4, bytes);
                    *next = next.wrapping_add(1);
                }
                // Release: pairs with the driver's acquire load of idx.
                memory.store_u16(layout.used_index(), *next, Ordering::Release);
            }
            Self::Packed { layout, next } => {
                for _ in 0..most {
                    let at = layout.descriptor(next.index);
                    // Acquire: pairs with the driver's release store of the flags.
                    let flags = memory.load_u16(at + 14, Ordering::Acquire);
                    if flags & (DESC_AVAIL | DESC_USED) != next.available_flags() {
                        break;
                    }
                    memory.store_u32(at + 8, bytes);
                    // Release: pairs with the driver's acquire load.
                    memory.store_u16(at + 14, next.used_flags(), Ordering::Release);
                    *next = next.after(1, layout.size);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_is_sent_received_and_found_good() {
        for (size, flows, packed) in [(64, 1, false), (1518, 7, false), (64, 1, true)] {
            let cost = measure(size, flows, 1, 5000, packed).unwrap();
            assert!(cost.arrived.good >= 5000, "{cost:?}");
            assert_eq!((cost.arrived.corrupt, cost.arrived.foreign), (0, 0));
        }
    }
}
