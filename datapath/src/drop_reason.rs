//! Why a frame ended without reaching anybody: a closed list, each with a name for counters and a sentence for people.

/// The end of a frame that was not sent. Every drop has exactly one reason and is counted once:
/// at the receiving port for what the receiver causes, else where the frame came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DropReason {
    /// A descriptor chain that no frame can be read from.
    BadChain,
    /// A virtio-net header that asks for what was not negotiated, or that does not fit its frame.
    BadOffload,
    /// Shorter than an Ethernet header.
    TooShort,
    /// Longer than the network's MTU with Ethernet header and two VLAN tags.
    TooLong,
    /// The source address is a group address or zero.
    BadSource,
    /// The source is not one that the port may use.
    SourceGuard,
    /// A rule of the sender's port, or its network's posture, denies it.
    EgressDenied,
    /// A rule of the receiver's port, or its network's posture, denies it.
    IngressDenied,
    /// Headers that cannot be read to their end, at a port with a policy.
    Unreadable,
    /// It fits no connection and cannot begin one.
    InvalidState,
    /// A later fragment of a datagram whose first was not let through.
    FragmentWithoutFirst,
    /// Beyond the port's rate of new connections.
    NewFlowRate,
    /// The port's connection table is full of more useful ones.
    ConnectionsFull,
    /// Beyond the port's packets or bits per second.
    RateLimit,
    /// The port has a policy, but its worker has nothing to hold it to it.
    NoPerimeter,
    /// A frame that IEEE 802.1Q forbids to forward (pause, 01-80-c2-00-00-01).
    Reserved,
    /// The sender's ring is started but disabled (SET_VRING_ENABLE 0).
    SenderDisabled,
    /// The destination is where the frame came from.
    Hairpin,
    /// Nobody else is in the network.
    NoDestination,
    /// It came from a tunnel and would go back into one.
    SplitHorizon,
    /// The port or network was removed while the frame was under way.
    Removed,
    /// The receiving guest has no driver, or its receiveq is disabled.
    PortDown,
    /// The receiving guest has not posted enough buffers.
    RingFull,
    /// The receiving guest posted a descriptor that cannot be written to.
    BadReceiveChain,
    /// An outer packet that is no VXLAN (RFC 7348 §5: I flag, length).
    BadEncapsulation,
    /// No network here has that VNI on that underlay.
    UnknownVni,
    /// The outer source address is not one of the network's `remotes`.
    UnknownVtep,
    /// The kernel's send buffer or the uplink's ring is full.
    UnderlayFull,
    /// The kernel refused the packet (no route, too big), or it is too big for the underlay's MTU.
    UnderlayRefused,
    /// The next hop on the underlay has not said which card it has.
    Unresolved,
    /// An outer packet that is neither a tunnel's nor ARP, neighbour discovery or an echo request for this host.
    NotForHost,
    /// A fragment of an outer packet.
    OuterFragment,
    /// An outer packet whose IPv4 header or UDP checksum is wrong.
    OuterChecksum,
    /// The hand-off to the worker that owns the destination is full: that worker does not keep up.
    HandoffFull,
}

impl DropReason {
    /// How many reasons there are.
    pub const COUNT: usize = Self::ALL.len();

    /// All of them, in the order of their discriminants.
    pub const ALL: [DropReason; 34] = [
        Self::BadChain,
        Self::BadOffload,
        Self::TooShort,
        Self::TooLong,
        Self::BadSource,
        Self::SourceGuard,
        Self::EgressDenied,
        Self::IngressDenied,
        Self::Unreadable,
        Self::InvalidState,
        Self::FragmentWithoutFirst,
        Self::NewFlowRate,
        Self::ConnectionsFull,
        Self::RateLimit,
        Self::NoPerimeter,
        Self::Reserved,
        Self::SenderDisabled,
        Self::Hairpin,
        Self::NoDestination,
        Self::SplitHorizon,
        Self::Removed,
        Self::PortDown,
        Self::RingFull,
        Self::BadReceiveChain,
        Self::BadEncapsulation,
        Self::UnknownVni,
        Self::UnknownVtep,
        Self::UnderlayFull,
        Self::UnderlayRefused,
        Self::Unresolved,
        Self::NotForHost,
        Self::OuterFragment,
        Self::OuterChecksum,
        Self::HandoffFull,
    ];

    /// Whether a perimeter gives it, which has told of the frame.
    pub(crate) const fn is_judgement(self) -> bool {
        matches!(
            self,
            Self::EgressDenied
                | Self::IngressDenied
                | Self::Unreadable
                | Self::InvalidState
                | Self::FragmentWithoutFirst
                | Self::NewFlowRate
                | Self::ConnectionsFull
        )
    }

    /// The name in counters: snake case, stable.
    pub const fn name(self) -> &'static str {
        match self {
            Self::BadChain => "bad_chain",
            Self::BadOffload => "bad_offload",
            Self::TooShort => "too_short",
            Self::TooLong => "too_long",
            Self::BadSource => "bad_source",
            Self::SourceGuard => "source_guard",
            Self::EgressDenied => "egress_denied",
            Self::IngressDenied => "ingress_denied",
            Self::Unreadable => "unreadable",
            Self::InvalidState => "invalid_state",
            Self::FragmentWithoutFirst => "fragment_without_first",
            Self::NewFlowRate => "new_flow_rate",
            Self::ConnectionsFull => "connections_full",
            Self::RateLimit => "rate_limit",
            Self::NoPerimeter => "no_perimeter",
            Self::Reserved => "reserved",
            Self::SenderDisabled => "sender_disabled",
            Self::Hairpin => "hairpin",
            Self::NoDestination => "no_destination",
            Self::SplitHorizon => "split_horizon",
            Self::Removed => "removed",
            Self::PortDown => "port_down",
            Self::RingFull => "ring_full",
            Self::BadReceiveChain => "bad_receive_chain",
            Self::BadEncapsulation => "bad_encapsulation",
            Self::UnknownVni => "unknown_vni",
            Self::UnknownVtep => "unknown_vtep",
            Self::UnderlayFull => "underlay_full",
            Self::UnderlayRefused => "underlay_refused",
            Self::Unresolved => "unresolved",
            Self::NotForHost => "not_for_host",
            Self::OuterFragment => "outer_fragment",
            Self::OuterChecksum => "outer_checksum",
            Self::HandoffFull => "handoff_full",
        }
    }
}

const _: () = {
    let mut index = 0;
    while index < DropReason::COUNT {
        assert!(DropReason::ALL[index] as usize == index, "ALL is in the order of discriminants");
        index += 1;
    }
};
