//! What a port's connection tracking costs in resident memory: what its connections use, not what they may.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::net::{IpAddr, Ipv4Addr};

use dreamwire_policy::tcp::Segment;
use dreamwire_policy::{Conntrack, ConntrackLimits, Direction, Fragment, Grant, Key, Packet, Transport};

const PORTS: u64 = 100;
const TCP: u8 = 6;
const UDP: u8 = 17;

/// proc_pid_statm(5): the second number, in pages.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    let page_bytes = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let line = page_bytes.lines().find(|line| line.starts_with("KernelPageSize:")).unwrap();
    pages * 1024 * line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
}

#[test]
fn an_empty_table_takes_no_memory_and_a_full_one_its_connections() {
    let limits = ConntrackLimits::default();
    assert_eq!(limits.connections, 32_768);
    let start = resident_bytes();
    let mut ports: Vec<Conntrack> = (0..PORTS).map(|seed| Conntrack::new(limits, seed)).collect();
    for port in &mut ports {
        port.sweep(usize::MAX, 1);
        assert_eq!(port.rows(0).count(), 0);
    }
    let empty = resident_bytes().saturating_sub(start) / PORTS;
    println!("{empty} bytes resident per empty table of {} connections", limits.connections);
    assert!(empty < 32 << 10, "{empty} bytes per empty table");

    // Bytes of an entry, of what TCP and IPv6 take besides, and up to a half more for what finds them.
    for (version, protocol, least) in [(4, UDP, 64), (4, TCP, 128), (6, UDP, 96), (6, TCP, 160)] {
        let before = resident_bytes();
        let port = ports.pop().unwrap();
        let port = fill(port, limits.connections, version, protocol);
        let full = resident_bytes() - before;
        let each = full / u64::from(port.len());
        println!("{full} bytes resident for {} connections of protocol {protocol}, IPv{version}", port.len());
        assert!((least..least + 32).contains(&each), "{each} bytes per connection");
    }
}

fn fill(mut port: Conntrack, connections: u32, version: u8, protocol: u8) -> Conntrack {
    let grant = Grant { policy_generation: 1, rule: None, log: false, identity: None };
    let address = |number: u32| -> IpAddr {
        let four = Ipv4Addr::from(number);
        if version == 4 { four.into() } else { four.to_ipv6_mapped().into() }
    };
    let syn = Segment {
        sequence: 1000,
        acknowledgment: 0,
        selective: 0,
        payload_bytes: 0,
        window: 64_000,
        flags: 2,
        scale: Some(7),
        sack_permitted: true,
        options: true,
        fragmented: false,
    };
    for n in 0..connections {
        let key = Key::new(protocol, (address(0x0a01_0000 + n), 5000), (address(0x0a00_0001), 53));
        let transport = if protocol == TCP { Transport::Tcp(syn) } else { Transport::Other };
        let packet = Packet { key, fragment: Fragment::Whole, transport };
        port.admit(&packet, Direction::Ingress, grant, 0).unwrap();
    }
    port
}
