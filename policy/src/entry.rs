//! What a connection table keeps of a connection.

use crate::model::Direction;
use crate::slab::Link;
use crate::tcp_state::TcpState;

/// What the protocol's tracking keeps.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Tracked {
    Tcp {
        /// Its place among the table's trackers.
        tracker: u32,
    },
    /// UDP and UDP-Lite.
    Udp {
        /// When it counts as a stream, in ms of the caller's clock.
        stream_ms: u32,
    },
    Icmp,
    Other,
}

/// One connection: a cache line. What only some have lies elsewhere: state of TCP, addresses of IPv6.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Entry {
    /// Of IPv4, [`ConnKey::addresses4`](crate::conn_key::ConnKey::addresses4); of IPv6, their place among the table's.
    pub(crate) addresses: u64,
    /// [`ConnKey::rest`](crate::conn_key::ConnKey::rest).
    pub(crate) rest: u64,
    pub(crate) expires_ns: u64,
    /// Odd while taken. Counts up when taken and when freed, so an old reference is told from a new connection.
    pub(crate) generation: u32,
    /// The policy that last judged it.
    pub(crate) policy_generation: u32,
    /// The rule that let it pass; `u32::MAX`: none.
    pub(crate) rule: u32,
    /// Of the far end, from a tunnel header, if [`Entry::IDENTITY`].
    pub(crate) identity: u16,
    pub(crate) flags: u8,
    /// Which way its first packet went.
    pub(crate) initiator: Direction,
    pub(crate) tracked: Tracked,
    /// As its tracker has it; of other protocols, none.
    pub(crate) tcp: TcpState,
}

const _: () = assert!(size_of::<Entry>() == 64);

impl Entry {
    pub(crate) const REPLIED: u8 = 1;
    pub(crate) const ASSURED: u8 = 2;
    pub(crate) const LOG: u8 = 4;
    pub(crate) const IDENTITY: u8 = 8;
    /// The rules no longer let it pass.
    pub(crate) const REVOKED: u8 = 16;

    /// The worth of one that no other replaces.
    pub(crate) const KEPT: u64 = u64::MAX;

    #[inline]
    pub(crate) const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    #[inline]
    pub(crate) const fn is_taken(&self) -> bool {
        self.generation % 2 == 1
    }

    /// How useful it is, [`Self::KEPT`] if too useful to be dropped. Of two that are equally useful, the one that expires first goes.
    #[inline]
    pub(crate) fn worth(&self, now_ns: u64) -> u64 {
        const CLASS_SHIFT: u32 = 60;
        let class = match self.tcp {
            _ if self.expires_ns <= now_ns => 0,
            _ if self.has(Self::REVOKED) => 1,
            TcpState::Close | TcpState::TimeWait => 2,
            _ if !self.has(Self::ASSURED) => 3,
            TcpState::FinWait | TcpState::CloseWait | TcpState::LastAck => 4,
            _ => return Self::KEPT,
        };
        class << CLASS_SHIFT | self.expires_ns.min((1 << CLASS_SHIFT) - 1)
    }
}

impl Link for Entry {
    fn link(&self) -> u32 {
        self.rule
    }

    fn set_link(&mut self, place: u32) {
        self.rule = place;
    }
}
