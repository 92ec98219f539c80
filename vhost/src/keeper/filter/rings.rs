//! The messages about rings: size, addresses, base, descriptors, state.

use std::os::fd::OwnedFd;

use super::action::{Action, enable, forward};
use super::{Actions, Fault, Filter, RING_SIZE_MAX, wrong_length};
use crate::keeper::message::{self, RingAddresses, RingNumber, encode_ring_number, request as req};
use crate::keeper::record::RingSignal;
use crate::keeper::vet;
use crate::ring;

impl Filter {
    pub(super) fn ring_index(&self, index: u32) -> Result<u16, Fault> {
        // Compared as u32: truncated to 16 bits first, 0x10000 would be ring 0 (CVE-2020-10723).
        let count = self.record.rings.len();
        if index as usize >= count {
            return Err(Fault::Refused(format!("ring {index} does not exist, the port has {count} rings")));
        }
        Ok(index as u16)
    }

    pub(super) fn set_ring_size(&mut self, RingNumber { index, number }: RingNumber) -> Result<Actions, Fault> {
        let index = self.ring_index(index)?;
        if number == 0 || number > u32::from(RING_SIZE_MAX) || !(number.is_power_of_two() || self.is_packed()) {
            let kind = if self.is_packed() { "number from 1" } else { "power of two" };
            return Err(Fault::Refused(format!(
                "ring {index} cannot have {number} entries; a {kind} up to {RING_SIZE_MAX} is needed"
            )));
        }
        self.record.rings[usize::from(index)].size = Some(number as u16);
        Ok(vec![forward(req::SET_VRING_NUM, encode_ring_number(index.into(), number), vec![])])
    }

    /// Checks as much as keeps the session's connection alive: the parts start in memory and are aligned
    /// (VIRTIO 1.2 §2.7). Their extents are the ring's own to check.
    pub(super) fn set_ring_addresses(&mut self, payload: &[u8]) -> Result<Actions, Fault> {
        let addresses = message::decode_ring_addresses(payload).ok_or_else(|| wrong_length(payload))?;
        let index = self.ring_index(addresses.index)?;
        let RingAddresses { descriptors, available, used, flags, .. } = addresses;
        if flags & !RingAddresses::FLAG_LOG != 0 {
            return Err(Fault::Refused(format!("ring {index}: flags {flags:#x} are not known")));
        }
        // Without any memory to translate them, the ring just stays incomplete: sent away for it, QEMU would come back
        // at once to do the same again.
        if self.record.memory.is_empty() {
            let explained = self.warned_not_shared;
            let fault = Fault::Declined(self.memory_is_overdue());
            return Err(if explained { Fault::DeclinedAgain } else { fault });
        }
        for (part, address, alignment) in
            [("descriptor table", descriptors, 16), ("available ring", available, 2), ("used ring", used, 4)]
        {
            // 4 bytes: flags and index, which the session reads of the used ring
            let region = self.record.region_of(address, 4).ok_or_else(|| {
                Fault::Refused(format!("ring {index}: the {part} at {address:#x} is not in guest memory"))
            })?;
            let guest_address = address - region.front_end_address + region.guest_address;
            if !guest_address.is_multiple_of(alignment) {
                let text = format!("ring {index}: the {part} at {guest_address:#x} is not aligned to {alignment}");
                return Err(Fault::Refused(text));
            }
        }
        let used_log = addresses.used_log();
        let before = self.record.rings[usize::from(index)].addresses.replace(addresses);
        let mut actions = Actions::new();
        if before.and_then(|before| before.used_log()) != used_log {
            actions.push(Action::SetUsedLog { index, address: used_log });
        }
        actions.push(forward(req::SET_VRING_ADDR, addresses.encode_unlogged(), vec![]));
        Ok(actions)
    }

    /// "Vring descriptor indices for packed virtqueues": bits 0 to 15 are the next available descriptor and its wrap
    /// counter, bits 16 to 31 the next used one. With a device that finishes in order and holds nothing back both are
    /// the same, and the session gets one of them: the engine (vhost-user-backend 0.24) would cut the upper half off.
    pub(super) fn set_ring_base(&mut self, RingNumber { index, number }: RingNumber) -> Result<Actions, Fault> {
        let index = self.ring_index(index)?;
        let (available, used) = (number as u16, (number >> 16) as u16);
        let base = match used {
            // Also what DPDK says of a packed ring, in its device (22.11, GET_VRING_BASE) and in its driver.
            0 => available,
            // Taken by a device before us and not finished: those are still to be done.
            used if self.is_packed() => used,
            _ => {
                return Err(Fault::Refused(format!("ring {index}: base {number:#x} is no index of a split ring")));
            }
        };
        self.record.rings[usize::from(index)].base = base;
        Ok(vec![forward(req::SET_VRING_BASE, encode_ring_number(index.into(), base.into()), vec![])])
    }

    /// The front-end uses packed rings, or may still choose to.
    pub(super) fn is_packed(&self) -> bool {
        ring::is_packed(self.record.features.unwrap_or(self.offer.features))
    }

    /// "Bits (0-7) of the payload contain the vring index. Bit 8 is the invalid FD flag."
    pub(super) fn set_ring_signal(
        &mut self,
        request: u32,
        value: u64,
        mut files: Vec<OwnedFd>,
    ) -> Result<Actions, Fault> {
        if value >> 9 != 0 {
            return Err(Fault::Refused(format!("bits above 8 are set in {value:#x}")));
        }
        let index = self.ring_index((value & 0xff) as u32)?;
        let descriptor = files.pop();
        if (value & 0x100 != 0) == descriptor.is_some() {
            return Err(Fault::Refused(format!("ring {index}: descriptor and invalid-FD flag contradict each other")));
        }
        let descriptor = descriptor
            .map(vet::eventfd)
            .transpose()
            .map_err(|reason| Fault::Refused(format!("ring {index}: {reason}")))?;
        let signal = descriptor.map_or(RingSignal::Polled, RingSignal::Descriptor);
        let ring = &mut self.record.rings[usize::from(index)];
        let place = match request {
            req::SET_VRING_KICK => &mut ring.kick,
            req::SET_VRING_CALL => &mut ring.call,
            _ => &mut ring.error,
        };
        *place = signal;
        Ok(vec![forward(request, value.to_ne_bytes().to_vec(), place.descriptors())])
    }

    pub(super) fn set_ring_enable(&mut self, RingNumber { index, number }: RingNumber) -> Result<Actions, Fault> {
        let index = self.ring_index(index)?;
        if number > 1 {
            return Err(Fault::Refused(format!("ring {index}: {number} is neither enable (1) nor disable (0)")));
        }
        let enabled = number == 1;
        self.record.rings[usize::from(index)].enabled = enabled;
        self.started = true;
        Ok(if self.record.features.is_some() { vec![enable(index, enabled)] } else { Actions::new() })
    }
}
