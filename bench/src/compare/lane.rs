//! A lane: one device under test and what it has to carry, as text: `ovs,size=1518,flows=1000,encap`.

use std::str::FromStr;

use serde::Serialize;

use crate::front_end::layout::RING_SIZE_MAX;
use crate::traffic::frame;

/// From where to where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    /// From one VM's port to another's.
    #[default]
    VmToVm,
    /// From a VM's port into a VXLAN tunnel.
    Encap,
    /// Out of a VXLAN tunnel to a VM's port.
    Decap,
}

/// When a frame's latency is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Load {
    /// At a tenth of the rate that was measured in the same round.
    Tenth,
    /// One at a time, when the device has had nothing to do for longer than it polls.
    Idle,
}

/// What is to be carried, and how.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Case {
    /// Frame length in the ring, bytes; above 1518 frames are TCP and to be segmented.
    pub size: usize,
    /// Flows.
    pub flows: usize,
    /// Descriptors per ring.
    pub ring: u16,
    /// Packed rings.
    pub packed: bool,
    /// The driver writes the descriptors of split rings anew, as those of Linux and DPDK do.
    pub rewrite: bool,
    /// From where to where.
    pub way: Way,
    /// Rules with connection tracking at both ports: what a VM sends is allowed, of what it is sent UDP to the flows' ports and
    /// replies.
    pub stateful: bool,
    /// Ports are held to their VMs' addresses, as those with rules are, but without rules.
    pub guard: bool,
    /// Rules of the receiver's group, of which only the last matches.
    pub rules: usize,
    /// Ports with a VM attached, the two busy ones included.
    pub ports: usize,
    /// Every frame is the first of its flow.
    pub new_flows: bool,
    /// Latency is measured besides the rate, or instead of it.
    pub latency: Option<Load>,
}

impl Default for Case {
    fn default() -> Self {
        Self {
            size: 64,
            flows: 1,
            ring: 256,
            packed: false,
            rewrite: false,
            way: Way::VmToVm,
            stateful: false,
            guard: false,
            rules: 1,
            ports: 2,
            new_flows: false,
            latency: None,
        }
    }
}

/// A device and its case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Lane {
    /// In tables: the text that it was made from, unless it has a `label=`.
    pub label: String,
    /// `testpmd` (or `io`), `ovs`, `kernel`, `dreamwire`, or a binary's name.
    pub device: String,
    /// What it carries.
    pub case: Case,
}

impl FromStr for Lane {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let device = words.next().filter(|device| !device.is_empty()).ok_or("no device")?.to_owned();
        let mut lane = Self { label: text.to_owned(), device, case: Case::default() };
        for word in words {
            let (key, value) = word.split_once('=').unwrap_or((word, ""));
            let number = || value.parse::<usize>().map_err(|_| format!("{word}: a number is missing"));
            let case = &mut lane.case;
            match key {
                "size" => case.size = number()?,
                "flows" => case.flows = number()?,
                "ring" => case.ring = u16::try_from(number()?).map_err(|_| format!("{word}: too many"))?,
                "ports" => case.ports = number()?,
                "packed" => case.packed = true,
                "rewrite" => case.rewrite = true,
                "encap" => case.way = Way::Encap,
                "decap" => case.way = Way::Decap,
                "stateful" => case.stateful = true,
                "guard" => case.guard = true,
                "rules" => (case.rules, case.stateful) = (number()?, true),
                "new-flows" => case.new_flows = true,
                "latency" => case.latency = Some(Load::Tenth),
                "wake-up" => case.latency = Some(Load::Idle),
                "label" => lane.label = value.to_owned(),
                _ => {
                    return Err(format!(
                        "{word}: neither size, flows, ring, ports, rules, packed, rewrite, encap, decap, stateful, guard, new-flows, \
                         latency, wake-up nor label"
                    ));
                }
            }
        }
        lane.case.check().map_err(|problem| format!("{text}: {problem}"))?;
        Ok(lane)
    }
}

impl Case {
    /// Whether frames are to be segmented.
    #[must_use]
    pub fn is_segmented(&self) -> bool {
        self.size > frame::FRAME_BYTES_MAX
    }

    fn check(&self) -> Result<(), String> {
        let sizes = frame::FRAME_BYTES_MIN..=frame::SEGMENTED_BYTES_MAX;
        let least = |name: &str, value: usize, least: usize, most: usize| {
            let fits = (least..=most).contains(&value);
            if fits { Ok(()) } else { Err(format!("{name} {value}: {least} to {most}")) }
        };
        least("size", self.size, *sizes.start(), *sizes.end())?;
        least("flows", self.flows, 1, frame::FLOWS_MAX)?;
        least("ports", self.ports, 2, PORTS_MAX)?;
        least("rules", self.rules, 1, RULES_MAX)?;
        if !self.ring.is_power_of_two() || !(2..=RING_SIZE_MAX).contains(&self.ring) {
            return Err(format!("ring {}: a power of two up to {RING_SIZE_MAX}", self.ring));
        }
        if self.rewrite && self.packed {
            return Err("descriptors of packed rings are written anew as it is".into());
        }
        if self.latency.is_some() && self.new_flows {
            return Err("latency is that of flows that are known".into());
        }
        if self.guard && self.new_flows {
            return Err("new flows come from addresses that a source guard would not let out".into());
        }
        if self.latency == Some(Load::Idle) && (self.way != Way::VmToVm || self.is_segmented()) {
            return Err("wake-up is measured with whole frames from VM to VM".into());
        }
        if self.is_segmented() && (self.flows > 1 || self.way != Way::VmToVm || self.new_flows) {
            return Err("frames to be segmented go from VM to VM in one flow".into());
        }
        Ok(())
    }
}

/// Ports at most: each attached VM takes eight descriptors of this process.
const PORTS_MAX: usize = 1024;
/// Rules at most: addresses that they name.
const RULES_MAX: usize = 65_536;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_becomes_a_lane() {
        let lane: Lane = "ovs,size=1518,flows=1000,encap,packed,ring=1024,label=OVS".parse().unwrap();
        let case = Case { size: 1518, flows: 1000, ring: 1024, packed: true, way: Way::Encap, ..Case::default() };
        assert_eq!(lane, Lane { label: "OVS".into(), device: "ovs".into(), case });
        assert_eq!("io".parse::<Lane>().unwrap().case, Case::default());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for text in [
            "",
            "io,size",
            "io,size=59",
            "io,flow=1",
            "io,ring=100",
            "io,size=65000,encap",
            "io,ports=1",
            "io,flows=0",
            "io,rules=0",
            "io,latency,new-flows",
            "io,guard,new-flows",
            "io,packed,rewrite",
            "io,wake-up,encap",
        ] {
            assert!(text.parse::<Lane>().is_err(), "{text}");
        }
    }
}
