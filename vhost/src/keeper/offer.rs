//! What a port offers to a front-end: feature bits, queue pairs, MTU.

use super::config_space::ConfigSpace;

/// Virtio feature bit 30: "the front-end may use protocol feature messages".
pub(crate) const VHOST_USER_F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// Virtio feature bit 26 (VHOST_F_LOG_ALL): "log all writes to guest memory". Ends at the keeper.
pub(super) const VHOST_F_LOG_ALL: u64 = 1 << 26;

/// Bits between front-end and keeper that no driver sees.
pub(super) const PRIVATE_FEATURES: u64 = VHOST_USER_F_PROTOCOL_FEATURES | VHOST_F_LOG_ALL;

/// Protocol feature bits that the keeper or the session really serves ("Protocol features").
pub(super) mod protocol {
    pub(in crate::keeper) const MQ: u64 = 1 << 0;
    pub(in crate::keeper) const LOG_SHMFD: u64 = 1 << 1;
    pub(in crate::keeper) const RARP: u64 = 1 << 2;
    pub(in crate::keeper) const REPLY_ACK: u64 = 1 << 3;
    pub(in crate::keeper) const MTU: u64 = 1 << 4;
    pub(in crate::keeper) const BACKEND_REQ: u64 = 1 << 5;
    /// Not for QEMU, which warns of it: see `config_space.rs`.
    pub(in crate::keeper) const CONFIG: u64 = 1 << 9;
    pub(in crate::keeper) const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub(in crate::keeper) const RESET_DEVICE: u64 = 1 << 13;
    pub(in crate::keeper) const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub(in crate::keeper) const STATUS: u64 = 1 << 16;
    /// What every port offers.
    pub(in crate::keeper) const ALL: u64 = MQ
        | LOG_SHMFD
        | RARP
        | REPLY_ACK
        | MTU
        | BACKEND_REQ
        | INFLIGHT_SHMFD
        | RESET_DEVICE
        | CONFIGURE_MEM_SLOTS
        | STATUS;
}

/// One port's offer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Offer {
    /// Virtio bits without [`PRIVATE_FEATURES`].
    pub(super) features: u64,
    pub(super) protocol_features: u64,
    pub(super) queue_pairs: u16,
    /// Largest payload of a frame that the port's network carries, bytes.
    pub(super) mtu: u16,
    /// With `protocol::CONFIG`, and only then.
    pub(super) config_space: Option<ConfigSpace>,
}

impl Offer {
    pub(super) fn ring_count(&self) -> usize {
        usize::from(self.queue_pairs) * 2
    }
}
