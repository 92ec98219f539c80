//! What a message comes to.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::inflight::Inflight;
use crate::keeper::message::{encode_ring_number, request as req};
use crate::owner::SessionEvent;
use crate::session::Logging;

/// What the connection does next, in order.
#[derive(Debug)]
pub(in crate::keeper) enum Action {
    /// Send this to the session and wait for its verdict; if it refuses, the connection ends.
    Forward { request: u32, payload: Vec<u8>, descriptors: Vec<Arc<OwnedFd>> },
    /// Tell the session whether and where its rings log.
    SetLogging(Logging),
    /// Tell the session where its rings note what they have taken.
    SetInflight(Arc<Inflight>),
    /// Tell the session where a ring logs its used ring.
    SetUsedLog { index: u16, address: Option<u64> },
    /// Send GET_VRING_BASE to the session, its answer to the front-end, and tell [`super::Filter::ring_stopped`].
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

pub(super) fn forward(request: u32, payload: Vec<u8>, descriptors: Vec<Arc<OwnedFd>>) -> Action {
    Action::Forward { request, payload, descriptors }
}

pub(super) fn enable(index: u16, enabled: bool) -> Action {
    forward(req::SET_VRING_ENABLE, encode_ring_number(index.into(), enabled.into()), vec![])
}

pub(super) fn unsealed(what: &str) -> SessionEvent {
    SessionEvent::Warning(format!(
        "the VM's {what} can be truncated by its front-end while we use it (no F_SEAL_SHRINK); use \
         memory-backend-memfd with seal=on (its default)"
    ))
}
