//! Frames under way, limited to what the receiver's buffers hold: a sender that outruns them measures how fast a device drops.
//!
//! Only for frames above [`LIMITED_BYTES`], which take several buffers each. Owned by a round; time comes in as `now`. What is
//! lost never arrives, so frames that nothing has been heard of for [`LOST_AFTER`] no longer count as under way.

use std::time::{Duration, Instant};

/// Longest frame that is sent without a limit, bytes: the usual MTU of jumbo frames.
pub(crate) const LIMITED_BYTES: usize = 9000;

/// A device takes some microseconds per frame; this long without one, after it has taken all, it has dropped the rest. Shorter
/// than a scheduler's time slice on a busy machine, at the price that a few frames too many may then be sent.
const LOST_AFTER: Duration = Duration::from_millis(2);

/// Sent minus arrived, in one round.
#[derive(Debug)]
pub(super) struct InFlight {
    most: u64,
    sent: u64,
    /// Arrived, or given up.
    settled: u64,
    arrived: u64,
    moved: Instant,
}

impl InFlight {
    /// `most` frames under way; at least one.
    pub(super) fn new(most: u16, now: Instant) -> Self {
        Self { most: u64::from(most.max(1)), sent: 0, settled: 0, arrived: 0, moved: now }
    }

    /// How many more may be sent.
    pub(super) fn room(&self) -> u16 {
        let room = self.most - (self.sent - self.settled);
        u16::try_from(room).expect("at most what `new` was given")
    }

    /// After a turn in which `sent` frames, at most [`Self::room`], went out. `arrived` have come since the round began;
    /// `all_taken` if the device has finished with everything that was sent.
    pub(super) fn turn(&mut self, sent: u16, arrived: u64, all_taken: bool, now: Instant) {
        self.sent += u64::from(sent);
        let fresh = arrived - self.arrived;
        if sent > 0 || fresh > 0 || !all_taken {
            self.moved = now;
        }
        self.arrived = arrived;
        // A frame that was given up may yet arrive.
        self.settled = (self.settled + fresh).min(self.sent);
        if now - self.moved > LOST_AFTER {
            self.settled = self.sent;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_arrives_makes_room() {
        let now = Instant::now();
        let mut in_flight = InFlight::new(4, now);
        assert_eq!(in_flight.room(), 4);
        in_flight.turn(4, 0, false, now);
        assert_eq!(in_flight.room(), 0);
        in_flight.turn(0, 3, true, now);
        assert_eq!(in_flight.room(), 3);
    }

    #[test]
    fn lost_frames_make_room_once_the_device_has_been_silent() {
        let now = Instant::now();
        let mut in_flight = InFlight::new(4, now);
        in_flight.turn(4, 0, true, now);
        in_flight.turn(0, 1, true, now);
        in_flight.turn(0, 1, true, now + LOST_AFTER);
        assert_eq!(in_flight.room(), 1);
        let later = now + 2 * LOST_AFTER;
        in_flight.turn(0, 1, true, later);
        assert_eq!(in_flight.room(), 4);
        // One was only late.
        in_flight.turn(2, 2, true, later);
        assert_eq!(in_flight.room(), 3);
    }

    #[test]
    fn a_device_that_still_holds_frames_has_lost_none() {
        let now = Instant::now();
        let mut in_flight = InFlight::new(1, now);
        in_flight.turn(1, 0, false, now);
        in_flight.turn(0, 0, false, now + 10 * LOST_AFTER);
        assert_eq!(in_flight.room(), 0);
    }
}
