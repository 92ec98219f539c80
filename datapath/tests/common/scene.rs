//! A LAN whose network reaches another host over a wire that is a ring: the front-end of that wire.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::net::IpAddr;
use std::sync::Arc;

use dreamwire_datapath::counters::UnderlayCounters;
use dreamwire_datapath::mac::Mac;
use dreamwire_datapath::snapshot::{NetworkId, Tunnel, UnderlayId};
use dreamwire_datapath::underlay::{Ends, OuterHeader, RingUnderlay, RingUnderlayConfig};
use dreamwire_datapath::vni::Vni;
use smoltcp::wire::{IpAddress, UdpPacket};

use super::{F_EVENT_IDX, F_MERGEABLE, F_VERSION_1, Lan, Station};

pub(crate) const WIRE: UnderlayId = UnderlayId(3);
pub(crate) const OURS: Mac = Mac([2, 0xaa, 0, 0, 0, 1]);
pub(crate) const THEIRS: Mac = Mac([2, 0xaa, 0, 0, 0, 2]);
pub(crate) const UDP_PORT: u16 = 4789;

/// Two guests, and a wire with another host on it.
pub(crate) struct Scene {
    pub(crate) lan: Lan,
    /// The front-end that is the wire: its receiveq is where we send.
    pub(crate) wire: Station,
    pub(crate) counters: Arc<UnderlayCounters>,
    pub(crate) here: IpAddr,
    pub(crate) there: IpAddr,
}

pub(crate) fn vni() -> Vni {
    Vni::new(0x12_3456).unwrap()
}

impl Scene {
    pub(crate) fn new(here: &str, there: &str) -> Self {
        Self::with(here, there, |_| {})
    }

    pub(crate) fn with(here: &str, there: &str, change: impl FnOnce(&mut RingUnderlayConfig)) -> Self {
        let (here, there): (IpAddr, IpAddr) = (here.parse().unwrap(), there.parse().unwrap());
        let mut lan = Lan::new(2, 1);
        lan.network(0).tunnel =
            Some(Tunnel { vni: vni(), underlay: WIRE, remotes: vec![there], carries_group: false, trusted: vec![] });
        lan.snapshot.by_vni.insert((WIRE, vni()), NetworkId(0));
        lan.publish();
        let mut config = RingUnderlayConfig {
            mac: OURS,
            address: here,
            udp_port: UDP_PORT,
            mtu: 1600,
            gateway: None,
            neighbours: Vec::new(),
        };
        change(&mut config);
        let counters = Arc::<UnderlayCounters>::default();
        lan.worker.add_underlay(WIRE, RingUnderlay::new(config, Arc::clone(&counters)));
        let mut scene = Self { lan, wire: Station::new(99, 1), counters, here, there };
        scene.plug_in();
        scene
    }

    pub(crate) fn plug_in(&mut self) {
        for (number, queue) in self.wire.queues.iter().enumerate() {
            let ring = queue.ring.open(F_VERSION_1 | F_MERGEABLE | F_EVENT_IDX);
            assert!(self.lan.worker.attach_wire(WIRE, number as u16, ring).is_none());
        }
        self.wire.fill();
    }

    /// An outer packet from the other host around `inner`.
    pub(crate) fn outer(&self, inner: &[u8]) -> Vec<u8> {
        let ends = Ends { source: (THEIRS, self.there), destination: (OURS, self.here), udp_port: UDP_PORT };
        let mut header = OuterHeader::new(&ends, vni().into()).unwrap();
        let mut packet = header.finish(inner.len(), 77).to_vec();
        packet.extend(inner);
        if self.here.is_ipv6() {
            self.sum(&mut packet, 54);
        }
        packet
    }

    /// Gives a packet the UDP checksum that is right.
    pub(crate) fn sum(&self, packet: &mut [u8], udp_at: usize) {
        let (source, destination) = (IpAddress::from(self.there), IpAddress::from(self.here));
        UdpPacket::new_unchecked(&mut packet[udp_at..]).fill_checksum(&source, &destination);
    }
}
