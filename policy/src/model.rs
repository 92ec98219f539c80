//! The model of a policy: groups, rules, postures. What an operator wrote, validated, before it is compiled.
//!
//! Owned by whoever builds it; [`crate::Classifier::compile`] reads it. Limits: [`RULES_MAX`], [`GROUPS_MAX`],
//! [`MEMBERS_MAX`], [`RANGES_MAX`].
//!
//! Of the rules that match, the one with the highest priority decides; at equal priority deny wins, then the one that was
//! defined first. If none matches, the network's [`Posture`] decides. A rule applies to the ports in its group.

use std::collections::HashSet;
use std::net::IpAddr;

use crate::key::{Family, protocol_has_ports};

/// Rules in a policy at most.
pub const RULES_MAX: usize = 65_536;
/// Groups in a policy at most.
pub const GROUPS_MAX: usize = 16_384;
/// Prefixes in all groups together at most.
pub const MEMBERS_MAX: usize = 1 << 20;
/// Port ranges, or ICMP kinds, in one rule at most.
pub const RANGES_MAX: usize = 64;

/// Names a rule in counters, logs and explanations; stays with the rule across changes of others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId(pub u32);

/// Names a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupId(pub u32);

/// Which way a packet goes, seen from the VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Into the VM.
    Ingress,
    /// Out of the VM.
    Egress,
}

impl Direction {
    /// The other one.
    #[inline]
    #[must_use]
    pub const fn opposite(self) -> Self {
        match self {
            Self::Ingress => Self::Egress,
            Self::Egress => Self::Ingress,
        }
    }
}

/// Which protocols a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// Every frame, also one that is not IP.
    Any,
    /// TCP over IPv4 and IPv6.
    Tcp,
    /// UDP over IPv4 and IPv6.
    Udp,
    /// ICMP over IPv4 alone.
    Icmp,
    /// ICMPv6 over IPv6 alone.
    Icmpv6,
    /// An IP protocol number, over both families.
    Number(u8),
}

impl Protocol {
    /// Its number, if it has one.
    #[must_use]
    pub const fn number(self) -> Option<u8> {
        match self {
            Self::Any => None,
            Self::Tcp => Some(6),
            Self::Udp => Some(17),
            Self::Icmp => Some(1),
            Self::Icmpv6 => Some(58),
            Self::Number(number) => Some(number),
        }
    }
}

/// Destination ports `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PortRange {
    /// Lowest port.
    pub first: u16,
    /// Highest port.
    pub last: u16,
}

/// A type of ICMP or ICMPv6 message, perhaps with one code only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IcmpKind {
    /// Type field.
    pub kind: u8,
    /// Code field; every code if `None`.
    pub code: Option<u8>,
}

/// An IPv4 or IPv6 prefix. Host bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Prefix {
    address: IpAddr,
    length: u8,
}

impl Prefix {
    /// The prefix of `length` bits that `address` is in.
    ///
    /// # Errors
    /// When the family has no such length.
    pub fn new(address: IpAddr, length: u8) -> Result<Self, PolicyError> {
        let family = Family::of(address);
        if length > family.bits() {
            return Err(PolicyError::PrefixLength { address, length });
        }
        let bits = family.aligned(address) & mask(length);
        Ok(Self { address: family.address(family.unaligned(bits)), length })
    }

    /// The prefix of this address alone.
    #[must_use]
    pub fn host(address: IpAddr) -> Self {
        Self { address, length: Family::of(address).bits() }
    }

    /// First address.
    #[must_use]
    pub const fn address(self) -> IpAddr {
        self.address
    }

    /// Length in bits.
    #[must_use]
    pub const fn length(self) -> u8 {
        self.length
    }

    /// Whether the address is in it.
    #[must_use]
    pub fn contains(self, address: IpAddr) -> bool {
        let family = Family::of(self.address);
        family == Family::of(address)
            && (family.aligned(address) ^ family.aligned(self.address)) & mask(self.length) == 0
    }
}

/// `length` ones at the top.
#[inline]
pub(crate) const fn mask(length: u8) -> u128 {
    match length {
        0 => 0,
        length => u128::MAX << (128 - length as u32),
    }
}

/// The far end that a rule is about: the source for ingress, the destination for egress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Remote {
    /// Everybody.
    Any,
    /// Addresses.
    Prefix(Prefix),
    /// The members of a group, by address or by the identity that came with the frame.
    Group(GroupId),
}

/// What a rule does with what it matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Lets it pass.
    Allow,
    /// Drops it.
    Deny,
}

/// One rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Its name.
    pub id: RuleId,
    /// The ports it applies to: those in this group.
    pub group: GroupId,
    /// Which way, seen from the VM.
    pub direction: Direction,
    /// Which protocols.
    pub protocol: Protocol,
    /// Destination ports; all if empty.
    pub ports: Vec<PortRange>,
    /// ICMP types and codes; all if empty.
    pub icmp: Vec<IcmpKind>,
    /// The far end.
    pub remote: Remote,
    /// Allow or deny.
    pub action: Action,
    /// The highest wins.
    pub priority: u16,
    /// Whether a decision by this rule is logged.
    pub log: bool,
}

/// A group: who is in it by address. Which local ports are in it is said when a port's classifier is compiled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Its name.
    pub id: GroupId,
    /// Its members' addresses and prefixes, as a remote.
    pub members: Vec<Prefix>,
}

/// A group policy identity as it travels in a tunnel header, and the groups that its bearer is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The value on the wire (VXLAN group policy: 16 bits).
    pub tag: u16,
    /// The groups it stands for.
    pub groups: Vec<GroupId>,
}

/// What happens to what no rule matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Posture {
    /// Everything passes.
    Open,
    /// Ingress is denied, egress passes.
    Enforced,
}

impl Posture {
    /// Its answer for one direction.
    #[inline]
    #[must_use]
    pub const fn allows(self, direction: Direction) -> bool {
        matches!((self, direction), (Self::Open, _) | (Self::Enforced, Direction::Egress))
    }
}

/// Why a policy is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "the messages say it")]
pub enum PolicyError {
    #[error("{address}/{length}: no such prefix length")]
    PrefixLength { address: IpAddr, length: u8 },
    #[error("{what}: {count} is more than {max}")]
    TooMany { what: &'static str, count: usize, max: usize },
    #[error("rule id {0} is used twice")]
    DuplicateRule(u32),
    #[error("group id {0} is used twice")]
    DuplicateGroup(u32),
    #[error("identity {0} is used twice")]
    DuplicateIdentity(u16),
    #[error("group {group} is not defined; {user} names it")]
    UnknownGroup { group: u32, user: String },
    #[error("rule {0}: ports need a protocol that has them (TCP, UDP, SCTP, UDP-Lite)")]
    PortsWithoutProtocol(u32),
    #[error("rule {0}: ICMP types need protocol icmp or icmpv6")]
    KindsWithoutProtocol(u32),
    #[error("rule {rule}: port range {first}-{last} is upside down")]
    RangeOrder { rule: u32, first: u16, last: u16 },
}

/// A validated policy.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Policy {
    groups: Vec<Group>,
    rules: Vec<Rule>,
    identities: Vec<Identity>,
}

impl Policy {
    /// Validates.
    ///
    /// # Errors
    /// On the first mistake: identifiers used twice, groups that do not exist, ports without a protocol that has them,
    /// or more of something than its limit.
    pub fn new(groups: Vec<Group>, rules: Vec<Rule>, identities: Vec<Identity>) -> Result<Self, PolicyError> {
        at_most("groups", groups.len(), GROUPS_MAX)?;
        at_most("rules", rules.len(), RULES_MAX)?;
        at_most("members", groups.iter().map(|group| group.members.len()).sum(), MEMBERS_MAX)?;
        let mut known = HashSet::new();
        for group in &groups {
            if !known.insert(group.id) {
                return Err(PolicyError::DuplicateGroup(group.id.0));
            }
        }
        let mut rule_ids = HashSet::new();
        for rule in &rules {
            if !rule_ids.insert(rule.id) {
                return Err(PolicyError::DuplicateRule(rule.id.0));
            }
            check_rule(rule, &known)?;
        }
        let mut tags = HashSet::new();
        for identity in &identities {
            if !tags.insert(identity.tag) {
                return Err(PolicyError::DuplicateIdentity(identity.tag));
            }
            for group in &identity.groups {
                check_group(*group, &known, || format!("identity {}", identity.tag))?;
            }
        }
        Ok(Self { groups, rules, identities })
    }

    /// The groups.
    #[must_use]
    pub fn groups(&self) -> &[Group] {
        &self.groups
    }

    /// The rules in the order of their definition.
    #[must_use]
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// The identities.
    #[must_use]
    pub fn identities(&self) -> &[Identity] {
        &self.identities
    }
}

fn check_rule(rule: &Rule, known: &HashSet<GroupId>) -> Result<(), PolicyError> {
    let user = || format!("rule {}", rule.id.0);
    check_group(rule.group, known, user)?;
    if let Remote::Group(group) = rule.remote {
        check_group(group, known, user)?;
    }
    at_most("port ranges of a rule", rule.ports.len(), RANGES_MAX)?;
    at_most("ICMP types of a rule", rule.icmp.len(), RANGES_MAX)?;
    if !rule.ports.is_empty() && !rule.protocol.number().is_some_and(protocol_has_ports) {
        return Err(PolicyError::PortsWithoutProtocol(rule.id.0));
    }
    if !rule.icmp.is_empty() && !matches!(rule.protocol, Protocol::Icmp | Protocol::Icmpv6) {
        return Err(PolicyError::KindsWithoutProtocol(rule.id.0));
    }
    match rule.ports.iter().find(|range| range.first > range.last) {
        Some(&PortRange { first, last }) => Err(PolicyError::RangeOrder { rule: rule.id.0, first, last }),
        None => Ok(()),
    }
}

fn check_group(group: GroupId, known: &HashSet<GroupId>, user: impl Fn() -> String) -> Result<(), PolicyError> {
    match known.contains(&group) {
        true => Ok(()),
        false => Err(PolicyError::UnknownGroup { group: group.0, user: user() }),
    }
}

fn at_most(what: &'static str, count: usize, max: usize) -> Result<(), PolicyError> {
    match count <= max {
        true => Ok(()),
        false => Err(PolicyError::TooMany { what, count, max }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule() -> Rule {
        Rule {
            id: RuleId(1),
            group: GroupId(1),
            direction: Direction::Ingress,
            protocol: Protocol::Tcp,
            ports: vec![PortRange { first: 443, last: 443 }],
            icmp: vec![],
            remote: Remote::Any,
            action: Action::Allow,
            priority: 100,
            log: false,
        }
    }

    fn check(rules: Vec<Rule>) -> Result<Policy, PolicyError> {
        Policy::new(vec![Group { id: GroupId(1), members: vec![] }], rules, vec![])
    }

    #[test]
    fn a_prefix_drops_its_host_bits_and_holds_its_own_family() {
        let prefix = Prefix::new("10.1.2.3".parse().unwrap(), 8).unwrap();
        assert_eq!(prefix.address(), "10.0.0.0".parse::<IpAddr>().unwrap());
        assert!(prefix.contains("10.255.0.1".parse().unwrap()));
        assert!(!prefix.contains("11.0.0.1".parse().unwrap()));
        assert!(!prefix.contains("::a00:1".parse().unwrap()));
        assert!(Prefix::new("10.0.0.0".parse().unwrap(), 33).is_err());
        assert!(Prefix::new("fd00::".parse().unwrap(), 129).is_err());
        assert!(Prefix::new("::".parse().unwrap(), 0).unwrap().contains("fd00::1".parse().unwrap()));
    }

    #[test]
    fn mistakes_are_named() {
        assert!(check(vec![rule()]).is_ok());
        assert_eq!(check(vec![rule(), rule()]), Err(PolicyError::DuplicateRule(1)));
        let any = Rule { protocol: Protocol::Any, ..rule() };
        assert_eq!(check(vec![any]), Err(PolicyError::PortsWithoutProtocol(1)));
        let upside = Rule { ports: vec![PortRange { first: 2, last: 1 }], ..rule() };
        assert_eq!(check(vec![upside]), Err(PolicyError::RangeOrder { rule: 1, first: 2, last: 1 }));
        let kinds = Rule { ports: vec![], icmp: vec![IcmpKind { kind: 8, code: None }], ..rule() };
        assert_eq!(check(vec![kinds]), Err(PolicyError::KindsWithoutProtocol(1)));
        let stranger = Rule { remote: Remote::Group(GroupId(2)), ..rule() };
        let unknown = PolicyError::UnknownGroup { group: 2, user: "rule 1".to_owned() };
        assert_eq!(check(vec![stranger]), Err(unknown));
        let many = Rule { ports: vec![PortRange { first: 1, last: 1 }; RANGES_MAX + 1], ..rule() };
        assert!(matches!(check(vec![many]), Err(PolicyError::TooMany { .. })));
    }
}
