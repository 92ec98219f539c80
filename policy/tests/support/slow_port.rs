//! A port that decides slowly and obviously: connections in a list, TCP states from a table of letters, rules from the oracle.
//!
//! Windows are left out (the comparison with Linux looks at them): every segment has the numbers of an exact one.

use dreamwire_policy::oracle::{Subject, verdict};
use dreamwire_policy::tcp::Segment;
use dreamwire_policy::{
    ConnState, Direction, Family, Fragment, GroupId, Key, Packet, Parsed, Policy, Posture, RuleId, Transport,
};

use super::random::Random;
use super::rule_sets::address;

const SECOND_NS: u64 = 1_000_000_000;

/// States, in the order of the table's columns: None, SYN_SENT, SYN_RECV, ESTABLISHED, FIN_WAIT, CLOSE_WAIT, LAST_ACK,
/// TIME_WAIT, CLOSE, SYN_SENT2. `-` is invalid, `.` ignored.
const COLUMNS: &str = "NSREFWLTC2";
/// By direction and kind: SYN, SYN/ACK, FIN, ACK, RST.
const TABLE: [[&str; 5]; 2] = [
    ["SS.....SS2", "--R------R", "--FFLLLTC-", "E-EEWWTTC-", "-CCCCCCCCC"],
    ["-2-----S-2", "-R.......R", "--FFLLLTC-", "-.REWWTTC.", "-CCCCCCCCC"],
];

fn timeout_ns(state: char) -> u64 {
    SECOND_NS
        * match state {
            'R' | 'W' => 60,
            'L' => 30,
            'C' => 10,
            'E' => 300,
            _ => 120,
        }
}

#[derive(Debug, Clone)]
struct SlowConnection {
    /// The first packet's, and its direction.
    key: Key,
    initiator: Direction,
    expires_ns: u64,
    created_ns: u64,
    replied: bool,
    state: char,
    closed_first: bool,
    simultaneous: bool,
    challenge: bool,
    last: (usize, bool),
    generation: u32,
    rule: Option<RuleId>,
    identity: Option<u16>,
}

#[derive(Debug)]
pub(crate) struct SlowPort {
    posture: Posture,
    groups: Vec<GroupId>,
    connections: Vec<SlowConnection>,
}

pub(crate) struct SlowDecision {
    pub(crate) allow: bool,
    pub(crate) rule: Option<RuleId>,
    pub(crate) state: ConnState,
    pub(crate) known: bool,
}

fn reversed(key: &Key) -> Key {
    let icmp = key.protocol == 1 && key.family == Family::V4 || key.protocol == 58 && key.family == Family::V6;
    let mut reply = *key;
    std::mem::swap(&mut reply.source, &mut reply.destination);
    if icmp {
        let [kind, code] = key.destination_port.to_be_bytes();
        let answer = match kind {
            8 => 0,
            0 => 8,
            129 => 128,
            128 => 129,
            13 => 14,
            14 => 13,
            other => other,
        };
        reply.destination_port = u16::from_be_bytes([answer, code]);
    } else {
        std::mem::swap(&mut reply.source_port, &mut reply.destination_port);
    }
    reply
}

/// RFC numbers of ICMP errors, and of what neither asks nor answers.
fn icmp_kind(key: &Key) -> Option<u8> {
    let icmp = key.protocol == 1 && key.family == Family::V4 || key.protocol == 58 && key.family == Family::V6;
    icmp.then(|| key.destination_port.to_be_bytes()[0])
}

impl SlowPort {
    pub(crate) fn new(posture: Posture, groups: Vec<GroupId>) -> Self {
        Self { posture, groups, connections: vec![] }
    }

    pub(crate) fn decide(
        &mut self,
        policy: &Policy,
        parsed: &Parsed,
        direction: Direction,
        identity: Option<u16>,
        generation: u32,
        now_ns: u64,
    ) -> SlowDecision {
        let untracked = ConnState::Untracked;
        let decision = |allow, rule, state| SlowDecision { allow, rule, state, known: false };
        let no_rules = !policy.rules().iter().any(|rule| self.groups.contains(&rule.group));
        if no_rules && self.posture == Posture::Open {
            return decision(true, None, untracked);
        }
        let packet = match parsed {
            Parsed::Unreadable => return decision(false, None, untracked),
            Parsed::Arp => return decision(true, None, untracked),
            Parsed::Other(_) => {
                let said = verdict(policy, self.posture, &self.groups, direction, Subject::Other, identity);
                return decision(said.allow, said.rule, untracked);
            }
            Parsed::Ip(packet) => packet,
        };
        self.connections.retain(|connection| connection.expires_ns > now_ns);
        let (state, place) = self.track(packet, direction, now_ns);
        if state == ConnState::Invalid {
            return decision(false, None, state);
        }
        let Some(place) = place else {
            let said = verdict(policy, self.posture, &self.groups, direction, Subject::Flow(&packet.key), identity);
            if said.allow && state == ConnState::New {
                self.connections.push(begin(packet, direction, generation, said.rule, identity, now_ns));
            }
            return decision(said.allow, said.rule, state);
        };
        let connection = &mut self.connections[place];
        let mut judged_identity = connection.identity;
        let is_initiators = direction == Direction::Ingress && connection.initiator == Direction::Ingress;
        if is_initiators && state != ConnState::Related {
            judged_identity = identity;
        }
        if connection.generation != generation || connection.identity != judged_identity {
            let said = verdict(
                policy,
                self.posture,
                &self.groups,
                connection.initiator,
                Subject::Flow(&connection.key),
                judged_identity,
            );
            if !said.allow {
                if connection.generation == generation {
                    // Somebody else's packet.
                } else if connection.key.protocol == 6 {
                    connection.generation = generation.wrapping_sub(1);
                    connection.identity = judged_identity;
                    connection.expires_ns = connection.expires_ns.min(now_ns + 300 * SECOND_NS);
                } else {
                    self.connections.remove(place);
                }
                return SlowDecision { known: true, ..decision(false, said.rule, state) };
            }
            connection.generation = generation;
            connection.rule = said.rule;
            connection.identity = judged_identity;
        }
        SlowDecision { known: true, ..decision(true, connection.rule, state) }
    }

    fn find(&self, key: &Key, direction: Direction) -> Option<usize> {
        self.connections.iter().position(|connection| {
            (connection.initiator == direction && connection.key == *key)
                || (connection.initiator != direction && reversed(&connection.key) == *key)
        })
    }

    fn track(&mut self, packet: &Packet, direction: Direction, now_ns: u64) -> (ConnState, Option<usize>) {
        if let Transport::IcmpError(quoted) = &packet.transport {
            let sent = if direction == Direction::Egress { Direction::Ingress } else { Direction::Egress };
            let found = quoted
                .filter(|quoted| quoted.key.source == packet.key.destination)
                .and_then(|quoted| self.find(&quoted.key, sent));
            return (if found.is_some() { ConnState::Related } else { ConnState::Invalid }, found);
        }
        let answers = match icmp_kind(&packet.key) {
            Some(0 | 14 | 129) => true,
            None | Some(8 | 13 | 128) => false,
            Some(_) => return (ConnState::Untracked, None),
        };
        if let Some(place) = self.find(&packet.key, direction) {
            let connection = &mut self.connections[place];
            let reply = connection.initiator != direction;
            let replied = connection.replied;
            match &packet.transport {
                Transport::Tcp(segment) => match connection.tcp(segment, reply, now_ns) {
                    Some(true) => {}
                    Some(false) => return (ConnState::Invalid, None),
                    None => {
                        self.connections.remove(place);
                        return (ConnState::New, None);
                    }
                },
                _ => connection.refresh(now_ns),
            }
            connection.replied |= reply;
            let state = match (reply, replied) {
                (true, _) => ConnState::Reply,
                (false, true) => ConnState::Established,
                (false, false) => ConnState::New,
            };
            return (state, Some(place));
        }
        let begins = match &packet.transport {
            Transport::Tcp(segment) => kind(segment).is_some_and(|kind| TABLE[0][kind].starts_with(['S', 'E'])),
            _ => !answers,
        };
        (if begins { ConnState::New } else { ConnState::Invalid }, None)
    }
}

impl SlowConnection {
    /// Whether the segment fits; `None`: it opens the connection anew.
    fn tcp(&mut self, segment: &Segment, reply: bool, now_ns: u64) -> Option<bool> {
        let Some(kind) = kind(segment) else { return Some(false) };
        let column = COLUMNS.find(self.state).unwrap();
        let mut next = TABLE[usize::from(reply)][kind].as_bytes()[column] as char;
        if next == '-' {
            return Some(false);
        }
        if next == '.' && kind == 1 && self.last == (0, !reply) {
            // A SYN/ACK for a SYN that was ignored.
            next = 'R';
            self.closed_first = false;
        }
        if next == '.' {
            self.ignore(kind, reply);
            return Some(true);
        }
        if next == 'S' && (self.state == 'T' || self.state == 'C') {
            if self.closed_first || self.last == (4, reply) {
                return None;
            }
            self.ignore(kind, reply);
            return Some(true);
        }
        if self.state == 'L' && kind == 3 && self.challenge && self.last == (0, !reply) {
            // It answers a SYN that was ignored, and is not the last acknowledgment.
            self.challenge = false;
            return Some(true);
        }
        self.simultaneous |= next == '2';
        if next == 'R' && kind == 3 && reply && self.simultaneous {
            next = 'E';
        }
        let repeated = (self.state, kind, self.replied) == ('S', 0, false);
        self.closed_first |= next == 'F' && self.state != 'F';
        self.state = next;
        self.last = (kind, reply);
        if !repeated {
            self.expires_ns = now_ns + timeout_ns(next);
        }
        if kind == 4 && !self.replied {
            self.expires_ns = now_ns;
        }
        Some(true)
    }

    fn ignore(&mut self, kind: usize, reply: bool) {
        self.last = (kind, reply);
        if kind == 0 && !reply {
            self.challenge = self.state == 'L';
            self.simultaneous = false;
        }
    }

    fn refresh(&mut self, now_ns: u64) {
        let stream = self.replied && now_ns > self.created_ns + 2 * SECOND_NS;
        let seconds = match self.key.protocol {
            17 => {
                if stream {
                    120
                } else {
                    30
                }
            }
            1 | 58 if icmp_kind(&self.key).is_some() => 30,
            _ => 600,
        };
        self.expires_ns = now_ns + seconds * SECOND_NS;
    }
}

fn begin(
    packet: &Packet,
    direction: Direction,
    generation: u32,
    rule: Option<RuleId>,
    identity: Option<u16>,
    now_ns: u64,
) -> SlowConnection {
    let mut connection = SlowConnection {
        key: packet.key,
        initiator: direction,
        expires_ns: 0,
        created_ns: now_ns,
        replied: false,
        state: 'N',
        closed_first: false,
        simultaneous: false,
        challenge: false,
        last: (5, false),
        generation,
        rule,
        identity,
    };
    match &packet.transport {
        Transport::Tcp(segment) => {
            connection.tcp(segment, false, now_ns).unwrap();
        }
        _ => connection.refresh(now_ns),
    }
    connection
}

fn kind(segment: &Segment) -> Option<usize> {
    match segment.flags {
        0x02 => Some(0),
        0x12 => Some(1),
        0x11 => Some(2),
        0x10 => Some(3),
        0x04 | 0x14 => Some(4),
        _ => None,
    }
}

/// The next frame: of a connection that is known, in either direction, or of another.
pub(crate) fn next_parsed(random: &mut Random, slow: &SlowPort) -> (Parsed, Direction) {
    if random.one_in(100) {
        return (random.of(&[Parsed::Unreadable, Parsed::Arp, Parsed::Other(0x88b5)]), Direction::Ingress);
    }
    let mut direction = if random.one_in(2) { Direction::Ingress } else { Direction::Egress };
    let mut key = if !slow.connections.is_empty() && !random.one_in(3) {
        let connection = &slow.connections[random.below(slow.connections.len() as u64) as usize];
        if connection.initiator == direction { connection.key } else { reversed(&connection.key) }
    } else {
        let v6 = random.one_in(3);
        let ends = (address(random, v6), address(random, v6));
        let icmp = if v6 { 58 } else { 1 };
        match random.below(8) {
            0 => Key::new(icmp, (ends.0, 1), (ends.1, u16::from_be_bytes([if v6 { 128 } else { 8 }, 0]))),
            1 => Key::new(47, (ends.0, 0), (ends.1, 0)),
            2 | 3 => Key::new(17, (ends.0, 1000), (ends.1, 53)),
            _ => Key::new(6, (ends.0, random.of(&[1000, 1001])), (ends.1, random.of(&[80, 443]))),
        }
    };
    let mut transport = Transport::Other;
    if random.one_in(12) {
        // An error about it, from this direction's far end or from somebody between.
        let quoted = if random.one_in(4) { key } else { reversed(&key) };
        let v4 = key.family == Family::V4;
        let honest = !random.one_in(4);
        key = Key {
            source: key.source ^ 0x100,
            destination: if honest { quoted.source } else { quoted.source ^ 1 },
            source_port: 0,
            destination_port: if v4 { 0x0301 } else { 0x0100 },
            protocol: if v4 { 1 } else { 58 },
            ..key
        };
        transport = Transport::IcmpError(Some(dreamwire_policy::parse::Quoted { key: quoted, sequence: None }));
        if random.one_in(20) {
            direction = if direction == Direction::Egress { Direction::Ingress } else { Direction::Egress };
        }
    } else if key.protocol == 6 {
        let flags = random.of(&[0x02, 0x02, 0x12, 0x12, 0x10, 0x10, 0x10, 0x10, 0x11, 0x11, 0x14, 0x00, 0x03]);
        let sequence = u32::from(flags & 0x02 == 0);
        let acknowledgment = u32::from(flags & 0x10 != 0);
        transport = Transport::Tcp(Segment {
            sequence,
            acknowledgment,
            selective: acknowledgment,
            window: 1000,
            flags,
            ..Segment::default()
        });
    }
    (Parsed::Ip(Packet { key, fragment: Fragment::Whole, transport }), direction)
}
