//! What a port may use up, as desired state: connections, new ones a second, packets and bits.

use dreamwire_policy::MeterLimits;
use serde::Serialize;

/// What a port may use up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Limits {
    /// Connections at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub connections: Option<u32>,
    /// New connections per second, in each direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub new_flows: Option<Rate>,
    /// What the VM may send.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub egress: Option<Meter>,
    /// What the VM may be sent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ingress: Option<Meter>,
}

/// So many per second, and so many at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Rate {
    /// Per second.
    pub rate: u64,
    /// At once.
    pub burst: u64,
}

/// Packets and bits; a burst is there if its rate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Meter {
    /// Packets per second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pps: Option<u64>,
    /// Packets at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pps_burst: Option<u64>,
    /// Bits per second, of Ethernet frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps: Option<u64>,
    /// Bits at once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bps_burst: Option<u64>,
}

impl Meter {
    /// As the policy crate takes it; `None` lets everything pass.
    pub fn limits(meter: Option<Self>) -> MeterLimits {
        meter.map_or_else(MeterLimits::default, |meter| MeterLimits {
            packets: meter.pps.zip(meter.pps_burst),
            bits: meter.bps.zip(meter.bps_burst),
        })
    }
}
