//! The states of a TCP connection, and where each kind of segment leads: nf_conntrack's table, without its windows.

pub(crate) const SECOND_NS: u64 = 1_000_000_000;
pub(crate) const MINUTE_NS: u64 = 60 * SECOND_NS;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Syn,
    SynAck,
    Fin,
    Ack,
    Rst,
    /// Nothing was seen yet.
    None,
}

/// State of a TCP connection, by the names that `conntrack -L` prints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are nf_conntrack's")]
pub enum TcpState {
    None,
    SynSent,
    SynRecv,
    Established,
    FinWait,
    CloseWait,
    LastAck,
    TimeWait,
    Close,
    /// A SYN from each side: simultaneous open.
    SynSent2,
}

impl TcpState {
    /// How long an idle connection in this state is remembered: the kernel's defaults.
    #[must_use]
    pub const fn timeout_ns(self) -> u64 {
        match self {
            Self::None | Self::SynSent | Self::SynSent2 | Self::FinWait | Self::TimeWait => 2 * MINUTE_NS,
            Self::SynRecv | Self::CloseWait => MINUTE_NS,
            Self::Established => 5 * 24 * 60 * MINUTE_NS,
            Self::LastAck => 30 * SECOND_NS,
            Self::Close => 10 * SECOND_NS,
        }
    }

    /// A packet that ends a connection in one of these is taken for what it is: the ports may be used again already.
    pub(crate) const fn is_closing(self) -> bool {
        matches!(self, Self::FinWait | Self::CloseWait | Self::LastAck | Self::TimeWait | Self::Close)
    }
}

/// What the table says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    To(TcpState),
    Ignore,
    Invalid,
}

/// The state table: where `kind` leads from `state`.
pub(crate) fn step(state: TcpState, kind: Kind, reply: bool) -> Step {
    use Step::{Ignore, Invalid, To};
    use TcpState::{Close, CloseWait, Established, FinWait, LastAck, None, SynRecv, SynSent, SynSent2, TimeWait};
    match (kind, reply, state) {
        (Kind::None, ..) | (_, true, None) => Invalid,
        (Kind::Rst, false, None) => Invalid,
        (Kind::Rst, ..) => To(Close),

        (Kind::Syn, false, None | SynSent) => To(SynSent),
        // The port is used again.
        (Kind::Syn, false, TimeWait | Close) => To(SynSent),
        (Kind::Syn, true, TimeWait) => To(SynSent),
        (Kind::Syn, true, SynSent) | (Kind::Syn, _, SynSent2) => To(SynSent2),
        // Perhaps a retransmission, perhaps a connection that we missed the end of.
        (Kind::Syn, false, _) => Ignore,
        (Kind::Syn, true, _) => Invalid,

        (Kind::SynAck, false, SynRecv | SynSent2) => To(SynRecv),
        (Kind::SynAck, false, _) => Invalid,
        (Kind::SynAck, true, SynSent | SynSent2) => To(SynRecv),
        (Kind::SynAck, true, _) => Ignore,

        (Kind::Fin, _, SynRecv | Established) => To(FinWait),
        (Kind::Fin, _, FinWait | CloseWait | LastAck) => To(LastAck),
        (Kind::Fin, _, TimeWait) => To(TimeWait),
        (Kind::Fin, _, Close) => To(Close),
        (Kind::Fin, _, None | SynSent | SynSent2) => Invalid,

        (Kind::Ack, false, None | SynRecv) => To(Established),
        (Kind::Ack, false, SynSent | SynSent2) => Invalid,
        (Kind::Ack, true, SynSent | SynSent2) => Ignore,
        (Kind::Ack, true, SynRecv) => To(SynRecv),
        (Kind::Ack, _, Established) => To(Established),
        (Kind::Ack, _, FinWait | CloseWait) => To(CloseWait),
        (Kind::Ack, _, LastAck | TimeWait) => To(TimeWait),
        (Kind::Ack, _, Close) => To(Close),
    }
}
