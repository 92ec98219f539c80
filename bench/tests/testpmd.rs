//! Our front-end against a back-end that others wrote: DPDK's vhost library, in testpmd.
//!
//! Without dpdk-testpmd these tests say so and pass, unless CI=true: then they fail.
#![allow(clippy::unwrap_used)] // also in the helpers, which clippy does not take for tests

use std::io::Write;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use dreamwire_bench::front_end::position::Position;
use dreamwire_bench::front_end::{ChainShape, FrontEnd, MessageOrder, Options, feature};
use dreamwire_bench::traffic::frame::{self, Endpoint};
use dreamwire_bench::traffic::testpmd::{self, TestpmdOptions};
use dreamwire_bench::traffic::throughput::Throughput;
use dreamwire_bench::traffic::{DeviceUnderTest, Plan, Testpmd};

const A: Endpoint = Endpoint { mac: [2, 0, 0, 0, 0, 1], address: Ipv4Addr::new(10, 0, 0, 1) };
const B: Endpoint = Endpoint { mac: [2, 0, 0, 0, 0, 2], address: Ipv4Addr::new(10, 0, 0, 2) };

/// testpmd busy-polls a whole core: one at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn start(options: &TestpmdOptions) -> Option<(Testpmd, MutexGuard<'static, ()>)> {
    if !testpmd::is_installed() {
        let message = "SKIPPED: dpdk-testpmd is not installed (apt-get install dpdk-dev); nothing was tested\n";
        assert!(std::env::var("CI").as_deref() != Ok("true"), "{message}");
        // Past the test harness, which swallows what a passing test prints.
        std::io::stderr().write_all(message.as_bytes()).unwrap();
        return None;
    }
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let cpus = std::thread::available_parallelism().unwrap().get();
    let options = TestpmdOptions { cpu: cpus - 1, ..options.clone() };
    Some((Testpmd::start(Path::new("/tmp"), &options).unwrap(), guard))
}

fn open(device: &DeviceUnderTest, options: &Options) -> (FrontEnd, FrontEnd) {
    let open = if device.is_client { FrontEnd::listen } else { FrontEnd::connect };
    (open(&device.from, options.clone()).unwrap(), open(&device.to, options.clone()).unwrap())
}

/// A short round; every frame compared to its last byte.
fn carries(from: &mut FrontEnd, to: &mut FrontEnd, ring_size: u16, size: usize, flows: usize) {
    let plan = Plan { size, flows, duration: Duration::from_millis(50), sample: 1, from: A, to: B, ..Plan::default() };
    let set = Throughput::flow_set(&plan, ring_size);
    let mut throughput = Throughput::new(from, to, plan, &set).unwrap();
    throughput.warm_up().unwrap();
    let round = throughput.round().unwrap();
    assert!(round.received > 0, "{round:?}");
    assert_eq!(round.corrupt, 0, "{round:?}");
    assert_eq!(round.received + round.lost, round.sent, "{round:?}");
    assert!(round.in_order, "{round:?}");
}

#[test]
fn frames_go_through_testpmd_whole() {
    let Some((testpmd, _guard)) = start(&TestpmdOptions::default()) else { return };
    let shapes =
        [(1, false), (2, false), (3, true)].map(|(descriptors, indirect)| ChainShape { descriptors, indirect });
    for (order, tx_chain) in
        [MessageOrder::Specification, MessageOrder::Qemu, MessageOrder::Specification].into_iter().zip(shapes)
    {
        let options = Options { order, tx_chain, ring_base: 65000, ..Options::default() };
        // Another front-end connects where the one before has left: a guest that reboots.
        let (mut from, mut to) = open(testpmd.device(), &options);
        carries(&mut from, &mut to, options.ring_size, 64, 1);
        carries(&mut from, &mut to, options.ring_size, 1518, 10);
    }
}

#[test]
fn packed_rings_go_through_testpmd_whole() {
    let Some((testpmd, _guard)) = start(&TestpmdOptions::default()) else { return };
    let shapes =
        [(1, false), (2, false), (3, true)].map(|(descriptors, indirect)| ChainShape { descriptors, indirect });
    let features = Options::default().features | feature::RING_PACKED;
    for (without, tx_chain) in [feature::EVENT_IDX, 0, feature::MRG_RXBUF].into_iter().zip(shapes) {
        let options = Options {
            features: features & !without,
            features_required: feature::VERSION_1 | feature::RING_PACKED,
            tx_chain,
            ring_base: 1000,
            ..Options::default()
        };
        let (mut from, mut to) = open(testpmd.device(), &options);
        carries(&mut from, &mut to, options.ring_size, 64, 1);
        carries(&mut from, &mut to, options.ring_size, 1518, 10);
        // Stopped and started again where the device says it stands.
        let bases = from.stop().unwrap();
        let sent = from.pairs()[0].transmit.sent();
        let slots = u64::from(if tx_chain.indirect { 1 } else { tx_chain.descriptors });
        let position = 1000 + sent * slots;
        let expected = Position { index: (position % 256) as u16, wrap: (position / 256).is_multiple_of(2) };
        assert_eq!(Position::from_bits(bases[1]), expected, "all that was sent was taken");
        from.start().unwrap();
        carries(&mut from, &mut to, options.ring_size, 64, 1);
    }
}

#[test]
fn fewest_features_do() {
    let Some((testpmd, _guard)) = start(&TestpmdOptions::default()) else { return };
    // 0 is a legacy device with a header of ten bytes.
    for features in [0, feature::VERSION_1, feature::VERSION_1 | feature::MRG_RXBUF | feature::PROTOCOL_FEATURES] {
        let options =
            Options { features, features_required: features, rx_buffer_bytes: 2048, regions: 4, ..Options::default() };
        let (mut from, mut to) = open(testpmd.device(), &options);
        assert_eq!(from.negotiated().features, features);
        carries(&mut from, &mut to, options.ring_size, 64, 1);
    }
}

#[test]
fn testpmd_can_connect_to_us() {
    let Some((testpmd, _guard)) = start(&TestpmdOptions { client: true, ..TestpmdOptions::default() }) else { return };
    let options = Options { rx_buffer_bytes: 512, ..Options::default() };
    let (mut from, mut to) = open(testpmd.device(), &options);
    carries(&mut from, &mut to, options.ring_size, 1518, 1);
}

#[test]
fn stopped_rings_report_their_index_and_start_again_from_it() {
    let Some((testpmd, _guard)) = start(&TestpmdOptions::default()) else { return };
    let options = Options::default();
    let (mut from, mut to) = open(testpmd.device(), &options);
    carries(&mut from, &mut to, options.ring_size, 64, 1);
    let bases = from.stop().unwrap();
    let transmit = &from.pairs()[0].transmit;
    assert_eq!(bases[1], transmit.sent() as u16, "all that was sent was taken");
    from.start().unwrap();
    carries(&mut from, &mut to, options.ring_size, 64, 1);
}

#[test]
fn waiting_driver_is_called_when_a_frame_arrives() {
    let Some((testpmd, _guard)) = start(&TestpmdOptions::default()) else { return };
    let features = Options::default().features;
    let packed = features | feature::RING_PACKED;
    for features in [features, features & !feature::EVENT_IDX, packed, packed & !feature::EVENT_IDX] {
        let options = Options { features, ..Options::default() };
        let (mut from, mut to) = open(testpmd.device(), &options);
        carries(&mut from, &mut to, options.ring_size, 64, 1);
        to.pairs()[0].receive.doorbell().calls();
        assert!(to.pairs()[0].receive.enable_calls());
        from.send_burst(&[&frame::frame(A, B, 64, 0, 0)]).unwrap();
        assert!(to.pairs()[0].receive.doorbell().wait(Duration::from_secs(5)).unwrap());
        let mut arrived = 0;
        let deadline = Instant::now() + Duration::from_secs(5);
        while arrived == 0 && Instant::now() < deadline {
            arrived += to.receive_burst(|_, _| ()).unwrap();
        }
        assert_eq!(arrived, 1);
    }
}

#[test]
fn two_queue_pairs_carry_frames_each() {
    let Some((testpmd, _guard)) = start(&TestpmdOptions { queue_pairs: 2, ..TestpmdOptions::default() }) else {
        return;
    };
    let options = Options { queue_pairs: 2, ..Options::default() };
    let (mut from, mut to) = open(testpmd.device(), &options);
    for pair in 0..2 {
        let sent = frame::frame(A, B, 100, pair as u16, 7);
        let mut arrived = [0, 0];
        let deadline = Instant::now() + Duration::from_secs(10);
        while arrived == [0, 0] && Instant::now() < deadline {
            // testpmd begins to forward some time after the rings are enabled; until then frames wait or are dropped.
            from.pairs()[pair].transmit.send_burst(&[&sent]).unwrap();
            for (arrived, pair) in arrived.iter_mut().zip(to.pairs()) {
                *arrived += pair.receive.receive_burst(|frame, _| assert_eq!(frame, sent)).unwrap();
            }
        }
        let settled = Instant::now() + Duration::from_millis(50);
        while Instant::now() < settled {
            for (arrived, pair) in arrived.iter_mut().zip(to.pairs()) {
                *arrived += pair.receive.receive_burst(|frame, _| assert_eq!(frame, sent)).unwrap();
            }
        }
        assert!(arrived[pair] > 0 && arrived[1 - pair] == 0, "pair {pair}: {arrived:?} arrived on the pairs");
    }
}
