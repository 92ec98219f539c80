//! Virtio feature bits by name.

/// VIRTIO 1.2 §5.1.3 (network device) and §6 (reserved bits); 30 is vhost-user's.
const NAMES: [(u32, &str); 45] = [
    (0, "CSUM"),
    (1, "GUEST_CSUM"),
    (2, "CTRL_GUEST_OFFLOADS"),
    (3, "MTU"),
    (5, "MAC"),
    (7, "GUEST_TSO4"),
    (8, "GUEST_TSO6"),
    (9, "GUEST_ECN"),
    (10, "GUEST_UFO"),
    (11, "HOST_TSO4"),
    (12, "HOST_TSO6"),
    (13, "HOST_ECN"),
    (14, "HOST_UFO"),
    (15, "MRG_RXBUF"),
    (16, "STATUS"),
    (17, "CTRL_VQ"),
    (18, "CTRL_RX"),
    (19, "CTRL_VLAN"),
    (20, "CTRL_RX_EXTRA"),
    (21, "GUEST_ANNOUNCE"),
    (22, "MQ"),
    (23, "CTRL_MAC_ADDR"),
    (24, "NOTIFY_ON_EMPTY"),
    (26, "LOG_ALL"),
    (27, "ANY_LAYOUT"),
    (28, "INDIRECT_DESC"),
    (29, "EVENT_IDX"),
    (30, "PROTOCOL_FEATURES"),
    (32, "VERSION_1"),
    (33, "ACCESS_PLATFORM"),
    (34, "RING_PACKED"),
    (35, "IN_ORDER"),
    (36, "ORDER_PLATFORM"),
    (37, "SR_IOV"),
    (38, "NOTIFICATION_DATA"),
    (39, "NOTIF_CONFIG_DATA"),
    (40, "RING_RESET"),
    (54, "GUEST_USO4"),
    (55, "GUEST_USO6"),
    (56, "HOST_USO"),
    (57, "HASH_REPORT"),
    (59, "GUEST_HDRLEN"),
    (60, "RSS"),
    (61, "RSC_EXT"),
    (63, "SPEED_DUPLEX"),
];

/// The names of the bits that are set; a bit without a name is `bit_N`.
pub fn names(features: u64) -> Vec<String> {
    let is_set = |bit: &u32| features & (1 << bit) != 0;
    let name = |bit| NAMES.iter().find(|(known, _)| *known == bit).map(|(_, name)| (*name).to_owned());
    (0..64).filter(is_set).map(|bit| name(bit).unwrap_or_else(|| format!("bit_{bit}"))).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn bits_have_names_in_their_order() {
        assert_eq!(super::names(1 << 32 | 1 << 15 | 1 << 4), ["bit_4", "MRG_RXBUF", "VERSION_1"]);
    }
}
