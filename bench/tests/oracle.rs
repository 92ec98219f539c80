//! Our driver against virtio-queue's device, in one thread: every frame arrives whole, in order, once.
#![allow(clippy::unwrap_used)] // also in the helpers, which clippy does not take for tests

mod device;

use std::net::Ipv4Addr;
use std::sync::Arc;

use device::EchoDevice;
use dreamwire_bench::front_end::header::{HEADER_BYTES_MAX, bits};
use dreamwire_bench::front_end::memory::{Arena, GuestMemory};
use dreamwire_bench::front_end::split::RingError;
use dreamwire_bench::front_end::{ChainShape, Options, QueuePair, RawDriver, VirtioNetHeader, feature};
use dreamwire_bench::traffic::frame::{self, Endpoint};

const A: Endpoint = Endpoint { mac: [2, 0, 0, 0, 0, 1], address: Ipv4Addr::new(10, 0, 0, 1) };
const B: Endpoint = Endpoint { mac: [2, 0, 0, 0, 0, 2], address: Ipv4Addr::new(10, 0, 0, 2) };
const FEATURES: u64 = feature::VERSION_1 | feature::MRG_RXBUF | feature::INDIRECT_DESC;

struct Setup {
    memory: Arc<GuestMemory>,
    arena: Arena,
    pair: QueuePair,
    device: EchoDevice,
}

fn setup(options: &Options, features: u64) -> Setup {
    let memory = Arc::new(GuestMemory::new(options.memory_bytes(), options.regions).unwrap());
    let mut arena = Arena::new(&memory);
    let pair = QueuePair::new(&memory, &mut arena, options, features).unwrap();
    let (transmit, receive) = (pair.transmit.ring().layout(), pair.receive.ring().layout());
    let device = EchoDevice::new(&memory, transmit, receive, features & feature::EVENT_IDX != 0, options.ring_base);
    Setup { memory, arena, pair, device }
}

fn options() -> Options {
    Options { ring_size: 16, ring_base: 65530, ..Options::default() }
}

/// Sends frames of all sizes there and back, `rounds` times, and compares.
fn echo(options: &Options, features: u64, sizes: &[usize], rounds: u64) {
    let mut setup = setup(options, features);
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
            let burst: Vec<&[u8]> = rest.iter().map(Vec::as_slice).collect();
            let sent = setup.pair.transmit.send_burst(&burst).unwrap();
            rest = &rest[sent..];
            for echoed in setup.device.take() {
                setup.device.give(echoed);
            }
            setup.device.deliver();
            setup.pair.receive.receive_burst(|frame, _| returned.push(frame.to_vec())).unwrap();
        }
        assert!(returned == frames, "{options:?}: frames differ");
    }
    assert_eq!(setup.pair.transmit.sent(), sequence);
    assert_eq!(setup.pair.receive.received(), sequence);
}

#[test]
fn frames_of_every_size_survive_every_shape_of_chain() {
    let sizes: Vec<_> = (frame::FRAME_BYTES_MIN..=frame::FRAME_BYTES_MAX).step_by(27).chain([1518]).collect();
    for descriptors in [1, 2, 3, 5] {
        for indirect in [false, true] {
            for event_idx in [0, feature::EVENT_IDX] {
                let shape = ChainShape { descriptors, indirect };
                echo(&Options { tx_chain: shape, rx_chain: shape, ..options() }, FEATURES | event_idx, &sizes, 3);
            }
        }
    }
}

#[test]
fn frames_of_many_buffers_are_put_together() {
    let sizes = [60, 1518, 61, 777, 1518, 1518];
    for rx_buffer_bytes in [128, 200, 1024] {
        echo(&Options { rx_buffer_bytes, ..options() }, FEATURES | feature::EVENT_IDX, &sizes, 50);
    }
}

#[test]
fn memory_in_several_regions_is_addressed_correctly() {
    echo(&Options { regions: 8, spare_bytes: 0, ..options() }, FEATURES, &[60, 1518], 50);
}

#[test]
fn indices_wrap_many_times() {
    echo(&Options { ring_size: 2, ring_base: 0, ..options() }, FEATURES | feature::EVENT_IDX, &[60, 60], 70_000);
}

#[test]
fn polling_driver_is_never_called_and_a_waiting_one_is() {
    for features in [FEATURES | feature::EVENT_IDX] {
        let mut setup = setup(&options(), features);
        let frame = frame::frame(A, B, 64, 0, 0);
        setup.pair.transmit.send_burst(&[&frame]).unwrap();
        setup.device.take();
        // The first answer may be a call: virtio-queue has not notified before (VIRTIO 1.2 §2.7.7.2 leaves it to the device).
        let calls = setup.device.calls;
        for _ in 0..1000 {
            setup.pair.transmit.send_burst(&[&frame]).unwrap();
            setup.device.take();
        }
        assert_eq!(setup.device.calls, calls, "polling");
        setup.pair.transmit.reap().unwrap();
        assert!(setup.pair.transmit.enable_calls());
        setup.pair.transmit.send_burst(&[&frame]).unwrap();
        setup.device.take();
        assert_eq!(setup.device.calls, calls + 1, "waiting");
    }
}

#[test]
fn device_that_wants_no_kick_gets_none() {
    let mut setup = setup(&options(), FEATURES | feature::EVENT_IDX);
    let frame = frame::frame(A, B, 64, 0, 0);
    setup.device.want_kicks();
    setup.pair.transmit.send_burst(&[&frame]).unwrap();
    assert_eq!(setup.pair.transmit.doorbell().kicks(), 1);
    setup.pair.transmit.send_burst(&[&frame]).unwrap();
    assert_eq!(setup.pair.transmit.doorbell().kicks(), 1, "avail_event has not moved");
    setup.device.take();
    setup.device.want_kicks();
    setup.pair.transmit.send_burst(&[&frame]).unwrap();
    assert_eq!(setup.pair.transmit.doorbell().kicks(), 2);
}

#[test]
fn offload_header_reaches_the_device_as_given() {
    let mut setup = setup(&options(), FEATURES);
    let header =
        VirtioNetHeader { flags: bits::NEEDS_CSUM, csum_start: 34, csum_offset: 6, ..VirtioNetHeader::default() };
    let frame = frame::frame(A, B, 64, 0, 0);
    setup.pair.transmit.send_burst_with_headers(&[(header, &frame)]).unwrap();
    let taken = setup.device.take();
    assert_eq!(taken[0][..HEADER_BYTES_MAX], header.to_bytes());
    assert_eq!(taken[0][HEADER_BYTES_MAX..], frame);
}

#[test]
fn reposted_frames_go_round_in_order() {
    let mut setup = setup(&options(), FEATURES);
    let frames: Vec<_> = (0..20).map(|sequence| frame::frame(A, B, 64, 0, sequence)).collect();
    setup.pair.transmit.load_templates(&mut setup.arena, &frames, VirtioNetHeader::default()).unwrap();
    let mut taken = Vec::new();
    while taken.len() < 100 {
        setup.pair.transmit.repost_burst(7).unwrap();
        taken.extend(setup.device.take().into_iter().map(|frame| frame[HEADER_BYTES_MAX..].to_vec()));
    }
    for (index, taken) in taken.iter().enumerate() {
        assert_eq!(taken, &frames[index % frames.len()], "frame {index}");
    }
}

#[test]
fn full_ring_takes_no_more_and_nothing_is_lost() {
    let mut setup = setup(&options(), FEATURES);
    let frame = frame::frame(A, B, 64, 0, 0);
    assert_eq!(setup.pair.transmit.send_burst(&[frame.as_slice(); 20]).unwrap(), 16);
    assert_eq!(setup.pair.transmit.send_burst(&[frame.as_slice(); 20]).unwrap(), 0);
    assert_eq!(setup.device.take().len(), 16);
    assert_eq!(setup.pair.transmit.send_burst(&[frame.as_slice(); 20]).unwrap(), 16);
}

/// The device's side of the receive ring, through the raw handle.
fn raw_receive(setup: &Setup) -> RawDriver {
    let ring = setup.pair.receive.ring();
    RawDriver::new(setup.memory.clone(), ring.layout(), setup.pair.receive.doorbell().clone())
}

fn use_entry(raw: &RawDriver, index: u16, head: u32, bytes: u32) {
    let entry = raw.layout().used_entry(index);
    raw.memory().store_u32(entry, head);
    raw.memory().store_u32(entry + 4, bytes);
    raw.set_used_index(index.wrapping_add(1));
}

#[test]
fn device_that_breaks_the_rules_is_reported_not_believed() {
    let base = options().ring_base;
    let run = |spoil: &dyn Fn(&RawDriver)| {
        let mut setup = setup(&options(), FEATURES);
        spoil(&raw_receive(&setup));
        setup.pair.receive.receive_burst(|_, _| ()).unwrap_err()
    };
    assert_eq!(run(&|raw| use_entry(raw, base, 16, 100)), RingError::HeadNotOutstanding { head: 16 });
    assert_eq!(run(&|raw| use_entry(raw, base, 0, 11)), RingError::WrittenBytes { bytes: 11, least: 12, most: 2048 });
    assert_eq!(
        run(&|raw| use_entry(raw, base, 0, 4096)),
        RingError::WrittenBytes { bytes: 4096, least: 12, most: 2048 }
    );
    assert_eq!(run(&|raw| use_entry(raw, base, 0, 100)), RingError::BufferCount(0));
    let jump = RingError::IndexJump { from: base, to: base.wrapping_add(17), outstanding: 16 };
    assert_eq!(run(&|raw| raw.set_used_index(base.wrapping_add(17))), jump);
}

#[test]
fn frame_of_two_buffers_waits_until_both_are_used() {
    let mut setup = setup(&options(), FEATURES);
    let raw = raw_receive(&setup);
    let base = options().ring_base;
    let address = raw.descriptor(0).address - setup.memory.regions()[0].guest_address;
    let header = VirtioNetHeader { num_buffers: 2, ..VirtioNetHeader::default() };
    setup.memory.write(address as usize, &header.to_bytes());
    use_entry(&raw, base, 0, 2048);
    assert_eq!(setup.pair.receive.receive_burst(|_, _| ()), Ok(0));
    assert_eq!(setup.pair.receive.torn(), 1);
    use_entry(&raw, base.wrapping_add(1), 1, 100);
    let mut bytes = 0;
    assert_eq!(setup.pair.receive.receive_burst(|frame, _| bytes = frame.len()), Ok(1));
    assert_eq!(bytes, 2048 - 12 + 100);
}
