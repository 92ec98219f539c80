use proptest::prelude::*;

use super::*;

fn ethernet(ethertype: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x52, 0x54, 0, 0, 0, 1, 0x52, 0x54, 0, 0, 0, 2];
    frame.extend(ethertype.to_be_bytes());
    frame.extend(packet);
    frame
}

/// IPv4 from 10.0.0.1 to 10.0.0.2; `field` is flags and fragment offset.
fn ipv4_frame(protocol: u8, field: u16, options: &[u8], payload: &[u8]) -> Vec<u8> {
    let header_bytes = 20 + options.len();
    let mut packet = vec![0x40 | (header_bytes / 4) as u8, 0];
    packet.extend(((header_bytes + payload.len()) as u16).to_be_bytes());
    packet.extend([0x12, 0x34]);
    packet.extend(field.to_be_bytes());
    packet.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend(options);
    packet.extend(payload);
    ethernet(ETHERTYPE_IPV4, &packet)
}

fn ipv6_frame(next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0];
    packet.extend((payload.len() as u16).to_be_bytes());
    packet.extend([next, 64, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    packet.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    packet.extend(payload);
    ethernet(ETHERTYPE_IPV6, &packet)
}

/// Port 40000 to 443, sequence 1000, acknowledgment 2000, window 500.
fn tcp_header(flags: u8, options: &[u8]) -> Vec<u8> {
    let mut header = vec![0x9c, 0x40, 0x01, 0xbb, 0, 0, 0x03, 0xe8, 0, 0, 0x07, 0xd0];
    header.extend([((20 + options.len()) as u8 / 4) << 4, flags, 0x01, 0xf4, 0, 0, 0, 0]);
    header.extend(options);
    header
}

fn udp_header(payload_bytes: u16) -> Vec<u8> {
    let mut header = vec![0x9c, 0x40, 0, 53];
    header.extend((payload_bytes + 8).to_be_bytes());
    header.extend([0, 0]);
    header
}

fn of(frame: &[u8]) -> Parsed {
    parse(&frame[..frame.len().min(128)], frame.len())
}

fn packet(frame: &[u8]) -> Packet {
    match of(frame) {
        Parsed::Ip(packet) => packet,
        other => panic!("{other:?}"),
    }
}

fn key4(protocol: u8, source_port: u16, destination_port: u16) -> Key {
    Key::new(protocol, ([10, 0, 0, 1].into(), source_port), ([10, 0, 0, 2].into(), destination_port))
}

#[test]
fn tcp_is_read_with_its_options_with_and_without_tags() {
    // MSS, SACK permitted, timestamp, NOP, window scale 7: what Linux sends.
    let options = [2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7];
    let segment = Segment {
        sequence: 1000,
        acknowledgment: 2000,
        selective: 2000,
        window: 500,
        flags: 2,
        scale: Some(7),
        sack_permitted: true,
        options: true,
        ..Segment::default()
    };
    let expected = Packet { key: key4(TCP, 40000, 443), fragment: Fragment::Whole, transport: Transport::Tcp(segment) };
    let mut frame = ipv4_frame(TCP, 0x4000, &[], &tcp_header(2, &options));
    assert_eq!(packet(&frame), expected);
    frame.splice(12..12, [0x81, 0, 0, 7]);
    assert_eq!(packet(&frame), expected);
    frame.splice(12..12, [0x88, 0xa8, 0, 7]);
    assert_eq!(packet(&frame), expected);
    frame.splice(12..12, [0x81, 0, 0, 7]);
    assert_eq!(of(&frame), Parsed::Unreadable, "a third tag");
    assert_eq!(packet(&ipv4_frame(TCP, 0, &[1, 1, 1, 0], &tcp_header(2, &options))), expected);
}

#[test]
fn a_sack_counts_with_its_highest_edge_and_padding_is_no_payload() {
    let sack = [1, 1, 5, 18, 0, 0, 8, 0, 0, 0, 9, 0, 0, 0, 10, 0, 0, 0, 11, 0];
    let mut frame = ipv4_frame(TCP, 0, &[], &[tcp_header(0x10, &sack), vec![7; 3]].concat());
    frame.extend([0; 9]);
    let Transport::Tcp(segment) = packet(&frame).transport else { panic!("TCP") };
    assert_eq!((segment.selective, segment.acknowledgment, segment.payload_bytes), (0x0b00, 2000, 3));
    let broken = [1, 1, 5, 40, 0, 0, 8, 0, 0, 0, 9, 0];
    let Transport::Tcp(segment) = packet(&ipv4_frame(TCP, 0, &[], &tcp_header(0x10, &broken))).transport else {
        panic!("TCP")
    };
    assert_eq!(segment.selective, 2000);
}

#[test]
fn lengths_that_lie_are_unreadable() {
    let good = ipv4_frame(TCP, 0, &[], &tcp_header(2, &[]));
    assert!(matches!(of(&good), Parsed::Ip(_)));
    for (at, value) in [(14, 0x44), (14, 0x4f), (14, 0x55), (16, 0xff), (17, 19), (17, 39), (46, 0x40), (46, 0xf0)] {
        let mut bad = good.clone();
        bad[at] = value;
        assert_eq!(of(&bad), Parsed::Unreadable, "byte {at} = {value:#x}");
    }
    assert_eq!(of(&good[..good.len() - 1]), Parsed::Unreadable);
    assert_eq!(parse(&good[..40], good.len()), Parsed::Unreadable, "ports beyond the copy");
    let mut udp = ipv4_frame(UDP, 0, &[], &udp_header(0));
    assert_eq!(packet(&udp).key, key4(UDP, 40000, 53));
    udp[39] = 7;
    assert_eq!(of(&udp), Parsed::Unreadable);
    udp[39] = 9;
    assert_eq!(of(&udp), Parsed::Unreadable);
}

#[test]
fn frames_that_are_not_ip_are_told_apart() {
    assert_eq!(of(&ethernet(ETHERTYPE_ARP, &[0; 28])), Parsed::Arp);
    assert_eq!(of(&ethernet(0x88b5, &[])), Parsed::Other(0x88b5));
    assert_eq!(of(&ethernet(38, &[0; 38])), Parsed::Other(38));
    assert_eq!(of(&[0; 13]), Parsed::Unreadable);
}

#[test]
fn fragments_are_read_by_place() {
    let first = ipv4_frame(UDP, 0x2000, &[], &[udp_header(100), vec![0; 16]].concat());
    let expected = Fragment::First { id: 0x1234, end_bytes: 24 };
    assert_eq!(packet(&first), Packet { key: key4(UDP, 40000, 53), fragment: expected, transport: Transport::Other });
    let later = ipv4_frame(UDP, 0x2003, &[], &[0; 8]);
    let expected = Fragment::Later { id: 0x1234, offset_bytes: 24 };
    assert_eq!(packet(&later), Packet { key: key4(UDP, 0, 0), fragment: expected, transport: Transport::Other });
    // RFC 1858: a first fragment too small for the header; a length that is no multiple of 8; the ping of death.
    assert_eq!(of(&ipv4_frame(TCP, 0x2000, &[], &tcp_header(2, &[])[..16])), Parsed::Unreadable);
    assert_eq!(of(&ipv4_frame(UDP, 0x2000, &[], &[0; 12])), Parsed::Unreadable);
    assert_eq!(of(&ipv4_frame(UDP, 0x1fff, &[], &[0; 16])), Parsed::Unreadable);
    let tcp = packet(&ipv4_frame(TCP, 0x2000, &[], &[tcp_header(0x10, &[]), vec![0; 4]].concat()));
    assert!(matches!(tcp.transport, Transport::Tcp(Segment { fragmented: true, .. })));
}

#[test]
fn ipv6_extension_headers_are_looked_behind_up_to_a_limit() {
    let hop = |next: u8| vec![next, 0, 5, 2, 0, 0, 1, 0];
    let fragment = |next: u8, field: u16| {
        let [high, low] = field.to_be_bytes();
        vec![next, 0, high, low, 0, 0, 0, 9]
    };
    let key = |protocol, source_port, destination_port| {
        Key::new(protocol, ("fd00::1".parse().unwrap(), source_port), ("fd00::2".parse().unwrap(), destination_port))
    };
    let chain = [hop(DESTINATION_OPTIONS), hop(UDP), udp_header(0)].concat();
    assert_eq!(packet(&ipv6_frame(HOP_BY_HOP, &chain)).key, key(UDP, 40000, 53));
    let atomic = [fragment(UDP, 0), udp_header(0)].concat();
    assert_eq!(packet(&ipv6_frame(FRAGMENT, &atomic)).fragment, Fragment::Whole);
    let first = packet(&ipv6_frame(FRAGMENT, &[fragment(UDP, 1), udp_header(50)].concat()));
    assert_eq!((first.fragment, first.key), (Fragment::First { id: 9, end_bytes: 8 }, key(UDP, 40000, 53)));
    let later = packet(&ipv6_frame(FRAGMENT, &[fragment(UDP, 16), vec![0; 5]].concat()));
    assert_eq!((later.fragment, later.key), (Fragment::Later { id: 9, offset_bytes: 16 }, key(UDP, 0, 0)));
    // The first fragment ends before the header chain does (RFC 7112).
    assert_eq!(of(&ipv6_frame(FRAGMENT, &fragment(DESTINATION_OPTIONS, 1))), Parsed::Unreadable);
    let twice = [fragment(FRAGMENT, 1), fragment(UDP, 1), udp_header(50)].concat();
    assert_eq!(of(&ipv6_frame(FRAGMENT, &twice)), Parsed::Unreadable);
    let longest = [hop(DESTINATION_OPTIONS).repeat(EXTENSIONS_MAX - 1), hop(UDP), udp_header(0)].concat();
    assert_eq!(
        parse(&ipv6_frame(DESTINATION_OPTIONS, &longest), 14 + 40 + longest.len()),
        Parsed::Ip(packet(&ipv6_frame(HOP_BY_HOP, &chain)))
    );
    let longer = [hop(DESTINATION_OPTIONS), longest].concat();
    assert_eq!(parse(&ipv6_frame(DESTINATION_OPTIONS, &longer), 14 + 40 + longer.len()), Parsed::Unreadable);
}

#[test]
fn an_icmp_error_quotes_a_packet() {
    let quoted = ipv4_frame(TCP, 0x4000, &[], &tcp_header(2, &[]));
    let error = [vec![3, 1, 0, 0, 0, 0, 0, 0], quoted[14..42].to_vec()].concat();
    let parsed = packet(&ipv4_frame(ICMP, 0, &[], &error));
    assert_eq!(parsed.key, key4(ICMP, 0, 0x0301));
    let expected = Quoted { key: key4(TCP, 40000, 443), sequence: Some(1000) };
    assert_eq!(parsed.transport, Transport::IcmpError(Some(expected)));
    let unreadable = |error: &[u8]| {
        assert_eq!(packet(&ipv4_frame(ICMP, 0, &[], error)).transport, Transport::IcmpError(None));
    };
    unreadable(&error[..8 + 27]);
    unreadable(&error[..8]);
    let mut later = error.clone();
    later[8 + 7] = 1;
    unreadable(&later);
    // An error about an error.
    let inner = ipv4_frame(ICMP, 0, &[], &error);
    unreadable(&[vec![3, 1, 0, 0, 0, 0, 0, 0], inner[14..].to_vec()].concat());
    let echo = packet(&ipv4_frame(ICMP, 0, &[], &[8, 0, 0, 0, 0, 77, 0, 1]));
    assert_eq!((echo.key, echo.transport), (key4(ICMP, 77, 0x0800), Transport::Other));
    let too_big = [vec![2, 0, 0, 0, 0, 0, 5, 0], ipv6_frame(UDP, &udp_header(0))[14..].to_vec()].concat();
    let Transport::IcmpError(Some(quoted)) = packet(&ipv6_frame(ICMPV6, &too_big)).transport else {
        panic!("an error")
    };
    assert_eq!((quoted.key.source_port, quoted.key.destination_port, quoted.sequence), (40000, 53, None));
}

proptest! {
    #[test]
    fn the_straight_line_and_the_general_walk_agree(
        bytes in proptest::collection::vec(any::<u8>(), 0..140),
        shape in 0..6usize,
        cut in 0..140usize,
        bit in proptest::option::of(0..1120usize),
    ) {
        let mut frame = match shape {
            0 => bytes,
            1 => ipv4_frame(TCP, 0x4000, &[], &[tcp_header(0x18, &[1, 1, 8, 10, 0, 0, 0, 0, 0, 0, 0, 0]), bytes].concat()),
            2 => ipv4_frame(UDP, 0, &[], &[udp_header(bytes.len() as u16), bytes].concat()),
            3 => ipv6_frame(TCP, &[tcp_header(0x10, &[]), bytes].concat()),
            4 => ipv6_frame(UDP, &[udp_header(bytes.len() as u16), bytes].concat()),
            _ => ipv6_frame(HOP_BY_HOP, &[vec![ICMPV6, 0, 0, 0, 0, 0, 0, 0], bytes].concat()),
        };
        if let Some(bit) = bit && let Some(byte) = frame.get_mut(bit / 8) {
            *byte ^= 1 << (bit % 8);
        }
        let copy = &frame[..frame.len().min(cut)];
        let mut parsed = Parsed::Unreadable;
        if straight(copy, frame.len(), &mut parsed).is_some() {
            prop_assert_eq!(general(copy, frame.len()), parsed);
        }
        let _ = parse(copy, frame.len());
    }
}
