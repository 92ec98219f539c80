//! Front-ends of rings, with this program in the place of the guest or of the wire.

use dreamwire_bench::front_end::FrontEnd;
use dreamwire_bench::hostile::attack;
use dreamwire_bench::topology::{Daemon, wait_until};
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::underlay::{Ends, OuterHeader};
use dreamwire_datapath::vni::Vni;
use dreamwire_datapath::vxlan;

use super::counters::{drops, wait_drops};
use super::{LIMIT, mac, mac_text, port, udp_frame};

/// The cards at the ends of the wire.
pub(crate) const OURS: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const THEIRS: [u8; 6] = [2, 0, 0, 0, 0, 2];

/// A rule for the group `web`: UDP to port 9 comes in, and is logged. The rule goes on with the next keys.
pub(crate) const DISCARD: &str = r#"
[[rule]]
name = "discard"
group = "web"
direction = "ingress"
allow = "udp"
ports = "9"
log = true
"#;

/// Port `vmN` with guest `N`'s addresses, which it is held to.
pub(crate) fn guarded_port(number: u8, keys: &str) -> String {
    port(number, &format!("mac = \"{}\"\naddresses = [\"10.0.0.{number}\"]\n{keys}", mac_text(number)))
}

/// The front-end of a port or underlay.
pub(crate) fn front_end(daemon: &Daemon, name: &str) -> FrontEnd {
    FrontEnd::connect(&daemon.path(&format!("{name}.sock")), attack::small()).unwrap()
}

/// UDP from guest to guest, in a frame of 60 bytes.
pub(crate) fn datagram(from: u8, to: u8, source_port: u16, destination_port: u16) -> Vec<u8> {
    let mut frame = udp_frame([(mac(from), from), (mac(to), to)], source_port, b"eighteen bytes....");
    frame[36..38].copy_from_slice(&destination_port.to_be_bytes());
    frame
}

/// What the other host, 192.0.2.2, sends to 192.0.2.1 around a frame of VNI 100; of a group, if that is not 0.
pub(crate) fn outer(group: u16, inner: &[u8]) -> Vec<u8> {
    let ends = Ends {
        source: (Mac(THEIRS), "192.0.2.2".parse().unwrap()),
        destination: (Mac(OURS), "192.0.2.1".parse().unwrap()),
        udp_port: 4789,
    };
    let mut header = OuterHeader::new(&ends, vxlan::Header::new(Vni::new(100).unwrap(), group)).unwrap();
    [header.finish(inner.len(), 1), inner].concat()
}

/// Waits for one frame, and returns it.
#[track_caller]
pub(crate) fn next(front_end: &mut FrontEnd) -> Vec<u8> {
    let mut frames: Vec<Vec<u8>> = Vec::new();
    wait_until(LIMIT, "a frame", || {
        front_end.receive_burst(|bytes, _| frames.push(bytes.to_vec())).unwrap();
        !frames.is_empty()
    })
    .unwrap();
    assert_eq!(frames.len(), 1);
    frames.remove(0)
}

/// Sends a frame, and waits until it has come out.
#[track_caller]
pub(crate) fn passes(from: &mut FrontEnd, to: &mut FrontEnd, frame: &[u8]) {
    assert_eq!(from.send_burst(&[frame]).unwrap(), 1);
    assert_eq!(next(to), frame);
}

/// Sends a frame that must end at `place`, as `ports/vm2/ingress_denied`, and nowhere else.
#[track_caller]
pub(crate) fn ends(daemon: &Daemon, from: &mut FrontEnd, to: &mut FrontEnd, frame: &[u8], place: &str) {
    let before = drops(daemon);
    assert_eq!(from.send_burst(&[frame]).unwrap(), 1);
    wait_drops(daemon, &before, &[(place, 1)]);
    assert_eq!(to.receive_burst(|_, _| ()).unwrap(), 0);
}
