//! What ports are held to, and what their worker keeps for it: connection tables are allocated, handed over, taken back and
//! freed here.
//!
//! A perimeter is handed over before the snapshot that needs it, and taken back after the one that does not: a port with a policy
//! and no perimeter is closed. Other limits mean another perimeter, without the connections of the last. A port that moves to
//! another worker takes it along, while neither has its rings.

use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;

use dreamwire_datapath::huge_pages::HugePages;
use dreamwire_datapath::perimeter::ahead::Ahead;
use dreamwire_datapath::perimeter::{Perimeter, PerimeterLimits};
use dreamwire_datapath::snapshot::{PortId, PortPolicy, WorkerId};
use dreamwire_policy::{ConntrackLimits, MeterLimits};

use super::core::Control;
use super::inventory::Workers;
use crate::config::Port;
use crate::config::limits::Meter;

/// How much memory is looked at in one go, of each port: 32 MiB, in some 30 us.
const HUGE_PAGES_AT_ONCE: usize = 16;
/// Made huge in one go, of all ports. A worker may wait for each for most of a millisecond.
const HUGE_PAGES_MADE_MAX: usize = 4;

/// Had ready in one go, for all ports.
const READY_BYTES_MAX: usize = 32 << 20;

/// A perimeter that was handed over.
#[derive(Debug)]
pub(super) struct Guarded {
    worker: WorkerId,
    limits: PerimeterLimits,
    ahead: Arc<Ahead>,
    pages: HugePages,
}

impl Control {
    /// What a port is held to; `None` if to nothing.
    pub(super) fn port_policy(&self, port: &Port) -> Option<PortPolicy> {
        let ruleset = self.rulebook.of_port(&port.name)?;
        // By direction: ingress, egress.
        let meters = [port.limits.ingress, port.limits.egress].map(Meter::limits);
        let nothing = ruleset.classifier.allows_all() && meters == [MeterLimits::default(); 2];
        (!nothing).then(|| PortPolicy { classifier: Arc::clone(&ruleset.classifier), meters })
    }

    /// Gives workers what the ports of the document need that they do not have.
    pub(super) fn guard_ports(&mut self) {
        for (id, (worker, limits)) in self.wanted() {
            let last = self.guarded.get(&id);
            if last.is_none_or(|last| last.limits != limits) {
                // One that is to move has its rings where it was.
                let worker = last.map_or(worker, |last| last.worker);
                let perimeter = Box::new(Perimeter::new(limits, seed()));
                let (ahead, pages) = (perimeter.ahead(), perimeter.huge_pages());
                drop(guard(&self.workers, worker, id, Some(perimeter)));
                self.guarded.insert(id, Guarded { worker, limits, ahead, pages });
            }
        }
    }

    /// Takes back what no port of the document needs.
    pub(super) fn unguard_ports(&mut self) {
        let wanted = self.wanted();
        for (id, last) in self.guarded.extract_if(.., |id, _| !wanted.contains_key(id)) {
            drop(guard(&self.workers, last.worker, id, None));
        }
    }

    /// Has every port served by the worker that it is placed at.
    pub(super) fn move_ports(&mut self) {
        let Self { ports, workers, guarded, .. } = self;
        for live in ports.values() {
            live.endpoint.move_to(live.worker, || {
                if let Some(guarded) = guarded.get_mut(&live.id)
                    && guarded.worker != live.worker
                {
                    let perimeter = guard(workers, guarded.worker, live.id, None);
                    drop(guard(workers, live.worker, live.id, perimeter));
                    guarded.worker = live.worker;
                }
            });
        }
    }

    /// Has memory ready for new connections, and gives tables that have come to be used huge pages, some at a time.
    pub(super) fn look_after_pages(&mut self) {
        let mut bytes_left = READY_BYTES_MAX;
        let mut pages_left = HUGE_PAGES_MADE_MAX;
        for guarded in self.guarded.values_mut() {
            bytes_left -= guarded.ahead.make_ready(bytes_left);
            pages_left -= guarded.pages.gather(HUGE_PAGES_AT_ONCE, pages_left);
        }
    }

    fn wanted(&self) -> BTreeMap<PortId, (WorkerId, PerimeterLimits)> {
        let judged = self.document.port.iter().filter(|port| self.port_policy(port).is_some());
        let live = |port: &Port| &self.ports[&port.name];
        judged.map(|port| (live(port).id, (live(port).worker, limits(port)))).collect()
    }
}

fn guard(
    workers: &Workers,
    worker: WorkerId,
    port: PortId,
    perimeter: Option<Box<Perimeter>>,
) -> Option<Box<Perimeter>> {
    workers[usize::from(worker.0)].guard(port, perimeter)
}

fn limits(port: &Port) -> PerimeterLimits {
    let default = ConntrackLimits::default();
    PerimeterLimits {
        conntrack: ConntrackLimits {
            connections: port.limits.connections.unwrap_or(default.connections),
            new_flows: port.limits.new_flows.map(|flows| (flows.rate, flows.burst)),
            ..default
        },
    }
}

/// A number that no guest can guess: the standard library's hashes are keyed by the operating system's random numbers.
fn seed() -> u64 {
    RandomState::new().hash_one(())
}
