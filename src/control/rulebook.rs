//! Desired rules, compiled: one [`Ruleset`] for all ports that the same rules apply to.
//!
//! Owned by the control thread. A ruleset is compiled from a policy of its own, which has no more than it needs: the rules of
//! its groups, and the groups that those rules name. So what a change does not concern is recognized by comparing policies,
//! and stays as it is; and a ruleset's cost does not depend on what other ports' rules are.
//!
//! A port is a member of its groups for the ports of its own network only: addresses mean nothing beyond it, and another
//! tenant may use the same ones. Prefixes are members everywhere.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use dreamwire_datapath::counters::RuleCounters;
use dreamwire_datapath::snapshot::WorkerId;
use dreamwire_policy::{Classifier, Group, GroupId, Identity, Policy, Posture, Prefix, Remote, Rule, RuleId};

use super::numbers::Numbers;
use super::totals::Shares;
use crate::config::{self, Document};

/// What holds at a port.
#[derive(Debug)]
pub struct Ruleset {
    /// What it was compiled from.
    pub policy: Policy,
    /// What workers ask.
    pub classifier: Arc<Classifier>,
}

/// What a ruleset depends on, beside the text of rules and prefixes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Scope {
    posture: Posture,
    groups: Vec<GroupId>,
    /// Addresses of ports in the groups that the rules name.
    members: Vec<(GroupId, IpAddr)>,
}

/// A rule as readers know it.
#[derive(Debug, Clone)]
pub struct RuleEntry {
    /// Its name.
    pub name: String,
    /// Written by workers.
    pub counters: Shares<RuleCounters>,
}

/// What readers need of a rulebook; replaced as a whole.
#[derive(Debug, Clone, Default)]
pub struct Index {
    /// What holds at each port.
    pub by_port: BTreeMap<String, Arc<Ruleset>>,
    /// All rules, by their numbers.
    pub rules: BTreeMap<RuleId, RuleEntry>,
    /// Numbers of the rules, by their names.
    pub rule_ids: HashMap<String, RuleId>,
    /// Names of the groups, by their numbers.
    pub groups: BTreeMap<GroupId, String>,
}

/// All rulesets, and the numbers of groups and rules.
#[derive(Debug)]
pub struct Rulebook {
    workers: usize,
    groups: Numbers<()>,
    rules: Numbers<Shares<RuleCounters>>,
    by_scope: HashMap<Scope, Arc<Ruleset>>,
    index: Arc<Index>,
    generation: u32,
    compiled: u64,
}

impl Rulebook {
    /// Without rules, for so many workers.
    pub fn new(workers: usize) -> Self {
        Self {
            workers,
            groups: Numbers::default(),
            rules: Numbers::default(),
            by_scope: HashMap::new(),
            index: Arc::default(),
            generation: 0,
            compiled: 0,
        }
    }

    /// Follows a document without mistakes.
    pub fn update(&mut self, document: &Document) {
        self.groups.keep(document.group.iter().map(|group| group.name.as_str()), || ());
        let names = document.rule.iter().map(|rule| rule.name.as_str());
        self.rules.keep(names, || Shares::new(self.workers, RuleCounters::default));
        let source = Source::new(self, document);
        let mut before = std::mem::take(&mut self.by_scope);
        let mut by_port = BTreeMap::new();
        for port in &document.port {
            let scope = source.scope(port);
            let ruleset = self.by_scope.get(&scope).cloned().unwrap_or_else(|| {
                let policy = source.policy(&scope);
                let kept = before.remove(&scope).filter(|ruleset| ruleset.policy == policy);
                let ruleset = kept.unwrap_or_else(|| {
                    self.compiled += 1;
                    let classifier = Arc::new(Classifier::compile(&policy, scope.posture, &scope.groups));
                    Arc::new(Ruleset { policy, classifier })
                });
                self.by_scope.insert(scope, Arc::clone(&ruleset));
                ruleset
            });
            by_port.insert(port.name.clone(), ruleset);
        }
        let old = &self.index.by_port;
        let same = by_port.len() == old.len()
            && by_port.iter().zip(old).all(|(new, old)| new.0 == old.0 && Arc::ptr_eq(new.1, old.1));
        if !same {
            self.generation = self.generation.wrapping_add(1);
        }
        let entry = |(name, number, counters): (&str, u32, &Shares<RuleCounters>)| {
            (RuleId(number), RuleEntry { name: name.to_owned(), counters: counters.clone() })
        };
        self.index = Arc::new(Index {
            by_port,
            rules: self.rules.iter().map(entry).collect(),
            rule_ids: self.rules.iter().map(|(name, number, _)| (name.to_owned(), RuleId(number))).collect(),
            groups: self.groups.iter().map(|(name, number, ())| (GroupId(number), name.to_owned())).collect(),
        });
    }

    /// What readers need.
    pub fn index(&self) -> &Arc<Index> {
        &self.index
    }

    /// What holds at a port of the document.
    pub fn of_port(&self, port: &str) -> Option<&Arc<Ruleset>> {
        self.index.by_port.get(port)
    }

    /// Changes whenever a port has another classifier than before.
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// Classifiers compiled so far.
    pub fn compiled(&self) -> u64 {
        self.compiled
    }

    /// What a worker counts at, by the rules' numbers. Numbers that rest share one that nobody reads.
    pub fn counters(&self, worker: WorkerId) -> Vec<Arc<RuleCounters>> {
        let Some((last, _)) = self.index.rules.last_key_value() else { return Vec::new() };
        let mut all = vec![Arc::default(); last.0 as usize + 1];
        for (id, entry) in &self.index.rules {
            all[id.0 as usize] = entry.counters.of(worker);
        }
        all
    }
}

/// A document, looked up by group.
struct Source<'a> {
    document: &'a Document,
    numbers: HashMap<&'a str, GroupId>,
    groups: HashMap<GroupId, &'a config::Group>,
    /// The rules of each group, with their places in the document.
    rules: HashMap<GroupId, Vec<(usize, Rule)>>,
    /// The groups that a group's rules name.
    named: HashMap<GroupId, BTreeSet<GroupId>>,
    /// Addresses of the ports in a group, by network.
    members: HashMap<(&'a str, GroupId), BTreeSet<IpAddr>>,
}

impl<'a> Source<'a> {
    fn new(book: &Rulebook, document: &'a Document) -> Self {
        let number = |name: &str| GroupId(book.groups.of(name));
        let mut rules: HashMap<_, Vec<_>> = HashMap::new();
        let mut named: HashMap<_, BTreeSet<_>> = HashMap::new();
        for (place, written) in document.rule.iter().enumerate() {
            let rule = rule(book, written);
            if let Remote::Group(group) = rule.remote {
                named.entry(rule.group).or_default().insert(group);
            }
            rules.entry(rule.group).or_default().push((place, rule));
        }
        let mut members: HashMap<_, BTreeSet<_>> = HashMap::new();
        for port in &document.port {
            for group in &port.groups {
                members.entry((port.network.as_str(), number(group))).or_default().extend(&port.addresses);
            }
        }
        let numbers = document.group.iter().map(|group| (group.name.as_str(), number(&group.name))).collect();
        let groups = document.group.iter().map(|group| (number(&group.name), group)).collect();
        Self { document, numbers, groups, rules, named, members }
    }

    fn scope(&self, port: &config::Port) -> Scope {
        let network = self.document.find_network(&port.network).expect("a validated document has every port's network");
        let mut groups: Vec<_> = port.groups.iter().map(|name| self.numbers[name.as_str()]).collect();
        groups.sort_unstable();
        let named: BTreeSet<_> = groups.iter().filter_map(|group| self.named.get(group)).flatten().collect();
        let mut members = Vec::new();
        for group in named {
            let addresses = self.members.get(&(network.name.as_str(), *group)).into_iter().flatten();
            members.extend(addresses.map(|address| (*group, *address)));
        }
        Scope { posture: network.policy, groups, members }
    }

    fn policy(&self, scope: &Scope) -> Policy {
        let mut rules: Vec<_> = scope.groups.iter().filter_map(|group| self.rules.get(group)).flatten().collect();
        rules.sort_by_key(|(place, _)| *place);
        let mut wanted: BTreeSet<_> = scope.groups.iter().copied().collect();
        wanted.extend(scope.groups.iter().filter_map(|group| self.named.get(group)).flatten());
        let mut groups = BTreeMap::new();
        let mut identities = Vec::new();
        for id in wanted {
            let written = self.groups[&id];
            groups.insert(id, written.prefixes.clone());
            identities.extend(written.id.map(|tag| Identity { tag, groups: vec![id] }));
        }
        for (group, address) in &scope.members {
            groups.entry(*group).or_default().push(Prefix::host(*address));
        }
        let groups = groups.into_iter().map(|(id, members)| Group { id, members }).collect();
        let rules = rules.into_iter().map(|(_, rule)| rule.clone()).collect();
        Policy::new(groups, rules, identities).expect("a validated document has no mistakes that a policy could have")
    }
}

fn rule(book: &Rulebook, written: &config::Rule) -> Rule {
    Rule {
        id: RuleId(book.rules.of(&written.name)),
        group: GroupId(book.groups.of(&written.group)),
        direction: written.direction,
        protocol: written.protocol,
        ports: written.ports.clone(),
        icmp: written.icmp.clone(),
        remote: match &written.remote {
            config::Remote::Any => Remote::Any,
            config::Remote::Prefix(prefix) => Remote::Prefix(*prefix),
            config::Remote::Group(group) => Remote::Group(GroupId(book.groups.of(group))),
        },
        action: written.action,
        priority: written.priority,
        log: written.log,
    }
}

#[cfg(test)]
#[path = "rulebook_tests.rs"]
mod tests;
