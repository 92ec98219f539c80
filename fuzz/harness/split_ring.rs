//! A split ring all of whose content is the guest's: descriptor tables, indices, buffers, features.
//!
//! Used by the fuzz target and by `vhost/tests/fuzz_regressions.rs`.

use dreamwire_vhost::frame::{NetHeader, RawFrame};
use dreamwire_vhost::memory::Payload;
use dreamwire_vhost::ring::{BURST, Ring};

use super::guest::{AVAILABLE, Guest, buffer, check_frames, send_run};

thread_local! {
    /// Made once: fuzzers run a case in microseconds.
    static GUEST: Guest = Guest::new();
}

/// Zeros everywhere, then what `bytes` says: available index and entries, descriptors of 8 bytes each (first the
/// ring's, then a table at the start of the second region), and what is left as the third region's bytes.
fn fill(guest: &Guest, size: u16, first: u16, bytes: &[u8]) {
    let mut bytes = bytes.iter().copied();
    let mut byte = || bytes.next().unwrap_or(0);
    guest.clear();
    let flags = byte();
    guest.set(AVAILABLE + 2, first.wrapping_add(u16::from(byte()) % (size + 2)));
    guest.set(AVAILABLE, u16::from(flags));
    for slot in 0..u64::from(size) {
        // One more than there are, now and then.
        guest.set(AVAILABLE + 4 + 2 * slot, u16::from(byte()) % (size + 1));
    }
    guest.set(AVAILABLE + 4 + 2 * u64::from(size), u16::from(byte()));
    for table in [0, 1] {
        for entry in 0..if table == 0 { size } else { 32 } {
            let [a, b, c, d, flags, next, ends, _]: [u8; 8] = std::array::from_fn(|_| byte());
            let (address, bytes) = buffer([a, b, c, d, ends]);
            let rest = u64::from(bytes) | u64::from(flags & 7) << 32 | u64::from(u16::from(next) % (size + 1)) << 48;
            guest.set_entry(table, entry, [address, rest]);
        }
    }
    guest.fill_buffers(byte);
}

pub(crate) fn run(bytes: &[u8]) {
    let [shape, turns, first, length_low, length_high, rest @ ..] = bytes else { return };
    let size = 1u16 << (shape & 7).min(6);
    // Before zero, so that indices wrap.
    let first = u16::from(*first).wrapping_sub(32);
    GUEST.with(|guest| {
        fill(guest, size, first, rest);
        let ring = Ring::new(guest.setup(*shape, size, first)).expect("a ring of at most 64 entries has room");
        let frame_bytes = usize::from(u16::from_le_bytes([*length_low, *length_high]));
        if turns & 1 == 0 { receive(guest, ring, turns >> 1) } else { send(guest, ring, turns >> 1, frame_bytes) }
    });
}

fn receive(guest: &Guest, mut ring: Ring, turns: u8) {
    let mut frames = vec![RawFrame::EMPTY; BURST];
    for _ in 0..=(turns & 7) {
        let (avail, used) = (ring.next_avail(), ring.next_used());
        let Ok(count) = ring.receive(&mut frames) else {
            assert!(ring.is_broken());
            assert!(ring.receive(&mut frames).is_err(), "a broken ring stays broken");
            return;
        };
        check_frames(&ring, &frames[..count]);
        ring.complete();
        let moved = (ring.next_avail().wrapping_sub(avail), ring.next_used().wrapping_sub(used));
        assert_eq!(moved, (count as u16, count as u16), "each chain is given back once");
        ring.enable_kicks();
        ring.disable_kicks();
        guest.set(AVAILABLE + 2, ring.next_avail().wrapping_add(u16::from(turns >> 3)));
    }
}

fn send(guest: &Guest, mut ring: Ring, turns: u8, frame_bytes: usize) {
    let frame = vec![0xa5; frame_bytes];
    let (header, payload) = frame.split_at(frame_bytes.min(128));
    for _ in 0..=(turns & 7) {
        let (avail, used) = (ring.next_avail(), ring.next_used());
        let sent = ring.send(NetHeader::default(), header, Payload::private(payload));
        let moved = (ring.next_avail().wrapping_sub(avail), ring.next_used().wrapping_sub(used));
        assert_eq!(moved.0, moved.1);
        assert_eq!(sent.is_ok(), moved.0 > 0, "all of a frame, or nothing");
        let (avail, used) = (ring.next_avail(), ring.next_used());
        let run = send_run(&mut ring, header, payload);
        assert_eq!((ring.next_avail().wrapping_sub(avail), ring.next_used().wrapping_sub(used)), (run, run));
        ring.flush();
        guest.set(AVAILABLE + 2, ring.next_avail().wrapping_add(u16::from(turns >> 3)));
    }
}
