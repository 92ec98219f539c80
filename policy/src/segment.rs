//! What connection tracking reads from a TCP header (RFC 9293 §3.1, RFC 7323, RFC 2018).

use crate::tcp_state::Kind;

pub(crate) const FIN: u8 = 0x01;
pub(crate) const SYN: u8 = 0x02;
pub(crate) const RST: u8 = 0x04;
pub(crate) const ACK: u8 = 0x10;
pub(crate) const URG: u8 = 0x20;

const HEADER_BYTES: usize = 20;
/// RFC 7323 §2.3: a larger shift counts as this.
pub(crate) const SCALE_MAX: u8 = 14;

/// What connection tracking reads from a TCP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgment number.
    pub acknowledgment: u32,
    /// Highest right edge of a selective acknowledgment; the acknowledgment number if there is none.
    pub selective: u32,
    /// Bytes behind the header.
    pub payload_bytes: u16,
    /// Window as sent, before scaling.
    pub window: u16,
    /// Flags, low byte: CWR, ECE, URG, ACK, PSH, RST, SYN, FIN.
    pub flags: u8,
    /// Window scale option.
    pub scale: Option<u8>,
    /// SACK-permitted option.
    pub sack_permitted: bool,
    /// Any option at all.
    pub options: bool,
    /// The first fragment of a longer segment: where it ends is not known.
    pub fragmented: bool,
}

impl Segment {
    /// Reads a header of which `rest` holds the first bytes; `segment_bytes` from its start to the packet's end.
    #[inline]
    pub(crate) fn parse(rest: &[u8], segment_bytes: usize) -> Option<Self> {
        let tcp: &[u8; HEADER_BYTES] = rest.first_chunk()?;
        let header_bytes = usize::from(tcp[12] >> 4) * 4;
        if header_bytes < HEADER_BYTES || header_bytes > segment_bytes {
            return None;
        }
        let acknowledgment = u32::from_be_bytes([tcp[8], tcp[9], tcp[10], tcp[11]]);
        let mut segment = Self {
            sequence: u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]),
            acknowledgment,
            selective: acknowledgment,
            payload_bytes: u16::try_from(segment_bytes - header_bytes).ok()?,
            window: u16::from_be_bytes([tcp[14], tcp[15]]),
            flags: tcp[13],
            ..Self::default()
        };
        if header_bytes > HEADER_BYTES {
            segment.read_options(rest.get(HEADER_BYTES..header_bytes)?);
        }
        Some(segment)
    }

    #[inline]
    fn read_options(&mut self, options: &[u8]) {
        self.options = true;
        // RFC 7323 appendix A: the timestamp alone, which is what nearly every segment has.
        if options.len() == 12 && options[..4] == [1, 1, 8, 10] {
            return;
        }
        self.read_all_options(options);
    }

    /// RFC 9293 §3.1. Stops at the first option that contradicts itself.
    fn read_all_options(&mut self, mut options: &[u8]) {
        while let [kind, rest @ ..] = options {
            match kind {
                0 => return,
                1 => {
                    options = rest;
                    continue;
                }
                _ => {}
            }
            let Some(length) = rest.first().map(|&length| usize::from(length)).filter(|&length| length >= 2) else {
                return;
            };
            let Some((option, behind)) = options.split_at_checked(length) else { return };
            match (kind, length) {
                (3, 3) => self.scale = Some(option[2].min(SCALE_MAX)),
                (4, 2) => self.sack_permitted = true,
                (5, _) if (length - 2).is_multiple_of(8) => {
                    for block in option[2..].chunks_exact(8) {
                        let right = u32::from_be_bytes([block[4], block[5], block[6], block[7]]);
                        if after(right, self.selective) {
                            self.selective = right;
                        }
                    }
                }
                _ => {}
            }
            options = behind;
        }
    }

    #[inline]
    pub(crate) const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The sequence number behind it; SYN and FIN count one each.
    #[inline]
    pub(crate) fn end(&self) -> u32 {
        let controls = u32::from(self.has(SYN)) + u32::from(self.has(FIN));
        self.sequence.wrapping_add(u32::from(self.payload_bytes)).wrapping_add(controls)
    }

    /// `None` for a combination of flags that no TCP sends.
    #[inline]
    pub(crate) fn kind(&self) -> Option<Kind> {
        match self.flags & (FIN | SYN | RST | ACK | URG) {
            f if f == SYN || f == SYN | URG => Some(Kind::Syn),
            f if f == SYN | ACK => Some(Kind::SynAck),
            f if f == RST || f == RST | ACK => Some(Kind::Rst),
            f if f == FIN | ACK || f == FIN | ACK | URG => Some(Kind::Fin),
            f if f == ACK || f == ACK | URG => Some(Kind::Ack),
            _ => None,
        }
    }
}

/// `a` is later than `b` in sequence space (RFC 9293 §3.4).
#[inline]
pub(crate) const fn after(a: u32, b: u32) -> bool {
    (b.wrapping_sub(a) as i32) < 0
}

#[inline]
pub(crate) const fn before(a: u32, b: u32) -> bool {
    after(b, a)
}
