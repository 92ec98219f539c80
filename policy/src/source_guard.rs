//! The source guard: holds a port to its own addresses, whatever the guest sends.
//!
//! It is asked before any rule. A frame passes only if every source that it claims, in its Ethernet header, its IP header
//! and in the ARP or neighbour discovery message that it may carry, is the port's own. Messages by which a host
//! takes over a network (DHCP server, router advertisement, redirect) never pass a guarded port.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// What a frame says about who sent it, beyond its Ethernet source address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// Neither IP nor ARP: no claim beyond the Ethernet source.
    None,
    /// An IPv4 packet.
    Ipv4 {
        /// Source address.
        source: Ipv4Addr,
    },
    /// A DHCP message from a client (UDP port 68 to 67), which may come from an unspecified address.
    DhcpClient {
        /// Source address.
        source: Ipv4Addr,
    },
    /// An ARP packet: its sender fields (RFC 826).
    Arp {
        /// Sender hardware address.
        mac: [u8; 6],
        /// Sender protocol address.
        address: Ipv4Addr,
    },
    /// An IPv6 packet that is no neighbour discovery.
    Ipv6 {
        /// Source address.
        source: Ipv6Addr,
    },
    /// A neighbour or router solicitation, multicast listener report, or neighbour advertisement (RFC 4861, RFC 3810).
    Neighbour {
        /// Source address; unspecified during duplicate address detection (RFC 4862 §5.4.2).
        source: Ipv6Addr,
        /// The address that an advertisement says to be the sender's.
        advertised: Option<Ipv6Addr>,
        /// The link-layer address in the source or target link-layer address option.
        mac: Option<[u8; 6]>,
    },
    /// A message that only servers and routers send: DHCP or DHCPv6 server, router advertisement, redirect.
    Authority,
    /// Headers that could not be read to their end: nothing allows them.
    Unreadable,
}

/// A guarded port's own addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceGuard {
    mac: [u8; 6],
    /// Sorted. With the link-local address that the MAC gives (RFC 4291 appendix A).
    addresses: Vec<IpAddr>,
}

impl SourceGuard {
    /// A guard for a port with this MAC and these addresses. The link-local address in EUI-64 form needs no mention;
    /// other link-local addresses do.
    pub fn new(mac: [u8; 6], addresses: impl IntoIterator<Item = IpAddr>) -> Self {
        let mut addresses: Vec<IpAddr> = addresses.into_iter().chain([IpAddr::V6(link_local(mac))]).collect();
        addresses.sort_unstable();
        addresses.dedup();
        Self { mac, addresses }
    }

    /// Whether a frame with this Ethernet source and claim may leave the port.
    #[inline]
    pub fn allows(&self, source: [u8; 6], claim: Claim) -> bool {
        source == self.mac
            && match claim {
                Claim::None => true,
                Claim::Ipv4 { source } => self.owns(source),
                Claim::DhcpClient { source } => source.is_unspecified() || self.owns(source),
                // RFC 5227 §1.1: a probe has an unspecified sender protocol address.
                Claim::Arp { mac, address } => mac == self.mac && (address.is_unspecified() || self.owns(address)),
                Claim::Ipv6 { source } => self.owns(source),
                Claim::Neighbour { source, advertised, mac } => {
                    (source.is_unspecified() || self.owns(source))
                        && advertised.is_none_or(|address| self.owns(address))
                        && mac.is_none_or(|mac| mac == self.mac)
                }
                Claim::Authority | Claim::Unreadable => false,
            }
    }

    fn owns(&self, address: impl Into<IpAddr>) -> bool {
        self.addresses.binary_search(&address.into()).is_ok()
    }
}

/// RFC 4291 appendix A: fe80::/64 and the MAC with its universal bit turned and ff:fe in the middle.
fn link_local([a, b, c, d, e, f]: [u8; 6]) -> Ipv6Addr {
    Ipv6Addr::from([0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
    const OTHER: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
    const V4: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
    const V4_OTHER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
    const V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1);
    const V6_OTHER: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2);
    const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0x5054, 0xff, 0xfe00, 1);

    fn guard() -> SourceGuard {
        SourceGuard::new(MAC, [V4.into(), V6.into()])
    }

    fn neighbour(source: Ipv6Addr, advertised: Option<Ipv6Addr>, mac: Option<[u8; 6]>) -> Claim {
        Claim::Neighbour { source, advertised, mac }
    }

    #[test]
    fn own_addresses_pass() {
        let none4 = Ipv4Addr::UNSPECIFIED;
        let none6 = Ipv6Addr::UNSPECIFIED;
        for claim in [
            Claim::None,
            Claim::Ipv4 { source: V4 },
            Claim::DhcpClient { source: none4 },
            Claim::DhcpClient { source: V4 },
            Claim::Arp { mac: MAC, address: V4 },
            Claim::Arp { mac: MAC, address: none4 },
            Claim::Ipv6 { source: V6 },
            Claim::Ipv6 { source: LINK_LOCAL },
            neighbour(none6, None, None),
            neighbour(LINK_LOCAL, Some(V6), Some(MAC)),
        ] {
            assert!(guard().allows(MAC, claim), "{claim:?}");
            assert!(!guard().allows(OTHER, claim), "{claim:?} from another MAC");
        }
    }

    #[test]
    fn other_addresses_do_not_pass() {
        for claim in [
            Claim::Ipv4 { source: V4_OTHER },
            Claim::Ipv4 { source: Ipv4Addr::UNSPECIFIED },
            Claim::DhcpClient { source: V4_OTHER },
            Claim::Arp { mac: OTHER, address: V4 },
            Claim::Arp { mac: MAC, address: V4_OTHER },
            Claim::Ipv6 { source: V6_OTHER },
            Claim::Ipv6 { source: Ipv6Addr::UNSPECIFIED },
            Claim::Ipv6 { source: "fe80::1".parse().unwrap() },
            neighbour(V6_OTHER, None, None),
            neighbour(V6, Some(V6_OTHER), None),
            neighbour(V6, None, Some(OTHER)),
            Claim::Authority,
            Claim::Unreadable,
        ] {
            assert!(!guard().allows(MAC, claim), "{claim:?}");
        }
    }
}
