//! Bringing up what a new document needs, with a way back.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use dreamwire_datapath::counters::{NetworkCounters, PortCounters, UnderlayCounters};
use dreamwire_datapath::snapshot::{NetworkId, PortId, UnderlayId, WorkerId};
use dreamwire_datapath::underlay::af_xdp::{XdpError, XdpUnderlay, XdpUnderlayConfig};
use dreamwire_datapath::underlay::{self, RingUnderlay, RingUnderlayConfig, SocketUnderlay};

use super::core::{Control, LiveNetwork, LivePort, LiveUnderlay, Slot};
use super::next_hops::NextHops;
use super::session::Session;
use super::totals::{Counted, Shares};
use crate::card;
use crate::config::{Document, Driver, Mistake, Port, Underlay, Wire};
use crate::port::{ConfigSpace, EndpointSpec, PortEndpoint, WireEndpoint};

/// A step that was made: how to undo it, and what it replaced.
#[derive(Debug)]
pub(super) enum Step {
    PortStarted { name: String },
    PortStopped(StoppedPort),
    NetworkPlaced { name: String, previous: Option<LiveNetwork> },
    UnderlayAdded { name: String },
    UnderlayRemoved { name: String, live: LiveUnderlay },
}

/// Enough to start a port again as it was.
#[derive(Debug)]
pub(super) struct StoppedPort {
    id: PortId,
    network: String,
    spec: EndpointSpec,
    worker: WorkerId,
    counters: Shares<PortCounters>,
    session: Arc<Session>,
}

/// The worker of each port, by name.
pub(super) type Places = BTreeMap<String, WorkerId>;

impl Control {
    /// The worker of each port: the one that it names, or else has already, or else the one with the fewest ports.
    pub(super) fn place_ports(&self, document: &Document) -> Places {
        let known = |port: &Port| port.worker.map(WorkerId).or_else(|| Some(self.ports.get(&port.name)?.worker));
        let mut counts = vec![0; self.workers.len()];
        for worker in document.port.iter().filter_map(known) {
            counts[usize::from(worker.0)] += 1;
        }
        let place = |port: &Port| {
            let worker = known(port).unwrap_or_else(|| {
                let emptiest = (0..).zip(&mut counts).min_by_key(|(_, count)| **count);
                let (index, count) = emptiest.expect("there is a worker at least");
                *count += 1;
                WorkerId(index)
            });
            (port.name.clone(), worker)
        };
        document.port.iter().map(place).collect()
    }

    /// Starts everything that `document` needs and that does not run yet, new ports at their `places`. On failure
    /// everything is as before.
    pub(super) fn bring_up(&mut self, document: &Document, places: &Places) -> Result<Vec<Step>, Mistake> {
        let mut steps = Vec::new();
        let result = self
            .bring_up_underlays(document, &mut steps)
            .and_then(|()| self.place_networks(document, &mut steps))
            .and_then(|()| self.bring_up_ports(document, places, &mut steps));
        match result {
            Ok(()) => Ok(steps),
            Err(mistake) => {
                self.roll_back(steps);
                Err(mistake)
            }
        }
    }

    fn bring_up_underlays(&mut self, document: &Document, steps: &mut Vec<Step>) -> Result<(), Mistake> {
        let wanted: Vec<_> = document
            .underlay
            .iter()
            .filter(|new| self.underlays.get(&new.name).is_none_or(|live| !same_binding(&live.bound, new)))
            .collect();
        let held = |control: &Self, new: &Underlay| {
            let holds = |live: &LiveUnderlay| {
                let same_socket = new.wire.is_some() && socket_of(&live.bound) == socket_of(new);
                let is_xdp = [live.bound.driver, new.driver] == [Driver::AfXdp; 2];
                let same_device = is_xdp && live.bound.device == new.device;
                (live.bound.address, live.bound.port) == (new.address, new.port) || same_socket || same_device
            };
            control.underlays.iter().find(|(_, live)| holds(live)).map(|(name, _)| name.clone())
        };
        // What conflicts with nothing of ours is bound first: most failures show before anything was touched.
        let (later, first): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|new| held(self, new).is_some());
        let mut bound = Vec::new();
        for new in first {
            bound.push((new, bind(new, self.underlay_counters(&new.name))?));
        }
        for new in later {
            if let Some(holder) = held(self, new) {
                self.remove_underlay(&holder, steps);
            }
            bound.push((new, bind(new, self.underlay_counters(&new.name))?));
        }
        for (new, driver) in bound {
            self.remove_underlay(&new.name, steps);
            let slot = self.slots.underlays.take().ok_or_else(|| all_in_use("underlay", &new.name))?;
            let (id, counters) = (UnderlayId(slot), Arc::clone(driver.counters()));
            self.worker_of(new).add_underlay(id, driver);
            let next_hops = self.follow(new, id);
            let live = LiveUnderlay { id, bound: new.clone(), counters, endpoint: None, next_hops };
            self.underlays.insert(new.name.clone(), live);
            steps.push(Step::UnderlayAdded { name: new.name.clone() });
            let endpoint = self.plug_in(new, id)?;
            self.underlays.get_mut(&new.name).expect("it was just put there").endpoint = endpoint;
        }
        Ok(())
    }

    /// Begins to follow the next hops of an underlay that does not find them itself.
    fn follow(&self, underlay: &Underlay, id: UnderlayId) -> Option<NextHops> {
        let device = underlay.device.as_deref().filter(|_| underlay.driver == Driver::AfXdp)?;
        let followed = NextHops::follow(device, id, &self.workers, underlay.worker);
        match followed {
            Ok(next_hops) => {
                next_hops.set_remotes(self.remotes_over(&underlay.name));
                Some(next_hops)
            }
            Err(error) => {
                tracing::error!(underlay = underlay.name, "cannot ask the kernel for next hops: {error}");
                None
            }
        }
    }

    /// Starts the front-end's side of an underlay that has one.
    fn plug_in(&self, underlay: &Underlay, id: UnderlayId) -> Result<Option<WireEndpoint>, Mistake> {
        let Some(wire) = &underlay.wire else { return Ok(None) };
        let spec = EndpointSpec {
            name: underlay.name.clone(),
            socket: wire.socket.clone(),
            mode: wire.mode,
            queue_pairs: 1,
            mtu: underlay.mtu,
            features: card::offered(&card::WIRE_SWITCHED_OFF),
            config_space: None,
        };
        let started = WireEndpoint::start(&spec, id, &self.workers, WorkerId(underlay.worker), self.run_dir());
        started.map(Some).map_err(|message| Mistake::new(format!("underlay.{}.socket", underlay.name), message))
    }

    /// Counters live as long as the name.
    fn underlay_counters(&self, name: &str) -> Arc<UnderlayCounters> {
        self.underlays.get(name).map(|live| Arc::clone(&live.counters)).unwrap_or_default()
    }

    fn remove_underlay(&mut self, name: &str, steps: &mut Vec<Step>) {
        if let Some(mut live) = self.underlays.remove(name) {
            if let Some(endpoint) = live.endpoint.take() {
                endpoint.stop();
            }
            live.next_hops = None;
            self.worker_of(&live.bound).remove_underlay(live.id);
            steps.push(Step::UnderlayRemoved { name: name.to_owned(), live });
        }
    }

    fn place_networks(&mut self, document: &Document, steps: &mut Vec<Step>) -> Result<(), Mistake> {
        for network in &document.network {
            let underlay = network.underlay.as_ref().and_then(|name| self.underlays.get(name));
            let wire = underlay.map(|live| live.id).zip(network.vni);
            let previous = self.networks.get(&network.name).cloned();
            if previous.as_ref().is_some_and(|live| live.wire == wire) {
                continue;
            }
            let slot = self.slots.networks.take().ok_or_else(|| all_in_use("network", &network.name))?;
            let counters = previous.as_ref().map_or_else(
                || Shares::new(self.workers.len(), NetworkCounters::default),
                |live| live.counters.clone(),
            );
            self.networks.insert(network.name.clone(), LiveNetwork { id: NetworkId(slot), wire, counters });
            steps.push(Step::NetworkPlaced { name: network.name.clone(), previous });
        }
        Ok(())
    }

    fn bring_up_ports(&mut self, document: &Document, places: &Places, steps: &mut Vec<Step>) -> Result<(), Mistake> {
        let mut first = Vec::new();
        let mut later = Vec::new();
        let mut in_the_way = BTreeSet::new();
        for port in &document.port {
            let spec = endpoint_spec(port, document);
            if self.ports.get(&port.name).is_some_and(|live| live.spec == spec && live.network == port.network) {
                continue;
            }
            let holders =
                self.ports.iter().filter(|(name, live)| **name == port.name || live.spec.socket == spec.socket);
            let holders: Vec<_> = holders.map(|(name, _)| name.clone()).collect();
            if holders.is_empty() { &mut first } else { &mut later }.push((port, spec));
            in_the_way.extend(holders);
        }
        for (port, spec) in first {
            self.start_port(port, spec, places[&port.name], None, steps)?;
        }
        for name in &in_the_way {
            self.stop_port(name, steps);
        }
        for (port, spec) in later {
            let before = steps.iter().find_map(|step| match step {
                Step::PortStopped(stopped) if stopped.spec.name == port.name => Some(stopped),
                _ => None,
            });
            // The same number only where nothing that was learned or counted under it becomes wrong.
            let kept = before
                .filter(|old| old.network == port.network && old.spec.queue_pairs == port.queues)
                .map(|old| (old.id, old.counters.clone(), Arc::clone(&old.session)));
            self.start_port(port, spec, places[&port.name], kept, steps)?;
        }
        Ok(())
    }

    fn start_port(
        &mut self,
        port: &Port,
        spec: EndpointSpec,
        worker: WorkerId,
        kept: Option<(PortId, Shares<PortCounters>, Arc<Session>)>,
        steps: &mut Vec<Step>,
    ) -> Result<(), Mistake> {
        let fresh = kept.is_none();
        let (id, counters, session) = match kept {
            Some(kept) => kept,
            None => {
                let slot = self.slots.ports.take().ok_or_else(|| all_in_use("port", &port.name))?;
                let counters = Shares::new(self.workers.len(), || PortCounters::new(port.queues));
                (PortId(slot), counters, Arc::new(Session::new(&port.name)))
            }
        };
        let started = PortEndpoint::start(&spec, id, &self.workers, worker, &session, self.run_dir());
        let endpoint = started.map_err(|message| {
            if fresh {
                self.slots.ports.free(id.0);
            }
            Mistake::new(format!("port.{}.socket", port.name), message)
        })?;
        let live = LivePort { id, network: port.network.clone(), spec, worker, counters, session, endpoint };
        self.ports.insert(port.name.clone(), live);
        steps.push(Step::PortStarted { name: port.name.clone() });
        Ok(())
    }

    fn stop_port(&mut self, name: &str, steps: &mut Vec<Step>) {
        if let Some(LivePort { id, network, spec, worker, counters, session, endpoint }) = self.ports.remove(name) {
            endpoint.stop();
            steps.push(Step::PortStopped(StoppedPort { id, network, spec, worker, counters, session }));
        }
    }

    fn roll_back(&mut self, mut steps: Vec<Step>) {
        let mut lost = Vec::new();
        while let Some(step) = steps.pop() {
            match step {
                Step::PortStarted { name } => {
                    let Some(live) = self.ports.remove(&name) else { continue };
                    live.endpoint.stop();
                    let kept = steps.iter().any(|step| matches!(step, Step::PortStopped(old) if old.id == live.id));
                    if !kept {
                        self.retire(Slot::Port(live.id), Some(Counted::Port(live.counters)));
                    }
                }
                Step::PortStopped(old) => lost.extend(self.restart(old)),
                Step::NetworkPlaced { name, previous } => {
                    if let Some(live) = self.networks.remove(&name) {
                        self.retire(Slot::Network(live.id), None);
                    }
                    if let Some(previous) = previous {
                        self.networks.insert(name, previous);
                    }
                }
                Step::UnderlayAdded { name } => {
                    if let Some(mut live) = self.underlays.remove(&name) {
                        if let Some(endpoint) = live.endpoint.take() {
                            endpoint.stop();
                        }
                        self.worker_of(&live.bound).remove_underlay(live.id);
                        let kept = Step::keeps_counters_of(&steps, &live);
                        self.retire(Slot::Underlay(live.id), (!kept).then_some(Counted::Underlay(live.counters)));
                    }
                }
                Step::UnderlayRemoved { name, mut live } => {
                    // Its address and port, or socket, were ours a moment ago.
                    let bound = bind(&live.bound, Arc::clone(&live.counters));
                    let added = bound.map(|driver| self.worker_of(&live.bound).add_underlay(live.id, driver));
                    match added.and_then(|()| self.plug_in(&live.bound, live.id)) {
                        Ok(endpoint) => {
                            live.endpoint = endpoint;
                            live.next_hops = self.follow(&live.bound, live.id);
                        }
                        Err(error) => {
                            tracing::error!(underlay = name, "cannot be opened again after a refused change: {error}");
                        }
                    }
                    self.underlays.insert(name, live);
                }
            }
        }
        self.give_up(lost);
    }

    /// Starts a port again that had to make way. Its socket was ours a moment ago; should somebody have taken it
    /// since, the port is returned as lost.
    fn restart(&mut self, old: StoppedPort) -> Option<StoppedPort> {
        match PortEndpoint::start(&old.spec, old.id, &self.workers, old.worker, &old.session, self.run_dir()) {
            Ok(endpoint) => {
                let StoppedPort { id, network, spec, worker, counters, session } = old;
                let live = LivePort { id, network, spec, worker, counters, session, endpoint };
                self.ports.insert(live.spec.name.clone(), live);
                None
            }
            Err(error) => {
                tracing::error!(port = old.spec.name, "cannot be started again after a refused change: {error}");
                Some(old)
            }
        }
    }

    /// Takes ports that could not be brought back out of desired state: what is not served must not be shown.
    fn give_up(&mut self, lost: Vec<StoppedPort>) {
        if !lost.is_empty() {
            let is_lost = |name: &str| lost.iter().any(|old| old.spec.name == name);
            Arc::make_mut(&mut self.document).port.retain(|port| !is_lost(&port.name));
            self.publish();
        }
        for old in lost {
            self.retire(Slot::Port(old.id), Some(Counted::Port(old.counters)));
        }
        self.announce();
    }

    /// Retires what was replaced by something else of the same name, after the new state was published.
    pub(super) fn retire_replaced(&mut self, steps: Vec<Step>) {
        for step in steps {
            match step {
                Step::PortStopped(old) => {
                    let kept = self.ports.get(&old.spec.name).is_some_and(|live| live.id == old.id);
                    if !kept {
                        self.retire(Slot::Port(old.id), Some(Counted::Port(old.counters)));
                    }
                }
                Step::NetworkPlaced { previous: Some(previous), .. } => {
                    // Counters went over to the network's new number.
                    self.retire(Slot::Network(previous.id), None);
                }
                Step::UnderlayRemoved { name, live } => {
                    let successor = self.underlays.get(&name);
                    let kept = successor.is_some_and(|new| Arc::ptr_eq(&new.counters, &live.counters));
                    self.retire(Slot::Underlay(live.id), (!kept).then_some(Counted::Underlay(live.counters)));
                }
                Step::PortStarted { .. } | Step::UnderlayAdded { .. } | Step::NetworkPlaced { previous: None, .. } => {}
            }
        }
    }
}

impl Step {
    /// Whether an underlay that was removed earlier counts at the same counters.
    fn keeps_counters_of(steps: &[Self], live: &LiveUnderlay) -> bool {
        steps.iter().any(|step| match step {
            Self::UnderlayRemoved { live: old, .. } => Arc::ptr_eq(&old.counters, &live.counters),
            _ => false,
        })
    }
}

fn endpoint_spec(port: &Port, document: &Document) -> EndpointSpec {
    let network = document.find_network(&port.network).expect("a validated document has every port's network");
    EndpointSpec {
        name: port.name.clone(),
        socket: port.socket.clone(),
        mode: port.mode,
        queue_pairs: port.queues,
        mtu: network.mtu,
        features: match port.config_space {
            true => card::offered(&port.switched_off) | card::in_config_space(port.mac.is_some()),
            false => card::offered(&port.switched_off),
        },
        config_space: port.config_space.then(|| ConfigSpace { mac: port.mac.map(|mac| mac.0) }),
    }
}

/// Everything but the MTU, which for sockets only warnings are made of.
fn same_binding(old: &Underlay, new: &Underlay) -> bool {
    let mtu = if new.driver == Driver::Socket { new.mtu } else { old.mtu };
    Underlay { mtu, ..old.clone() } == *new
}

fn socket_of(underlay: &Underlay) -> Option<&Path> {
    underlay.wire.as_ref().map(|wire| wire.socket.as_path())
}

fn bind(underlay: &Underlay, counters: Arc<UnderlayCounters>) -> Result<underlay::Underlay, Mistake> {
    let Underlay { name, address, port, device, .. } = underlay;
    if let Some(Wire { mac, gateway, neighbours, .. }) = &underlay.wire {
        let config = RingUnderlayConfig {
            mac: *mac,
            address: *address,
            udp_port: *port,
            mtu: underlay.mtu,
            gateway: *gateway,
            neighbours: neighbours.iter().map(|neighbour| (neighbour.address, neighbour.mac)).collect(),
        };
        return Ok(RingUnderlay::new(config, counters).into());
    }
    if let (Driver::AfXdp, Some(device), Some(queues)) = (underlay.driver, device, underlay.queues) {
        let (device, mtu) = (device.clone(), underlay.mtu);
        let config = XdpUnderlayConfig { device, queues, address: *address, udp_port: *port, mtu };
        let opened = XdpUnderlay::open(&config, counters);
        return opened.map(Into::into).map_err(|error| {
            let key = if matches!(error, XdpError::NoAddress(_)) { "address" } else { "device" };
            Mistake::new(format!("underlay.{name}.{key}"), error.to_string())
        });
    }
    SocketUnderlay::bind(*address, *port, device.as_deref(), counters).map(Into::into).map_err(|error| {
        let advice = match error.kind() {
            std::io::ErrorKind::AddrNotAvailable => "give the address to an interface of this host, or correct it",
            std::io::ErrorKind::AddrInUse => {
                "another program has that UDP port (a kernel vxlan device?): end it or set another port"
            }
            std::io::ErrorKind::PermissionDenied => "binding to a device needs CAP_NET_RAW",
            _ if error.raw_os_error() == Some(NO_SUCH_DEVICE) => "no such device: see `ip link`",
            _ => "check address, port and device",
        };
        let at = device.as_ref().map(|device| format!(" on {device}")).unwrap_or_default();
        Mistake::new(
            format!("underlay.{name}.address"),
            format!("cannot bind {address} port {port}{at}: {error}; {advice}"),
        )
    })
}

/// Linux: ENODEV.
const NO_SUCH_DEVICE: i32 = 19;

fn all_in_use(kind: &str, name: &str) -> Mistake {
    Mistake::new(format!("{kind}.{name}"), format!("all {kind} numbers are in use just now; try again in a moment"))
}
