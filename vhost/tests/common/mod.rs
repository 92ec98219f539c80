//! A guest in plain memory: the driver's side of split rings, written field by field, so that a test can write anything.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod packed;
pub(crate) mod pair;

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

use dreamwire_vhost::eventfd::EventFd;
use dreamwire_vhost::frame::RawFrame;
use dreamwire_vhost::memory::Memory;
use dreamwire_vhost::ring::{BURST, Ring, RingSetup};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MmapAdvise, madvise};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

// VIRTIO 1.2 §2.7.5 and §6.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;
pub(crate) const F_MERGEABLE: u64 = 1 << 15;
pub(crate) const F_IN_ORDER: u64 = 1 << 35;
pub(crate) const F_INDIRECT: u64 = 1 << 28;
pub(crate) const F_EVENT_IDX: u64 = 1 << 29;
pub(crate) const F_VERSION_1: u64 = 1 << 32;

pub(crate) const DESCRIPTOR_BYTES: u64 = 16;
const PAGE_BYTES: u64 = 4096;

/// A guest's memory.
#[derive(Debug, Clone)]
pub(crate) struct Guest(pub(crate) Arc<Memory>);

impl Guest {
    /// Regions: start and length.
    pub(crate) fn new(regions: &[(u64, usize)]) -> Self {
        let ranges = regions.iter().map(|&(start, bytes)| {
            let file = File::from(memfd_create("guest", MFdFlags::MFD_CLOEXEC).expect("a memfd"));
            file.set_len(bytes as u64).expect("room");
            (GuestAddress(start), bytes, Some(FileOffset::new(file, 0)))
        });
        let mapped = GuestMemoryMmap::from_ranges_with_files(ranges).expect("shared memory");
        Self(Arc::new(Memory::new(Arc::new(mapped)).expect("room for its regions")))
    }

    pub(crate) fn mapped(&self) -> &GuestMemoryMmap<()> {
        self.0.mapped()
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.mapped().write_slice(bytes, GuestAddress(address)).expect("an address in the guest");
    }

    pub(crate) fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut read = vec![0; bytes];
        self.mapped().read_slice(&mut read, GuestAddress(address)).expect("an address in the guest");
        read
    }

    pub(crate) fn write_u16(&self, address: u64, value: u16) {
        self.write(address, &value.to_le_bytes());
    }

    pub(crate) fn read_u16(&self, address: u64) -> u16 {
        u16::from_le_bytes(self.read(address, 2).try_into().expect("two bytes"))
    }

    /// Has the next load from the page at `address` take longer than any from memory: a page fault, on any machine.
    pub(crate) fn unmap_page(&self, address: u64) {
        let page = address / PAGE_BYTES * PAGE_BYTES;
        let host = self.mapped().get_host_address(GuestAddress(page)).expect("an address in the guest");
        let host = NonNull::new(host.cast()).expect("a mapped page");
        // SAFETY: a page of the guest's memory, whose content stays: it is a file's.
        unsafe { madvise(host, PAGE_BYTES as usize, MmapAdvise::MADV_DONTNEED) }.expect("a page of shared memory");
    }

    /// Writes entry `index` of the descriptor table at `table`.
    pub(crate) fn descriptor(&self, table: u64, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        let mut entry = [0; DESCRIPTOR_BYTES as usize];
        entry[..8].copy_from_slice(&address.to_le_bytes());
        entry[8..12].copy_from_slice(&bytes.to_le_bytes());
        entry[12..14].copy_from_slice(&flags.to_le_bytes());
        entry[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + DESCRIPTOR_BYTES * u64::from(index), &entry);
    }
}

/// The driver's side of one ring.
#[derive(Debug, Clone)]
pub(crate) struct GuestRing {
    pub(crate) guest: Guest,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    /// The available index as last written.
    pub(crate) available_index: u16,
    /// The index that the ring started with.
    pub(crate) first_index: u16,
}

impl GuestRing {
    /// A ring of `size` entries at `base`, a multiple of 16, both indices at `first_index`.
    pub(crate) fn new(guest: &Guest, base: u64, size: u16, first_index: u16) -> Self {
        let available = base + DESCRIPTOR_BYTES * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let ring = Self {
            guest: guest.clone(),
            size,
            descriptors: base,
            available,
            used,
            available_index: first_index,
            first_index,
        };
        guest.write_u16(available + 2, first_index);
        guest.write_u16(used + 2, first_index);
        ring
    }

    /// Bytes of a ring of `size` entries.
    pub(crate) fn bytes(size: u16) -> usize {
        16 * usize::from(size) + 6 + 2 * usize::from(size) + 2 + 6 + 8 * usize::from(size)
    }

    pub(crate) fn setup(&self, features: u64) -> RingSetup {
        RingSetup {
            memory: Arc::clone(&self.guest.0),
            size: self.size,
            descriptors: self.descriptors,
            available: self.available,
            used: self.used,
            next_avail: self.first_index,
            next_used: self.first_index,
            features,
            enabled: true,
            kick: Some(EventFd::new().expect("an eventfd")),
            call: Some(EventFd::new().expect("an eventfd")),
            error: None,
            log: None,
            inflight: None,
            fault: None,
        }
    }

    /// The device's side of it.
    pub(crate) fn open(&self, features: u64) -> Ring {
        Ring::new(self.setup(features)).expect("a sound ring")
    }

    pub(crate) fn descriptor(&self, index: u16, address: u64, bytes: u32, flags: u16, next: u16) {
        self.guest.descriptor(self.descriptors, index, address, bytes, flags, next);
    }

    /// Makes the chain at `head` available.
    pub(crate) fn post(&mut self, head: u16) {
        let slot = u64::from(self.available_index & (self.size - 1));
        self.guest.write_u16(self.available + 4 + 2 * slot, head);
        self.available_index = self.available_index.wrapping_add(1);
        self.set_available_index(self.available_index);
    }

    pub(crate) fn set_available_index(&self, index: u16) {
        self.guest.write_u16(self.available + 2, index);
    }

    pub(crate) fn set_available_flags(&self, flags: u16) {
        self.guest.write_u16(self.available, flags);
    }

    pub(crate) fn set_used_event(&self, index: u16) {
        self.guest.write_u16(self.available + 4 + 2 * u64::from(self.size), index);
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.guest.read_u16(self.used + 2)
    }

    /// Used entry with index `index`: head and length.
    pub(crate) fn used_entry(&self, index: u16) -> (u32, u32) {
        let slot = u64::from(index & (self.size - 1));
        let entry = self.guest.read(self.used + 4 + 8 * slot, 8);
        let word = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().expect("four bytes"));
        (word(0), word(4))
    }

    /// The used ring as it lies in memory, without `avail_event`.
    pub(crate) fn used_bytes(&self) -> Vec<u8> {
        self.guest.read(self.used, 4 + 8 * usize::from(self.size))
    }
}

/// Room for a burst.
pub(crate) fn frames() -> Vec<RawFrame> {
    vec![RawFrame::EMPTY; BURST]
}

/// A received frame's bytes.
pub(crate) fn frame_bytes(ring: &Ring, frame: &RawFrame) -> Vec<u8> {
    let payload = ring.payload(frame);
    let mut bytes = frame.headers().to_vec();
    bytes.resize(bytes.len() + payload.bytes() as usize, 0);
    payload.copy_out(&mut bytes[frame.headers().len()..]);
    bytes
}
