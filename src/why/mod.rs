//! Why a flow would pass or not, from one end to the other, without sending anything: for `dreamwire why`.
//!
//! Follows a flow's first packet through what a worker would do with it: source guard and egress at the sender's port, the
//! switch, ingress at the receiver's. The rules' verdicts are those of the compiled classifiers. Everything it works
//! with is given to it; it asks nobody.

mod question;

use std::collections::BTreeMap;
use std::net::IpAddr;

use dreamwire_datapath::mac::Mac;
use dreamwire_policy::key::IcmpRole;
use dreamwire_policy::{Action, Claim, ConnectionRow, Direction, Explanation, GroupId, Key, RuleId, explain};
use serde::Serialize;

use crate::config::notation::{direction_word, posture_word};
use crate::config::{Document, Network, Port};
use crate::control::news::Flow;
use crate::control::rulebook::Index;
pub use question::{Question, key};

/// Where a station is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// At a port of this host.
    Port(String),
    /// Behind another host.
    Vtep(IpAddr),
}

/// What is known.
#[derive(Debug)]
pub struct Facts<'a> {
    /// Desired state.
    pub document: &'a Document,
    /// What it became.
    pub rules: &'a Index,
    /// Stations that were learned, by network.
    pub learned: Vec<(String, Mac, Place)>,
    /// Connections that carry the packets that [`concerned`] names, by port.
    pub connections: BTreeMap<String, Vec<ConnectionRow>>,
}

/// What becomes of a packet at one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It goes on.
    Pass,
    /// It ends.
    Drop,
    /// That depends on what is not known here.
    Unknown,
}

/// A rule that matches.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Matching {
    /// Its name.
    pub rule: String,
    /// The group it belongs to.
    pub group: String,
    /// What it does.
    pub action: &'static str,
    /// Its priority.
    pub priority: u16,
}

/// One place on the way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// `source_guard`, `egress`, `switch`, `ingress`.
    pub at: &'static str,
    /// The port that judges, or for the switch the one that it goes to.
    pub port: Option<String>,
    /// What becomes of the packet.
    pub verdict: Verdict,
    /// Why, as a sentence.
    pub why: String,
    /// The rule that decides.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rule: Option<Matching>,
    /// Rules that match too, and come after it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub shadowed: Vec<Matching>,
    /// Whether a connection that exists carries it.
    pub connection: bool,
}

/// One direction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Path {
    /// The flow.
    #[serde(flatten)]
    pub flow: Flow,
    /// Of all steps together.
    pub verdict: Verdict,
    /// What decides.
    pub why: String,
    /// In their order; the first that drops is the last.
    pub steps: Vec<Step>,
}

/// Both directions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// The port that was asked about.
    pub port: String,
    /// Its network.
    pub network: String,
    /// The flow that was asked about.
    pub path: Path,
    /// What becomes of answers to it.
    pub replies: String,
    /// The same flow begun by the other end.
    pub reverse: Path,
}

/// Answers; `None` if there is no such port.
pub fn why(question: &Question, facts: &Facts<'_>) -> Option<Answer> {
    let port = facts.document.find_port(&question.port)?;
    let network = facts.document.find_network(&port.network)?;
    let Question { key, station, identity, .. } = question;
    let (source, destination) = (key.source_address(), key.destination_address());
    let owner = |address| facts.document.port.iter().find(|port| port.network == network.name && owns(port, address));
    let receives = !owns(port, source)
        && (owns(port, destination)
            || port.addresses.is_empty() && owner(source).is_some() && owner(destination).is_none());
    let (sender, receiver) = match receives {
        true => (owner(source), Some(port)),
        false => (Some(port), owner(destination)),
    };
    let forward = Ends { network, sender, receiver, station: *station, identity: *identity };
    let path = facts.path(&forward, key);
    let replies = match path.verdict {
        Verdict::Pass => {
            "pass as a part of the connection, in both directions, while the rules let its first packet through"
        }
        Verdict::Drop => "there is nothing to answer",
        Verdict::Unknown => "pass as a part of the connection if its first packet does",
    };
    // Who came by a tunnel is answered there: what names the receiver on the way back is not known here.
    let back = Ends { network, sender: receiver, receiver: sender, station: None, identity: None };
    let reverse = facts.path(&back, &reversed(key));
    Some(Answer { port: port.name.clone(), network: network.name.clone(), path, replies: replies.to_owned(), reverse })
}

/// The packets whose connections [`why`] wants to know, at each of the ports that [`concerned`] names.
pub fn packets(question: &Question) -> [(Direction, Key); 4] {
    let (key, back) = (question.key, reversed(&question.key));
    let (ingress, egress) = (Direction::Ingress, Direction::Egress);
    [(egress, key), (ingress, key), (egress, back), (ingress, back)]
}

/// The ports whose connections [`why`] wants to know: those that either end may be.
pub fn concerned<'a>(question: &Question, document: &'a Document) -> Vec<&'a Port> {
    let ends = [question.key.source_address(), question.key.destination_address()];
    let Some(port) = document.find_port(&question.port) else { return Vec::new() };
    let is_end = |other: &&Port| {
        other.network == port.network && (other.name == port.name || ends.iter().any(|end| owns(other, *end)))
    };
    document.port.iter().filter(is_end).collect()
}

/// Where a packet begins and where it may go.
struct Ends<'a> {
    network: &'a Network,
    /// `None`: another host, or a port that is not known to have the address.
    sender: Option<&'a Port>,
    receiver: Option<&'a Port>,
    station: Option<Mac>,
    identity: Option<u16>,
}

impl Facts<'_> {
    fn path(&self, ends: &Ends<'_>, key: &Key) -> Path {
        let mut steps = Vec::new();
        if let Some(sender) = ends.sender {
            steps.push(guard(sender, key));
            if passes(&steps) {
                steps.push(self.judge(sender, Direction::Egress, key, None));
            }
        }
        let mut goes_to = None;
        if passes(&steps) {
            let (step, place) = self.switch(ends, key);
            steps.push(step);
            goes_to = place;
        }
        let receiver = match &goes_to {
            Some(Place::Port(name)) => self.document.find_port(name),
            _ => None,
        };
        if let (Some(receiver), true) = (receiver, passes(&steps)) {
            let trusted = &ends.network.trusted_remotes;
            let identity = match ends.sender {
                Some(sender) => sender.identity_without_addresses(&self.document.identities()),
                // As the datapath does: 0 is none, and who is not trusted is not believed.
                None => ends.identity.filter(|identity| *identity != 0 && !trusted.is_empty()),
            };
            let mut step = self.judge(receiver, Direction::Ingress, key, identity);
            if let (None, Some(told)) = (ends.sender, ends.identity) {
                step.why += &said_of_identity(ends.network, told);
            }
            steps.push(step);
        }
        let dropped = steps.iter().find(|step| step.verdict == Verdict::Drop);
        let unknown = steps.iter().find(|step| step.verdict == Verdict::Unknown);
        let (verdict, why) = match (dropped, unknown) {
            (Some(step), _) => (Verdict::Drop, format!("{}: {}", place_text(step), step.why)),
            (None, Some(step)) => (Verdict::Unknown, format!("{}: {}", place_text(step), step.why)),
            (None, None) if receiver.is_some() => (Verdict::Pass, "every port on its way lets it pass".to_owned()),
            (None, None) => (Verdict::Pass, "it leaves this host; what receives it judges ingress".to_owned()),
        };
        Path { flow: Flow::of(key), verdict, why, steps }
    }

    /// What the rules of a port, and its connections, say.
    fn judge(&self, port: &Port, direction: Direction, key: &Key, identity: Option<u16>) -> Step {
        let mut step = Step {
            at: direction_word(direction),
            port: Some(port.name.clone()),
            verdict: Verdict::Pass,
            why: String::new(),
            rule: None,
            shadowed: Vec::new(),
            connection: false,
        };
        let Some(ruleset) = self.rules.by_port.get(&port.name) else { return step };
        if ruleset.classifier.allows_all() {
            "no rule applies to the port, and its network is open".clone_into(&mut step.why);
            return step;
        }
        if key.is_neighbour_discovery() {
            "neighbour discovery and multicast listener messages always pass".clone_into(&mut step.why);
            return step;
        }
        let row = self.connections.get(&port.name).into_iter().flatten().find(|row| row.carries(key, direction));
        // A connection is judged as its first packet was.
        let (direction, key, identity) =
            row.map_or((direction, *key, identity), |row| (row.initiator, row.key, row.identity));
        let explanation = explain(&ruleset.policy, &ruleset.classifier, direction, &key, identity);
        step.verdict = if explanation.verdict.allow { Verdict::Pass } else { Verdict::Drop };
        step.why = self.because(&explanation, direction, ruleset.classifier.posture());
        if let Some(row) = row {
            step.connection = true;
            let state = if row.replied { "answered" } else { "not answered yet" };
            step.why = match explanation.verdict.allow {
                true => format!("a connection carries it ({state}); {}", step.why),
                false => format!("its connection ends with its next packet; {}", step.why),
            };
        } else if let Some((verdict, needs)) = needs_another(&key) {
            step.verdict = verdict;
            needs.clone_into(&mut step.why);
            return step;
        }
        let rules = ruleset.classifier.rules();
        step.rule = explanation.verdict.rule.and_then(|id| {
            let rule = rules.iter().find(|rule| rule.id == id)?;
            Some(self.matching(rule.id, rule.group, rule.action, rule.priority))
        });
        let shadowed = explanation.shadowed.iter();
        step.shadowed = shadowed.map(|rule| self.matching(rule.rule, rule.group, rule.action, rule.priority)).collect();
        step
    }

    fn because(&self, explanation: &Explanation, direction: Direction, posture: dreamwire_policy::Posture) -> String {
        match (explanation.verdict.rule, explanation.group) {
            (Some(rule), Some(group)) => {
                let verb = if explanation.verdict.allow { "allows" } else { "denies" };
                format!("rule {} of group {} {verb} it", self.rule_name(rule), self.group_name(group))
            }
            _ => {
                let verb = if explanation.verdict.allow { "passes" } else { "is denied" };
                format!(
                    "no rule matches: in a network that is {}, {} {verb}",
                    posture_word(posture),
                    direction_word(direction)
                )
            }
        }
    }

    fn matching(&self, rule: RuleId, group: GroupId, action: Action, priority: u16) -> Matching {
        let action = if action == Action::Allow { "allow" } else { "deny" };
        Matching { rule: self.rule_name(rule), group: self.group_name(group), action, priority }
    }

    fn rule_name(&self, rule: RuleId) -> String {
        self.rules.rules.get(&rule).map_or_else(|| format!("#{}", rule.0), |entry| entry.name.clone())
    }

    fn group_name(&self, group: GroupId) -> String {
        self.rules.groups.get(&group).cloned().unwrap_or_else(|| format!("#{}", group.0))
    }

    /// Where the switch sends it.
    fn switch(&self, ends: &Ends<'_>, key: &Key) -> (Step, Option<Place>) {
        let (verdict, why, place) = self.next_hop(ends, key.destination_address());
        let port = match &place {
            Some(Place::Port(name)) => Some(name.clone()),
            _ => None,
        };
        let step = Step { at: "switch", port, verdict, why, rule: None, shadowed: Vec::new(), connection: false };
        (step, place)
    }

    fn next_hop(&self, ends: &Ends<'_>, destination: IpAddr) -> (Verdict, String, Option<Place>) {
        let Ends { network, sender, receiver, station, .. } = ends;
        if is_group(destination) {
            return (Verdict::Unknown, format!("a group address: flooded to {}", everybody(network)), None);
        }
        let place = match (receiver, station) {
            (Some(receiver), _) => Some((Place::Port(receiver.name.clone()), "the port that has the address")),
            (None, Some(mac)) => match self.station(network, *mac) {
                Some(known) => Some(known),
                None => {
                    let why = format!("station {mac} is not known: flooded to {}", everybody(network));
                    return (Verdict::Unknown, why, None);
                }
            },
            (None, None) => None,
        };
        match place {
            Some((Place::Port(name), _)) if sender.is_some_and(|sender| sender.name == name) => {
                (Verdict::Drop, "the sender's own port: frames do not go back where they came from".to_owned(), None)
            }
            Some((Place::Port(name), how)) => {
                (Verdict::Pass, format!("to port {name}, {how}"), Some(Place::Port(name)))
            }
            Some((Place::Vtep(vtep), how)) if sender.is_some() => {
                (Verdict::Pass, format!("to host {vtep}, {how}{}", self.wire(ends)), Some(Place::Vtep(vtep)))
            }
            Some((Place::Vtep(vtep), _)) => {
                (Verdict::Drop, format!("host {vtep} has it: what came by a tunnel goes into none"), None)
            }
            None => {
                let why = format!(
                    "no port of this network has {destination}: it goes to the station that the sender's neighbour table has for it (say which \
                     with --mac), and if nobody knows that, it is flooded to {}",
                    everybody(network)
                );
                (Verdict::Unknown, why, None)
            }
        }
    }

    /// Where a station is, and how that is known.
    fn station(&self, network: &Network, mac: Mac) -> Option<(Place, &'static str)> {
        let configured = self.document.port.iter().find(|port| port.network == network.name && port.mac == Some(mac));
        if let Some(port) = configured {
            return Some((Place::Port(port.name.clone()), "the port with that mac"));
        }
        let learned = self.learned.iter().find(|(name, known, _)| *name == network.name && *known == mac);
        learned.map(|(_, _, place)| (place.clone(), "where the station was learned"))
    }

    /// What is around it on the underlay.
    fn wire(&self, ends: &Ends<'_>) -> String {
        let (Some(vni), Some(underlay)) = (ends.network.vni, &ends.network.underlay) else { return String::new() };
        let identity = ends
            .sender
            .filter(|_| ends.network.group_policy)
            .and_then(|sender| sender.identity(&self.document.identities()));
        let group = identity.map(|id| format!(", from group {id}")).unwrap_or_default();
        format!(", in VXLAN {} over {underlay}{group}", vni.get())
    }
}

/// The source guard's word.
fn guard(port: &Port, key: &Key) -> Step {
    let source = key.source_address();
    let (verdict, why) = match (port.source_guard(), port.mac) {
        (Some(guard), Some(mac)) => match (guard.allows(mac.0, claim(key)), claim(key)) {
            (true, Claim::DhcpClient { .. }) if source.is_unspecified() => {
                (Verdict::Pass, format!("a DHCP client has no address yet: {source} passes"))
            }
            (true, Claim::Neighbour { .. }) if source.is_unspecified() => {
                (Verdict::Pass, format!("neighbour discovery begins without an address: {source} passes"))
            }
            (true, _) => (Verdict::Pass, format!("{source} is the port's own")),
            (false, Claim::Authority) => (Verdict::Drop, "a message that only servers and routers send".to_owned()),
            (false, _) => (Verdict::Drop, format!("{source} is not among the port's addresses")),
        },
        _ => (Verdict::Pass, "the port has no addresses configured: it may claim any".to_owned()),
    };
    Step {
        at: "source_guard",
        port: Some(port.name.clone()),
        verdict,
        why,
        rule: None,
        shadowed: Vec::new(),
        connection: false,
    }
}

/// What a packet with this key claims: as the datapath reads it from a frame.
fn claim(key: &Key) -> Claim {
    const UDP: u8 = 17;
    let icmp_kind = if key.is_icmp() { key.destination_port >> 8 } else { 0 };
    match (key.source_address(), key.protocol, key.source_port, key.destination_port) {
        (IpAddr::V4(_), UDP, 67, _) | (IpAddr::V6(_), UDP, 547, _) => Claim::Authority,
        (IpAddr::V4(source), UDP, 68, 67) => Claim::DhcpClient { source },
        (IpAddr::V4(source), ..) => Claim::Ipv4 { source },
        (IpAddr::V6(_), ..) if matches!(icmp_kind, 134 | 137) => Claim::Authority,
        // A listener query (130) is none of what a station without an address sends.
        (IpAddr::V6(source), ..) if key.is_neighbour_discovery() && icmp_kind != 130 => {
            Claim::Neighbour { source, advertised: None, mac: None }
        }
        (IpAddr::V6(source), ..) => Claim::Ipv6 { source },
    }
}

/// ICMP that passes, or not, because of another packet.
fn needs_another(key: &Key) -> Option<(Verdict, &'static str)> {
    match key.icmp_role()? {
        IcmpRole::Answer { .. } => Some((Verdict::Drop, "an answer to a query that there is no connection of")),
        IcmpRole::Error => Some((Verdict::Unknown, "an error passes if what it quotes is of a connection of the port")),
        IcmpRole::Query { .. } | IcmpRole::Other => None,
    }
}

/// What an identity in a tunnel header is worth.
fn said_of_identity(network: &Network, identity: u16) -> String {
    let trusted: Vec<_> = network.trusted_remotes.iter().map(ToString::to_string).collect();
    match (identity, trusted.is_empty()) {
        (0, _) => " (identity 0 is none)".to_owned(),
        (_, true) => format!(" (identity {identity} is ignored: network {} has no trusted_remotes)", network.name),
        (_, false) => format!(" (identity {identity} is believed if the remote is one of {})", trusted.join(", ")),
    }
}

/// The same, begun by the other end; a ping stays a ping.
fn reversed(key: &Key) -> Key {
    let mut other = Key { source: key.destination, destination: key.source, ..*key };
    if !key.is_icmp() {
        (other.source_port, other.destination_port) = (key.destination_port, key.source_port);
    }
    other
}

fn owns(port: &Port, address: IpAddr) -> bool {
    port.addresses.contains(&address)
}

fn is_group(address: IpAddr) -> bool {
    address.is_multicast() || address == IpAddr::V4(std::net::Ipv4Addr::BROADCAST)
}

fn everybody(network: &Network) -> String {
    match network.remotes.len() {
        0 => format!("the ports of network {} that hear it", network.name),
        count => format!("the ports of network {} that hear it, and {count} other hosts", network.name),
    }
}

fn passes(steps: &[Step]) -> bool {
    steps.iter().all(|step| step.verdict != Verdict::Drop)
}

fn place_text(step: &Step) -> String {
    match (step.at, &step.port) {
        ("switch", _) | (_, None) => step.at.to_owned(),
        (at, Some(port)) => format!("{} at {port}", at.replace('_', " ")),
    }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
