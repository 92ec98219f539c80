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

mod action;
mod memory;
mod rings;
mod shared_files;

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

pub(super) use self::action::Action;
use self::action::{enable, forward};
use super::config_space::{self, ConfigFault};
use super::message::{self, Message, RingNumber, request as req};
use super::offer::{Offer, PRIVATE_FEATURES, VHOST_F_LOG_ALL, VHOST_USER_F_PROTOCOL_FEATURES, protocol};
use super::record::{MEMORY_SLOTS_MAX, SessionRecord};
use super::vet;
use crate::owner::SessionEvent;
use crate::ring;

/// VIRTIO 1.2 §2.7, §2.8: queue sizes go up to 32768, those of split rings in powers of two.
pub(crate) const RING_SIZE_MAX: u16 = 32768;

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
