//! Random traces: two TCP ends that mostly behave, two that never do, and datagrams.

use super::packets::{ACK, FIN, Packet, RST, SYN, Tcp};

/// Splitmix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    fn of<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }
}

/// The packets of one host's port or identifier.
pub(crate) fn trace(random: &mut Random) -> Vec<Packet> {
    let trace: Vec<Packet> = match random.below(8) {
        0 => (0..random.below(8)).map(|_| datagram(random)).collect(),
        1..=3 => wild(random).into_iter().map(Packet::Tcp).collect(),
        _ => conversation(random).into_iter().map(Packet::Tcp).collect(),
    };
    // Some are sent again, up to four times.
    let mut times = || if random.below(16) == 0 { 2 + random.below(4) as usize } else { 1 };
    trace.into_iter().flat_map(|packet| std::iter::repeat_n(packet, times())).collect()
}

fn datagram(random: &mut Random) -> Packet {
    let ingress = random.below(2) == 0;
    match random.below(2) {
        0 => Packet::Udp { ingress, vm_port: random.of(&[53, 54, 123]) },
        _ => Packet::Icmp { ingress, kind: random.of(&[8, 8, 0, 0, 13, 14, 15, 16, 17, 18]) },
    }
}

/// Segments with any of a few flags and numbers, so that each meets what it should not.
fn wild(random: &mut Random) -> Vec<Tcp> {
    let first = [1000u32, random.below(1 << 32) as u32];
    let near = |random: &mut Random, number: u32| {
        number.wrapping_add(random.of(&[
            0,
            0,
            0,
            1,
            1,
            1,
            2,
            101,
            0u32.wrapping_sub(1),
            0u32.wrapping_sub(100),
            1000,
            70_000,
        ]))
    };
    (0..1 + random.below(12))
        .map(|_| {
            let end = random.below(2) as usize;
            let flags = random.of(&[SYN, SYN, SYN | ACK, SYN | ACK, ACK, ACK, ACK, FIN | ACK, RST, RST | ACK]);
            let zero = flags & RST != 0 && random.below(3) == 0;
            Tcp {
                ingress: end == 0,
                flags,
                sequence: if zero { 0 } else { near(random, first[end]) },
                acknowledgment: if flags & ACK != 0 && random.below(8) != 0 { near(random, first[1 - end]) } else { 0 },
                window: random.of(&[0, 1000, 1000, 65_535]),
                payload_bytes: if flags & ACK != 0 { random.of(&[0, 0, 0, 100]) } else { 0 },
                options: (random.below(3) == 0).then(|| random.of(&[0, 7])),
                sack: None,
            }
        })
        .collect()
}

/// A conversation: handshake (mostly), data and acknowledgments, closing, resets and beginning again, with numbers that are
/// off in one packet of eight.
fn conversation(random: &mut Random) -> Vec<Tcp> {
    // What each end sends next: host, VM.
    let mut next =
        if random.below(2) == 0 { [1_000_000, 5_000_000] } else { [random.below(1 << 32) as u32, u32::MAX - 50] };
    let scaled = random.below(2) == 0;
    let mut trace = Vec::new();
    let mut push = |random: &mut Random, next: &mut [u32; 2], end: usize, flags: u8| {
        let off = |random: &mut Random| -> u32 {
            let far = [
                1u32,
                0xffff_ffff,
                100,
                900,
                1100,
                5000,
                70_000,
                1 << 31,
                0u32.wrapping_sub(100),
                0u32.wrapping_sub(5000),
                0u32.wrapping_sub(70_000),
            ];
            random.of(&far)
        };
        let odd = random.below(8) == 0;
        let mut segment = Tcp {
            ingress: end == 0,
            flags,
            sequence: next[end],
            acknowledgment: if flags & ACK != 0 { next[1 - end] } else { 0 },
            window: random.of(&[0, 500, 1000, 1000, 8000, 65_535]),
            payload_bytes: if flags & (SYN | RST) == 0 { random.of(&[0, 0, 1, 100, 500]) } else { 0 },
            options: (flags & SYN != 0 && scaled).then_some(2),
            sack: None,
        };
        if odd {
            match random.below(3) {
                0 => segment.sequence = segment.sequence.wrapping_add(off(random)),
                1 if flags & ACK != 0 => segment.acknowledgment = segment.acknowledgment.wrapping_add(off(random)),
                _ => segment.payload_bytes = random.of(&[0, 1, 1000, 1400]),
            }
        } else {
            let controls = u32::from(flags & SYN != 0) + u32::from(flags & FIN != 0);
            next[end] = next[end].wrapping_add(controls + u32::from(segment.payload_bytes));
            if scaled && flags == ACK && random.below(8) == 0 {
                segment.sack = Some((next[1 - end], next[1 - end].wrapping_add(random.of(&[10, 2000]))));
            }
        }
        trace.push(segment);
    };
    let opener = random.below(2) as usize;
    match random.below(8) {
        0 => {}
        1 => {
            push(random, &mut next, opener, SYN);
            push(random, &mut next, 1 - opener, SYN);
        }
        _ => {
            push(random, &mut next, opener, SYN);
            push(random, &mut next, 1 - opener, SYN | ACK);
            push(random, &mut next, opener, ACK);
        }
    }
    for _ in 0..random.below(14) {
        let end = random.below(2) as usize;
        let flags = random.of(&[
            ACK,
            ACK,
            ACK,
            ACK,
            ACK,
            ACK,
            ACK,
            ACK,
            FIN | ACK,
            FIN | ACK,
            SYN,
            SYN | ACK,
            RST,
            RST | ACK,
            0,
            SYN | FIN,
        ]);
        push(random, &mut next, end, flags);
    }
    trace
}
