//! A packed ring all of whose content is the guest's: descriptors with any flags and ids, indirect tables, event
//! suppression structures, features, and the place where the front-end says that it stands.
//!
//! Used by the fuzz target and by `vhost/tests/fuzz_regressions.rs`. Every second case takes the ring over as it finds it
//! (`Ring::resume`), the others begin where they are told to. What is taken over has flags that agree on a driver's place: where
//! they do not, the device reads them again for 10 ms, which is no pace for a fuzzer (`ring_packed.rs` tests it).

use dreamwire_vhost::frame::{NetHeader, RawFrame};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{BURST, Ring, RingSetup};

use super::guest::{AVAILABLE, ENTRIES_MAX, Guest, USED, buffer, check_frames, send_run};

const RING_PACKED: u64 = 1 << 34;
const WRAP: u16 = 1 << 15;
const FLAG_AVAIL: u16 = 1 << 7;
const FLAG_USED: u16 = 1 << 15;
/// Sizes, most of them no power of two.
const SIZES: [u16; 8] = [1, 2, 3, 5, 8, 17, 63, ENTRIES_MAX];

thread_local! {
    /// Made once: fuzzers run a case in microseconds.
    static GUEST: Guest = Guest::new();
}

/// The flags of one byte: NEXT, WRITE, INDIRECT in the lower bits, AVAIL and USED in the upper.
fn flags(byte: u8) -> u16 {
    let lap = [FLAG_AVAIL, FLAG_USED, FLAG_AVAIL | FLAG_USED, 0];
    u16::from(byte & 7) | lap[usize::from(byte >> 3 & 3)]
}

/// Zeros everywhere, then what `bytes` says: the driver's events, descriptors of 7 bytes each (first the ring's, then a
/// table at the start of the second region), and what is left as the third region's bytes.
fn fill(guest: &Guest, size: u16, bytes: &mut impl Iterator<Item = u8>) {
    let mut byte = || bytes.next().unwrap_or(0);
    guest.clear();
    guest.set(AVAILABLE, u16::from_le_bytes([byte(), byte()]));
    guest.set(AVAILABLE + 2, u16::from(byte()));
    for table in [0, 1] {
        for entry in 0..if table == 0 { size } else { 32 } {
            let [a, b, c, d, ends, id, flag_byte]: [u8; 7] = std::array::from_fn(|_| byte());
            let (address, bytes) = buffer([a, b, c, d, ends]);
            let id = u16::from(id) | u16::from(ends >> 3) << 11;
            guest.set_entry(table, entry, [address, word(bytes, id, flags(flag_byte))]);
        }
    }
    guest.fill_buffers(byte);
}

/// Gives every descriptor the lap that it has with a driver at `at` (index below 128, wrap counter above); available or
/// used it stays.
fn agree(guest: &Guest, size: u16, at: u8) {
    let (place, wrap) = (u16::from(at & 0x7f) % size, at & 0x80 != 0);
    for index in 0..size {
        let offset = 16 * u64::from(index) + 14;
        let flags = guest.get(offset);
        let is_used = (flags & FLAG_AVAIL != 0) == (flags & FLAG_USED != 0);
        let lap = (index < place) == wrap;
        let told = if lap { FLAG_AVAIL } else { 0 } | if is_used == lap { FLAG_USED } else { 0 };
        guest.set(offset, (flags & !(FLAG_AVAIL | FLAG_USED)) | told);
    }
}

fn word(bytes: u32, id: u16, flags: u16) -> u64 {
    u64::from(bytes) | u64::from(id) << 32 | u64::from(flags) << 48
}

/// Descriptors from `before` to `after` in a ring of `size`. A burst passes less than two laps: what was available in one
/// is not in the next, but its last chain may reach over descriptors that were taken before.
fn moved(before: u16, after: u16, size: u16) -> u16 {
    let place = |position: u16| (position & !WRAP) + if position & WRAP == 0 { size } else { 0 };
    (place(after) + 2 * size - place(before)) % (2 * size)
}

pub(crate) fn run(bytes: &[u8]) {
    let [shape, turns, first, length_low, length_high, rest @ ..] = bytes else { return };
    let size = SIZES[usize::from(shape & 7)];
    // One more than there are, now and then.
    let first = (u16::from(first & 0x7f) % (size + 1)) | (u16::from(first >> 7) << 15);
    GUEST.with(|guest| {
        let mut rest = rest.iter().copied();
        fill(guest, size, &mut rest);
        let setup = guest.setup(*shape, size, first);
        let setup = RingSetup { features: setup.features | RING_PACKED, ..setup };
        let is_resumed = shape & 0x80 != 0;
        if is_resumed {
            agree(guest, size, *length_high);
        }
        let ring = if is_resumed { Ring::resume(setup) } else { Ring::new(setup) };
        let Ok(ring) = ring else {
            assert!(first & !WRAP >= size, "only a place outside is refused");
            return;
        };
        assert!(ring.next_avail() & !WRAP < size);
        let frame_bytes = usize::from(u16::from_le_bytes([*length_low, *length_high]));
        if turns & 1 == 0 { receive(guest, ring, turns >> 1) } else { send(guest, ring, turns >> 1, frame_bytes) }
    });
}

/// The driver makes descriptors available from `at` on, whatever they are.
fn offer(guest: &Guest, at: u16, size: u16, count: u8) {
    let (mut index, mut wrap) = (at & !WRAP, at & WRAP != 0);
    for _ in 0..count {
        let place = 16 * u64::from(index) + 14;
        let kept = guest.get(place) & !(FLAG_AVAIL | FLAG_USED);
        guest.set(place, kept | if wrap { FLAG_AVAIL } else { FLAG_USED });
        index += 1;
        if index == size {
            (index, wrap) = (0, !wrap);
        }
    }
}

fn receive(guest: &Guest, mut ring: Ring, turns: u8) {
    let size = ring.size();
    let mut frames = vec![RawFrame::EMPTY; BURST];
    for _ in 0..=(turns & 7) {
        let before = ring.next_avail();
        let Ok(count) = ring.receive(&mut frames) else {
            assert!(ring.is_broken());
            assert!(ring.receive(&mut frames).is_err(), "a broken ring stays broken");
            assert_eq!(ring.next_avail(), before, "it stands where it stood");
            return;
        };
        check_frames(&ring, &frames[..count]);
        assert_eq!(ring.next_avail(), before, "what was taken is still to be given back");
        ring.complete();
        let moved = moved(before, ring.next_avail(), size);
        assert!(moved >= count as u16 && (moved == 0) == (count == 0), "{count} chains, {moved} descriptors");
        assert_eq!(ring.next_used(), ring.next_avail());
        ring.enable_kicks();
        ring.disable_kicks();
        assert_eq!(guest.get(USED + 2), 1, "no kicks, please");
        offer(guest, ring.next_avail(), size, turns >> 3);
    }
}

fn send(guest: &Guest, mut ring: Ring, turns: u8, frame_bytes: usize) {
    let size = ring.size();
    let frame = vec![0xa5; frame_bytes];
    let (header, payload) = frame.split_at(frame_bytes.min(128));
    for _ in 0..=(turns & 7) {
        let before = ring.next_avail();
        let sent = ring.send(NetHeader::default(), header, Payload::private(payload));
        assert_eq!(ring.next_used(), ring.next_avail());
        assert_eq!(sent.is_ok(), moved(before, ring.next_avail(), size) > 0, "all of a frame, or nothing");
        let before = ring.next_avail();
        let run = send_run(&mut ring, header, payload);
        assert_eq!(ring.next_used(), ring.next_avail());
        assert_eq!(moved(before, ring.next_avail(), size), run, "a descriptor each");
        ring.flush();
        offer(guest, ring.next_avail(), size, turns >> 3);
    }
}
