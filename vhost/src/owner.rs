//! The boundary between a session and whoever serves its rings.

use crate::ring::Ring;

/// Who serves a session's rings. One per session (port). Called from the session's thread.
pub trait RingOwner: Send + Sync + 'static {
    /// Hands over ring `queue` (even: guest receiveq, odd: guest transmitq). The owner alone touches it until
    /// `detach`.
    fn attach(&self, queue: u16, ring: Ring);

    /// Takes ring `queue` back; returns only when the owner will never touch it again. `None` if it was not
    /// attached.
    fn detach(&self, queue: u16) -> Option<Ring>;

    /// Something an operator may want to see changed.
    fn event(&self, event: SessionEvent);
}

/// What happens to a session, for `show port` and the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEvent {
    /// A front-end has connected.
    Connected,
    /// The front-end has accepted these virtio feature bits.
    Negotiated {
        /// VIRTIO feature bits, 64 wide.
        features: u64,
    },
    /// The front-end is gone, or was sent away; `reason` is for people.
    Disconnected {
        /// Why, as a sentence that names what to do where something can be done.
        reason: String,
    },
    /// Writes to guest memory are logged from now on, or no longer: the VM is being migrated away.
    DirtyLog {
        /// Whether they are.
        on: bool,
    },
    /// SEND_RARP: the VM runs here now, and its driver does not say so itself. A frame in its name must tell the network.
    Announce {
        /// The VM's address.
        mac: [u8; 6],
    },
    /// Something that works, but hardly as meant (unsealed memory, memory that is not shared), or was refused.
    Warning(String),
    /// As above, from a port that has had its share of log lines: to be shown, not logged.
    QuietWarning(String),
}
