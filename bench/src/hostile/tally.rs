//! What dreamwire has to count while a case goes on: at the attacked port what it took and why it dropped, at the port on
//! the other side what arrived.

use std::collections::BTreeMap;

/// A port's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counted {
    /// Frames taken from the guest.
    pub(super) received: u64,
    /// Frames given to the guest.
    pub(super) sent: u64,
    /// Those that ended here, by reason.
    pub(super) drops: BTreeMap<String, u64>,
}

impl Counted {
    /// What came since `before`.
    pub(super) fn since(&self, before: &Self) -> Self {
        let new = |(reason, count): (&String, &u64)| {
            let count = count - before.drops.get(reason).unwrap_or(&0);
            (count > 0).then(|| (reason.clone(), count))
        };
        Self {
            received: self.received - before.received,
            sent: self.sent - before.sent,
            drops: self.drops.iter().filter_map(new).collect(),
        }
    }

    fn dropped(&self) -> u64 {
        self.drops.values().sum()
    }
}

/// What the counters have to say afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tally {
    /// Exactly this, and nothing at the port on the other side but what arrived there.
    Exactly {
        /// Frames taken from the attacker.
        received: u64,
        /// Why one of them was dropped at its port, if one was.
        dropped: Option<&'static str>,
        /// Frames given to the port on the other side.
        delivered: u64,
    },
    /// Every frame taken was delivered or dropped, and the attacker's port dropped for this reason alone; of both kinds
    /// there were some.
    Conserved(&'static str),
}

impl Tally {
    /// What is wrong with the counters of attacker and friend, if anything is.
    pub(super) fn judge(self, attacker: &Counted, friend: &Counted) -> Result<(), String> {
        let is_right = match self {
            Self::Exactly { received, dropped, delivered } => {
                let drops = dropped.map(|reason| (reason.to_owned(), 1)).into_iter().collect();
                *attacker == Counted { received, sent: 0, drops }
                    && *friend == Counted { sent: delivered, ..Counted::default() }
            }
            Self::Conserved(reason) => {
                attacker.received == attacker.dropped() + friend.sent + friend.dropped()
                    && attacker.drops.keys().eq([reason])
                    && friend.sent > 0
            }
        };
        if is_right { Ok(()) } else { Err(format!("expected {self:?}, counted {attacker:?}, {friend:?}")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(received: u64, sent: u64, drops: &[(&str, u64)]) -> Counted {
        Counted { received, sent, drops: drops.iter().map(|&(reason, count)| (reason.into(), count)).collect() }
    }

    #[test]
    fn a_count_too_many_anywhere_is_found() {
        let tally = Tally::Exactly { received: 2, dropped: Some("bad_offload"), delivered: 1 };
        let (attacker, friend) = (counted(2, 0, &[("bad_offload", 1)]), counted(0, 1, &[]));
        assert_eq!(tally.judge(&attacker, &friend), Ok(()));
        for (attacker, friend) in [
            (counted(3, 0, &[("bad_offload", 1)]), friend.clone()),
            (counted(2, 0, &[("bad_offload", 2)]), friend.clone()),
            (counted(2, 0, &[("bad_offload", 1), ("too_long", 1)]), friend.clone()),
            (counted(2, 1, &[("bad_offload", 1)]), friend.clone()),
            (attacker.clone(), counted(0, 2, &[])),
            (attacker.clone(), counted(0, 1, &[("ring_full", 1)])),
        ] {
            assert!(tally.judge(&attacker, &friend).is_err(), "{attacker:?} {friend:?}");
        }
    }

    #[test]
    fn only_what_is_new_counts() {
        let before = counted(5, 1, &[("too_long", 2), ("bad_offload", 1)]);
        let after = counted(7, 1, &[("too_long", 2), ("bad_offload", 2)]);
        assert_eq!(after.since(&before), counted(2, 0, &[("bad_offload", 1)]));
    }

    #[test]
    fn a_frame_that_vanished_is_found() {
        let tally = Tally::Conserved("bad_offload");
        let friend = counted(0, 6, &[("ring_full", 1)]);
        assert_eq!(tally.judge(&counted(10, 0, &[("bad_offload", 3)]), &friend), Ok(()));
        assert!(tally.judge(&counted(11, 0, &[("bad_offload", 3)]), &friend).is_err());
        assert!(tally.judge(&counted(10, 0, &[("bad_chain", 3)]), &friend).is_err());
    }
}
