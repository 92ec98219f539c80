//! Bytes of packets. Transport checksums are zero: nobody in this topology looks at them.

/// The VM, a host outside, and a router between.
pub(crate) const VM: [u8; 4] = [10, 2, 0, 1];
pub(crate) const HOST: [u8; 4] = [10, 1, 0, 1];
pub(crate) const ROUTER: [u8; 4] = [10, 1, 0, 2];

pub(crate) const FIN: u8 = 1;
pub(crate) const SYN: u8 = 2;
pub(crate) const RST: u8 = 4;
pub(crate) const ACK: u8 = 16;

/// RFC 791 §3.1; `field` is flags and fragment offset.
pub(crate) fn ipv4(id: u16, protocol: u8, from: [u8; 4], to: [u8; 4], field: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x45, 0];
    bytes.extend((20 + payload.len() as u16).to_be_bytes());
    bytes.extend(id.to_be_bytes());
    bytes.extend(field.to_be_bytes());
    bytes.extend([64, protocol, 0, 0]);
    bytes.extend(from);
    bytes.extend(to);
    let sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    bytes[10..12].copy_from_slice(&(!((folded & 0xffff) + (folded >> 16)) as u16).to_be_bytes());
    bytes.extend(payload);
    bytes
}

pub(crate) fn udp(from: u16, to: u16, payload_bytes: u16) -> Vec<u8> {
    let mut bytes = [from.to_be_bytes(), to.to_be_bytes(), (8 + payload_bytes).to_be_bytes(), [0, 0]].concat();
    bytes.resize(8 + usize::from(payload_bytes), 0);
    bytes
}

pub(crate) fn icmp(kind: u8, code: u8, rest: [u8; 4], payload: &[u8]) -> Vec<u8> {
    [&[kind, code, 0, 0][..], &rest, payload].concat()
}

/// A TCP segment of a connection between the host's `port` and the VM's 443.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tcp {
    /// From the host to the VM.
    pub(crate) ingress: bool,
    pub(crate) flags: u8,
    pub(crate) sequence: u32,
    pub(crate) acknowledgment: u32,
    pub(crate) window: u16,
    pub(crate) payload_bytes: u16,
    /// Window scale and SACK permitted.
    pub(crate) options: Option<u8>,
    /// One selective acknowledgment.
    pub(crate) sack: Option<(u32, u32)>,
}

impl Tcp {
    pub(crate) fn header(&self, port: u16) -> Vec<u8> {
        let (from, to) = if self.ingress { (port, 443) } else { (443, port) };
        let mut options = Vec::new();
        if let Some(scale) = self.options {
            options.extend([1, 3, 3, scale, 1, 1, 4, 2]);
        }
        if let Some((left, right)) = self.sack {
            options.extend([1, 1, 5, 10]);
            options.extend(left.to_be_bytes());
            options.extend(right.to_be_bytes());
        }
        let mut bytes = [from.to_be_bytes(), to.to_be_bytes()].concat();
        bytes.extend(self.sequence.to_be_bytes());
        bytes.extend(self.acknowledgment.to_be_bytes());
        bytes.extend([(((20 + options.len()) / 4) << 4) as u8, self.flags]);
        bytes.extend(self.window.to_be_bytes());
        bytes.extend([0, 0, 0, 0]);
        bytes.extend(options);
        bytes.resize(bytes.len() + usize::from(self.payload_bytes), 0);
        bytes
    }

    pub(crate) fn packet(&self, id: u16, port: u16) -> Vec<u8> {
        let (from, to) = if self.ingress { (HOST, VM) } else { (VM, HOST) };
        ipv4(id, 6, from, to, 0x4000, &self.header(port))
    }
}

impl std::fmt::Display for Tcp {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let arrow = if self.ingress { "host > VM" } else { "VM > host" };
        let flags: String = [(SYN, 'S'), (FIN, 'F'), (RST, 'R'), (ACK, 'A')]
            .iter()
            .filter(|flag| self.flags & flag.0 != 0)
            .map(|flag| flag.1)
            .collect();
        let Self { sequence, acknowledgment, window, payload_bytes, .. } = self;
        write!(f, "{arrow} [{flags}] {sequence}+{payload_bytes} ack {acknowledgment} window {window}")?;
        write!(f, " scale {:?} sack {:?}", self.options, self.sack)
    }
}

/// A packet of a random trace, between the host and the VM.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Packet {
    Tcp(Tcp),
    /// Between the host's port and this one of the VM.
    Udp {
        ingress: bool,
        vm_port: u16,
    },
    /// A message with an identifier.
    Icmp {
        ingress: bool,
        kind: u8,
    },
}

impl Packet {
    pub(crate) fn ingress(&self) -> bool {
        match *self {
            Self::Tcp(Tcp { ingress, .. }) | Self::Udp { ingress, .. } | Self::Icmp { ingress, .. } => ingress,
        }
    }

    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Tcp(_) => "TCP",
            Self::Udp { .. } => "UDP",
            Self::Icmp { .. } => "ICMP",
        }
    }

    /// `port` is the host's, or the identifier.
    pub(crate) fn bytes(&self, id: u16, port: u16) -> Vec<u8> {
        let (from, to) = if self.ingress() { (HOST, VM) } else { (VM, HOST) };
        match *self {
            Self::Tcp(tcp) => tcp.packet(id, port),
            Self::Udp { ingress: true, vm_port } => ipv4(id, 17, from, to, 0, &udp(port, vm_port, 10)),
            Self::Udp { ingress: false, vm_port } => ipv4(id, 17, from, to, 0, &udp(vm_port, port, 10)),
            Self::Icmp { kind, .. } => {
                let [high, low] = port.to_be_bytes();
                ipv4(id, 1, from, to, 0, &icmp(kind, 0, [high, low, 0, 1], &[0; 12]))
            }
        }
    }
}

impl std::fmt::Display for Packet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(tcp) => write!(f, "{tcp}"),
            other => write!(f, "{other:?}"),
        }
    }
}
