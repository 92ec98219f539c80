//! What kind of driver to be.

use std::time::Duration;

use vhost::vhost_user::VhostUserProtocolFeatures;

use super::chains::ChainShape;
use super::header::feature;
use super::layout::DESCRIPTOR_BYTES;

/// In which order the session's messages go out.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MessageOrder {
    /// Features, memory, rings, and SET_VRING_ENABLE last; everything acknowledged if REPLY_ACK is offered.
    #[default]
    Specification,
    /// As QEMU's vhost-user netdev: CALL, ERR and SET_VRING_ENABLE before any SET_FEATURES; only the memory table
    /// acknowledged.
    Qemu,
}

/// Options of a [`super::FrontEnd`].
#[derive(Clone, Debug)]
pub struct Options {
    /// Receive and transmit queues, in pairs.
    pub queue_pairs: u16,
    /// Descriptors per ring: a power of two, unless packed. QEMU's default is 256.
    pub ring_size: u16,
    /// Where all ring indices start; near 65536 the wrap comes early. A packed ring stands this many descriptors after
    /// its start.
    pub ring_base: u16,
    /// Write the descriptors of split rings anew each time, as drivers in use do, also where nothing changes in them.
    pub rewrite: bool,
    /// Virtio features to negotiate where offered ([`feature`]).
    pub features: u64,
    /// Features without which to give up.
    pub features_required: u64,
    /// vhost-user protocol features to negotiate where offered.
    pub protocol_features: u64,
    /// Order of messages.
    pub order: MessageOrder,
    /// Bytes per receive buffer, virtio-net header included.
    pub rx_buffer_bytes: usize,
    /// How receive buffers are described.
    pub rx_chain: ChainShape,
    /// Longest frame that can be sent, bytes, without virtio-net header.
    pub tx_buffer_bytes: usize,
    /// How frames to send are described.
    pub tx_chain: ChainShape,
    /// Regions that guest memory is described as.
    pub regions: usize,
    /// Guest memory beyond rings and buffers, bytes: for frames to be reposted, and for hostile tests.
    pub spare_bytes: usize,
    /// Seal guest memory against truncation, as QEMU does.
    pub seal: bool,
    /// Post all receive buffers before the device starts.
    pub fill_receive: bool,
    /// Give the back-end kick descriptors; without, it has to poll (bit 8 of SET_VRING_KICK).
    pub kick_descriptors: bool,
    /// Give the back-end call descriptors.
    pub call_descriptors: bool,
    /// How long to wait for the socket to exist, and for each answer.
    pub timeout: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queue_pairs: 1,
            ring_size: 256,
            ring_base: 0,
            rewrite: false,
            features: feature::VERSION_1
                | feature::MRG_RXBUF
                | feature::EVENT_IDX
                | feature::INDIRECT_DESC
                | feature::MQ
                | feature::PROTOCOL_FEATURES,
            features_required: feature::VERSION_1,
            protocol_features: (VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK).bits(),
            order: MessageOrder::Specification,
            rx_buffer_bytes: 2048,
            rx_chain: ChainShape::default(),
            tx_buffer_bytes: 2048,
            tx_chain: ChainShape::default(),
            regions: 1,
            spare_bytes: 16 << 20,
            seal: true,
            fill_receive: true,
            kick_descriptors: true,
            call_descriptors: true,
            timeout: Duration::from_secs(10),
        }
    }
}

impl Options {
    /// Guest memory that these options need, bytes. Generous: a memfd's pages exist only once touched.
    pub fn memory_bytes(&self) -> usize {
        let entries = usize::from(self.ring_size);
        // Stride of a buffer: header, rounding to 64, and the odd line.
        let buffers = (self.rx_buffer_bytes + self.tx_buffer_bytes + 512) * entries;
        let tables =
            usize::from(self.rx_chain.descriptors + self.tx_chain.descriptors + 8) * DESCRIPTOR_BYTES * entries;
        let rings = 2 * (DESCRIPTOR_BYTES + 2 + 8) * entries + 1024;
        // Each region may end in a hole of the largest piece: a descriptor table or a buffer.
        let largest = (DESCRIPTOR_BYTES * entries).max(self.rx_buffer_bytes).max(self.tx_buffer_bytes) + 4096;
        usize::from(self.queue_pairs) * (buffers + tables + rings) + self.spare_bytes + self.regions * largest
    }
}
