//! Reads a port's limits.

use dreamwire_policy::bucket::RATE_MAX;

use super::fields::Fields;
use super::limits::{Limits, Meter, Rate};

/// Once all are in use, one port's table has 155 MB; its leases up to 134 MB for IPv4, 268 MB for IPv6.
const CONNECTIONS_MAX: i64 = 1 << 20;
/// Bits of the longest frame that a guest may hand over (64 KiB, its Ethernet header and tags): a smaller burst would never let it
/// pass.
const BITS_BURST_MIN: u64 = 8 * (65_536 + 22);
/// Packets at once that any rate lets pass, unless told otherwise: a burst of the worker, and of its neighbour.
const PACKETS_BURST_MIN: u64 = 64;
/// The default burst is what the rate gives in a tenth of a second.
const BURSTS_PER_SECOND: u64 = 10;

pub(super) fn limits(fields: &mut Fields<'_>) -> Limits {
    Limits {
        connections: fields
            .integer("connections", 1..=CONNECTIONS_MAX, "connections at once")
            .and_then(|connections| u32::try_from(connections).ok()),
        new_flows: new_flows(fields),
        egress: meter(fields, "egress"),
        ingress: meter(fields, "ingress"),
    }
}

fn new_flows(fields: &mut Fields<'_>) -> Option<Rate> {
    let [rate, burst] = numbers(fields, "new_flows", ["rate", "burst"])?;
    let Some(rate) = rate else {
        fields.mistake("new_flows", "rate is missing: write { rate = 1000 }, perhaps with a burst");
        return None;
    };
    Some(Rate { rate, burst: burst.unwrap_or(rate) })
}

fn meter(fields: &mut Fields<'_>, key: &'static str) -> Option<Meter> {
    let [pps, pps_burst, bps, bps_burst] = numbers(fields, key, ["pps", "pps_burst", "bps", "bps_burst"])?;
    if pps.is_none() && bps.is_none() || pps.is_none() && pps_burst.is_some() || bps.is_none() && bps_burst.is_some() {
        fields.mistake(
            key,
            "a rate is missing: write { pps = 100000 } or { bps = 1000000000 } or both; a burst needs its rate",
        );
    }
    if let Some(burst) = bps_burst.filter(|burst| *burst < BITS_BURST_MIN) {
        fields.mistake(key, format!("bps_burst {burst} never lets a frame of 64 KiB pass: {BITS_BURST_MIN} at least"));
    }
    let burst = |rate: Option<u64>, burst: Option<u64>, least: u64| {
        rate.map(|rate| burst.unwrap_or(least.max(rate / BURSTS_PER_SECOND)))
    };
    Some(Meter {
        pps,
        pps_burst: burst(pps, pps_burst, PACKETS_BURST_MIN),
        bps,
        bps_burst: burst(bps, bps_burst, BITS_BURST_MIN),
    })
}

fn numbers<const N: usize>(
    fields: &mut Fields<'_>,
    key: &'static str,
    names: [&'static str; N],
) -> Option<[Option<u64>; N]> {
    let values = fields.integer_table(key, names, 1..=RATE_MAX as i64)?;
    Some(values.map(|value| value.and_then(|value| u64::try_from(value).ok())))
}
