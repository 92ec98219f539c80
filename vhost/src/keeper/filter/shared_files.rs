//! The messages about files that are shared beside guest memory: the dirty log and the in-flight region.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::action::{Action, unsealed};
use super::{Actions, Fault, Filter, wrong_length};
use crate::dirty_log::DirtyLog;
use crate::inflight::Inflight;
use crate::keeper::inflight::{self, InflightRange};
use crate::keeper::message::{self, request as req};
use crate::keeper::offer::protocol;
use crate::keeper::vet::{self, Shrink};
use crate::owner::SessionEvent;
use crate::session::Logging;

impl Filter {
    /// LOG_ALL comes when a migration begins, after SET_LOG_BASE, and goes when it has ended one way or the other. With
    /// it goes the log: nothing is mapped or paid for once there is no migration.
    pub(super) fn set_log_all(&mut self, on: bool) -> Actions {
        if std::mem::replace(&mut self.record.log_all, on) == on {
            return Actions::new();
        }
        let log = if on { None } else { self.record.log.take() };
        let mut actions = vec![Action::SetLogging(self.logging()), Action::Report(SessionEvent::DirtyLog { on })];
        if let Some(outside) = log.map(|log| log.pages_outside()).filter(|&outside| outside > 0) {
            let text = format!("the dirty log had no room for {outside} writes of pages; the migrated VM lacks them");
            actions.push(Action::Report(SessionEvent::Warning(text)));
        }
        actions
    }

    /// What the session's rings are to do.
    pub(super) fn logging(&self) -> Logging {
        match &self.record.log {
            _ if !self.record.log_all => Logging::Off,
            Some(log) => Logging::On(Arc::clone(log)),
            None if self.record.protocol_features & protocol::LOG_SHMFD != 0 => Logging::Awaited,
            // A front-end that has no way to bring a log does not mean it.
            None => Logging::Off,
        }
    }

    /// Also during a migration, when memory has grown: the old log is let go of before the answer, for the front-end then
    /// reads it for the last time.
    pub(super) fn set_log_base(&mut self, payload: Vec<u8>, mut files: Vec<OwnedFd>) -> Result<Actions, Fault> {
        let range = message::decode_log_range(&payload).ok_or_else(|| wrong_length(&payload))?;
        let file = files.pop().ok_or_else(|| Fault::Refused("it came without a descriptor".into()))?;
        let shrink = vet::log_file(&range, &file).map_err(Fault::Refused)?;
        let log = DirtyLog::map(&file, range.offset, range.bytes)
            .map_err(|error| Fault::Refused(format!("the dirty log cannot be mapped: {error}")))?;
        let mut actions = Actions::new();
        if shrink == Shrink::Possible {
            actions.push(Action::Report(unsealed("dirty log")));
        }
        // vetted: guest_address + bytes does not overflow
        let memory_end =
            self.record.memory.iter().map(|mapped| mapped.region.guest_address + mapped.region.bytes).max();
        if let Some(end) = memory_end.filter(|&end| end > log.covered_bytes()) {
            let covered = log.covered_bytes();
            let text = format!("the dirty log covers {covered:#x} bytes of guest memory, which ends at {end:#x}");
            actions.push(Action::Report(SessionEvent::Warning(text)));
        }
        self.record.log = Some(Arc::new(log));
        if self.record.log_all {
            actions.push(Action::SetLogging(self.logging()));
        }
        // QEMU takes any answer, rust-vmm's front-end wants its own words back.
        actions.push(Action::Reply { request: req::SET_LOG_BASE, payload });
        Ok(actions)
    }

    /// The region is the rings' from the moment that it is given out: a front-end that dies with the answer has no use
    /// for it anyway.
    pub(super) fn get_inflight(&mut self, payload: &[u8]) -> Result<Actions, Fault> {
        let asked = InflightRange::decode(payload).ok_or_else(|| wrong_length(payload))?;
        let made = inflight::create(&asked, self.record.rings.len(), self.is_packed());
        let (range, region, file) = made.map_err(Fault::Refused)?;
        let answer = range.encode(payload.len());
        let reply = Action::ReplyWithFile { request: req::GET_INFLIGHT_FD, payload: answer, file: Arc::new(file) };
        Ok(vec![self.use_inflight(region), reply])
    }

    pub(super) fn set_inflight(&mut self, payload: &[u8], mut files: Vec<OwnedFd>) -> Result<Actions, Fault> {
        let range = InflightRange::decode(payload).ok_or_else(|| wrong_length(payload))?;
        let file = files.pop().ok_or_else(|| Fault::Refused("it came without a descriptor".into()))?;
        let adopted = inflight::adopt(&range, &file, self.record.rings.len());
        let (region, shrink) = adopted.map_err(Fault::Refused)?;
        let mut actions = vec![self.use_inflight(region)];
        if shrink == Shrink::Possible {
            actions.push(Action::Report(unsealed("in-flight region")));
        }
        Ok(actions)
    }

    pub(super) fn use_inflight(&mut self, region: Inflight) -> Action {
        let region = Arc::new(region);
        self.record.inflight = Some(Arc::clone(&region));
        Action::SetInflight(region)
    }
}
