//! Rules that let everything pass, and are asked all the same.

use std::sync::Arc;

use dreamwire_datapath::perimeter::{Perimeter, PerimeterLimits};
use dreamwire_datapath::snapshot::PortPolicy;
use dreamwire_policy::{
    Action, Classifier, ConntrackLimits, Direction, Group, GroupId, Policy, Posture, Protocol, Remote, Rule, RuleId,
};

use super::Lan;

/// All stations under rules that let everything pass, with room for so many connections each.
pub(crate) fn with_policy(lan: &mut Lan, connections: u32) {
    let group = GroupId(1);
    let rule = |id, direction| Rule {
        id: RuleId(id),
        group,
        direction,
        protocol: Protocol::Any,
        ports: vec![],
        icmp: vec![],
        remote: Remote::Any,
        action: Action::Allow,
        priority: 1,
        log: false,
    };
    let rules = vec![rule(0, Direction::Ingress), rule(1, Direction::Egress)];
    let policy = Policy::new(vec![Group { id: group, members: vec![] }], rules, vec![]).expect("a sound policy");
    let classifier = Arc::new(Classifier::compile(&policy, Posture::Enforced, &[group]));
    let conntrack = ConntrackLimits { connections, ..ConntrackLimits::default() };
    for port in lan.snapshot.ports.iter_mut().flatten() {
        port.policy = Some(PortPolicy { classifier: Arc::clone(&classifier), meters: Default::default() });
    }
    for station in &lan.stations {
        lan.worker.guard(station.id, Some(Box::new(Perimeter::new(PerimeterLimits { conntrack }, 7))));
    }
    lan.snapshot.has_policies = true;
    lan.publish();
}
