//! Named raw frames through the wire, and what became of each.

use std::time::{Duration, Instant};

use super::packet::ethernet;
use super::site::{GUEST_MAC, PEER_MAC};
use super::{Observations, Site};
use crate::topology::{Frame, FrameFilter, PacketSocket, TopologyError};

/// How long the last frame of a batch may take on a loaded machine.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(10);
/// How long frames behind the last are waited for: fragments of the outer packet overtake.
const STRAGGLERS: Duration = Duration::from_millis(150);
/// How long a capture in the guest is waited for at a time.
const SLICE: Duration = Duration::from_millis(250);
/// Never reached: takes end by time.
const FRAMES_MAX: usize = 100_000;
/// Local experimental ethertype 2 (IEEE 802.1Q); the last frame of a batch has it and nothing else does.
const LAST: u16 = 0x88b6;

/// A frame with the name of what it tries.
#[derive(Debug, Clone)]
pub(super) struct Case {
    pub(super) name: String,
    pub(super) frame: Vec<u8>,
}

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From the guest to the peer.
    Out,
    /// From the peer to the guest.
    In,
}

impl Way {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Out => "out",
            Self::In => "in",
        }
    }

    /// Destination and source address.
    pub(super) fn ends(self) -> ([u8; 6], [u8; 6]) {
        match self {
            Self::Out => (PEER_MAC, GUEST_MAC),
            Self::In => (GUEST_MAC, PEER_MAC),
        }
    }
}

/// Sends the frames, and records what came of each under `prefix` and its name.
pub(super) fn deliver(
    site: &Site,
    way: Way,
    prefix: &str,
    cases: &[Case],
    rows: &mut Observations,
) -> Result<(), TopologyError> {
    let frames: Vec<_> = cases.iter().map(|case| case.frame.clone()).collect();
    let arrived = carry(site, way, &frames)?;
    for case in cases {
        let others = || cases.iter().filter(|other| other.name != case.name);
        let unknown = |frame: &&Frame| !others().any(|other| other.frame == frame.bytes);
        let candidates: Vec<_> = arrived.iter().filter(unknown).collect();
        rows.record(format!("{prefix}.{}", case.name), fate(&case.frame, &candidates));
    }
    Ok(())
}

/// Sends frames one way and gives all that arrived until the last of them had.
pub(super) fn carry(site: &Site, way: Way, frames: &[Vec<u8>]) -> Result<Vec<Frame>, TopologyError> {
    // To everybody: a guest with another address must get it too.
    let last = ethernet([0xff; 6], way.ends().1, LAST, &[0x5a; 46]);
    let is_last = FrameFilter::any().ether_type(LAST);
    let mut arrived = match way {
        Way::Out => {
            let socket = site.peer.listen()?;
            site.guest.send_frames("eth0", frames)?;
            site.guest.send_frames("eth0", std::slice::from_ref(&last))?;
            receive_until(&socket, &is_last)?
        }
        Way::In => {
            let capture = site.guest.capture("eth0")?;
            site.peer.send(frames)?;
            site.peer.send(std::slice::from_ref(&last))?;
            let deadline = Instant::now() + ARRIVAL_LIMIT;
            let mut arrived = Vec::new();
            while !arrived.iter().any(|frame: &Frame| is_last.matches(&frame.bytes)) && Instant::now() < deadline {
                arrived.extend(capture.frames(&FrameFilter::any(), FRAMES_MAX, SLICE)?);
            }
            arrived
        }
    };
    arrived.retain(|frame| !is_last.matches(&frame.bytes));
    Ok(arrived)
}

fn receive_until(socket: &PacketSocket, is_last: &FrameFilter) -> Result<Vec<Frame>, TopologyError> {
    let deadline = Instant::now() + ARRIVAL_LIMIT;
    let mut arrived = Vec::new();
    while Instant::now() < deadline {
        let frames = socket.receive(&FrameFilter::any(), 1, SLICE)?;
        let done = frames.iter().any(|frame| is_last.matches(&frame.bytes));
        arrived.extend(frames);
        if done {
            break;
        }
    }
    arrived.extend(socket.receive(&FrameFilter::any(), FRAMES_MAX, STRAGGLERS)?);
    Ok(arrived)
}

/// What became of a frame, given all that arrived and is no other frame of the batch.
fn fate(sent: &[u8], arrived: &[&Frame]) -> String {
    let whole: Vec<_> = arrived.iter().filter(|frame| frame.bytes == sent).collect();
    match whole.as_slice() {
        [frame] if frame.checksum_pending => return "as sent, checksum pending".to_owned(),
        [_] => return "as sent".to_owned(),
        [] => {}
        several => return format!("as sent, {} times", several.len()),
    }
    let common = |frame: &Frame| frame.bytes.iter().zip(sent).take_while(|(left, right)| left == right).count();
    // Altered, but still its own: the addresses and type survived, and most of the rest.
    let Some(frame) = arrived.iter().filter(|frame| common(frame) >= 14).max_by_key(|frame| common(frame)) else {
        return "lost".to_owned();
    };
    let same = common(frame);
    match frame.bytes.len() {
        length if length > sent.len() && same == sent.len() => format!("padded to {length} bytes"),
        length if length < sent.len() && same == length => format!("cut to {length} bytes"),
        _ if same * 2 < sent.len() => "lost".to_owned(),
        length => format!("{length} bytes, altered from byte {same} on"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(bytes: &[u8]) -> Frame {
        Frame { bytes: bytes.to_vec(), checksum_pending: false }
    }

    #[test]
    fn every_fate_has_its_words() {
        let sent: Vec<u8> = (0..20).collect();
        let with = |change: fn(&mut Vec<u8>)| {
            let mut bytes = sent.clone();
            change(&mut bytes);
            fate(&sent, &[&frame(&bytes)])
        };
        assert_eq!(with(|_| ()), "as sent");
        assert_eq!(fate(&sent, &[&frame(&sent), &frame(&sent)]), "as sent, 2 times");
        assert_eq!(with(|bytes| bytes.resize(60, 0)), "padded to 60 bytes");
        assert_eq!(with(|bytes| bytes.truncate(16)), "cut to 16 bytes");
        assert_eq!(with(|bytes| bytes[17] = 99), "20 bytes, altered from byte 17 on");
        assert_eq!(with(|bytes| bytes[2] = 99), "lost");
        assert_eq!(fate(&sent, &[]), "lost");
    }
}
