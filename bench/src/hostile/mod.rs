//! The corpus of hostile guests and front-ends: each line of this field's history (CVEs, fixes in DPDK, QEMU and
//! rust-vmm) as a case that any vhost-user back-end can be put to.
//!
//! Theory of operation. A [`Target`] serves two pairs of ports, and one more with a card of two queue pairs. Over one pair a [`Witness`] carries traffic at a steady
//! rate and compares every frame; nothing that happens at the other pair may cost it one. At the other pair each [`Case`]
//! connects as `bad`, does its worst, and keeps what it holds open. The [`runner`] then looks at what became of it,
//! lets the "VM" reset its rings or reconnect, and exchanges a frame with `friend`, the port on the other side. Around
//! all cases the target's descriptors and memory are counted.
//!
//! A case is a row of a table: a name, where it comes from, what to do, what dreamwire does about it ([`Outcome`]), and of
//! some what it counts ([`Tally`]). For another target the outcome is only observed ([`Verdict`]). What means the same to
//! split and packed rings, to one pair and to two, is one row and a case of each [`Card`].
//!
//! Limits: two queue pairs at most. A case lasts a second at most.

pub mod attack;
mod card;
mod descriptor_cases;
mod flood_cases;
mod memory_cases;
mod message_cases;
mod offload_cases;
mod packed_cases;
mod race_cases;
mod receive_cases;
pub mod runner;
mod shared_file_cases;
mod split_cases;
mod tally;
pub mod target;
mod transmit_cases;
pub mod witness;

pub use attack::{Attack, Failure};
pub use card::Card;
pub use runner::{Report, Verdict, run};
pub use tally::Tally;
pub use target::Target;
pub use witness::Witness;

/// What an attack does.
pub type Deed = Box<dyn Fn(&mut Attack<'_>) -> Result<(), Failure> + Send>;

/// What becomes of the port. In every case all others go on, and this one works again afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Nothing: frames may be dropped and counted.
    Served,
    /// A ring is quarantined, for a reason with these words; it is served again once its driver has reset it.
    Quarantined(&'static str),
    /// As above, but only a new connection helps.
    Lost(&'static str),
    /// The connection is closed, for a reason with these words.
    Disconnected(&'static str),
    /// The message is refused, for a reason with these words; the session goes on.
    Refused(&'static str),
    /// Whichever of them: it depends on a race, or the case tries many things.
    Contained,
}

/// One attack.
pub struct Case {
    /// Unique; says what is done.
    pub name: String,
    /// The CVE or commit that it comes from.
    pub class: &'static str,
    /// Of a [`Target`].
    pub port: &'static str,
    /// What is done.
    pub attack: Deed,
    /// What dreamwire makes of it.
    pub outcome: Outcome,
    /// What it counts meanwhile, where that is part of the outcome.
    pub tally: Option<Tally>,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} ({}): {:?}", self.name, self.class, self.outcome)
    }
}

impl Case {
    fn new(
        name: impl Into<String>,
        class: &'static str,
        outcome: Outcome,
        attack: impl Fn(&mut Attack<'_>) -> Result<(), Failure> + Send + 'static,
    ) -> Self {
        Self { name: name.into(), class, port: "bad", attack: Box::new(attack), outcome, tally: None }
    }
}

/// All cases.
pub fn corpus() -> Vec<Case> {
    let tables: [fn() -> Vec<Case>; 11] = [
        transmit_cases::all,
        split_cases::all,
        packed_cases::all,
        offload_cases::all,
        receive_cases::all,
        message_cases::all,
        shared_file_cases::all,
        flood_cases::all,
        memory_cases::all,
        descriptor_cases::all,
        race_cases::all,
    ];
    tables.into_iter().flat_map(|table| table()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    #[test]
    fn names_are_unique() {
        let cases = super::corpus();
        let names: BTreeSet<_> = cases.iter().map(|case| &case.name).collect();
        assert_eq!(names.len(), cases.len());
    }
}
