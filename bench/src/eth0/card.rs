//! The card itself: feature bits by QEMU's account and by the guest's, and its PCI function.

use serde_json::{Value, json};

use super::{Observations, Site};
use crate::topology::TopologyError;

/// QEMU's name for the card.
const QOM_PATH: &str = "/machine/peripheral/nic0/virtio-backend";
/// Bits of the feature word that sysfs shows.
const BITS: usize = 64;
/// The standard header and the capabilities behind it.
const PCI_CONFIG_BYTES: usize = 256;

/// Names of bits, from VIRTIO 1.3 §5.1.3 and §6 and, for the legacy ones, linux/virtio_ring.h, virtio_config.h.
const BIT_NAMES: &[(usize, &str)] = &[
    (0, "CSUM"),
    (1, "GUEST_CSUM"),
    (2, "CTRL_GUEST_OFFLOADS"),
    (3, "MTU"),
    (5, "MAC"),
    (6, "GSO"),
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
    (27, "ANY_LAYOUT"),
    (28, "INDIRECT_DESC"),
    (29, "EVENT_IDX"),
    (30, "BAD_FEATURE"),
    (32, "VERSION_1"),
    (33, "ACCESS_PLATFORM"),
    (34, "RING_PACKED"),
    (35, "IN_ORDER"),
    (36, "ORDER_PLATFORM"),
    (37, "SR_IOV"),
    (38, "NOTIFICATION_DATA"),
    (39, "NOTIF_CONFIG_DATA"),
    (40, "RING_RESET"),
    (41, "ADMIN_VQ"),
    (51, "DEVICE_STATS"),
    (52, "VQ_NOTF_COAL"),
    (53, "NOTF_COAL"),
    (54, "GUEST_USO4"),
    (55, "GUEST_USO6"),
    (56, "HOST_USO"),
    (57, "HASH_REPORT"),
    (59, "GUEST_HDRLEN"),
    (60, "RSS"),
    (61, "RSC_EXT"),
    (62, "STANDBY"),
    (63, "SPEED_DUPLEX"),
];

pub(super) fn observe(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    offered_bits(site, rows)?;
    negotiated_bits(site, "card.negotiated", rows)?;
    pci(site, rows)
}

/// As QEMU offers them to the guest.
fn offered_bits(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    let status = site.guest.qmp("x-query-virtio-status", json!({ "path": QOM_PATH }))?;
    let offered = &status["host-features"];
    for list in ["transports", "dev-features"] {
        for bit in offered[list].as_array().into_iter().flatten().filter_map(Value::as_str) {
            // "VIRTIO_NET_F_CSUM: Device handles packets with partial checksum"
            let name = bit.split(':').next().unwrap_or(bit).trim();
            // What QEMU and its back-end agree about between themselves is no business of the guest's.
            if !matches!(name, "VHOST_F_LOG_ALL" | "VHOST_USER_F_PROTOCOL_FEATURES" | "VHOST_NET_F_VIRTIO_NET_HDR") {
                rows.record_again(&format!("card.offered.{name}"), "yes");
            }
        }
    }
    for field in ["unknown-dev-features", "unknown-features"] {
        rows.record(format!("card.offered.{field}"), &offered[field]);
    }
    for field in ["num-vqs", "endianness", "bus-name", "device-id"] {
        rows.record(format!("card.{field}"), &status[field]);
    }
    Ok(())
}

/// As the guest's driver accepted them.
pub(super) fn negotiated_bits(site: &Site, prefix: &str, rows: &mut Observations) -> Result<(), TopologyError> {
    let word = site.ask("cat /sys/class/net/eth0/device/features")?;
    let bits: Vec<char> = word.trim().chars().collect();
    for (number, bit) in bits.iter().take(BITS).enumerate() {
        let name = BIT_NAMES.iter().find(|(of, _)| *of == number).map_or("unused", |(_, name)| name);
        rows.record(format!("{prefix}.{number:02}.{name}"), bit);
    }
    for file in ["status", "device", "vendor", "modalias"] {
        rows.record(format!("{prefix}.virtio.{file}"), site.ask(&format!("cat /sys/class/net/eth0/device/{file}"))?);
    }
    Ok(())
}

fn pci(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    const DIRECTORY: &str = "/sys/class/net/eth0/device/..";
    let config = site.ask(&format!("od -An -v -tx1 -w16 -N {PCI_CONFIG_BYTES} {DIRECTORY}/config"))?;
    for (line, bytes) in config.lines().enumerate() {
        rows.record(format!("card.pci.config.{:02x}", line * 16), bytes);
    }
    let names = "class device enable irq local_cpus max_link_speed max_link_width current_link_speed current_link_width \
                 modalias msi_bus power_state revision subsystem_device subsystem_vendor vendor";
    for name in names.split_whitespace() {
        rows.record(format!("card.pci.{name}"), site.ask(&format!("cat {DIRECTORY}/{name}"))?);
    }
    rows.record("card.pci.location", site.ask(&format!("readlink -f {DIRECTORY}"))?);
    rows.record("card.pci.msi_irqs", site.ask(&format!("ls {DIRECTORY}/msi_irqs | wc -l"))?);
    let resources = site.ask(&format!("head -n 7 {DIRECTORY}/resource"))?;
    for (index, resource) in resources.lines().enumerate() {
        rows.record(format!("card.pci.resource.{index}"), resource);
    }
    // "24: 123 PCI-MSI 1-edge virtio2-input.0": only the names are static.
    let names = site.ask("awk '/virtio/ { print $NF }' /proc/interrupts")?;
    for (index, name) in names.lines().enumerate() {
        rows.record(format!("card.interrupt.{index}"), name);
    }
    Ok(())
}
