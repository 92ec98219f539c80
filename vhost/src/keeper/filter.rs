//! The message filter: a front-end's message in, actions out. No socket, no clock, no thread.
//!
//! Theory of operation. The session behind us (vhost-user-backend 0.24) follows the specification to the letter and
//! ends its connection at the first message it refuses. QEMU's network front-end does not follow the letter, and a
//! front-end is not to be trusted. So the keeper negotiates with the session on its own (features offered, protocol
//! features, ownership), answers the front-end's negotiation itself, and passes on only what was vetted:
//!
//! - SET_VRING_ENABLE waits until SET_FEATURES has passed: QEMU sends it before a driver exists. The front-end has its
//!   answer at once; the session gets the ring states right after the features.
//! - GET_QUEUE_NUM, STATUS, NET_SET_MTU, SEND_RARP and RESET_OWNER end here.
//! - The dirty log ends here too: SET_LOG_BASE, SET_LOG_FD, feature LOG_ALL and the log's part of SET_VRING_ADDR. What they
//!   come to is told to the session past the protocol engine.
//! - The in-flight region, the channel for requests of the back-end and the configuration space are no concern of the
//!   engine's either (`inflight.rs`, `config_space.rs`).
//! - The rest is checked, remembered in the [`SessionRecord`] and forwarded; the session's verdict is waited for.
//!
//! A message that cannot be served is *refused*: with a non-zero answer where the front-end asked for one (the session
//! goes on as if it had not come), and by a disconnect where it did not, for then nothing else tells it. Bytes that
//! are no vhost-user message end the connection always.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::config_space::{self, ConfigFault};
use super::inflight::{self, InflightRange};
use super::message::{
    self, Message, RingAddresses, RingNumber, encode_region, encode_regions, encode_ring_number, request as req,
};
use super::offer::{Offer, PRIVATE_FEATURES, VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, protocol};
use super::record::{MEMORY_SLOTS_MAX, MappedRegion, RingSignal, SessionRecord};
use super::vet::{self, Shrink};
use crate::dirty_log::DirtyLog;
use crate::inflight::Inflight;
use crate::owner::SessionEvent;
use crate::ring;
use crate::session::Logging;

/// VIRTIO 1.2 §2.7, §2.8: queue sizes go up to 32768, those of split rings in powers of two.
pub(crate) const RING_SIZE_MAX: u16 = 32768;

/// What the connection does next, in order.
#[derive(Debug)]
pub(super) enum Action {
    /// Send this to the session and wait for its verdict; if it refuses, the connection ends.
    Forward { request: u32, payload: Vec<u8>, descriptors: Vec<Arc<OwnedFd>> },
    /// Tell the session whether and where its rings log.
    SetLogging(Logging),
    /// Tell the session where its rings note what they have taken.
    SetInflight(Arc<Inflight>),
    /// Tell the session where a ring logs its used ring.
    SetUsedLog { index: u16, address: Option<u64> },
    /// Send GET_VRING_BASE to the session, its answer to the front-end, and tell [`Filter::ring_stopped`].
    StopRing { index: u16 },
    /// Tell the session that the driver has reset its device.
    DriverReset,
    /// Send this to the front-end.
    Reply { request: u32, payload: Vec<u8> },
    /// The same, with a descriptor.
    ReplyWithFile { request: u32, payload: Vec<u8>, file: Arc<OwnedFd> },
    /// Tell the ring owner.
    Report(SessionEvent),
    /// End the connection.
    Disconnect { reason: String },
}

/// Why a message is not served.
enum Fault {
    /// Not a vhost-user message: disconnect.
    Rubbish(String),
    /// Understood, but wrong: nack, or disconnect if no answer was asked for.
    Refused(String),
    /// Understood, not offered, and harmless to leave out: nack if an answer was asked for.
    Declined(String),
    /// The same, when it has been explained before.
    DeclinedAgain,
}

type Actions = Vec<Action>;

/// One connection's filter with the record of what has passed.
#[derive(Debug)]
pub(super) struct Filter {
    offer: Offer,
    record: SessionRecord,
    warned_unsealed: bool,
    warned_not_shared: bool,
    /// Features or a ring's state were agreed once: the front-end means to use the port.
    started: bool,
}

impl Filter {
    pub(super) fn new(offer: Offer) -> Self {
        let record = SessionRecord::new(offer.ring_count());
        Self { offer, record, warned_unsealed: false, warned_not_shared: false, started: false }
    }

    pub(super) fn record(&self) -> &SessionRecord {
        &self.record
    }

    /// Whether the front-end came further than to ask what there is.
    pub(super) fn started(&self) -> bool {
        self.started
    }

    /// Whether it did ask, as a vhost-user front-end does.
    pub(super) fn was_asked(&self) -> bool {
        self.record.protocol_features != 0
    }

    /// Judges one message.
    pub(super) fn judge(&mut self, message: Message) -> VecDeque<Action> {
        let request = message.header.request;
        let needs_reply = message.header.needs_reply() && !has_own_reply(request);
        let mut actions = Actions::new();
        let fault = match self.dispatch(message) {
            Ok(served) => {
                actions = served;
                None
            }
            Err(fault) => Some(fault),
        };
        // Asked afterwards: SET_PROTOCOL_FEATURES is answered under the rules that it has just set.
        let wants_ack = needs_reply && self.record.protocol_features & protocol::REPLY_ACK != 0;
        let ack = |value: u64| Action::Reply { request, payload: value.to_ne_bytes().to_vec() };
        let named = |reason: String| format!("{}: {reason}", req::name(request));
        match fault {
            None if wants_ack => actions.push(ack(0)),
            None => {}
            Some(Fault::Refused(reason) | Fault::Declined(reason)) if wants_ack => {
                actions.push(ack(1));
                actions.push(Action::Report(SessionEvent::Warning(named(reason))));
            }
            Some(Fault::DeclinedAgain) if wants_ack => actions.push(ack(1)),
            Some(Fault::DeclinedAgain) => {}
            Some(Fault::Declined(reason)) => actions.push(Action::Report(SessionEvent::Warning(named(reason)))),
            Some(Fault::Refused(reason) | Fault::Rubbish(reason)) => {
                actions.push(Action::Disconnect { reason: named(reason) });
            }
        }
        actions.into()
    }

    /// The session has answered GET_VRING_BASE; returns what the front-end is told. Of a packed ring the upper half
    /// says what is used next: the same, for a stopped ring has given everything back.
    pub(super) fn ring_stopped(&mut self, index: u16, base: u16) -> u32 {
        self.record.ring_stopped(usize::from(index), base);
        let base = u32::from(base);
        if self.record.features.is_some_and(ring::is_packed) { base | base << 16 } else { base }
    }

    /// Features are agreed but no memory has come. With QEMU 10: the VM's memory has no file to share, and its vhost
    /// device fails to start (or, with memory slots, goes on as if all was well).
    pub(super) fn memory_is_awaited(&self) -> bool {
        self.record.features.is_some() && self.record.memory.is_empty() && !self.warned_not_shared
    }

    /// The wait for memory was too long.
    pub(super) fn memory_is_overdue(&mut self) -> String {
        self.warned_not_shared = true;
        format!("the front-end has sent no memory: {}", super::MEMORY_NOT_SHARED)
    }

    fn dispatch(&mut self, message: Message) -> Result<Actions, Fault> {
        let Message { header, payload, descriptors } = message;
        let request = header.request;
        let descriptors_max = descriptors_max(request);
        if descriptors.len() > descriptors_max {
            return Err(Fault::Rubbish(format!(
                "came with {} descriptors, at most {descriptors_max} belong to it",
                descriptors.len()
            )));
        }
        self.check_negotiated(request)?;
        match request {
            req::GET_FEATURES => {
                no_payload(&payload)?;
                reply(request, self.offer.features | PRIVATE_FEATURES)
            }
            req::SET_FEATURES => self.set_features(number(&payload)?),
            // The session was claimed by the keeper when it was made; RESET_OWNER is deprecated ("no longer used").
            req::SET_OWNER | req::RESET_OWNER => no_payload(&payload).map(|()| Actions::new()),
            req::SET_MEM_TABLE => self.set_mem_table(&payload, descriptors),
            req::SET_LOG_BASE => self.set_log_base(payload, descriptors),
            // A descriptor to signal logged writes by; front-ends that migrate look at the log when they need it.
            req::SET_LOG_FD => no_payload(&payload).map(|()| Actions::new()),
            req::SET_VRING_NUM => self.set_ring_size(ring_number(&payload)?),
            req::SET_VRING_ADDR => self.set_ring_addresses(&payload),
            req::SET_VRING_BASE => self.set_ring_base(ring_number(&payload)?),
            req::GET_VRING_BASE => {
                let index = self.ring_index(ring_number(&payload)?.index)?;
                Ok(vec![Action::StopRing { index }])
            }
            req::SET_VRING_KICK | req::SET_VRING_CALL | req::SET_VRING_ERR => {
                self.set_ring_signal(request, number(&payload)?, descriptors)
            }
            req::GET_PROTOCOL_FEATURES => {
                no_payload(&payload)?;
                reply(request, self.offer.protocol_features)
            }
            req::SET_PROTOCOL_FEATURES => self.set_protocol_features(number(&payload)?),
            // QEMU compares it with queue pairs (net/vhost-user.c), the session would answer with rings.
            req::GET_QUEUE_NUM => no_payload(&payload).and_then(|()| reply(request, u64::from(self.offer.queue_pairs))),
            req::SET_VRING_ENABLE => self.set_ring_enable(ring_number(&payload)?),
            req::SEND_RARP => {
                // A u64 whose first six bytes in memory are the address.
                let [mac @ .., _, _] = number(&payload)?.to_ne_bytes();
                Ok(vec![Action::Report(SessionEvent::Announce { mac })])
            }
            req::NET_SET_MTU => self.set_mtu(number(&payload)?),
            req::SET_BACKEND_REQ_FD => self.set_backend_channel(&payload, descriptors),
            req::GET_CONFIG => {
                // "uses zero length of payload to indicate an error"
                let answer = config_space::read(&self.offer, &payload);
                let warning = match &answer {
                    Ok(_) => None,
                    Err(ConfigFault::Length) => return Err(wrong_length(&payload)),
                    Err(fault) => Some(SessionEvent::Warning(format!("GET_CONFIG: {}", fault.text()))),
                };
                let reply = Action::Reply { request, payload: answer.unwrap_or_default() };
                Ok(std::iter::once(reply).chain(warning.map(Action::Report)).collect())
            }
            req::SET_CONFIG => match config_space::write(&self.offer, &payload) {
                Ok(()) => Ok(Actions::new()),
                Err(ConfigFault::Length) => Err(wrong_length(&payload)),
                // A guest can cause it: a driver of before VERSION_1 may write the address. The VM goes on without.
                Err(fault @ ConfigFault::ReadOnly { .. }) => Err(Fault::Declined(fault.text())),
                Err(fault) => Err(Fault::Refused(fault.text())),
            },
            req::GET_INFLIGHT_FD => self.get_inflight(&payload),
            req::SET_INFLIGHT_FD => self.set_inflight(&payload, descriptors),
            req::RESET_DEVICE => {
                no_payload(&payload)?;
                self.record.reset_device();
                // The session forgets the log by itself.
                Ok(vec![forward(request, payload, vec![])])
            }
            req::GET_MAX_MEM_SLOTS => no_payload(&payload).and_then(|()| reply(request, MEMORY_SLOTS_MAX as u64)),
            req::ADD_MEM_REG => self.add_region(&payload, descriptors),
            req::REM_MEM_REG => self.remove_region(&payload),
            req::SET_STATUS => {
                let status = number(&payload)?;
                self.record.status = u8::try_from(status)
                    .map_err(|_| Fault::Refused(format!("a device status has 8 bits, this one is {status:#x}")))?;
                // VIRTIO 1.2 §2.4: "The driver MAY reset the device by writing 0 to device status".
                Ok(if status == 0 { vec![Action::DriverReset] } else { Actions::new() })
            }
            req::GET_STATUS => no_payload(&payload).and_then(|()| reply(request, u64::from(self.record.status))),
            _ => Err(Fault::Refused(format!("request {request} is not served"))),
        }
    }

    /// A request that belongs to a protocol feature must not come before that is negotiated.
    fn check_negotiated(&self, request: u32) -> Result<(), Fault> {
        let needed = match request {
            req::GET_QUEUE_NUM => protocol::MQ,
            req::SET_LOG_BASE => protocol::LOG_SHMFD,
            req::SEND_RARP => protocol::RARP,
            req::NET_SET_MTU => protocol::MTU,
            req::SET_BACKEND_REQ_FD => protocol::BACKEND_REQ,
            req::GET_CONFIG | req::SET_CONFIG => protocol::CONFIG,
            req::GET_INFLIGHT_FD | req::SET_INFLIGHT_FD => protocol::INFLIGHT_SHMFD,
            req::RESET_DEVICE => protocol::RESET_DEVICE,
            req::GET_MAX_MEM_SLOTS | req::ADD_MEM_REG | req::REM_MEM_REG => protocol::CONFIGURE_MEM_SLOTS,
            req::SET_STATUS | req::GET_STATUS => protocol::STATUS,
            _ => return Ok(()),
        };
        if self.record.protocol_features & needed == 0 {
            return Err(Fault::Refused("its protocol feature was not negotiated".into()));
        }
        Ok(())
    }

    fn ring_index(&self, index: u32) -> Result<u16, Fault> {
        // Compared as u32: truncated to 16 bits first, 0x10000 would be ring 0 (CVE-2020-10723).
        let count = self.record.rings.len();
        if index as usize >= count {
            return Err(Fault::Refused(format!("ring {index} does not exist, the port has {count} rings")));
        }
        Ok(index as u16)
    }

    fn set_features(&mut self, acked: u64) -> Result<Actions, Fault> {
        let unknown = acked & !(self.offer.features | PRIVATE_FEATURES);
        if unknown != 0 {
            return Err(Fault::Refused(format!("feature bits {unknown:#x} were not offered")));
        }
        // "If VHOST_USER_F_PROTOCOL_FEATURES has not been negotiated, the ring starts directly in the enabled state."
        if acked & VHOST_USER_F_PROTOCOL_FEATURES == 0 {
            self.record.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        let features = acked & !PRIVATE_FEATURES;
        let mut actions = self.set_log_all(acked & VHOST_F_LOG_ALL != 0);
        // QEMU repeats the same features for each queue pair, when the first pairs run already.
        if self.record.features == Some(features) && acked & VHOST_USER_F_PROTOCOL_FEATURES != 0 {
            return Ok(actions);
        }
        self.record.features = Some(features);
        self.started = true;
        // The session takes SET_VRING_ENABLE only with the bit set, so between us it always is.
        let private = (features | VHOST_USER_F_PROTOCOL_FEATURES).to_ne_bytes().to_vec();
        actions.push(forward(req::SET_FEATURES, private, vec![]));
        let states = self.record.rings.iter().enumerate();
        actions.extend(states.filter(|(_, ring)| ring.enabled).map(|(index, _)| enable(index as u16, true)));
        actions.push(Action::Report(SessionEvent::Negotiated { features }));
        Ok(actions)
    }

    /// LOG_ALL comes when a migration begins, after SET_LOG_BASE, and goes when it has ended one way or the other. With
    /// it goes the log: nothing is mapped or paid for once there is no migration.
    fn set_log_all(&mut self, on: bool) -> Actions {
        if std::mem::replace(&mut self.record.log_all, on) == on {
            return Actions::new();
        }
        let log = if on { None } else { self.record.log.take() };
        let mut actions = vec![Action::SetLogging(self.logging()), Action::Report(SessionEvent::DirtyLog { on })];
        if let Some(outside) = log.map(|log| log.pages_outside()).filter(|&outside| outside > 0) {
            let text = format!("the dirty log had no room for {outside} writes of pages; the migrated VM lacks them");
            actions.push(Action::Report(SessionEvent::Warning(text)));
        }
        actions
    }

    /// What the session's rings are to do.
    fn logging(&self) -> Logging {
        match &self.record.log {
            _ if !self.record.log_all => Logging::Off,
            Some(log) => Logging::On(Arc::clone(log)),
            None if self.record.protocol_features & protocol::LOG_SHMFD != 0 => Logging::Awaited,
            // A front-end that has no way to bring a log does not mean it.
            None => Logging::Off,
        }
    }

    /// Also during a migration, when memory has grown: the old log is let go of before the answer, for the front-end then
    /// reads it for the last time.
    fn set_log_base(&mut self, payload: Vec<u8>, mut files: Vec<OwnedFd>) -> Result<Actions, Fault> {
        let range = message::decode_log_range(&payload).ok_or_else(|| wrong_length(&payload))?;
        let file = files.pop().ok_or_else(|| Fault::Refused("it came without a descriptor".into()))?;
        let shrink = vet::log_file(&range, &file).map_err(Fault::Refused)?;
        let log = DirtyLog::map(&file, range.offset, range.bytes)
            .map_err(|error| Fault::Refused(format!("the dirty log cannot be mapped: {error}")))?;
        let mut actions = Actions::new();
        if shrink == Shrink::Possible {
            actions.push(Action::Report(unsealed("dirty log")));
        }
        // vetted: guest_address + bytes does not overflow
        let memory_end =
            self.record.memory.iter().map(|mapped| mapped.region.guest_address + mapped.region.bytes).max();
        if let Some(end) = memory_end.filter(|&end| end > log.covered_bytes()) {
            let covered = log.covered_bytes();
            let text = format!("the dirty log covers {covered:#x} bytes of guest memory, which ends at {end:#x}");
            actions.push(Action::Report(SessionEvent::Warning(text)));
        }
        self.record.log = Some(Arc::new(log));
        if self.record.log_all {
            actions.push(Action::SetLogging(self.logging()));
        }
        // QEMU takes any answer, rust-vmm's front-end wants its own words back.
        actions.push(Action::Reply { request: req::SET_LOG_BASE, payload });
        Ok(actions)
    }

    /// The region is the rings' from the moment that it is given out: a front-end that dies with the answer has no use
    /// for it anyway.
    fn get_inflight(&mut self, payload: &[u8]) -> Result<Actions, Fault> {
        let asked = InflightRange::decode(payload).ok_or_else(|| wrong_length(payload))?;
        let made = inflight::create(&asked, self.record.rings.len(), self.is_packed());
        let (range, region, file) = made.map_err(Fault::Refused)?;
        let answer = range.encode(payload.len());
        let reply = Action::ReplyWithFile { request: req::GET_INFLIGHT_FD, payload: answer, file: Arc::new(file) };
        Ok(vec![self.use_inflight(region), reply])
    }

    fn set_inflight(&mut self, payload: &[u8], mut files: Vec<OwnedFd>) -> Result<Actions, Fault> {
        let range = InflightRange::decode(payload).ok_or_else(|| wrong_length(payload))?;
        let file = files.pop().ok_or_else(|| Fault::Refused("it came without a descriptor".into()))?;
        let adopted = inflight::adopt(&range, &file, self.record.rings.len());
        let (region, shrink) = adopted.map_err(Fault::Refused)?;
        let mut actions = vec![self.use_inflight(region)];
        if shrink == Shrink::Possible {
            actions.push(Action::Report(unsealed("in-flight region")));
        }
        Ok(actions)
    }

    fn use_inflight(&mut self, region: Inflight) -> Action {
        let region = Arc::new(region);
        self.record.inflight = Some(Arc::clone(&region));
        Action::SetInflight(region)
    }

    /// A channel that comes again takes the place of the one before, which is closed.
    fn set_backend_channel(&mut self, payload: &[u8], mut sockets: Vec<OwnedFd>) -> Result<Actions, Fault> {
        no_payload(payload)?;
        let socket = sockets.pop().ok_or_else(|| Fault::Refused("it came without a descriptor".into()))?;
        vet::channel(&socket).map_err(Fault::Refused)?;
        self.record.backend_channel = Some(socket);
        Ok(Actions::new())
    }

    fn set_protocol_features(&mut self, acked: u64) -> Result<Actions, Fault> {
        let unknown = acked & !self.offer.protocol_features;
        if unknown != 0 {
            return Err(Fault::Refused(format!("protocol feature bits {unknown:#x} were not offered")));
        }
        self.record.protocol_features = acked;
        Ok(Actions::new())
    }

    fn set_mem_table(&mut self, payload: &[u8], files: Vec<OwnedFd>) -> Result<Actions, Fault> {
        let regions = message::decode_regions(payload)
            .ok_or_else(|| Fault::Rubbish("its region count does not fit its length".into()))?;
        if regions.is_empty() {
            return Err(Fault::Refused(format!("the memory table is empty: {}", super::MEMORY_NOT_SHARED)));
        }
        if regions.len() != files.len() {
            let counts = format!("{} regions came with {} descriptors", regions.len(), files.len());
            return Err(Fault::Refused(counts));
        }
        let mut memory = Vec::with_capacity(regions.len());
        let mut actions = Actions::new();
        for (region, file) in regions.into_iter().zip(files) {
            let shrink = vet_region(&region, &file, &memory)?;
            actions.extend(self.warn_of(shrink));
            memory.push(MappedRegion { region, file: Arc::new(file) });
        }
        // vm-memory wants them in order.
        memory.sort_by_key(|mapped| mapped.region.guest_address);
        let payload = encode_regions(memory.iter().map(|mapped| &mapped.region));
        let descriptors = memory.iter().map(|mapped| Arc::clone(&mapped.file)).collect();
        self.record.memory = memory;
        actions.push(forward(req::SET_MEM_TABLE, payload, descriptors));
        Ok(actions)
    }

    fn add_region(&mut self, payload: &[u8], mut files: Vec<OwnedFd>) -> Result<Actions, Fault> {
        let region = message::decode_region(payload).ok_or_else(|| wrong_length(payload))?;
        let file = files.pop().ok_or_else(|| Fault::Refused("it came without a descriptor".into()))?;
        if self.record.memory.len() >= MEMORY_SLOTS_MAX {
            return Err(Fault::Refused(format!("all {MEMORY_SLOTS_MAX} memory slots are taken")));
        }
        let shrink = vet_region(&region, &file, &self.record.memory)?;
        let mut actions: Actions = self.warn_of(shrink).into_iter().collect();
        let file = Arc::new(file);
        let at = self.record.memory.partition_point(|mapped| mapped.region.guest_address < region.guest_address);
        self.record.memory.insert(at, MappedRegion { region, file: Arc::clone(&file) });
        actions.push(forward(req::ADD_MEM_REG, encode_region(&region), vec![file]));
        Ok(actions)
    }

    fn remove_region(&mut self, payload: &[u8]) -> Result<Actions, Fault> {
        let region = message::decode_region(payload).ok_or_else(|| wrong_length(payload))?;
        // "identified by guest address, user address and size"; the file offset is the back-end's to ignore
        let same = |mapped: &MappedRegion| {
            let known = mapped.region;
            (known.guest_address, known.front_end_address, known.bytes)
                == (region.guest_address, region.front_end_address, region.bytes)
        };
        let Some(at) = self.record.memory.iter().position(same) else {
            let guest_address = region.guest_address;
            return Err(Fault::Refused(format!("no memory region at {guest_address:#x} of that size is mapped")));
        };
        self.record.memory.remove(at);
        Ok(vec![forward(req::REM_MEM_REG, encode_region(&region), vec![])])
    }

    /// Warns of a file that can be truncated, once per session.
    fn warn_of(&mut self, shrink: Shrink) -> Option<Action> {
        let due = shrink == Shrink::Possible && !self.warned_unsealed;
        self.warned_unsealed |= due;
        due.then(|| Action::Report(unsealed("memory")))
    }

    fn set_ring_size(&mut self, RingNumber { index, number }: RingNumber) -> Result<Actions, Fault> {
        let index = self.ring_index(index)?;
        if number == 0 || number > u32::from(RING_SIZE_MAX) || !(number.is_power_of_two() || self.is_packed()) {
            let kind = if self.is_packed() { "number from 1" } else { "power of two" };
            return Err(Fault::Refused(format!(
                "ring {index} cannot have {number} entries; a {kind} up to {RING_SIZE_MAX} is needed"
            )));
        }
        self.record.rings[usize::from(index)].size = Some(number as u16);
        Ok(vec![forward(req::SET_VRING_NUM, encode_ring_number(index.into(), number), vec![])])
    }

    /// Checks as much as keeps the session's connection alive: the parts start in memory and are aligned
    /// (VIRTIO 1.2 §2.7). Their extents are the ring's own to check.
    fn set_ring_addresses(&mut self, payload: &[u8]) -> Result<Actions, Fault> {
        let addresses = message::decode_ring_addresses(payload).ok_or_else(|| wrong_length(payload))?;
        let index = self.ring_index(addresses.index)?;
        let RingAddresses { descriptors, available, used, flags, .. } = addresses;
        if flags & !RingAddresses::FLAG_LOG != 0 {
            return Err(Fault::Refused(format!("ring {index}: flags {flags:#x} are not known")));
        }
        // Without any memory to translate them, the ring just stays incomplete: sent away for it, QEMU would come back
        // at once to do the same again.
        if self.record.memory.is_empty() {
            let explained = self.warned_not_shared;
            let fault = Fault::Declined(self.memory_is_overdue());
            return Err(if explained { Fault::DeclinedAgain } else { fault });
        }
        for (part, address, alignment) in
            [("descriptor table", descriptors, 16), ("available ring", available, 2), ("used ring", used, 4)]
        {
            // 4 bytes: flags and index, which the session reads of the used ring
            let region = self.record.region_of(address, 4).ok_or_else(|| {
                Fault::Refused(format!("ring {index}: the {part} at {address:#x} is not in guest memory"))
            })?;
            let guest_address = address - region.front_end_address + region.guest_address;
            if !guest_address.is_multiple_of(alignment) {
                let text = format!("ring {index}: the {part} at {guest_address:#x} is not aligned to {alignment}");
                return Err(Fault::Refused(text));
            }
        }
        let used_log = addresses.used_log();
        let before = self.record.rings[usize::from(index)].addresses.replace(addresses);
        let mut actions = Actions::new();
        if before.and_then(|before| before.used_log()) != used_log {
            actions.push(Action::SetUsedLog { index, address: used_log });
        }
        actions.push(forward(req::SET_VRING_ADDR, addresses.encode_unlogged(), vec![]));
        Ok(actions)
    }

    /// "Vring descriptor indices for packed virtqueues": bits 0 to 15 are the next available descriptor and its wrap
    /// counter, bits 16 to 31 the next used one. With a device that finishes in order and holds nothing back both are
    /// the same, and the session gets one of them: the engine (vhost-user-backend 0.24) would cut the upper half off.
    fn set_ring_base(&mut self, RingNumber { index, number }: RingNumber) -> Result<Actions, Fault> {
        let index = self.ring_index(index)?;
        let (available, used) = (number as u16, (number >> 16) as u16);
        let base = match used {
            // Also what DPDK says of a packed ring, in its device (22.11, GET_VRING_BASE) and in its driver.
            0 => available,
            // Taken by a device before us and not finished: those are still to be done.
            used if self.is_packed() => used,
            _ => {
                return Err(Fault::Refused(format!("ring {index}: base {number:#x} is no index of a split ring")));
            }
        };
        self.record.rings[usize::from(index)].base = base;
        Ok(vec![forward(req::SET_VRING_BASE, encode_ring_number(index.into(), base.into()), vec![])])
    }

    /// The front-end uses packed rings, or may still choose to.
    fn is_packed(&self) -> bool {
        ring::is_packed(self.record.features.unwrap_or(self.offer.features))
    }

    /// "Bits (0-7) of the payload contain the vring index. Bit 8 is the invalid FD flag."
    fn set_ring_signal(&mut self, request: u32, value: u64, mut files: Vec<OwnedFd>) -> Result<Actions, Fault> {
        if value >> 9 != 0 {
            return Err(Fault::Refused(format!("bits above 8 are set in {value:#x}")));
        }
        let index = self.ring_index((value & 0xff) as u32)?;
        let descriptor = files.pop();
        if (value & 0x100 != 0) == descriptor.is_some() {
            return Err(Fault::Refused(format!("ring {index}: descriptor and invalid-FD flag contradict each other")));
        }
        let descriptor = descriptor
            .map(vet::eventfd)
            .transpose()
            .map_err(|reason| Fault::Refused(format!("ring {index}: {reason}")))?;
        let signal = descriptor.map_or(RingSignal::Polled, RingSignal::Descriptor);
        let ring = &mut self.record.rings[usize::from(index)];
        let place = match request {
            req::SET_VRING_KICK => &mut ring.kick,
            req::SET_VRING_CALL => &mut ring.call,
            _ => &mut ring.error,
        };
        *place = signal;
        Ok(vec![forward(request, value.to_ne_bytes().to_vec(), place.descriptors())])
    }

    fn set_ring_enable(&mut self, RingNumber { index, number }: RingNumber) -> Result<Actions, Fault> {
        let index = self.ring_index(index)?;
        if number > 1 {
            return Err(Fault::Refused(format!("ring {index}: {number} is neither enable (1) nor disable (0)")));
        }
        let enabled = number == 1;
        self.record.rings[usize::from(index)].enabled = enabled;
        self.started = true;
        Ok(if self.record.features.is_some() { vec![enable(index, enabled)] } else { Actions::new() })
    }

    /// "If VHOST_USER_PROTOCOL_F_MTU [...] the back-end must reply with zero in case the specified MTU is valid".
    /// A smaller one than the port's is the guest's own business.
    fn set_mtu(&mut self, mtu: u64) -> Result<Actions, Fault> {
        let allowed = self.offer.mtu;
        match u16::try_from(mtu) {
            // VIRTIO 1.2 §5.1.4.1: mtu is 68 to 65535.
            Ok(mtu @ 68..) if mtu <= allowed => {
                self.record.mtu = Some(mtu);
                Ok(Actions::new())
            }
            _ => Err(Fault::Declined(format!(
                "the VM was given MTU {mtu}, the port's network carries 68 to {allowed}; set host_mtu={allowed}"
            ))),
        }
    }
}

/// Requests whose reply is part of their definition; NEED_REPLY means nothing on them.
fn has_own_reply(request: u32) -> bool {
    matches!(
        request,
        req::GET_FEATURES
            | req::GET_PROTOCOL_FEATURES
            | req::GET_QUEUE_NUM
            | req::GET_VRING_BASE
            | req::SET_LOG_BASE
            | req::GET_CONFIG
            | req::GET_INFLIGHT_FD
            | req::GET_MAX_MEM_SLOTS
            | req::GET_STATUS
    )
}

/// CVE-2022-0669: every request says how many descriptors it takes, none is the rule.
fn descriptors_max(request: u32) -> usize {
    match request {
        req::SET_MEM_TABLE => message::TABLE_REGIONS_MAX,
        req::SET_VRING_KICK | req::SET_VRING_CALL | req::SET_VRING_ERR => 1,
        // REM_MEM_REG: "the back-end MAY accept messages with one file descriptor", and closes it.
        req::ADD_MEM_REG | req::REM_MEM_REG | req::SET_LOG_BASE | req::SET_LOG_FD => 1,
        req::SET_BACKEND_REQ_FD | req::SET_INFLIGHT_FD => 1,
        _ => 0,
    }
}

/// Checks a new region on its own, against those that are there and against its file.
fn vet_region(region: &message::Region, file: &OwnedFd, others: &[MappedRegion]) -> Result<Shrink, Fault> {
    vet::region(region).map_err(Fault::Refused)?;
    for other in others {
        vet::disjoint(region, &other.region).map_err(Fault::Refused)?;
    }
    vet::region_file(region, file).map_err(Fault::Refused)
}

fn unsealed(what: &str) -> SessionEvent {
    SessionEvent::Warning(format!(
        "the VM's {what} can be truncated by its front-end while we use it (no F_SEAL_SHRINK); use \
         memory-backend-memfd with seal=on (its default)"
    ))
}

fn forward(request: u32, payload: Vec<u8>, descriptors: Vec<Arc<OwnedFd>>) -> Action {
    Action::Forward { request, payload, descriptors }
}

fn enable(index: u16, enabled: bool) -> Action {
    forward(req::SET_VRING_ENABLE, encode_ring_number(index.into(), enabled.into()), vec![])
}

fn reply(request: u32, value: u64) -> Result<Actions, Fault> {
    Ok(vec![Action::Reply { request, payload: value.to_ne_bytes().to_vec() }])
}

fn wrong_length(payload: &[u8]) -> Fault {
    Fault::Rubbish(format!("{} bytes are not its length", payload.len()))
}

fn no_payload(payload: &[u8]) -> Result<(), Fault> {
    if payload.is_empty() { Ok(()) } else { Err(wrong_length(payload)) }
}

fn number(payload: &[u8]) -> Result<u64, Fault> {
    message::decode_u64(payload).ok_or_else(|| wrong_length(payload))
}

fn ring_number(payload: &[u8]) -> Result<RingNumber, Fault> {
    message::decode_ring_number(payload).ok_or_else(|| wrong_length(payload))
}
