//! Traffic between two innocent ports while others misbehave: a steady rate, every frame compared, none lost.
//!
//! One thread sends and receives. It never has more frames under way than the receiver has buffers, so that a machine
//! too busy to run it costs rate, never frames: whatever is missing, the target has lost.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::Failure;
use crate::front_end::{FrontEnd, Options};

/// Frames a second.
pub const RATE: u64 = 10_000;
/// Between two looks.
const TICK: Duration = Duration::from_millis(1);
/// Frames under way at most; the rings have 256 entries.
const CREDIT: u64 = 128;
/// Bytes of a frame.
const FRAME_BYTES: usize = 200;
/// How long the last frames may take at the end.
const END: Duration = Duration::from_secs(5);

/// What it has seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Testimony {
    /// Frames sent.
    pub sent: u64,
    /// Frames received, whole and in order.
    pub received: u64,
    /// Frames received that were not the next one.
    pub wrong: u64,
    /// The longest that nothing arrived although something was under way.
    pub gap: Duration,
    /// From start to end.
    pub lasted: Duration,
    /// The target broke a ring, or closed a connection.
    pub failure: Option<String>,
}

impl Testimony {
    /// Frames a second.
    pub fn rate(&self) -> u64 {
        (self.received as f64 / self.lasted.as_secs_f64().max(1e-3)) as u64
    }

    /// Whether everything arrived.
    pub fn is_clean(&self) -> bool {
        self.received == self.sent && self.wrong == 0 && self.failure.is_none()
    }
}

/// The thread. Dropping it ends it.
#[derive(Debug)]
pub struct Witness {
    stop: Arc<AtomicBool>,
    received: Arc<AtomicU64>,
    thread: Option<JoinHandle<Testimony>>,
}

impl Witness {
    /// Connects to both sockets and starts.
    ///
    /// # Errors
    /// When a port does not take a front-end.
    pub fn start(from: &Path, to: &Path) -> Result<Self, Failure> {
        let options = Options { timeout: Duration::from_secs(15), ..Options::default() };
        let (mut from, mut to) = (FrontEnd::connect(from, options.clone())?, FrontEnd::connect(to, options)?);
        warm_up(&mut from, &mut to)?;
        let (stop, received) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = thread::spawn({
            let (stop, received) = (stop.clone(), received.clone());
            move || carry(from, to, &stop, &received)
        });
        Ok(Self { stop, received, thread: Some(thread) })
    }

    /// Frames received so far.
    pub fn received(&self) -> u64 {
        // Relaxed: a number to look at.
        self.received.load(Ordering::Relaxed)
    }

    /// Whether a frame more arrives within `patience`.
    pub fn goes_on(&self, patience: Duration) -> bool {
        let (before, deadline) = (self.received(), Instant::now() + patience);
        while self.received() == before {
            if Instant::now() > deadline {
                return false;
            }
            thread::sleep(TICK);
        }
        true
    }

    /// Ends it; waits for the last frames.
    ///
    /// # Panics
    /// If its thread has.
    pub fn end(mut self) -> Testimony {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("ended once").join().expect("the witness does not panic")
    }
}

impl Drop for Witness {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Until a frame arrives, and nothing more of what was sent: some targets open a port later than they say.
fn warm_up(from: &mut FrontEnd, to: &mut FrontEnd) -> Result<(), Failure> {
    let deadline = Instant::now() + Duration::from_secs(15);
    let mut quiet_since = None;
    while quiet_since.is_none_or(|since: Instant| since.elapsed() < Duration::from_millis(100)) {
        if Instant::now() > deadline {
            return Err(Failure::Wrong("nothing is forwarded between the witness's ports".into()));
        }
        if quiet_since.is_none() {
            from.send_burst(&[&numbered(u64::MAX)])?;
        }
        thread::sleep(TICK);
        let count = to.receive_burst(|_, _| ()).map_err(crate::front_end::FrontEndError::from)?;
        if count > 0 {
            quiet_since = Some(Instant::now());
        }
    }
    Ok(())
}

fn numbered(number: u64) -> [u8; FRAME_BYTES] {
    let mut frame = [number.wrapping_mul(31) as u8; FRAME_BYTES];
    frame[..6].copy_from_slice(&[0x52, 0x54, 0, 0x90, 0x0d, 2]);
    frame[6..12].copy_from_slice(&[0x52, 0x54, 0, 0x90, 0x0d, 1]);
    frame[12..14].copy_from_slice(&[0x88, 0xb5]);
    frame[14..22].copy_from_slice(&number.to_le_bytes());
    frame
}

fn carry(mut from: FrontEnd, mut to: FrontEnd, stop: &AtomicBool, received: &AtomicU64) -> Testimony {
    let mut seen = Testimony::default();
    let start = Instant::now();
    let mut last_arrival = start;
    let mut end_by = None;
    loop {
        // Relaxed: it is seen a tick later at worst.
        if stop.load(Ordering::Relaxed) && end_by.is_none() {
            end_by = Some(Instant::now() + END);
        }
        let step =
            |seen: &mut Testimony, from: &mut FrontEnd, to: &mut FrontEnd| -> Result<usize, Failure> {
                if end_by.is_none() {
                    let due = start.elapsed().as_micros() as u64 * RATE / 1_000_000;
                    // After a pause of the machine: no burst to catch up with.
                    let count = due.saturating_sub(seen.sent).min(2 * RATE / 1000);
                    let count = count.min(CREDIT.saturating_sub(seen.sent - seen.received));
                    let frames: Vec<_> = (seen.sent..seen.sent + count).map(numbered).collect();
                    let frames: Vec<&[u8]> = frames.iter().map(|frame| &frame[..]).collect();
                    seen.sent += from.send_burst(&frames)? as u64;
                }
                let count = to.receive_burst(|frame, _| {
                    if frame == numbered(seen.received) { seen.received += 1 } else { seen.wrong += 1 }
                });
                Ok(count.map_err(crate::front_end::FrontEndError::from)?)
            };
        match step(&mut seen, &mut from, &mut to) {
            Ok(count) => {
                let now = Instant::now();
                if count > 0 || seen.received == seen.sent {
                    last_arrival = now;
                }
                seen.gap = seen.gap.max(now - last_arrival);
            }
            Err(failure) => {
                seen.failure = Some(failure.to_string());
                break;
            }
        }
        received.store(seen.received, Ordering::Relaxed);
        if end_by.is_some_and(|end_by| seen.received == seen.sent || Instant::now() > end_by) {
            break;
        }
        thread::sleep(TICK);
    }
    seen.lasted = start.elapsed();
    seen
}
