//! The messages about guest memory: the table, and regions that come and go.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::action::{Action, forward, unsealed};
use super::{Actions, Fault, Filter, wrong_length};
use crate::keeper::message::{self, encode_region, encode_regions, request as req};
use crate::keeper::record::{MEMORY_SLOTS_MAX, MappedRegion};
use crate::keeper::vet::{self, Shrink};

impl Filter {
    pub(super) fn set_mem_table(&mut self, payload: &[u8], files: Vec<OwnedFd>) -> Result<Actions, Fault> {
        let regions = message::decode_regions(payload)
            .ok_or_else(|| Fault::Rubbish("its region count does not fit its length".into()))?;
        if regions.is_empty() {
            return Err(Fault::Refused(format!("the memory table is empty: {}", crate::keeper::MEMORY_NOT_SHARED)));
        }
        if regions.len() != files.len() {
            let counts = format!("{} regions came with {} descriptors", regions.len(), files.len());
            return Err(Fault::Refused(counts));
        }
        let mut memory = Vec::with_capacity(regions.len());
        let mut actions = Actions::new();
        for (region, file) in regions.into_iter().zip(files) {
            let shrink = vet_region(&region, &file, &memory)?;
            actions.extend(self.warn_of(shrink));
            memory.push(MappedRegion { region, file: Arc::new(file) });
        }
        // vm-memory wants them in order.
        memory.sort_by_key(|mapped| mapped.region.guest_address);
        let payload = encode_regions(memory.iter().map(|mapped| &mapped.region));
        let descriptors = memory.iter().map(|mapped| Arc::clone(&mapped.file)).collect();
        self.record.memory = memory;
        actions.push(forward(req::SET_MEM_TABLE, payload, descriptors));
        Ok(actions)
    }

    pub(super) fn add_region(&mut self, payload: &[u8], mut files: Vec<OwnedFd>) -> Result<Actions, Fault> {
        let region = message::decode_region(payload).ok_or_else(|| wrong_length(payload))?;
        let file = files.pop().ok_or_else(|| Fault::Refused("it came without a descriptor".into()))?;
        if self.record.memory.len() >= MEMORY_SLOTS_MAX {
            return Err(Fault::Refused(format!("all {MEMORY_SLOTS_MAX} memory slots are taken")));
        }
        let shrink = vet_region(&region, &file, &self.record.memory)?;
        let mut actions: Actions = self.warn_of(shrink).into_iter().collect();
        let file = Arc::new(file);
        let at = self.record.memory.partition_point(|mapped| mapped.region.guest_address < region.guest_address);
        self.record.memory.insert(at, MappedRegion { region, file: Arc::clone(&file) });
        actions.push(forward(req::ADD_MEM_REG, encode_region(&region), vec![file]));
        Ok(actions)
    }

    pub(super) fn remove_region(&mut self, payload: &[u8]) -> Result<Actions, Fault> {
        let region = message::decode_region(payload).ok_or_else(|| wrong_length(payload))?;
        // "identified by guest address, user address and size"; the file offset is the back-end's to ignore
        let same = |mapped: &MappedRegion| {
            let known = mapped.region;
            (known.guest_address, known.front_end_address, known.bytes)
                == (region.guest_address, region.front_end_address, region.bytes)
        };
        let Some(at) = self.record.memory.iter().position(same) else {
            let guest_address = region.guest_address;
            return Err(Fault::Refused(format!("no memory region at {guest_address:#x} of that size is mapped")));
        };
        self.record.memory.remove(at);
        Ok(vec![forward(req::REM_MEM_REG, encode_region(&region), vec![])])
    }

    /// Warns of a file that can be truncated, once per session.
    pub(super) fn warn_of(&mut self, shrink: Shrink) -> Option<Action> {
        let due = shrink == Shrink::Possible && !self.warned_unsealed;
        self.warned_unsealed |= due;
        due.then(|| Action::Report(unsealed("memory")))
    }
}

/// Checks a new region on its own, against those that are there and against its file.
fn vet_region(region: &message::Region, file: &OwnedFd, others: &[MappedRegion]) -> Result<Shrink, Fault> {
    vet::region(region).map_err(Fault::Refused)?;
    for other in others {
        vet::disjoint(region, &other.region).map_err(Fault::Refused)?;
    }
    vet::region_file(region, file).map_err(Fault::Refused)
}
