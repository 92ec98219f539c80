//! The messages that bring a session up and down, in either order.
//!
//! Theory of operation. `negotiate` settles features; `start` tells the back-end of memory and rings and enables
//! them; `stop` disables them and asks for each ring's index. Between negotiate and start QEMU may wait for seconds,
//! because the guest has no driver yet: what it sends in between is [`MessageOrder::Qemu`]'s `announce`.
//! Ring `2 n` is pair n's receiveq, `2 n + 1` its transmitq (VIRTIO 1.2 §5.1.2).

use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost::vhost_user::message::FrontendReq;

use super::connection::Connection;
use super::doorbell::Doorbell;
use super::error::FrontEndError;
use super::header::feature;
use super::layout::RingLayout;
use super::memory::{GuestMemory, Region};
use super::options::{MessageOrder, Options};

/// SET_VRING_KICK, SET_VRING_CALL: no descriptor comes along.
const NO_DESCRIPTOR: u64 = 1 << 8;

/// What front-end and back-end agreed upon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Negotiated {
    /// Virtio features acknowledged.
    pub features: u64,
    /// Protocol features acknowledged.
    pub protocol_features: u64,
}

impl Negotiated {
    fn has(&self, feature: VhostUserProtocolFeatures) -> bool {
        self.protocol_features & feature.bits() != 0
    }
}

/// What start has to tell of one ring.
pub(super) struct RingDescription<'a> {
    pub(super) layout: RingLayout,
    pub(super) base: u16,
    pub(super) doorbell: &'a Doorbell,
}

/// Features, protocol features, number of queues, ownership. SET_FEATURES itself comes with [`start`].
pub(super) fn negotiate(connection: &mut Connection, options: &Options) -> Result<Negotiated, FrontEndError> {
    let offered = connection.get_u64(FrontendReq::GET_FEATURES)?;
    let missing = options.features_required & !offered;
    if missing != 0 {
        return Err(FrontEndError::MissingFeatures { offered, missing });
    }
    let mut agreed = Negotiated { features: options.features & offered, protocol_features: 0 };
    if options.queue_pairs == 1 {
        agreed.features &= !feature::MQ;
    }
    if agreed.features & feature::PROTOCOL_FEATURES != 0 {
        agreed.protocol_features =
            options.protocol_features & connection.get_u64(FrontendReq::GET_PROTOCOL_FEATURES)?;
        connection.set(FrontendReq::SET_PROTOCOL_FEATURES, &agreed.protocol_features.to_le_bytes(), &[])?;
        connection.acknowledge(
            options.order == MessageOrder::Specification && agreed.has(VhostUserProtocolFeatures::REPLY_ACK),
        );
    }
    check_queues(connection, options, &agreed)?;
    if agreed.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
        connection.get_u64(FrontendReq::GET_MAX_MEM_SLOTS)?;
    }
    connection.set(FrontendReq::SET_OWNER, &[], &[])?;
    if options.order == MessageOrder::Qemu {
        connection.get_u64(FrontendReq::GET_FEATURES)?;
    }
    Ok(agreed)
}

/// GET_QUEUE_NUM counts pairs in QEMU's reading and rings in others'; either must be enough.
fn check_queues(connection: &mut Connection, options: &Options, agreed: &Negotiated) -> Result<(), FrontEndError> {
    if !agreed.has(VhostUserProtocolFeatures::MQ) {
        return match options.queue_pairs {
            1 => Ok(()),
            pairs => Err(FrontEndError::TooFewQueues { offered: 1, pairs }),
        };
    }
    let offered = connection.get_u64(FrontendReq::GET_QUEUE_NUM)?;
    if offered < u64::from(options.queue_pairs) {
        return Err(FrontEndError::TooFewQueues { offered, pairs: options.queue_pairs });
    }
    Ok(())
}

/// Tells the back-end everything and enables the rings.
pub(super) fn start(
    connection: &mut Connection,
    options: &Options,
    agreed: &Negotiated,
    memory: &GuestMemory,
    rings: &[RingDescription<'_>],
) -> Result<(), FrontEndError> {
    if options.order == MessageOrder::Qemu {
        announce(connection, options, agreed, rings)?;
    }
    connection.set(FrontendReq::SET_FEATURES, &agreed.features.to_le_bytes(), &[])?;
    share_memory(connection, agreed, memory)?;
    for (index, ring) in (0..).zip(rings) {
        connection.set(FrontendReq::SET_VRING_NUM, &vring_state(index, u32::from(ring.layout.size)), &[])?;
        let base = u32::from(ring.base);
        // Of a packed ring the upper half says what is used next: the same, for nothing is in flight yet.
        let base = if agreed.features & feature::RING_PACKED != 0 { base | base << 16 } else { base };
        connection.set(FrontendReq::SET_VRING_BASE, &vring_state(index, base), &[])?;
        connection.set(FrontendReq::SET_VRING_ADDR, &vring_addresses(index, ring.layout, memory), &[])?;
        match options.order {
            // The kick starts the ring: what it needs comes before.
            MessageOrder::Specification => {
                set_call(connection, options, index, ring)?;
                set_error(connection, index, ring)?;
                set_kick(connection, options, index, ring)?;
            }
            MessageOrder::Qemu => {
                set_kick(connection, options, index, ring)?;
                set_call(connection, options, index, ring)?;
            }
        }
    }
    enable(connection, agreed, rings.len(), true)
}

/// What QEMU sends before the guest has a driver (net/vhost-user.c, hw/virtio/vhost.c): CALL and ERR of every ring,
/// and SET_VRING_ENABLE 1 for the first pair, 0 for the others.
fn announce(
    connection: &mut Connection,
    options: &Options,
    agreed: &Negotiated,
    rings: &[RingDescription<'_>],
) -> Result<(), FrontEndError> {
    for (index, ring) in (0..).zip(rings) {
        set_call(connection, options, index, ring)?;
        set_error(connection, index, ring)?;
    }
    if agreed.features & feature::PROTOCOL_FEATURES != 0 {
        for index in 0..rings.len() as u32 {
            connection.set(FrontendReq::SET_VRING_ENABLE, &vring_state(index, u32::from(index < 2)), &[])?;
        }
    }
    Ok(())
}

fn share_memory(connection: &mut Connection, agreed: &Negotiated, memory: &GuestMemory) -> Result<(), FrontEndError> {
    let regions = memory.regions();
    if agreed.has(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
        for region in regions {
            let body = [0_u64.to_le_bytes().to_vec(), region_bytes(region)].concat();
            connection.set(FrontendReq::ADD_MEM_REG, &body, &[memory.fd()])?;
        }
        return Ok(());
    }
    let mut body = [(regions.len() as u32).to_le_bytes(), [0; 4]].concat();
    body.extend(regions.iter().flat_map(region_bytes));
    let fds = vec![memory.fd(); regions.len()];
    if agreed.has(VhostUserProtocolFeatures::REPLY_ACK) {
        connection.set_acknowledged(FrontendReq::SET_MEM_TABLE, &body, &fds)
    } else {
        connection.set(FrontendReq::SET_MEM_TABLE, &body, &fds)
    }
}

/// Disables every ring and takes its index back: what the device would have taken next.
pub(super) fn stop(connection: &mut Connection, agreed: &Negotiated, rings: usize) -> Result<Vec<u16>, FrontEndError> {
    enable(connection, agreed, rings, false)?;
    (0..rings as u32)
        .map(|index| {
            let request = FrontendReq::GET_VRING_BASE;
            let body = connection.get(request, &vring_state(index, 0))?;
            match body.as_slice() {
                [a, b, c, d, low, high, _, _] if u32::from_le_bytes([*a, *b, *c, *d]) == index => {
                    Ok(u16::from_le_bytes([*low, *high]))
                }
                _ => Err(FrontEndError::Answer {
                    request: format!("{request:?}"),
                    problem: format!("{body:?} for ring {index}"),
                }),
            }
        })
        .collect()
}

/// Without PROTOCOL_FEATURES a ring is enabled from its kick to its GET_VRING_BASE, and the message does not exist.
fn enable(connection: &mut Connection, agreed: &Negotiated, rings: usize, on: bool) -> Result<(), FrontEndError> {
    if agreed.features & feature::PROTOCOL_FEATURES == 0 {
        return Ok(());
    }
    for index in 0..rings as u32 {
        connection.set(FrontendReq::SET_VRING_ENABLE, &vring_state(index, u32::from(on)), &[])?;
    }
    Ok(())
}

fn set_kick(
    connection: &mut Connection,
    options: &Options,
    index: u32,
    ring: &RingDescription<'_>,
) -> Result<(), FrontEndError> {
    if options.kick_descriptors {
        connection.set(FrontendReq::SET_VRING_KICK, &u64::from(index).to_le_bytes(), &[ring.doorbell.kick_fd()])
    } else {
        connection.set(FrontendReq::SET_VRING_KICK, &(u64::from(index) | NO_DESCRIPTOR).to_le_bytes(), &[])
    }
}

fn set_call(
    connection: &mut Connection,
    options: &Options,
    index: u32,
    ring: &RingDescription<'_>,
) -> Result<(), FrontEndError> {
    if options.call_descriptors {
        connection.set(FrontendReq::SET_VRING_CALL, &u64::from(index).to_le_bytes(), &[ring.doorbell.call_fd()])
    } else {
        connection.set(FrontendReq::SET_VRING_CALL, &(u64::from(index) | NO_DESCRIPTOR).to_le_bytes(), &[])
    }
}

fn set_error(connection: &mut Connection, index: u32, ring: &RingDescription<'_>) -> Result<(), FrontEndError> {
    connection.set(FrontendReq::SET_VRING_ERR, &u64::from(index).to_le_bytes(), &[ring.doorbell.error_fd()])
}

/// struct vhost_vring_state.
fn vring_state(index: u32, number: u32) -> [u8; 8] {
    (u64::from(index) | u64::from(number) << 32).to_le_bytes()
}

/// struct vhost_vring_addr: index, flags, descriptor table, used ring, available ring, log.
fn vring_addresses(index: u32, layout: RingLayout, memory: &GuestMemory) -> Vec<u8> {
    let at = |offset| memory.front_end_address(offset);
    [u64::from(index), at(layout.descriptor_table), at(layout.used_ring), at(layout.available_ring), 0]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}

/// "Memory region description": guest address, size, user address, mmap offset.
fn region_bytes(region: &Region) -> Vec<u8> {
    [region.guest_address, region.bytes, region.front_end_address, region.file_offset]
        .iter()
        .flat_map(|word| word.to_le_bytes())
        .collect()
}
