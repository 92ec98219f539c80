//! The device configuration space (VIRTIO 1.2 §5.1.4) for front-ends that take it from the back-end: GET_CONFIG, SET_CONFIG.
//!
//! QEMU keeps its own and warns of a network back-end that offers one, so a port has it only where it is asked for.
//! It is made from the port's configuration and never changes while a front-end is connected. Limit: 256 bytes, of
//! which those behind the structure are zero.

use super::offer::Offer;

/// VHOST_USER_MAX_CONFIG_SIZE of all implementations.
const SPACE_BYTES: usize = 256;
/// "Virtio device config space": offset, size, flags, and as many bytes as size says.
const HEADER_BYTES: usize = 12;
/// "Vhost front-end messages used for live migration".
const FLAG_MIGRATION: u32 = 1;
/// VIRTIO_NET_S_LINK_UP.
const LINK_UP: u16 = 1;
/// "0x00000000-0x7fffffff for a valid speed, 0xffffffff for unknown", and 0xff for an unknown duplex mode.
const SPEED_UNKNOWN: u32 = u32::MAX;
const DUPLEX_UNKNOWN: u8 = 0xff;

/// What a port's configuration space says that nothing else of the port does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ConfigSpace {
    /// The card's address, if it is configured. Without, it is zero, and VIRTIO_NET_F_MAC must not be offered.
    pub mac: Option<[u8; 6]>,
}

/// Why an access is not served.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ConfigFault {
    /// The message is no such access.
    Length,
    /// It reaches out of the space.
    Outside { offset: u32, bytes: u32 },
    /// Flags that mean nothing.
    Flags(u32),
    /// It would change what the port's configuration says.
    ReadOnly { offset: u32, bytes: u32 },
}

impl ConfigFault {
    pub(super) fn text(&self) -> String {
        match self {
            Self::Length => "its size and its length contradict each other".into(),
            Self::Outside { offset, bytes } => {
                format!("{bytes} bytes at {offset} are not in the configuration space of {SPACE_BYTES}")
            }
            Self::Flags(flags) => format!("flags {flags:#x} are not known"),
            Self::ReadOnly { offset, bytes } => {
                format!("{bytes} bytes at {offset} are the port's to say, not the VM's")
            }
        }
    }
}

/// One access.
struct Access<'a> {
    offset: u32,
    flags: u32,
    content: &'a [u8],
    range: std::ops::Range<usize>,
}

fn decode(payload: &[u8]) -> Result<Access<'_>, ConfigFault> {
    let (header, content) = payload.split_at_checked(HEADER_BYTES).ok_or(ConfigFault::Length)?;
    let word = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (offset, bytes, flags) = (word(0), word(4), word(8));
    if content.len() != bytes as usize {
        return Err(ConfigFault::Length);
    }
    let range = offset as usize..offset as usize + content.len();
    if content.is_empty() || range.end > SPACE_BYTES {
        return Err(ConfigFault::Outside { offset, bytes });
    }
    if flags & !FLAG_MIGRATION != 0 {
        return Err(ConfigFault::Flags(flags));
    }
    Ok(Access { offset, flags, content, range })
}

/// `struct virtio_net_config`, little-endian.
fn space(offer: &Offer) -> [u8; SPACE_BYTES] {
    let mut space = [0; SPACE_BYTES];
    let mac = offer.config_space.and_then(|config| config.mac).unwrap_or_default();
    space[0..6].copy_from_slice(&mac);
    space[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
    space[8..10].copy_from_slice(&offer.queue_pairs.to_le_bytes());
    space[10..12].copy_from_slice(&offer.mtu.to_le_bytes());
    space[12..16].copy_from_slice(&SPEED_UNKNOWN.to_le_bytes());
    space[16] = DUPLEX_UNKNOWN;
    space
}

/// The answer to GET_CONFIG: the request with its bytes filled in.
pub(super) fn read(offer: &Offer, payload: &[u8]) -> Result<Vec<u8>, ConfigFault> {
    let access = decode(payload)?;
    Ok([&payload[..HEADER_BYTES], &space(offer)[access.range]].concat())
}

/// Judges SET_CONFIG. "Back-ends MUST NOT accept SET_CONFIG for read-only configuration space fields unless the live
/// migration bit is set", and all of ours are: then what comes must be what is there, for the destination's port is
/// configured here.
pub(super) fn write(offer: &Offer, payload: &[u8]) -> Result<(), ConfigFault> {
    let Access { offset, flags, content, range } = decode(payload)?;
    if flags & FLAG_MIGRATION != 0 && space(offer)[range] == *content {
        return Ok(());
    }
    Err(ConfigFault::ReadOnly { offset, bytes: content.len() as u32 })
}

#[cfg(test)]
pub(super) fn access(offset: u32, flags: u32, content: &[u8]) -> Vec<u8> {
    let words = [offset, content.len() as u32, flags];
    words.iter().flat_map(|word| word.to_ne_bytes()).chain(content.iter().copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::super::offer::protocol;
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];

    fn offer() -> Offer {
        let config_space = Some(ConfigSpace { mac: Some(MAC) });
        Offer { features: 0, protocol_features: protocol::CONFIG, queue_pairs: 2, mtu: 1450, config_space }
    }

    /// VIRTIO 1.2 §5.1.4: mac[6], status, max_virtqueue_pairs, mtu, speed, duplex.
    #[test]
    fn the_space_is_the_ports_configuration() {
        let answer = read(&offer(), &access(0, 0, &[0xee; 24])).unwrap();
        let expected = [&MAC[..], &[1, 0, 2, 0, 0xaa, 5], &[0xff; 5], &[0; 7]].concat();
        assert_eq!(answer, access(0, 0, &expected));
        assert_eq!(read(&offer(), &access(10, 0, &[0; 2])).unwrap(), access(10, 0, &[0xaa, 5]));
        assert_eq!(read(&offer(), &access(255, 0, &[1])).unwrap(), access(255, 0, &[0]));
    }

    #[test]
    fn what_is_not_in_the_space_is_neither_read_nor_written() {
        let refused = |payload: &[u8]| {
            let fault = read(&offer(), payload).unwrap_err();
            assert_eq!(write(&offer(), payload), Err(fault));
        };
        for (offset, bytes) in [(0, 0), (256, 1), (255, 2), (0, 257), (u32::MAX, 1), (u32::MAX - 3, 8)] {
            refused(&access(offset, 0, &vec![0; bytes]));
        }
        refused(&access(0, 2, &[0; 6]));
        for length in [0, 11, 12, 17, 19] {
            let mut payload = access(0, 0, &[0; 6]);
            payload.resize(length, 0);
            assert_eq!(read(&offer(), &payload), Err(ConfigFault::Length), "{length}");
        }
    }

    #[test]
    fn only_a_migration_that_brings_what_is_there_may_write() {
        let refused = |payload: &[u8]| matches!(write(&offer(), payload), Err(ConfigFault::ReadOnly { .. }));
        assert!(refused(&access(0, 0, &MAC)));
        assert!(refused(&access(0, 1, &[0; 6])));
        assert_eq!(write(&offer(), &access(0, 1, &MAC)), Ok(()));
    }
}
