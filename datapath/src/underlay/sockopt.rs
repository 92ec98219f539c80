//! Socket options that nix has no name for.
#![allow(missing_docs, clippy::undocumented_unsafe_blocks, reason = "the macro's own code")]

use nix::{setsockopt_impl, sockopt_impl};

sockopt_impl!(
    /// Path MTU discovery, ip(7).
    IpMtuDiscover, SetOnly, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::c_int
);
sockopt_impl!(
    /// Path MTU discovery, ipv6(7).
    Ipv6MtuDiscover, SetOnly, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::c_int
);
sockopt_impl!(
    /// Accept UDP over IPv6 with checksum zero (RFC 6935), `linux/udp.h`.
    UdpNoCheck6Rx, SetOnly, libc::SOL_UDP, libc::UDP_NO_CHECK6_RX, bool
);
