//! One AF_XDP socket: a queue of a network device whose packets lie in memory of ours.
//!
//! Theory of operation (kernel documentation, "AF_XDP"). The memory (UMEM) is cut into chunks. Four rings are shared with
//! the kernel, each with one producer and one consumer, who own what is between the two indices: the *fill* ring gives
//! empty chunks to the kernel, the *rx* ring brings them back with packets; the *tx* ring gives packets to the kernel, the
//! *completion* ring brings the chunks back. Half of the chunks only ever go the first way, the other half the second, so
//! the receiving and the sending half of a socket share nothing but descriptors.
//!
//! One of the files with unsafe code in this crate: memory shared with the kernel. What makes it sound: a ring's mapping
//! lives as long as [`Shared`], which both halves hold; indices are masked; each half is used through `&mut` for whatever
//! changes hands; and a chunk is looked at only between the kernel's giving it and its being given back, which the lists of
//! held and free chunks are the record of. The kernel is trusted to keep to the same rules.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use dreamwire_vhost::ring::BURST;
use nix::sys::socket::{MsgFlags, recv, send};

/// Chunks for each direction: as many packets as a burst of 64 KB segments makes, and some. A power of two, as it is the
/// size of the rings too.
const CHUNKS: u32 = 2048;
/// The kernel leaves so many bytes in front of a received packet (XDP_PACKET_HEADROOM).
const HEADROOM_BYTES: usize = 256;
/// Sizes that the kernel takes: powers of two from 2048 to a page.
const CHUNK_BYTES: [usize; 2] = [2048, 4096];

/// The longest packet, Ethernet header included.
pub(super) const PACKET_BYTES_MAX: usize = CHUNK_BYTES[1] - HEADROOM_BYTES;

/// A mapping, unmapped when dropped.
#[derive(Debug)]
struct Mapping {
    at: usize,
    bytes: usize,
}

impl Mapping {
    /// `file`: descriptor and offset, or else memory of ours.
    fn new(bytes: usize, file: Option<(&OwnedFd, libc::off_t)>) -> io::Result<Self> {
        let (descriptor, offset) = file.map_or((-1, 0), |(file, offset)| (file.as_raw_fd(), offset));
        let kind = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let at = unsafe { libc::mmap(ptr::null_mut(), bytes, access, kind | libc::MAP_POPULATE, descriptor, offset) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { at: at as usize, bytes })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: it is ours, and whoever has addresses in it holds it alive.
        unsafe { libc::munmap(self.at as *mut libc::c_void, self.bytes) };
    }
}

/// What both halves hold. Dropped with the second one: then the kernel lets go of the queue.
#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    umem: Mapping,
    chunk_bytes: usize,
    _rings: [Mapping; 4],
}

/// One ring, seen by one of its two users. `T` is plain data of the kernel's layout.
#[derive(Debug)]
struct Ring<T> {
    producer: usize,
    consumer: usize,
    flags: usize,
    entries: usize,
    /// Our own index: the next entry to write, or to read.
    next: u32,
    /// The other side's index as last seen.
    seen: u32,
    kind: std::marker::PhantomData<fn(T) -> T>,
}

impl<T: Copy> Ring<T> {
    fn new(mapping: &Mapping, offsets: &libc::xdp_ring_offset) -> Self {
        let at = |offset: u64| mapping.at + offset as usize;
        Self {
            producer: at(offsets.producer),
            consumer: at(offsets.consumer),
            flags: at(offsets.flags),
            entries: at(offsets.desc),
            next: 0,
            seen: 0,
            kind: std::marker::PhantomData,
        }
    }

    #[inline]
    fn atomic(&self, at: usize) -> &AtomicU32 {
        // SAFETY: an index or flag word at an offset that the kernel named, aligned, in a mapping that lives as long as
        // `Shared`; both sides access it atomically.
        unsafe { &*(at as *const AtomicU32) }
    }

    #[inline]
    fn entry(&self, index: u32) -> *mut T {
        (self.entries + (index & (CHUNKS - 1)) as usize * size_of::<T>()) as *mut T
    }

    /// As producer: how many entries are free.
    #[inline]
    fn room(&mut self) -> u32 {
        // Acquire: the kernel has read the entries that it gives back.
        self.seen = self.atomic(self.consumer).load(Ordering::Acquire);
        CHUNKS - self.next.wrapping_sub(self.seen)
    }

    /// As producer: writes an entry; there must be room. Seen by the kernel after [`Ring::publish`].
    #[inline]
    fn write(&mut self, value: T) {
        // SAFETY: within the ring by the mask, and ours until it is published.
        unsafe { self.entry(self.next).write(value) };
        self.next = self.next.wrapping_add(1);
    }

    #[inline]
    fn publish(&self) {
        // Release: the entries before the index.
        self.atomic(self.producer).store(self.next, Ordering::Release);
    }

    /// As consumer: how many entries are ready.
    #[inline]
    fn ready(&mut self) -> u32 {
        if self.seen == self.next {
            // Acquire: pairs with the kernel's release of the entries.
            self.seen = self.atomic(self.producer).load(Ordering::Acquire);
        }
        self.seen.wrapping_sub(self.next)
    }

    /// As consumer: takes an entry; there must be one ready.
    #[inline]
    fn read(&mut self) -> T {
        // SAFETY: within the ring by the mask, and published by the kernel.
        let value = unsafe { self.entry(self.next).read() };
        self.next = self.next.wrapping_add(1);
        value
    }

    #[inline]
    fn release(&self) {
        // Release: the entries have been read before the kernel may write them again.
        self.atomic(self.consumer).store(self.next, Ordering::Release);
    }

    #[inline]
    fn wants_wakeup(&self) -> bool {
        self.atomic(self.flags).load(Ordering::Relaxed) & libc::XDP_RING_NEED_WAKEUP != 0
    }
}

/// The receiving half.
#[derive(Debug)]
pub(super) struct XskRx {
    shared: Arc<Shared>,
    rx: Ring<libc::xdp_desc>,
    fill: Ring<u64>,
    /// Packets that we have and the kernel has not: where, and how long.
    held: [(u64, u32); BURST],
    count: usize,
}

/// The sending half.
#[derive(Debug)]
pub(super) struct XskTx {
    shared: Arc<Shared>,
    tx: Ring<libc::xdp_desc>,
    completion: Ring<u64>,
    /// Chunks that we have and the kernel has not.
    free: Vec<u64>,
    is_touched: bool,
}

/// A socket on queue `queue` of a device, for packets of up to `packet_bytes`.
///
/// The kernel is asked for zero-copy first, and falls back to copying by itself.
pub(super) fn open(device: u32, queue: u32, packet_bytes: usize) -> io::Result<(XskRx, XskTx, bool)> {
    let chunk_bytes = CHUNK_BYTES.into_iter().find(|bytes| packet_bytes + HEADROOM_BYTES <= *bytes);
    let chunk_bytes = chunk_bytes.ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: makes a descriptor, or fails.
    let descriptor = unsafe { libc::socket(libc::AF_XDP, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just made, for us.
    let socket = unsafe { OwnedFd::from_raw_fd(descriptor) };
    let umem = Mapping::new(2 * CHUNKS as usize * chunk_bytes, None)?;
    let registration = libc::xdp_umem_reg {
        addr: umem.at as u64,
        len: umem.bytes as u64,
        chunk_size: chunk_bytes as u32,
        headroom: 0,
        flags: 0,
        tx_metadata_len: 0,
    };
    set_option(&socket, libc::XDP_UMEM_REG, &registration)?;
    for ring in [libc::XDP_UMEM_FILL_RING, libc::XDP_UMEM_COMPLETION_RING, libc::XDP_RX_RING, libc::XDP_TX_RING] {
        set_option(&socket, ring, &CHUNKS)?;
    }
    let offsets: libc::xdp_mmap_offsets = option(&socket, libc::XDP_MMAP_OFFSETS)?;
    let map = |offsets: &libc::xdp_ring_offset, entry_bytes: usize, place: u64| {
        Mapping::new(offsets.desc as usize + CHUNKS as usize * entry_bytes, Some((&socket, place as libc::off_t)))
    };
    let descriptor_bytes = size_of::<libc::xdp_desc>();
    let rings = [
        map(&offsets.rx, descriptor_bytes, libc::XDP_PGOFF_RX_RING as u64)?,
        map(&offsets.tx, descriptor_bytes, libc::XDP_PGOFF_TX_RING as u64)?,
        map(&offsets.fr, 8, libc::XDP_UMEM_PGOFF_FILL_RING)?,
        map(&offsets.cr, 8, libc::XDP_UMEM_PGOFF_COMPLETION_RING)?,
    ];
    let (rx, tx) = (Ring::new(&rings[0], &offsets.rx), Ring::new(&rings[1], &offsets.tx));
    let (mut fill, completion) = (Ring::new(&rings[2], &offsets.fr), Ring::new(&rings[3], &offsets.cr));
    let chunk = |number: u32| u64::from(number) * chunk_bytes as u64;
    (0..CHUNKS).for_each(|number| fill.write(chunk(number)));
    fill.publish();
    bind(&socket, device, queue)?;
    let options: libc::xdp_options = option(&socket, libc::XDP_OPTIONS)?;
    let is_zero_copy = options.flags & libc::XDP_OPTIONS_ZEROCOPY != 0;
    let shared = Arc::new(Shared { socket, umem, chunk_bytes, _rings: rings });
    let receives = XskRx { shared: Arc::clone(&shared), rx, fill, held: [(0, 0); BURST], count: 0 };
    let free = (CHUNKS..2 * CHUNKS).map(chunk).collect();
    Ok((receives, XskTx { shared, tx, completion, free, is_touched: false }, is_zero_copy))
}

fn set_option<T>(socket: &OwnedFd, name: libc::c_int, value: &T) -> io::Result<()> {
    // SAFETY: the value is borrowed for the call, and its size is told.
    let result = unsafe {
        let value = ptr::from_ref(value).cast();
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_XDP, name, value, size_of::<T>() as libc::socklen_t)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `T` is one of the kernel's structures of plain numbers.
fn option<T>(socket: &OwnedFd, name: libc::c_int) -> io::Result<T> {
    let mut value = std::mem::MaybeUninit::<T>::zeroed();
    let mut bytes = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `bytes` bytes.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_XDP, name, value.as_mut_ptr().cast(), &raw mut bytes) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    if bytes as usize != size_of::<T>() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "the kernel's AF_XDP is older than Linux 5.4"));
    }
    // SAFETY: numbers, of which every pattern is one; zeroed, then written.
    Ok(unsafe { value.assume_init() })
}

fn bind(socket: &OwnedFd, device: u32, queue: u32) -> io::Result<()> {
    let address = libc::sockaddr_xdp {
        sxdp_family: libc::AF_XDP as u16,
        // Neither XDP_ZEROCOPY nor XDP_COPY: the first if the driver has it, else the second.
        sxdp_flags: libc::XDP_USE_NEED_WAKEUP,
        sxdp_ifindex: device,
        sxdp_queue_id: queue,
        sxdp_shared_umem_fd: 0,
    };
    let bytes = size_of::<libc::sockaddr_xdp>() as libc::socklen_t;
    // SAFETY: the address is borrowed for the call, and its size is told.
    let result = unsafe { libc::bind(socket.as_raw_fd(), ptr::from_ref(&address).cast(), bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl XskRx {
    /// Takes up to `most` packets; returns how many. The last ones must have been released.
    #[inline]
    pub(super) fn take(&mut self, most: usize) -> usize {
        assert_eq!(self.count, 0, "packets are held");
        let ready = (self.rx.ready() as usize).min(most).min(BURST);
        for slot in 0..ready {
            let descriptor = self.rx.read();
            self.held[slot] = (descriptor.addr, descriptor.len);
        }
        if ready > 0 {
            self.rx.release();
            self.count = ready;
        } else if self.fill.wants_wakeup() {
            // Fails only if there is nothing to wake.
            let _ = recv(self.shared.socket.as_raw_fd(), &mut [], MsgFlags::MSG_DONTWAIT);
        }
        ready
    }

    /// Packet `slot` of those held.
    #[inline]
    pub(super) fn packet(&self, slot: usize) -> &[u8] {
        let (at, bytes) = self.held[..self.count][slot];
        let (at, bytes) = (at as usize, bytes as usize);
        assert!(at + bytes <= CHUNKS as usize * self.shared.chunk_bytes, "a packet outside of the receiving chunks");
        // SAFETY: within the UMEM by the assertion; the chunk is ours, and nobody writes to it, until `release`, which
        // needs this borrow to have ended.
        unsafe { std::slice::from_raw_parts((self.shared.umem.at + at) as *const u8, bytes) }
    }

    /// Gives all held packets' chunks back to the kernel.
    #[inline]
    pub(super) fn release(&mut self) {
        // Every chunk of this half has a place in the ring.
        let first_byte = !(self.shared.chunk_bytes as u64 - 1);
        for slot in 0..self.count {
            self.fill.write(self.held[slot].0 & first_byte);
        }
        self.fill.publish();
        self.count = 0;
    }

    pub(super) fn descriptor(&self) -> BorrowedFd<'_> {
        self.shared.socket.as_fd()
    }
}

impl XskTx {
    /// An empty chunk to write a packet to. `None`: the device has them all.
    #[inline]
    pub(super) fn chunk(&mut self) -> Option<&mut [u8]> {
        if self.free.is_empty() {
            self.reclaim();
        }
        if self.free.is_empty() {
            // The device did not take them (its link was down): perhaps it does now.
            self.wake();
            self.reclaim();
        }
        let at = *self.free.last()? as usize;
        // SAFETY: within the UMEM, as all free chunks are; the chunk is ours until `commit`.
        Some(unsafe { std::slice::from_raw_parts_mut((self.shared.umem.at + at) as *mut u8, self.shared.chunk_bytes) })
    }

    /// Makes the chunk that [`XskTx::chunk`] gave last a packet of `bytes` bytes. It leaves with [`XskTx::flush`].
    #[inline]
    pub(super) fn commit(&mut self, bytes: usize) {
        assert!(bytes <= self.shared.chunk_bytes);
        let at = self.free.pop().expect("a chunk was just written to");
        // There is room: the ring has a place for every chunk of this half.
        debug_assert!(self.tx.room() > 0);
        self.tx.write(libc::xdp_desc { addr: at, len: bytes as u32, options: 0 });
        self.is_touched = true;
    }

    /// Shows all packets to the kernel; returns the number of system calls that it took.
    #[inline]
    pub(super) fn flush(&mut self) -> u64 {
        if !std::mem::take(&mut self.is_touched) {
            return 0;
        }
        self.tx.publish();
        let (mut calls, mut room) = (0, self.tx.room());
        // In copy mode a call sends 32 packets at most (and then says EAGAIN). Ends, as each round but the last makes room.
        while self.tx.wants_wakeup() && room < CHUNKS {
            calls += 1;
            self.wake();
            let after = self.tx.room();
            if after == room {
                // The device is full, or its link is down. What it does not take now goes with a later flush.
                self.is_touched = true;
                break;
            }
            room = after;
        }
        self.reclaim();
        calls
    }

    /// Has the kernel look at the ring. What is wrong with the device shows in chunks that do not come back.
    fn wake(&self) {
        let _ = send(self.shared.socket.as_raw_fd(), &[], MsgFlags::MSG_DONTWAIT);
    }

    /// Takes back the chunks of packets that are sent.
    #[inline]
    fn reclaim(&mut self) {
        let ready = self.completion.ready();
        for _ in 0..ready {
            let at = self.completion.read();
            self.free.push(at);
        }
        if ready > 0 {
            self.completion.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::{Duration, Instant};

    use nix::net::if_::if_nametoindex;
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    fn sh(line: &str) {
        assert!(Command::new("sh").args(["-c", line]).status().unwrap().success(), "{line}");
    }

    /// A veth pair in a namespace of this thread's own. Needs root, as the driver does.
    #[test]
    fn everything_staged_leaves_at_once_and_after_the_link_was_down() {
        unshare(CloneFlags::CLONE_NEWNET).expect("needs CAP_SYS_ADMIN");
        sh("ip link add near type veth peer name far && ip link set near up && ip link set far up");
        let (_rx, mut tx, _) = open(if_nametoindex("near").unwrap(), 0, 1614).expect("needs CAP_NET_ADMIN");
        let stage = |tx: &mut XskTx, count: u32| {
            for _ in 0..count {
                tx.chunk().expect("a free chunk")[..60].fill(0xff);
                tx.commit(60);
            }
        };
        let settles = |tx: &mut XskTx| {
            let deadline = Instant::now() + Duration::from_secs(5);
            while tx.free.len() < CHUNKS as usize {
                assert!(Instant::now() < deadline, "{} of {CHUNKS} chunks came back", tx.free.len());
                tx.reclaim();
            }
        };
        // Far more than one call sends.
        stage(&mut tx, 1500);
        assert!(tx.flush() >= 1);
        assert_eq!(tx.tx.room(), CHUNKS, "nothing waits for a later flush");
        settles(&mut tx);
        assert!(sent() >= 1500);

        sh("ip link set near down");
        stage(&mut tx, CHUNKS);
        tx.flush();
        assert!(tx.chunk().is_none(), "the device has them all");
        sh("ip link set near up");
        // The next frame that is to be sent finds out.
        let deadline = Instant::now() + Duration::from_secs(5);
        while tx.chunk().is_none() {
            assert!(Instant::now() < deadline, "the socket stays stuck");
        }
        tx.flush();
        settles(&mut tx);
    }

    /// Packets that left device `near`.
    fn sent() -> u64 {
        let said = Command::new("ip").args(["-s", "-o", "link", "show", "near"]).output().unwrap();
        let said = String::from_utf8(said.stdout).unwrap();
        let after = said.split("TX:").nth(1).unwrap().split('\\').nth(1).unwrap();
        after.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}
