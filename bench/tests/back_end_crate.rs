//! Our front-end against rust-vmm's vhost-user-backend: kicked and calling, not polling.
#![allow(clippy::unwrap_used)] // also in the helpers, which clippy does not take for tests

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use dreamwire_bench::front_end::header::HEADER_BYTES_MAX;
use dreamwire_bench::front_end::{FrontEnd, FrontEndError, Options, feature};
use dreamwire_bench::traffic::frame::{self, Endpoint};
use vhost::vhost_user::{Listener, VhostUserProtocolFeatures};
use vhost_user_backend::{VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

type Memory = GuestMemoryAtomic<GuestMemoryMmap>;

const A: Endpoint = Endpoint { mac: [2, 0, 0, 0, 0, 1], address: Ipv4Addr::new(10, 0, 0, 1) };
const B: Endpoint = Endpoint { mac: [2, 0, 0, 0, 0, 2], address: Ipv4Addr::new(10, 0, 0, 2) };

/// Puts every frame of the transmitq into the receiveq, one buffer each, when kicked.
struct Echo {
    memory: Mutex<Option<Memory>>,
}

impl VhostUserBackend for Echo {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        1024
    }

    fn features(&self) -> u64 {
        feature::VERSION_1
            | feature::MRG_RXBUF
            | feature::EVENT_IDX
            | feature::INDIRECT_DESC
            | feature::PROTOCOL_FEATURES
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn set_event_idx(&self, _: bool) {}

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *self.memory.lock().unwrap() = Some(memory);
        Ok(())
    }

    /// Without one the worker thread never ends, and the daemon's drop waits for it.
    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn handle_event(&self, ring: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        if ring != 1 {
            return Ok(());
        }
        let memory = self.memory.lock().unwrap().clone().unwrap();
        loop {
            vrings[1].disable_notification().unwrap();
            self.echo(&memory, vrings);
            if !vrings[1].enable_notification().unwrap() {
                break;
            }
        }
        for vring in vrings {
            if vring.needs_notification().unwrap() {
                vring.signal_used_queue().unwrap();
            }
        }
        Ok(())
    }
}

impl Echo {
    fn echo(&self, memory: &Memory, vrings: &[VringRwLock]) {
        let guest = memory.memory();
        let pop = |vring: &VringRwLock| vring.get_mut().get_queue_mut().pop_descriptor_chain(guest.clone());
        while let Some(chain) = pop(&vrings[1]) {
            let head = chain.head_index();
            let mut frame = Vec::new();
            for descriptor in chain {
                let at = frame.len();
                frame.resize(at + descriptor.len() as usize, 0);
                guest.read_slice(&mut frame[at..], descriptor.addr()).unwrap();
            }
            frame[10..HEADER_BYTES_MAX].copy_from_slice(&1_u16.to_le_bytes());
            let buffer = pop(&vrings[0]).expect("the test posts more buffers than frames");
            let buffer_head = buffer.head_index();
            let address: GuestAddress = buffer.into_iter().next().unwrap().addr();
            guest.write_slice(&frame, address).unwrap();
            vrings[0].add_used(buffer_head, frame.len() as u32).unwrap();
            vrings[1].add_used(head, 0).unwrap();
        }
    }
}

fn serve(path: &Path) -> thread::JoinHandle<()> {
    let mut listener = Listener::new(path, true).unwrap();
    thread::spawn(move || {
        let backend = Arc::new(Echo { memory: Mutex::new(None) });
        let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
        let mut daemon = VhostUserDaemon::new("echo".into(), backend, memory).unwrap();
        daemon.start(&mut listener).unwrap();
        // Ends with "disconnected" when the front-end goes.
        let _ = daemon.wait();
    })
}

fn echo(options: Options) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo.sock");
    let server = serve(&path);
    let mut front_end = FrontEnd::connect(&path, options.clone()).unwrap();
    let pair = &mut front_end.pairs()[0];
    for sequence in 0..1000 {
        let sent = frame::frame(A, B, 60 + sequence % 1400, 0, sequence as u64);
        assert_eq!(pair.transmit.send_burst(&[&sent]).unwrap(), 1);
        let mut returned = Vec::new();
        while returned.is_empty() {
            if pair.receive.enable_calls() {
                assert!(pair.receive.doorbell().wait(Duration::from_secs(5)).unwrap(), "no call for frame {sequence}");
                pair.receive.doorbell().calls();
            }
            pair.receive.suppress_calls();
            pair.receive.receive_burst(|frame, _| returned.push(frame.to_vec())).unwrap();
        }
        assert!(returned == [sent], "frame {sequence} differs");
    }
    let base = options.ring_base.wrapping_add(1000);
    assert_eq!(front_end.stop().unwrap(), [base, base]);
    drop(front_end);
    server.join().unwrap();
}

#[test]
fn kicked_back_end_echoes_and_calls() {
    echo(Options::default());
}

#[test]
fn without_event_idx_the_flags_are_honoured() {
    echo(Options {
        features: Options::default().features & !feature::EVENT_IDX,
        ring_base: 65000,
        ..Options::default()
    });
}

#[test]
fn memory_is_added_region_by_region_when_both_can() {
    let slots = VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS.bits();
    let protocol_features = Options::default().protocol_features | slots;
    echo(Options { protocol_features, regions: 8, ..Options::default() });
}

#[test]
fn missing_feature_is_named_and_missing_back_end_too() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("echo.sock");
    let options = Options { features_required: feature::IN_ORDER, ..Options::default() };
    let server = serve(&path);
    let error = FrontEnd::connect(&path, options).unwrap_err();
    assert!(matches!(error, FrontEndError::MissingFeatures { missing: feature::IN_ORDER, .. }), "{error}");
    server.join().unwrap();
    let options = Options { timeout: Duration::from_millis(50), ..Options::default() };
    let error = FrontEnd::connect(&directory.path().join("none"), options).unwrap_err();
    assert!(error.to_string().contains("none"), "{error}");
}
