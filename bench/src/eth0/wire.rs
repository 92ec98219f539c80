//! Single raw frames in both directions, and what becomes of them: sizes, types, destinations, sources, tags, packets; then
//! many in a row.

use super::delivery::{Way, carry, deliver};
use super::packet::ethernet;
use super::{Observations, Site, frames};
use crate::topology::{Frame, FramePattern, TopologyError};

/// Frames of the test for order. Fewer than half the buffers that any part of either site has.
const SEQUENCE_FRAMES: usize = 400;
/// Where the sequence number is: behind the Ethernet header.
const SEQUENCE_AT: usize = 14;

pub(super) fn observe(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    for way in [Way::Out, Way::In] {
        let name = way.name();
        // Both learn where the other is, so that only what is meant to be unknown is.
        carry(site, way, &[])?;
        deliver(site, way, &format!("wire.{name}.size"), &frames::sizes(way), rows)?;
        deliver(site, way, &format!("wire.{name}.type"), &frames::ether_types(way), rows)?;
        deliver(site, way, &format!("wire.{name}.destination"), &frames::destinations(way), rows)?;
        deliver(site, way, &format!("wire.{name}.control"), &frames::control_protocols(way), rows)?;
        deliver(site, way, &format!("wire.{name}.tag"), &frames::tags(way), rows)?;
        deliver(site, way, &format!("wire.{name}.packet"), &frames::packets(way), rows)?;
        deliver(site, way, &format!("wire.{name}.source"), &frames::sources(way), rows)?;
        every_length(site, way, rows)?;
        sequence(site, way, rows)?;
    }
    // A guest that asks for more gets more.
    site.guest.sh("ip link set eth0 allmulticast on")?;
    deliver(site, Way::In, "wire.in_allmulticast.destination", &frames::destinations(Way::In), rows)?;
    site.guest.sh("ip link set eth0 allmulticast off promisc on")?;
    deliver(site, Way::In, "wire.in_promiscuous.destination", &frames::destinations(Way::In), rows)?;
    deliver(site, Way::In, "wire.in_promiscuous.tag", &frames::tags(Way::In), rows)?;
    site.guest.sh("ip link set eth0 promisc off")?;
    vlan_interface(site, rows)
}

/// All lengths of whole frames, in one row.
fn every_length(site: &Site, way: Way, rows: &mut Observations) -> Result<(), TopologyError> {
    let (destination, source) = way.ends();
    let header = ethernet(destination, source, frames::EXPERIMENTAL, &[]);
    // Every seventh: coprime with every power of two, so that all remainders come up.
    let lengths: Vec<_> = (60..=1514).step_by(7).collect();
    let sent: Vec<_> = FramePattern::new(&header, &lengths).frames().collect();
    let arrived = own(carry(site, way, &sent)?, &header);
    let good = sent.iter().filter(|frame| arrived.iter().any(|other| other == *frame)).count();
    rows.record(format!("wire.{}.every_seventh_length", way.name()), format!("{good} of {} as sent", sent.len()));
    Ok(())
}

/// Many numbered frames of one flow.
fn sequence(site: &Site, way: Way, rows: &mut Observations) -> Result<(), TopologyError> {
    let (destination, source) = way.ends();
    let header = ethernet(destination, source, 0x88b7, &[]);
    let numbered = |number: usize| {
        let mut frame = [&header[..], &(number as u32).to_be_bytes()].concat();
        frame.resize(60 + number * 13 % 1400, 0x77);
        frame
    };
    let sent: Vec<_> = (0..SEQUENCE_FRAMES).map(numbered).collect();
    let arrived = own(carry(site, way, &sent)?, &header);
    let numbers: Vec<_> = arrived
        .iter()
        .filter_map(|frame| frame.get(SEQUENCE_AT..SEQUENCE_AT + 4)?.try_into().ok().map(u32::from_be_bytes))
        .collect();
    let late = numbers.windows(2).filter(|pair| pair[1] < pair[0]).count();
    let twice = numbers.windows(2).filter(|pair| pair[1] == pair[0]).count();
    let name = format!("wire.{}.sequence", way.name());
    rows.record(format!("{name}.arrived"), format!("{} of {SEQUENCE_FRAMES}", numbers.len()));
    rows.record(format!("{name}.out_of_order"), late);
    rows.record(format!("{name}.twice"), twice);
    Ok(())
}

/// With a VLAN interface, its own tag gets through the card's filter, and comes from it.
fn vlan_interface(site: &Site, rows: &mut Observations) -> Result<(), TopologyError> {
    let made = site.outcome("ip link add link eth0 name eth0.5 type vlan id 5 && ip link set eth0.5 up")?;
    rows.record("wire.vlan_interface.made", made);
    deliver(site, Way::In, "wire.in_vlan_interface.tag", &frames::tags(Way::In), rows)?;
    let socket = site.peer.listen()?;
    let frame = ethernet([0x52, 0x54, 0, 0, 0, 2], [0x52, 0x54, 0, 0, 0, 1], 0x88b7, &[0x42; 46]);
    site.guest.send_frames("eth0.5", &[frame])?;
    let tagged = crate::topology::FrameFilter::any().bytes_at(12, &[0x81, 0, 0, 5, 0x88, 0xb7]);
    let got = socket.receive(&tagged, 1, std::time::Duration::from_secs(2))?;
    rows.record("wire.vlan_interface.tag_of_its_frames", if got.is_empty() { "lost" } else { "802.1Q 5" });
    rows.record("wire.vlan_interface.removed", site.outcome("ip link del eth0.5")?);
    Ok(())
}

/// Bytes of the frames that begin with this header.
fn own(arrived: Vec<Frame>, header: &[u8]) -> Vec<Vec<u8>> {
    arrived.into_iter().map(|frame| frame.bytes).filter(|bytes| bytes.starts_with(header)).collect()
}
