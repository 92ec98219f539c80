//! The guest changes its rings and queues, and lets go of the card and takes it again.

use std::time::Duration;

use super::internet::{ping, ping_from_peer};
use super::{Observations, Site, change, driver};
use crate::topology::TopologyError;

const PING: &str = "-c 1 -W 3 10.0.0.2";
/// How long a driver may take to have its link again.
const LINK_LIMIT: Duration = Duration::from_secs(10);

/// Settings that are tried one after the other, with the name of what they try.
const SETTINGS: &[(&str, &str)] = &[
    ("channels.combined_1", "-L eth0 combined 1"),
    ("channels.combined_2", "-L eth0 combined 2"),
    ("coalescing.rx_frames_4", "-C eth0 rx-frames 4"),
    ("coalescing.rx_usecs_8", "-C eth0 rx-usecs 8"),
    ("coalescing.tx_frames_0", "-C eth0 tx-frames 0"),
    ("coalescing.tx_frames_1", "-C eth0 tx-frames 1"),
    ("coalescing.adaptive_rx", "-C eth0 adaptive-rx on"),
    ("settings.speed_1000", "-s eth0 speed 1000 duplex full"),
    ("settings.speed_25000", "-s eth0 speed 25000 duplex full"),
    ("settings.autonegotiation", "-s eth0 autoneg on"),
    ("settings.wake_on_lan", "-s eth0 wol g"),
    ("settings.message_level", "-s eth0 msglvl 1"),
    ("pause", "-A eth0 rx on tx on"),
    ("flow_hash.equal", "-X eth0 equal 1"),
    ("flow_hash.udp4", "-N eth0 rx-flow-hash udp4 sdfn"),
    ("flow_rule", "-N eth0 flow-type tcp4 dst-port 80 action 0"),
    ("reset", "--reset eth0 all"),
    ("negotiate", "-r eth0"),
    ("identify", "-p eth0 1"),
];

pub(super) fn observe(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    for (ring, size) in [
        ("rx", 64),
        ("rx", 128),
        ("rx", 256),
        ("rx", 512),
        ("rx", 100),
        ("tx", 64),
        ("tx", 128),
        ("tx", 256),
        ("tx", 512),
    ] {
        let name = format!("ring.size.{ring}.{size}");
        rows.record(&name, site.outcome(&format!("ethtool -G eth0 {ring} {size}"))?);
        rows.record(format!("{name}.ping"), ping(site, PING)?);
    }
    driver::ethtool(site, "ring.size.afterwards", "-g eth0", rows)?;
    rows.record("ring.size.log", driver::log(site)?);
    for (name, words) in SETTINGS {
        rows.record(format!("ring.{name}"), site.outcome(&format!("ethtool {words}"))?);
    }
    driver::ethtool(site, "ring.settings.afterwards", "eth0", rows)?;
    rows.record("ring.settings.ping", ping(site, PING)?);
    rebind(site, rows)?;
    rows.record("ring.log_at_the_end", driver::log(site)?);
    Ok(())
}

/// The driver leaves the device, and takes it again as if it had just been plugged in.
fn rebind(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    let features = "cat /sys/class/net/eth0/device/features";
    let before = site.ask(features)?;
    let device = site.ask("basename $(readlink /sys/class/net/eth0/device)")?;
    let (device, drivers) = (device.trim(), "/sys/bus/virtio/drivers/virtio_net");
    for round in ["first", "second"] {
        let name = format!("ring.rebind.{round}");
        rows.record(format!("{name}.unbind"), site.outcome(&format!("echo {device} >{drivers}/unbind"))?);
        rows.record(format!("{name}.interface"), site.ask("ls /sys/class/net | tr '\\n' ' '")?);
        rows.record(format!("{name}.bind"), site.outcome(&format!("echo {device} >{drivers}/bind"))?);
        let up = "ip address add 10.0.0.1/24 dev eth0 && ip link set eth0 up";
        rows.record(format!("{name}.up"), site.outcome(up)?);
        site.guest.wait_link("eth0", LINK_LIMIT)?;
        change::restore_ipv6(site)?;
        rows.record(format!("{name}.same_features"), site.ask(features)? == before);
        rows.record(format!("{name}.ping"), ping(site, PING)?);
        rows.record(format!("{name}.ping6"), ping(site, "-c 1 -W 3 fd00::2")?);
        rows.record(format!("{name}.ping_from_peer"), ping_from_peer(site, "-c 1 -W 3 10.0.0.1")?);
    }
    driver::ethtool(site, "ring.rebind.rings", "-g eth0", rows)?;
    driver::ethtool(site, "ring.rebind.settings", "eth0", rows)
}
