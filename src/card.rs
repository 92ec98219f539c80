//! What a port's card offers to its guest, and the switches that take parts of it away.

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_F_ANY_LAYOUT, VIRTIO_F_IN_ORDER, VIRTIO_F_NOTIFY_ON_EMPTY, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1,
};
use virtio_bindings::bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GSO, VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN,
    VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_GUEST_USO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

const TSO: u64 = bits(&[
    VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_ECN,
    VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_ECN,
]);
const UFO: u64 = bits(&[VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_GUEST_UFO]);
const USO: u64 = bits(&[VIRTIO_NET_F_HOST_USO, VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6]);
/// VIRTIO 1.2 §5.1.3.1: without the checksum nothing can be cut.
const CSUM: u64 = bits(&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GSO]) | TSO | UFO | USO;

/// RING_RESET is not among them: QEMU (10.0) tells a vhost-user back-end nothing when a guest resets one ring, so a guest that
/// used it (`ethtool -G`) would lose its network.
///
/// Switches of `port.features`, in the order of messages, and the virtio feature bits that each one takes away when
/// `false`: VIRTIO 1.2 §5.1.3 and §6.
pub const SWITCHES: [(&str, u64); 11] = [
    ("csum", CSUM),
    ("tso", TSO),
    ("ufo", UFO),
    ("uso", USO),
    ("mrg_rxbuf", bits(&[VIRTIO_NET_F_MRG_RXBUF])),
    ("mtu", bits(&[VIRTIO_NET_F_MTU])),
    ("indirect", bits(&[VIRTIO_RING_F_INDIRECT_DESC])),
    ("event_idx", bits(&[VIRTIO_RING_F_EVENT_IDX])),
    // Reaches a guest only if its QEMU has packed=on on the device.
    ("packed", bits(&[VIRTIO_F_RING_PACKED])),
    // Holds by construction, and lets front-ends resume a ring from its used index after a restart of ours.
    ("in_order", bits(&[VIRTIO_F_IN_ORDER])),
    // QEMU asks the driver to announce itself after a migration.
    ("announce", bits(&[VIRTIO_NET_F_GUEST_ANNOUNCE])),
];

/// What the card of an underlay's wire does without: every packet is finished when it leaves, and nobody migrates it.
pub const WIRE_SWITCHED_OFF: [&str; 5] = ["csum", "tso", "ufo", "uso", "announce"];

/// What has no switch: without these there is no card, or they cost nothing.
const ALWAYS: u64 = bits(&[VIRTIO_F_VERSION_1, VIRTIO_F_ANY_LAYOUT, VIRTIO_F_NOTIFY_ON_EMPTY, VIRTIO_NET_F_MQ]);

/// The virtio feature bits of a card with these switches turned off. QEMU adds what it serves itself (MAC, STATUS, CTRL_VQ).
pub fn offered(off: &[&'static str]) -> u64 {
    let all = SWITCHES.iter().fold(ALWAYS, |all, (_, bits)| all | bits);
    SWITCHES.iter().filter(|(name, _)| off.contains(name)).fold(all, |left, (_, bits)| left & !bits)
}

/// What a port with a configuration space of ours offers besides, for a VMM that has none: the fields that are in it.
pub const fn in_config_space(has_mac: bool) -> u64 {
    bits(&[VIRTIO_NET_F_STATUS]) | if has_mac { bits(&[VIRTIO_NET_F_MAC]) } else { 0 }
}

const fn bits(positions: &[u32]) -> u64 {
    let mut bits = 0;
    let mut index = 0;
    while index < positions.len() {
        bits |= 1 << positions[index];
        index += 1;
    }
    bits
}

#[cfg(test)]
mod tests {
    use super::*;

    /// VIRTIO 1.2 §5.1.3 and §6, by number. ACCESS_PLATFORM (33) and RING_RESET (40) are not among them:
    /// docs/ARCHITECTURE.md, "Decisions".
    #[test]
    fn the_card_offers_what_is_promised_and_nothing_else() {
        let promised = [0, 1, 3, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 21, 22, 24, 27, 28, 29, 32, 34, 35, 54, 55, 56];
        assert_eq!(offered(&[]), bits(&promised));
        assert_eq!((in_config_space(false), in_config_space(true)), (1 << 16, 1 << 16 | 1 << 5));
    }

    #[test]
    fn a_switch_takes_its_bits_and_what_depends_on_them() {
        let all = offered(&[]);
        assert_eq!(all & TSO, TSO);
        assert_eq!(offered(&["tso"]), all & !TSO);
        assert_eq!(offered(&["csum"]) & (CSUM | TSO | UFO | USO), 0);
        let without_anything: Vec<_> = SWITCHES.iter().map(|(name, _)| *name).collect();
        assert_eq!(offered(&without_anything), ALWAYS);
    }
}
