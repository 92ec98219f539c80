//! Our driver against our device, in one thread: every frame arrives whole, in order, once, over both layouts of ring.
#![allow(clippy::unwrap_used)] // also in the helpers, which clippy does not take for tests

use std::net::Ipv4Addr;
use std::sync::Arc;

use dreamwire_bench::front_end::layout::RingLayout;
use dreamwire_bench::front_end::memory::{Arena, GuestMemory};
use dreamwire_bench::front_end::packed::{EVENT_DESC, EVENT_DISABLE, EVENT_ENABLE};
use dreamwire_bench::front_end::position::Position;
use dreamwire_bench::front_end::{ChainShape, Options, QueuePair, RawDriver, feature};
use dreamwire_bench::traffic::frame::{self, Endpoint};
use dreamwire_vhost::eventfd::EventFd;
use dreamwire_vhost::frame::RawFrame;
use dreamwire_vhost::memory::Memory;
use dreamwire_vhost::ring::{BURST, Ring, RingSetup};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const A: Endpoint = Endpoint { mac: [2, 0, 0, 0, 0, 1], address: Ipv4Addr::new(10, 0, 0, 1) };
const B: Endpoint = Endpoint { mac: [2, 0, 0, 0, 0, 2], address: Ipv4Addr::new(10, 0, 0, 2) };
const FEATURES: u64 = feature::VERSION_1 | feature::MRG_RXBUF | feature::INDIRECT_DESC | feature::RING_PACKED;

/// Sends what the driver sends back to it.
struct Echo {
    pair: QueuePair,
    memory: Arc<GuestMemory>,
    from_driver: Ring,
    to_driver: Ring,
    calls: u64,
}

fn echo(options: &Options, features: u64) -> Echo {
    let memory = Arc::new(GuestMemory::new(options.memory_bytes(), options.regions).unwrap());
    let mut arena = Arena::new(&memory);
    let pair = QueuePair::new(&memory, &mut arena, options, features).unwrap();
    let ranges = memory.regions().iter().map(|region| {
        let file = FileOffset::new(memory.file().unwrap(), region.file_offset);
        (GuestAddress(region.guest_address), region.bytes as usize, Some(file))
    });
    let mapped = Arc::new(Memory::new(Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())).unwrap());
    let base = if features & feature::RING_PACKED != 0 {
        Position::after_start(options.ring_base, options.ring_size).bits()
    } else {
        options.ring_base
    };
    let ring = |layout: RingLayout| {
        let at = |offset| memory.guest_address(offset);
        let setup = RingSetup {
            memory: Arc::clone(&mapped),
            size: layout.size,
            descriptors: at(layout.descriptor_table),
            available: at(layout.available_ring),
            used: at(layout.used_ring),
            next_avail: base,
            next_used: base,
            features,
            enabled: true,
            kick: None,
            call: Some(EventFd::new().unwrap()),
            error: None,
            log: None,
            inflight: None,
            fault: None,
        };
        Ring::resume(setup).unwrap()
    };
    let (from_driver, to_driver) = (ring(pair.transmit.ring().layout()), ring(pair.receive.ring().layout()));
    Echo { from_driver, to_driver, pair, memory, calls: 0 }
}

impl Echo {
    fn turn(&mut self) {
        let mut frames = vec![RawFrame::EMPTY; BURST];
        let count = self.from_driver.receive(&mut frames).unwrap();
        for frame in &frames[..count] {
            assert_eq!(frame.fault, None);
            let payload = self.from_driver.payload(frame);
            self.to_driver.send(frame.net, frame.headers(), payload).unwrap();
        }
        self.to_driver.flush();
        self.calls += u64::from(self.from_driver.complete());
    }

    fn carries(&mut self, sizes: &[usize], rounds: u64) {
        let mut sequence = 0;
        for _ in 0..rounds {
            let frames: Vec<_> = sizes
                .iter()
                .map(|bytes| {
                    sequence += 1;
                    frame::frame(A, B, *bytes, 0, sequence)
                })
                .collect();
            let mut returned = Vec::new();
            let mut rest: &[Vec<u8>] = &frames;
            while returned.len() < frames.len() {
                // What fits the receive ring whole, however small its buffers.
                let burst: Vec<&[u8]> = rest.iter().take(1).map(Vec::as_slice).collect();
                rest = &rest[self.pair.transmit.send_burst(&burst).unwrap()..];
                self.turn();
                self.pair.receive.receive_burst(|frame, _| returned.push(frame.to_vec())).unwrap();
            }
            assert!(returned == frames, "frames differ");
        }
        assert_eq!((self.pair.transmit.sent(), self.pair.receive.received()), (sequence, sequence));
        assert_eq!(self.pair.receive.torn(), 0);
    }
}

#[test]
fn frames_of_every_size_survive_every_shape_of_chain_and_ring() {
    let sizes: Vec<_> = (frame::FRAME_BYTES_MIN..=frame::FRAME_BYTES_MAX).step_by(97).chain([1518]).collect();
    for (ring_size, ring_base) in [(3, 0), (3, 5), (7, 6), (16, 65530), (250, 249), (256, 0)] {
        for descriptors in [1, 2, 3, 5] {
            for indirect in [false, true] {
                if descriptors > ring_size && !indirect {
                    continue;
                }
                for event_idx in [0, feature::EVENT_IDX] {
                    let shape = ChainShape { descriptors, indirect };
                    let options =
                        Options { ring_size, ring_base, tx_chain: shape, rx_chain: shape, ..Options::default() };
                    echo(&options, FEATURES | event_idx).carries(&sizes, 3);
                    if ring_size.is_power_of_two() {
                        echo(&options, FEATURES & !feature::RING_PACKED | event_idx).carries(&sizes, 1);
                    }
                }
            }
        }
    }
}

#[test]
fn frames_of_many_buffers_are_put_together() {
    for rx_buffer_bytes in [128, 200, 1024] {
        let options = Options { rx_buffer_bytes, ring_size: 30, ..Options::default() };
        echo(&options, FEATURES | feature::EVENT_IDX).carries(&[60, 1518, 61, 777, 1518, 1518], 50);
    }
}

#[test]
fn the_largest_ring_and_the_smallest_carry_frames() {
    let options = Options {
        ring_size: 32768,
        ring_base: 32760,
        rx_buffer_bytes: 256,
        tx_buffer_bytes: 256,
        ..Options::default()
    };
    echo(&options, FEATURES).carries(&[60, 200], 100);
    echo(&Options { ring_size: 1, ..Options::default() }, FEATURES | feature::EVENT_IDX).carries(&[60, 200], 1000);
}

#[test]
fn polling_driver_is_never_called_and_a_waiting_one_is_called_once() {
    for (event_idx, asked) in [(0, EVENT_ENABLE), (feature::EVENT_IDX, EVENT_DESC)] {
        let mut echo = echo(&Options { ring_size: 5, ..Options::default() }, FEATURES | event_idx);
        echo.carries(&[60], 1000);
        assert_eq!(echo.calls, 0, "polling");
        echo.pair.transmit.reap().unwrap();
        assert!(echo.pair.transmit.enable_calls());
        let ring = echo.pair.transmit.ring().layout();
        let raw = RawDriver::new(echo.memory.clone(), ring, echo.pair.transmit.doorbell().clone());
        assert_eq!((raw.events().0 >> 16) as u16, asked);
        let frame = frame::frame(A, B, 64, 0, 0);
        echo.pair.transmit.send_burst(&[&frame]).unwrap();
        echo.turn();
        assert_eq!(echo.calls, 1);
        // The same descriptor is not used again in this lap.
        echo.pair.transmit.send_burst(&[&frame]).unwrap();
        echo.turn();
        assert_eq!(echo.calls, if asked == EVENT_DESC { 1 } else { 2 });
    }
}

#[test]
fn device_that_wants_no_kick_gets_none() {
    for event_idx in [0, feature::EVENT_IDX] {
        let mut echo = echo(&Options { ring_size: 5, ..Options::default() }, FEATURES | event_idx);
        let frame = frame::frame(A, B, 64, 0, 0);
        for expected in 1..20 {
            assert!(!echo.from_driver.enable_kicks());
            echo.pair.transmit.send_burst(&[&frame]).unwrap();
            assert_eq!(echo.pair.transmit.doorbell().kicks(), expected);
            echo.from_driver.disable_kicks();
            echo.turn();
            echo.pair.transmit.send_burst(&[&frame]).unwrap();
            echo.turn();
            assert_eq!(echo.pair.transmit.doorbell().kicks(), expected, "the device polls");
            echo.pair.receive.receive_burst(|_, _| ()).unwrap();
        }
        let ring = echo.pair.transmit.ring().layout();
        let raw = RawDriver::new(echo.memory.clone(), ring, echo.pair.transmit.doorbell().clone());
        assert_eq!((raw.events().1 >> 16) as u16, EVENT_DISABLE);
    }
}
