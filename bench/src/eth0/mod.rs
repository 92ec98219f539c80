//! The conformance test of "a VM cannot tell its card from eth0".
//!
//! # Theory of operation
//! The same guest boots at two sites: `tap`, QEMU's tap on a Linux bridge (`vhost=off`), and `dreamwire`, a daemon whose
//! tunnel ends in the kernel's vxlan device. At both, the only other station is `peer0`: a network namespace with the same
//! addresses, behind a wire that carries whole frames with finished checksums. Everything that the guest can observe, and
//! everything that the peer sees of the guest, becomes a row: a key and a value. Rows that depend on time or chance are not
//! recorded, or only whether they exist.
//!
//! The rows of both sites are compared. Every difference has to be in a file of expected ones (`bench/eth0.expected`), under a
//! heading that names its cause; one that is new fails the test, and so does one that has gone, so that the file stays true.
//! `docs/eth0.md` shows the same differences as a table and explains the causes.
//!
//! Sections, in the order they run: `card` and `driver` only read, `wire` sends single raw frames both ways, `neighbour` and `internet`
//! asks the peer's and the guest's real stacks, `stream` sends TCP, `change` and `ring` alters the card's settings, and therefore comes
//! last.

mod card;
mod change;
mod delivery;
mod document;
mod driver;
mod expected;
mod frames;
mod internet;
mod neighbour;
mod observations;
mod packet;
mod peer;
mod ring;
mod segment;
mod site;
mod stream;
mod wire;

pub use document::write_table;
pub use expected::{Expected, Judgement};
pub use observations::{Difference, Observations, differences};
pub use segment::Segment;
pub use site::{Kind, Site};

use crate::topology::TopologyError;

/// Asks one site for everything.
///
/// # Errors
/// When the topology breaks: a guest that does not answer, an interface that is gone. What a guest is refused is an
/// observation, not an error.
pub fn observe(site: &Site) -> Result<Observations, TopologyError> {
    type Section = fn(&Site, &mut Observations) -> Result<(), TopologyError>;
    const SECTIONS: &[(&str, Section)] = &[
        ("card", card::observe),
        ("driver", driver::observe),
        ("wire", wire::observe),
        ("neighbour", neighbour::observe),
        ("internet", internet::observe),
        ("stream", stream::observe),
        ("change", change::observe),
        ("ring", ring::observe),
    ];
    let mut rows = Observations::default();
    for (name, section) in SECTIONS {
        let start = std::time::Instant::now();
        section(site, &mut rows)?;
        eprintln!("eth0-test: {}: {name} took {:.1} s", site.kind(), start.elapsed().as_secs_f64());
    }
    Ok(rows)
}
