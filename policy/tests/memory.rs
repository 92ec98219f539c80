//! What a port's connection tracking costs in resident memory: what its connections use, not what they may.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::net::Ipv4Addr;

use dreamwire_policy::{Conntrack, ConntrackLimits, Direction, Fragment, Grant, Key, Packet, Transport};

const PORTS: u64 = 100;
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

    let grant = Grant { policy_generation: 1, rule: None, log: false, identity: None };
    let before = resident_bytes();
    for n in 0..limits.connections {
        let peer = Ipv4Addr::from(0x0a01_0000 + n);
        let key = Key::new(UDP, (peer.into(), 5000), (Ipv4Addr::new(10, 0, 0, 1).into(), 53));
        let packet = Packet { key, fragment: Fragment::Whole, transport: Transport::Other };
        ports[0].admit(&packet, Direction::Ingress, grant, 0).unwrap();
    }
    let full = resident_bytes() - before;
    println!("{full} bytes resident for {} connections", ports[0].len());
    let each = full / u64::from(ports[0].len());
    assert!((64..96).contains(&each), "{each} bytes per connection");
}
