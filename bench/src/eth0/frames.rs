//! The raw frames that go over the wire one by one, as lists of cases.

use super::delivery::{Case, Way};
use super::packet::{ARP, IPV4, IPV6, Ipv4, NOBODY4, NOBODY6, TCP, UDP, ethernet, ipv6, tcp, udp};

/// Local experimental ethertype 1 (IEEE 802.1Q).
pub(super) const EXPERIMENTAL: u16 = 0x88b5;
/// A unicast address that nobody has spoken from.
pub(super) const STRANGER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 0x33];
const BROADCAST: [u8; 6] = [0xff; 6];

fn case(name: impl Into<String>, frame: Vec<u8>) -> Case {
    Case { name: name.into(), frame }
}

/// `length` bytes that differ from those of any other seed in the first one.
fn filler(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|index| (seed + index * 7) as u8).collect()
}

/// Every length around the shortest frame of a wire (60 bytes without check sequence), and some to the longest.
pub(super) fn sizes(way: Way) -> Vec<Case> {
    let (destination, source) = way.ends();
    let some =
        [100, 127, 128, 129, 255, 256, 257, 511, 512, 1023, 1024, 1279, 1280, 1400, 1450, 1499, 1500, 1513, 1514];
    (14..=66)
        .chain(some)
        .map(|bytes| {
            case(format!("{bytes:04}"), ethernet(destination, source, EXPERIMENTAL, &filler(bytes, bytes - 14)))
        })
        .collect()
}

/// Types that are not IP, with real ones and lengths (IEEE 802.3 §3.2.6) among them, from station to station.
pub(super) fn ether_types(way: Way) -> Vec<Case> {
    const TYPES: &[(u16, &str)] = &[
        (0x0000, "length_0"),
        (0x0026, "llc_length_38"),
        (0x05dc, "llc_length_1500"),
        (0x05ff, "undefined_05ff"),
        (0x0600, "xns"),
        (0x0806, "arp_malformed"),
        (0x0842, "wake_on_lan"),
        (0x22ea, "srp"),
        (0x22f0, "avtp"),
        (0x22f3, "trill"),
        (0x6003, "decnet"),
        (0x6558, "transparent_bridging"),
        (0x8035, "rarp"),
        (0x809b, "appletalk"),
        (0x8137, "ipx"),
        (0x8204, "qnx"),
        (0x86de, "unassigned_86de"),
        (0x8808, "mac_control"),
        (0x8809, "slow_protocols"),
        (0x8847, "mpls"),
        (0x8848, "mpls_multicast"),
        (0x8863, "pppoe_discovery"),
        (0x8864, "pppoe_session"),
        (0x8870, "jumbo_llc"),
        (0x887b, "homeplug"),
        (0x888e, "eapol"),
        (0x8892, "profinet"),
        (0x88a2, "ata_over_ethernet"),
        (0x88a4, "ethercat"),
        (0x88b5, "experimental"),
        (0x88b7, "oui_extended"),
        (0x88cc, "lldp"),
        (0x88e1, "homeplug_av"),
        (0x88e5, "macsec"),
        (0x88e7, "provider_backbone"),
        (0x88f7, "ptp"),
        (0x8902, "cfm"),
        (0x8906, "fcoe"),
        (0x8914, "fip"),
        (0x8915, "roce"),
        (0x892f, "hsr"),
        (0x893a, "ieee1905"),
        (0x894f, "nsh"),
        (0x9000, "loopback"),
        (0xffff, "reserved_ffff"),
    ];
    let (destination, source) = way.ends();
    let of = |(index, &(number, name)): (usize, &(u16, &str))| {
        case(name, ethernet(destination, source, number, &filler(index * 5 + 1, 46)))
    };
    TYPES.iter().enumerate().map(of).collect()
}

/// Destinations other than the receiver itself. What a card filters, shows towards the guest.
pub(super) fn destinations(way: Way) -> Vec<Case> {
    let (_, source) = way.ends();
    let mut named: Vec<(String, [u8; 6])> = vec![
        ("broadcast".to_owned(), BROADCAST),
        ("unknown_station".to_owned(), STRANGER),
        ("zero".to_owned(), [0; 6]),
        ("all_hosts_224.0.0.1".to_owned(), [1, 0, 0x5e, 0, 0, 1]),
        ("mdns_224.0.0.251".to_owned(), [1, 0, 0x5e, 0, 0, 0xfb]),
        ("unjoined_239.1.2.3".to_owned(), [1, 0, 0x5e, 1, 2, 3]),
        ("all_nodes_ff02::1".to_owned(), [0x33, 0x33, 0, 0, 0, 1]),
        ("all_routers_ff02::2".to_owned(), [0x33, 0x33, 0, 0, 0, 2]),
        ("solicited_node".to_owned(), [0x33, 0x33, 0xff, 0, 0, if way == Way::In { 1 } else { 2 }]),
        ("solicited_node_of_another".to_owned(), [0x33, 0x33, 0xff, 0, 0, 0x77]),
        ("cdp".to_owned(), [1, 0, 0x0c, 0xcc, 0xcc, 0xcc]),
        ("pvst".to_owned(), [1, 0, 0x0c, 0xcc, 0xcc, 0xcd]),
        ("ptp".to_owned(), [1, 0x1b, 0x19, 0, 0, 0]),
        ("isis".to_owned(), [9, 0, 0x2b, 0, 0, 5]),
        ("local_group".to_owned(), [3, 0, 0, 0, 0, 1]),
    ];
    // IEEE 802.1Q table 8-1 (00 STP, 01 pause, 02 slow protocols, 03 802.1X, 0e LLDP), then GARP.
    let reserved = (0..=0x10).chain([0x20, 0x21]);
    named.extend(reserved.map(|last| (format!("01-80-c2-00-00-{last:02x}"), [1, 0x80, 0xc2, 0, 0, last])));
    let frame = |(index, (name, to)): (usize, (String, [u8; 6]))| {
        case(name, ethernet(to, source, EXPERIMENTAL, &filler(index * 3, 46)))
    };
    named.into_iter().enumerate().map(frame).collect()
}

/// Control protocols as they really look, to their reserved addresses.
pub(super) fn control_protocols(way: Way) -> Vec<Case> {
    let (_, source) = way.ends();
    let reserved = |last: u8, ether_type: u16, head: &[u8]| {
        let mut body = head.to_vec();
        body.resize(46, 0);
        ethernet([1, 0x80, 0xc2, 0, 0, last], source, ether_type, &body)
    };
    vec![
        // 802.3 length, LLC 42-42-03, configuration BPDU (IEEE 802.1D §9.3.1).
        case("stp_bpdu", reserved(0, 0x0026, &[0x42, 0x42, 3, 0, 0, 0, 0, 0])),
        case("pause", reserved(1, 0x8808, &[0, 1, 0xff, 0xff])),
        case("priority_pause", reserved(1, 0x8808, &[1, 1, 0, 0xff])),
        case("lacp", reserved(2, 0x8809, &[1, 1])),
        case("eapol_start", reserved(3, 0x888e, &[1, 1, 0, 0])),
        case("lldp", reserved(0x0e, 0x88cc, &[2, 7, 4, 0x52, 0x54, 0, 0, 0, 1])),
        case("mvrp", reserved(0x21, 0x88f5, &[0, 1])),
    ]
}

/// Sources that are not the sender's own.
pub(super) fn sources(way: Way) -> Vec<Case> {
    let (destination, _) = way.ends();
    let named: [(&str, [u8; 6]); 5] = [
        ("another_station", [0x52, 0x54, 0, 0, 0, 0x44]),
        ("global_address", [0, 0x1b, 0x21, 0, 0, 1]),
        ("zero", [0; 6]),
        ("group", [1, 0, 0x5e, 0, 0, 9]),
        ("broadcast", BROADCAST),
    ];
    let frame =
        |(index, (name, from))| case(name, ethernet(destination, from, EXPERIMENTAL, &filler(100 + index * 3, 46)));
    named.into_iter().enumerate().map(frame).collect()
}

/// Tags: 802.1Q, 802.1ad, stacked, old, and the longest frames that have them.
pub(super) fn tags(way: Way) -> Vec<Case> {
    const STACKS: &[(&str, &[(u16, u16)])] = &[
        ("8021q.priority_0", &[(0x8100, 0)]),
        ("8021q.priority_7", &[(0x8100, 0xe000)]),
        ("8021q.vid_1", &[(0x8100, 1)]),
        ("8021q.vid_5", &[(0x8100, 5)]),
        ("8021q.vid_5_priority_6", &[(0x8100, 0xc005)]),
        ("8021q.vid_5_drop_eligible", &[(0x8100, 0x1005)]),
        ("8021q.vid_4094", &[(0x8100, 4094)]),
        ("8021q.vid_4095", &[(0x8100, 4095)]),
        ("8021ad.vid_5", &[(0x88a8, 5)]),
        ("qinq.8021ad_8021q", &[(0x88a8, 100), (0x8100, 5)]),
        ("qinq.8021q_8021q", &[(0x8100, 100), (0x8100, 5)]),
        ("qinq.three", &[(0x88a8, 100), (0x8100, 5), (0x8100, 6)]),
        ("old.9100", &[(0x9100, 5)]),
        ("old.9200", &[(0x9200, 5)]),
    ];
    let (destination, source) = way.ends();
    let tagged = |stack: &[(u16, u16)], payload: &[u8]| {
        let mut frame = [destination, source].concat();
        for (tpid, tci) in stack {
            frame.extend(tpid.to_be_bytes());
            frame.extend(tci.to_be_bytes());
        }
        frame.extend(EXPERIMENTAL.to_be_bytes());
        frame.extend(payload);
        frame
    };
    let mut cases: Vec<_> = STACKS
        .iter()
        .enumerate()
        .map(|(index, (name, stack))| case(*name, tagged(stack, &filler(index * 11, 46))))
        .collect();
    cases.push(case("8021q.longest_1518", tagged(&[(0x8100, 5)], &filler(1, 1500))));
    cases.push(case("8021q.shortest_60", tagged(&[(0x8100, 5)], &filler(2, 42))));
    cases
}

/// IPv4 and IPv6 packets whose every bit has to arrive: traffic classes, fragments, options, lies.
pub(super) fn packets(way: Way) -> Vec<Case> {
    let (destination, source) = way.ends();
    let four = |name: String, packet: &[u8]| case(format!("ipv4.{name}"), ethernet(destination, source, IPV4, packet));
    let six = |name: String, packet: &[u8]| case(format!("ipv6.{name}"), ethernet(destination, source, IPV6, packet));
    let (four_ends, six_ends) = (NOBODY4.map(|end| end.octets()), NOBODY6.map(|end| end.octets()));
    let four_ends = [&four_ends[0][..], &four_ends[1][..]];
    let six_ends = [&six_ends[0][..], &six_ends[1][..]];
    let mut cases = Vec::new();
    // Of each codepoint all four ECN values (RFC 3168 §5): default, AF11, EF, CS6, all ones.
    for dscp in [0_u8, 10, 46, 48, 63] {
        for (ecn, name) in ["not_ect", "ect1", "ect0", "ce"].into_iter().enumerate() {
            let class = dscp << 2 | ecn as u8;
            let payload = udp(four_ends, [4000, 4001], &filler(class.into(), 30));
            cases.push(four(format!("dscp_{dscp:02}.{name}"), &Ipv4 { tos: class, ..Ipv4::new(UDP) }.packet(&payload)));
            let payload = udp(six_ends, [4000, 4001], &filler(class.into(), 30));
            cases.push(six(format!("dscp_{dscp:02}.{name}"), &ipv6(class, UDP, NOBODY6, &payload)));
        }
    }
    for (name, fragment) in
        [("first", 0x2000), ("middle", 0x2003), ("last", 6), ("tiny_offset", 0x2001), ("far", 0x1ffe)]
    {
        let packet = Ipv4 { fragment, ..Ipv4::new(UDP) }.packet(&filler(usize::from(fragment), 24));
        cases.push(four(format!("fragment.{name}"), &packet));
        let word = (fragment & 0x1fff) << 3 | fragment >> 13;
        let [high, low] = word.to_be_bytes();
        let payload = [&[UDP, 0, high, low, 0, 0, 0, 7][..], &filler(usize::from(fragment), 24)].concat();
        cases.push(six(format!("fragment.{name}"), &ipv6(0, 44, NOBODY6, &payload)));
    }
    for (name, fragment) in [("dont_fragment", 0x4000), ("evil_bit", 0x8000)] {
        cases.push(four(name.to_owned(), &Ipv4 { fragment, ..Ipv4::new(99) }.packet(&filler(3, 30))));
    }
    for ttl in [0, 1, 2, 255] {
        cases.push(four(format!("ttl_{ttl}"), &Ipv4 { ttl, ..Ipv4::new(98) }.packet(&filler(9, 30))));
    }
    let options = vec![0x94, 4, 0, 0, 1, 1, 1, 0];
    cases.push(four("router_alert".to_owned(), &Ipv4 { options, ..Ipv4::new(97) }.packet(&filler(4, 30))));
    for protocol in [0_u8, 1, 2, 4, 17, 33, 41, 46, 47, 50, 51, 58, 89, 103, 112, 132, 136, 253, 255] {
        let payload = filler(usize::from(protocol) + 1, 40);
        cases.push(four(format!("protocol_{protocol:03}"), &Ipv4::new(protocol).packet(&payload)));
        cases.push(six(format!("next_header_{protocol:03}"), &ipv6(0, protocol, NOBODY6, &payload)));
    }
    for (flags, name) in [(2_u8, "syn"), (0xc2, "syn_ecn_setup"), (0x18, "data"), (0x3f, "all_flags"), (0, "no_flags")]
    {
        let payload = if name == "data" { filler(7, 40) } else { Vec::new() };
        cases.push(four(format!("tcp.{name}"), &Ipv4::new(TCP).packet(&tcp(four_ends, flags, &payload))));
        cases.push(six(format!("tcp.{name}"), &ipv6(0, TCP, NOBODY6, &tcp(six_ends, flags, &payload))));
    }
    let vxlan = udp(four_ends, [4789, 4789], &[&[8, 0, 0, 0, 0, 0, 100, 0][..], &filler(8, 60)].concat());
    cases.push(four("vxlan_of_the_guests_own".to_owned(), &Ipv4::new(UDP).packet(&vxlan)));
    cases.extend(broken_packets(&four, four_ends));
    cases.push(case("arp.proxy_request", ethernet(BROADCAST, source, ARP, &filler(60, 46))));
    cases
}

/// A wire looks at none of it: what is wrong in a packet arrives wrong.
fn broken_packets(four: &dyn Fn(String, &[u8]) -> Case, ends: [&[u8]; 2]) -> Vec<Case> {
    let whole = Ipv4::new(UDP).packet(&udp(ends, [5000, 5001], &filler(21, 40)));
    let altered = |name: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let mut packet = whole.clone();
        change(&mut packet);
        four(format!("broken.{name}"), &packet)
    };
    vec![
        altered("header_checksum", &|packet| packet[10] ^= 0xff),
        altered("udp_checksum", &|packet| packet[26] ^= 0xff),
        altered("udp_checksum_zero", &|packet| packet[26..28].fill(0)),
        altered("udp_length", &|packet| packet[25] = 200),
        altered("version_5", &|packet| packet[0] = 0x55),
        altered("header_length_4", &|packet| packet[0] = 0x44),
        altered("total_length_too_long", &|packet| packet[2..4].copy_from_slice(&[5, 0])),
        altered("total_length_too_short", &|packet| packet[2..4].copy_from_slice(&[0, 10])),
        altered("trailing_bytes", &|packet| packet.extend([0xaa; 20])),
        altered("cut_in_header", &|packet| packet.truncate(12)),
    ]
}
