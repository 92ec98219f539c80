//! The rules of one direction, compiled: remote address -> layers -> first rule for protocol and port.
//!
//! A *row* holds the rules of a set of remotes, as one table of intervals per protocol. Where prefixes nest, an address
//! matches the remotes of every prefix around it; it has a *layer* (a row) for each, or, while that stays small, one row
//! that has them merged. The best rank of a row and protocol is kept beside it, so layers that cannot win are not looked
//! into. Rows and lists of layers are stored once however many prefixes use them, so memory grows with the rules and
//! the members of the groups that they name, not with their product.
//!
//! Built once, then immutable; part of a classifier.

use std::collections::{BTreeMap, HashMap};

use crate::intervals::{Intervals, NONE, Ranged, Table};
use crate::key::{Family, ICMP, ICMPV6};
use crate::lpm::{Bits, Lpm};
use crate::model::{GroupId, Policy, Prefix, Protocol, Remote, Rule, mask};

/// A layer is merged with the one around it while both together have at most this many port ranges ...
const MERGED_RANGES_MAX: usize = 64;
/// ... and all merged rows of a direction at most this many: 6 bytes each, twice.
const MERGED_BUDGET: usize = 1 << 19;

/// Protocols that rules name, as small numbers. Slot 0 is every other protocol, and frames that are not IP.
#[derive(Debug)]
pub(crate) struct Slots {
    by_number: [[u16; 256]; 2],
    /// What each slot stands for.
    kinds: Vec<Option<(Family, u8)>>,
}

impl Slots {
    pub(crate) fn new<'a>(rules: impl Iterator<Item = &'a Rule>) -> Self {
        let mut slots = Self { by_number: [[0; 256]; 2], kinds: vec![None] };
        for number in rules.filter_map(|rule| rule.protocol.number()) {
            let place = usize::from(number);
            if slots.by_number[0][place] != 0 {
                continue;
            }
            // ICMP is a protocol of one family, its number one of both.
            let both = !matches!(number, ICMP | ICMPV6);
            for family in [Family::V4, Family::V6] {
                if family == Family::V4 || !both {
                    slots.kinds.push(Some((family, number)));
                }
                slots.by_number[family as usize][place] = slots.kinds.len() as u16 - 1;
            }
        }
        slots
    }

    #[inline]
    pub(crate) fn of(&self, family: Family, protocol: u8) -> u16 {
        self.by_number[family as usize][usize::from(protocol)]
    }
}

/// Where a direction's rules are looked up.
#[derive(Debug, Default)]
pub(crate) struct Rows {
    slots: usize,
    /// `row * slots + slot`.
    tables: Vec<Table>,
    intervals: Intervals,
    /// Sets of layers, each how many and then their rows. One is named by where it begins.
    sets: Vec<u32>,
    /// The set of everybody: the rules for remote `any`.
    everybody: u32,
    /// Sets of an address, groups included.
    members: Lpms,
    /// The same without groups, for remotes whose groups are known otherwise. `None`: no rule names a group.
    prefixes: Option<Lpms>,
    identities: HashMap<u16, u32>,
}

/// One for each family.
#[derive(Debug, Default)]
struct Lpms {
    v4: Lpm<u32>,
    v6: Lpm<u128>,
}

impl Lpms {
    #[inline]
    fn lookup(&self, family: Family, address: u128) -> u32 {
        match family {
            Family::V4 => self.v4.lookup(family.align(address)),
            Family::V6 => self.v6.lookup(family.align(address)),
        }
    }

    fn bytes(&self) -> usize {
        self.v4.bytes() + self.v6.bytes()
    }
}

/// What is looked up: slot, destination port (or ICMP type and code), and the remote.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Question {
    pub(crate) slot: u16,
    pub(crate) port: u16,
    /// `None` for a frame that is not IP.
    pub(crate) remote: Option<(Family, u128)>,
    pub(crate) identity: Option<u16>,
}

impl Rows {
    /// Compiles `rules`, each with its rank.
    pub(crate) fn compile(policy: &Policy, slots: &Slots, rules: &[(u32, &Rule)]) -> Self {
        Builder::new(policy, slots, rules).build()
    }

    /// The best rank that matches, or [`NONE`].
    #[inline]
    pub(crate) fn lookup(&self, question: Question) -> u32 {
        let lpms = match (question.identity, &self.prefixes) {
            (Some(_), Some(prefixes)) => prefixes,
            _ => &self.members,
        };
        let set = match question.remote {
            Some((family, address)) => lpms.lookup(family, address),
            None => self.everybody,
        };
        let (count, rows) = self.sets[set as usize..].split_first().expect("a set begins there");
        let mut best = NONE;
        for &row in &rows[..*count as usize] {
            best = self.better(best, row, question);
        }
        if let Some(&row) = question.identity.and_then(|tag| self.identities.get(&tag)) {
            best = self.better(best, row, question);
        }
        best
    }

    #[inline]
    fn better(&self, best: u32, row: u32, question: Question) -> u32 {
        let table = self.tables[row as usize * self.slots + usize::from(question.slot)];
        match table.best < best {
            true => best.min(self.intervals.find(table, question.port)),
            false => best,
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        let lpms = self.members.bytes() + self.prefixes.as_ref().map_or(0, Lpms::bytes);
        self.tables.len() * size_of::<Table>() + self.intervals.bytes() + self.sets.len() * size_of::<u32>() + lpms
    }
}

/// A distinct remote, by its place in [`Builder::specs`].
type SpecId = u32;

struct Builder<'a> {
    policy: &'a Policy,
    slots: &'a Slots,
    rules: HashMap<u32, &'a Rule>,
    /// Ranks of the rules for each distinct remote. The first is `any`.
    specs: Vec<Vec<u32>>,
    by_remote: HashMap<Remote, SpecId>,
    /// Specs of a row, and how many ranges they have.
    rows: Vec<(Vec<SpecId>, usize)>,
    by_specs: HashMap<Vec<SpecId>, u32>,
    by_layers: HashMap<Vec<u32>, u32>,
    merged: usize,
    out: Rows,
}

impl<'a> Builder<'a> {
    fn new(policy: &'a Policy, slots: &'a Slots, rules: &[(u32, &'a Rule)]) -> Self {
        let mut builder = Self {
            policy,
            slots,
            rules: rules.iter().copied().collect(),
            specs: vec![vec![]],
            by_remote: HashMap::from([(Remote::Any, 0)]),
            rows: vec![],
            by_specs: HashMap::new(),
            by_layers: HashMap::new(),
            merged: 0,
            out: Rows { slots: slots.kinds.len(), ..Rows::default() },
        };
        for (rank, rule) in rules {
            let next = builder.specs.len() as SpecId;
            let spec = *builder.by_remote.entry(rule.remote).or_insert(next);
            if spec == next {
                builder.specs.push(vec![]);
            }
            builder.specs[spec as usize].push(*rank);
        }
        builder
    }

    fn build(mut self) -> Rows {
        let everybody = match self.specs[0].is_empty() {
            true => vec![],
            false => vec![self.row(vec![0])],
        };
        self.out.everybody = self.set(&everybody);
        let mut prefixes = BTreeMap::new();
        for (remote, &spec) in &self.by_remote {
            if let Remote::Prefix(prefix) = remote {
                add(&mut prefixes, *prefix, spec);
            }
        }
        let mut members = prefixes.clone();
        let mut names_groups = false;
        for group in self.policy.groups() {
            if let Some(&spec) = self.by_remote.get(&Remote::Group(group.id)) {
                names_groups = true;
                group.members.iter().for_each(|&prefix| add(&mut members, prefix, spec));
            }
        }
        self.out.members = self.lpms(&members, &everybody);
        if names_groups {
            self.out.prefixes = Some(self.lpms(&prefixes, &everybody));
            self.identities();
        }
        self.out.intervals.shrink();
        self.out
    }

    fn identities(&mut self) {
        for identity in self.policy.identities() {
            let spec = |group: &GroupId| self.by_remote.get(&Remote::Group(*group)).copied();
            let mut specs: Vec<SpecId> = identity.groups.iter().filter_map(spec).collect();
            specs.sort_unstable();
            specs.dedup();
            if !specs.is_empty() {
                let row = self.row(specs);
                self.out.identities.insert(identity.tag, row);
            }
        }
    }

    fn lpms(&mut self, nodes: &Nodes, everybody: &[u32]) -> Lpms {
        Lpms { v4: self.lpm(nodes, Family::V4, everybody), v6: self.lpm(nodes, Family::V6, everybody) }
    }

    /// Walks the prefixes of one family from the outside in, and gives each its layers.
    fn lpm<B: Bits>(&mut self, nodes: &Nodes, family: Family, everybody: &[u32]) -> Lpm<B> {
        let mut around: Vec<(u128, u8, Vec<u32>)> = vec![(0, 0, everybody.to_vec())];
        let mut values = Vec::new();
        for (&(_, bits, length), specs) in nodes.range((family as u8, 0, 0)..=(family as u8, u128::MAX, u8::MAX)) {
            while around.len() > 1
                && around.last().is_some_and(|(outer, outer_length, _)| bits & mask(*outer_length) != *outer)
            {
                around.pop();
            }
            let outer = around.last().map(|node| node.2.clone()).unwrap_or_default();
            let layers = self.layers(outer, specs.clone());
            values.push((bits, length, self.set(&layers)));
            around.push((bits, length, layers));
        }
        Lpm::build(self.out.everybody, &values)
    }

    /// The layers inside a prefix: those around it and its own, merged if that is small.
    fn layers(&mut self, mut outer: Vec<u32>, mut specs: Vec<SpecId>) -> Vec<u32> {
        specs.sort_unstable();
        specs.dedup();
        let own: usize = specs.iter().map(|&spec| self.ranges(spec)).sum();
        if let Some(&last) = outer.last() {
            let (around, ranges) = &self.rows[last as usize];
            let total = own + ranges;
            if total <= MERGED_RANGES_MAX && self.merged + total <= MERGED_BUDGET {
                specs.extend(around);
                specs.sort_unstable();
                specs.dedup();
                if !self.by_specs.contains_key(&specs) {
                    self.merged += total;
                }
                outer.pop();
            }
        }
        outer.push(self.row(specs));
        outer
    }

    fn ranges(&self, spec: SpecId) -> usize {
        let ranges = |rank: &u32| self.rules[rank].ports.len().max(self.rules[rank].icmp.len()).max(1);
        self.specs[spec as usize].iter().map(ranges).sum()
    }

    fn set(&mut self, layers: &[u32]) -> u32 {
        if let Some(&set) = self.by_layers.get(layers) {
            return set;
        }
        let set = self.out.sets.len() as u32;
        self.out.sets.push(layers.len() as u32);
        self.out.sets.extend(layers);
        self.by_layers.insert(layers.to_vec(), set);
        set
    }

    fn row(&mut self, specs: Vec<SpecId>) -> u32 {
        if let Some(&row) = self.by_specs.get(&specs) {
            return row;
        }
        let row = self.rows.len() as u32;
        let mut ranged: Vec<Vec<Ranged>> = vec![vec![]; self.slots.kinds.len()];
        for &spec in &specs {
            for &rank in &self.specs[spec as usize] {
                let rule = self.rules[&rank];
                for (slot, kind) in self.slots.kinds.iter().enumerate() {
                    if in_slot(rule.protocol, *kind) {
                        push_ranges(&mut ranged[slot], rule, rank);
                    }
                }
            }
        }
        for ranged in &ranged {
            let table = self.out.intervals.add(ranged);
            self.out.tables.push(table);
        }
        let ranges = specs.iter().map(|&spec| self.ranges(spec)).sum();
        self.rows.push((specs.clone(), ranges));
        self.by_specs.insert(specs, row);
        row
    }
}

/// By family, first bits and length: outer prefixes before inner ones.
type Nodes = BTreeMap<(u8, u128, u8), Vec<SpecId>>;

fn add(nodes: &mut Nodes, prefix: Prefix, spec: SpecId) {
    let family = Family::of(prefix.address());
    nodes.entry((family as u8, family.aligned(prefix.address()), prefix.length())).or_default().push(spec);
}

fn in_slot(protocol: Protocol, slot: Option<(Family, u8)>) -> bool {
    match (protocol, slot) {
        (Protocol::Any, _) => true,
        (_, None) => false,
        (Protocol::Icmp, Some((family, number))) => (family, number) == (Family::V4, ICMP),
        (Protocol::Icmpv6, Some((family, number))) => (family, number) == (Family::V6, ICMPV6),
        (protocol, Some((_, number))) => protocol.number() == Some(number),
    }
}

fn push_ranges(ranged: &mut Vec<Ranged>, rule: &Rule, rank: u32) {
    if rule.ports.is_empty() && rule.icmp.is_empty() {
        ranged.push((0, u16::MAX, rank));
    }
    ranged.extend(rule.ports.iter().map(|range| (range.first, range.last, rank)));
    ranged.extend(rule.icmp.iter().map(|kind| {
        let first = u16::from(kind.kind) << 8;
        match kind.code {
            Some(code) => (first | u16::from(code), first | u16::from(code), rank),
            None => (first, first | 0xff, rank),
        }
    }));
}

impl std::fmt::Display for Rows {
    /// Sizes, for people.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let rows = self.tables.len() / self.slots.max(1);
        write!(f, "{rows} rows, {} intervals, {} bytes", self.intervals.count(), self.bytes())
    }
}
