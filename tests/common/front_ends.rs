//! Front-ends of rings, with this program in the place of the guest or of the wire.

use dreamwire_bench::front_end::FrontEnd;
use dreamwire_bench::topology::wait_until;
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::underlay::{Ends, OuterHeader};
use dreamwire_datapath::vni::Vni;
use dreamwire_datapath::vxlan;

use super::LIMIT;

/// The cards at the ends of the wire.
pub(crate) const OURS: [u8; 6] = [2, 0, 0, 0, 0, 1];
pub(crate) const THEIRS: [u8; 6] = [2, 0, 0, 0, 0, 2];

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
