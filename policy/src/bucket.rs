//! Token buckets: packets and bits per second with a burst, and new flows per second.
//!
//! Owned by a port. No clock: `now_ns` comes in, and may stand still; where it goes back, less passes. Rates up to
//! [`RATE_MAX`].
//!
//! Kept as the virtual scheduling form of the bucket (GCRA, ITU-T I.371): not tokens, but the time at which the bucket will be
//! full again. One multiplication per packet, no division, and nothing is lost to rounding.

/// Highest rate in units per second.
pub const RATE_MAX: u64 = 1_000_000_000_000;

const SECOND_NS: u64 = 1_000_000_000;

/// Bits behind the point of a time, so that a bit at 1 Tb/s still takes four million of them.
const FRACTION: u32 = 32;

/// Lets `rate` units per second pass, and `burst` at once.
#[derive(Debug, Clone, Copy)]
pub struct TokenBucket {
    /// Time that one unit takes to earn, in ns with a fraction.
    unit_time: u64,
    /// Time that a whole burst takes to earn.
    burst_time: u128,
    /// When the bucket is full again.
    full_at: u128,
}

impl TokenBucket {
    /// A full bucket. Neither may be more than [`RATE_MAX`]; they are cut down to it. A rate or burst of 0 lets nothing pass.
    #[must_use]
    pub fn new(rate: u64, burst: u64) -> Self {
        let second = u128::from(SECOND_NS) << FRACTION;
        let unit_time = second.div_ceil(u128::from(rate.clamp(1, RATE_MAX))) as u64;
        let burst = if rate == 0 { 0 } else { burst.min(RATE_MAX) };
        Self { unit_time, burst_time: u128::from(burst) * u128::from(unit_time), full_at: 0 }
    }

    /// Takes `units` if they are there.
    #[inline]
    pub fn take(&mut self, units: u64, now_ns: u64) -> bool {
        let full_at = self.full_after(units, now_ns);
        let there = full_at.is_some();
        self.full_at = full_at.unwrap_or(self.full_at);
        there
    }

    /// Whether `units` are there, without taking them.
    #[inline]
    #[must_use]
    pub fn has(&self, units: u64, now_ns: u64) -> bool {
        self.full_after(units, now_ns).is_some()
    }

    #[inline]
    fn full_after(&self, units: u64, now_ns: u64) -> Option<u128> {
        let now = u128::from(now_ns) << FRACTION;
        let full_at = self.full_at.max(now) + u128::from(units) * u128::from(self.unit_time);
        (full_at - now <= self.burst_time).then_some(full_at)
    }
}

/// What a port may send or receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MeterLimits {
    /// Packets per second and at once.
    pub packets: Option<(u64, u64)>,
    /// Bits per second and at once.
    pub bits: Option<(u64, u64)>,
}

/// Meters one direction of a port. A packet passes if both buckets have room for it, and then takes from both.
#[derive(Debug, Clone, Copy, Default)]
pub struct Meter {
    packets: Option<TokenBucket>,
    bits: Option<TokenBucket>,
}

impl Meter {
    /// Full buckets.
    #[must_use]
    pub fn new(limits: MeterLimits) -> Self {
        let bucket = |limit: Option<(u64, u64)>| limit.map(|(rate, burst)| TokenBucket::new(rate, burst));
        Self { packets: bucket(limits.packets), bits: bucket(limits.bits) }
    }

    /// Whether one frame of this length passes.
    #[inline]
    pub fn pass(&mut self, frame_bytes: u32, now_ns: u64) -> bool {
        let bits = u64::from(frame_bytes) * 8;
        let has_bits = self.bits.as_ref().is_none_or(|bucket| bucket.has(bits, now_ns));
        // A frame that fails on one bucket takes nothing from the other.
        has_bits
            && self.packets.as_mut().is_none_or(|bucket| bucket.take(1, now_ns))
            && self.bits.as_mut().is_none_or(|bucket| bucket.take(bits, now_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn passed(bucket: &mut TokenBucket, asks: u64, step_ns: u64) -> u64 {
        (1..=asks).filter(|ask| bucket.take(1, ask * step_ns)).count() as u64
    }

    #[test]
    fn the_rate_holds_in_the_long_run_and_the_burst_at_once() {
        let mut bucket = TokenBucket::new(1000, 50);
        assert_eq!((0..200).filter(|_| bucket.take(1, 0)).count(), 50);
        // 10 s, asked 100,000 times a second.
        assert_eq!(passed(&mut bucket, 1_000_000, 10_000), 10_000);
        // A pause earns no more than a burst.
        let late = 3600 * SECOND_NS;
        assert_eq!((0..200).filter(|_| bucket.take(1, late)).count(), 50);
    }

    #[test]
    fn odd_rates_lose_nothing_to_rounding() {
        for rate in [1, 3, 7, 999, 333_333, 10_000_000] {
            // Room for what is earned between two asks.
            let mut bucket = TokenBucket::new(rate, 2);
            assert!(bucket.take(2, 0));
            let seconds = if rate > 1000 { 1 } else { 20 };
            let step_ns = (SECOND_NS / rate / 4).max(1);
            let passed = passed(&mut bucket, seconds * SECOND_NS / step_ns, step_ns);
            let expected = rate * seconds;
            assert!(passed == expected || passed + 1 == expected, "{rate}/s: {passed} of {expected}");
        }
    }

    #[test]
    fn a_full_bucket_gives_one_burst_however_long_it_waited() {
        let mut bucket = TokenBucket::new(1000, 50);
        let late = 3600 * SECOND_NS + 1;
        assert_eq!((0..200).filter(|_| bucket.take(1, late)).count(), 50);
        let mut half = TokenBucket::new(10, 10);
        assert!(half.take(5, SECOND_NS));
        assert_eq!((0..20).filter(|_| half.take(1, SECOND_NS * 3 / 2)).count(), 10);
    }

    #[test]
    fn time_that_stands_still_or_jumps_gives_nothing_away() {
        let mut bucket = TokenBucket::new(RATE_MAX, RATE_MAX);
        assert!(bucket.take(RATE_MAX, u64::MAX));
        assert!(!bucket.take(1, u64::MAX));
        assert!(!bucket.take(1, 0));
        assert!(!TokenBucket::new(1000, 0).take(1, u64::MAX));
        assert!(!TokenBucket::new(0, 1000).take(1, u64::MAX));
        assert!(!TokenBucket::new(1, 1).take(u64::MAX, u64::MAX));
    }

    #[test]
    fn a_meter_holds_packets_and_bits_and_charges_both_or_none() {
        let mut meter = Meter::new(MeterLimits { packets: Some((10, 10)), bits: Some((8000, 8000)) });
        assert!(meter.pass(1000, 0), "1,000 bytes are 8,000 bits");
        assert!(!meter.pass(64, 0), "no bits left");
        assert_eq!((0..20).filter(|_| meter.pass(0, 0)).count(), 9, "the refused frame took no packet");
        assert!(Meter::default().pass(u32::MAX, 0));
    }
}
