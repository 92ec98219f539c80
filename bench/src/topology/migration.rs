//! Live migration of a guest from one QEMU to another on this machine.

use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::{Guest, TopologyError, wait_until};

/// Bytes per second: as good as none on one machine.
const BANDWIDTH_BYTES: u64 = 1 << 30;

/// What a migration cost, as QEMU has it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MigrationReport {
    /// How long the guest stood still, in milliseconds.
    pub downtime_ms: u64,
    /// From the command to the end, in milliseconds.
    pub total_ms: u64,
    /// Bytes of memory that were sent.
    pub memory_bytes: u64,
    /// How often the dirty pages were gathered.
    pub rounds: u64,
    /// When the guest stopped at the source.
    pub stopped: SystemTime,
    /// When it went on at the destination.
    pub resumed: SystemTime,
}

impl Guest {
    /// Moves the guest to `destination`, which was started from the same specification with [`super::GuestSpec::incoming`],
    /// and returns when it runs there. What is left here stands still. Ask the guest through `destination` from then on.
    ///
    /// # Errors
    /// When the migration fails or takes longer than `limit`; the error has QEMU's reason.
    pub fn migrate_to(
        &self,
        destination: &Guest,
        downtime_max: Duration,
        limit: Duration,
    ) -> Result<MigrationReport, TopologyError> {
        let downtime_max_ms = u64::try_from(downtime_max.as_millis()).unwrap_or(u64::MAX);
        self.qmp(
            "migrate-set-parameters",
            json!({ "downtime-limit": downtime_max_ms, "max-bandwidth": BANDWIDTH_BYTES }),
        )?;
        let uri = format!("unix:{}", destination.migration_socket().display());
        self.take_qmp_events()?;
        self.qmp("migrate", json!({ "uri": uri }))?;
        let mut state = Value::Null;
        wait_until(limit, &format!("the migration of {}", self.name()), || {
            state = self.qmp("query-migrate", json!({})).unwrap_or_default();
            ["completed", "failed", "cancelled"].iter().any(|end| state["status"] == *end)
        })?;
        if state["status"] != "completed" {
            let reason = format!("ended as {}", state["error-desc"].as_str().unwrap_or("failed"));
            return Err(TopologyError::Qmp { command: "migrate".to_owned(), reason });
        }
        wait_until(limit, &format!("{} to run at its destination", self.name()), || {
            destination.qmp("query-status", json!({})).is_ok_and(|status| status["status"] == "running")
        })?;
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        Ok(MigrationReport {
            downtime_ms: number(&state["downtime"]),
            total_ms: number(&state["total-time"]),
            memory_bytes: number(&state["ram"]["transferred"]),
            rounds: number(&state["ram"]["dirty-sync-count"]),
            stopped: self.time_of("STOP")?,
            resumed: destination.time_of("RESUME")?,
        })
    }

    /// When QEMU sent the last event of that name, of those that nobody has taken yet.
    fn time_of(&self, event: &str) -> Result<SystemTime, TopologyError> {
        let events = self.take_qmp_events()?;
        let last = events.iter().rev().find(|one| one["event"] == event);
        let number = |unit: &str| last.and_then(|one| one["timestamp"][unit].as_u64());
        match (number("seconds"), number("microseconds")) {
            (Some(seconds), Some(micros)) => {
                Ok(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_micros(micros))
            }
            _ => Err(TopologyError::Qmp { command: "migrate".to_owned(), reason: format!("no event {event}") }),
        }
    }

    /// Begins a migration to `destination` that cannot come to its end, and breaks it off once `is_under_way`. The guest
    /// goes on here; QEMU ends at the destination.
    ///
    /// # Errors
    /// When it cannot be begun or broken off, or is not under way within `limit`.
    pub fn abort_migration_to(
        &self,
        destination: &Guest,
        limit: Duration,
        is_under_way: impl FnMut() -> bool,
    ) -> Result<(), TopologyError> {
        // 64 KiB/s: hours.
        self.qmp("migrate-set-parameters", json!({ "max-bandwidth": 64 << 10 }))?;
        let uri = format!("unix:{}", destination.migration_socket().display());
        self.qmp("migrate", json!({ "uri": uri }))?;
        wait_until(limit, &format!("the migration of {} to be under way", self.name()), is_under_way)?;
        self.qmp("migrate_cancel", json!({}))?;
        wait_until(limit, &format!("the migration of {} to be broken off", self.name()), || {
            self.qmp("query-migrate", json!({})).is_ok_and(|state| state["status"] == "cancelled")
        })?;
        self.qmp("migrate-set-parameters", json!({ "max-bandwidth": BANDWIDTH_BYTES })).map(drop)
    }

    /// Where it listens for its incoming migration.
    fn migration_socket(&self) -> PathBuf {
        self.directory().join(super::guest_spec::MIGRATION_SOCKET)
    }
}
