//! What a guest does in the background for a test: keep frames as they arrive, send probes at a steady rate.

use std::time::Duration;

use super::agent_client::SLACK;
use super::agent_protocol::{Reply, Request};
use super::{Frame, FrameDigest, FrameFilter, Guest, ProbeReport, TopologyError};

/// Frames that a guest keeps as they arrive; the newest are lost when 8 MiB of them wait.
#[derive(Debug)]
pub struct Capture<'a> {
    pub(super) guest: &'a Guest,
    pub(super) number: u64,
}

impl Capture<'_> {
    /// Takes frames that match until there are `count` or `limit` has passed; others are thrown away on the way.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn frames(&self, filter: &FrameFilter, count: usize, limit: Duration) -> Result<Vec<Frame>, TopologyError> {
        match self.take(filter, count, limit, false)? {
            Reply::Frames { frames } => Ok(frames),
            other => Err(self.guest.agent().unexpected(&other)),
        }
    }

    /// As [`Self::frames`], but only lengths and hashes, for long lists.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn digests(
        &self,
        filter: &FrameFilter,
        count: usize,
        limit: Duration,
    ) -> Result<Vec<FrameDigest>, TopologyError> {
        match self.take(filter, count, limit, true)? {
            Reply::Digests { digests } => Ok(digests),
            other => Err(self.guest.agent().unexpected(&other)),
        }
    }

    fn take(
        &self,
        filter: &FrameFilter,
        count: usize,
        limit: Duration,
        digests_only: bool,
    ) -> Result<Reply, TopologyError> {
        let request = Request::CaptureTake {
            capture: self.number,
            filter: filter.clone(),
            count,
            limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            digests_only,
        };
        self.guest.agent().ask(request, limit + SLACK)
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        let request = Request::CaptureStop { capture: self.number };
        // A guest that rebooted has forgotten it already.
        let _ = self.guest.done(request, Duration::from_secs(1));
    }
}

/// A stream of probes that runs in a guest.
#[derive(Debug)]
pub struct RunningProbe<'a> {
    pub(super) guest: &'a Guest,
    pub(super) number: u64,
}

impl RunningProbe<'_> {
    /// Stops it and gives what it saw.
    ///
    /// # Errors
    /// When the guest does not answer or has rebooted meanwhile.
    pub fn stop(self) -> Result<ProbeReport, TopologyError> {
        let request = Request::ProbeStop { probe: self.number };
        match self.guest.agent().ask(request, SLACK)? {
            Reply::Probed(report) => Ok(report),
            other => Err(self.guest.agent().unexpected(&other)),
        }
    }
}
