//! What is logged of broken rings. Guests break them at will, so each port has one line a second; what was left out is
//! counted in the next line.

use dreamwire_vhost::ring::RingFault;

use crate::snapshot::{PORTS_MAX, PortId, Snapshot};

/// Between two lines about one port.
const INTERVAL_NS: u64 = 1_000_000_000;

/// When a port was last written about, and what was left out since.
#[derive(Debug, Clone, Copy, Default)]
struct Row {
    next_ns: u64,
    suppressed: u64,
}

/// See the module's text. Owned by one worker; [`PORTS_MAX`] rows.
#[derive(Debug)]
pub(crate) struct FaultLog {
    rows: Box<[Row]>,
    now_ns: u64,
}

impl Default for FaultLog {
    fn default() -> Self {
        Self { rows: vec![Row::default(); PORTS_MAX].into(), now_ns: 0 }
    }
}

impl FaultLog {
    /// The time, at the start of a turn.
    #[inline]
    pub(crate) fn set_now(&mut self, now_ns: u64) {
        self.now_ns = now_ns;
    }

    /// Logs that a ring was found broken, if the port may have a line.
    #[cold]
    pub(crate) fn report(&mut self, snapshot: &Snapshot, id: PortId, queue: u16, fault: RingFault) {
        let Some(suppressed) = self.admit(id) else { return };
        let Some(port) = snapshot.port(id) else { return };
        tracing::warn!(port = %port.name, queue, %fault, suppressed, "ring quarantined until its driver resets");
    }

    /// Whether the port may have a line; if so, how many it was refused before.
    fn admit(&mut self, id: PortId) -> Option<u64> {
        let row = &mut self.rows[usize::from(id.0)];
        if self.now_ns < row.next_ns {
            row.suppressed += 1;
            return None;
        }
        row.next_ns = self.now_ns + INTERVAL_NS;
        Some(std::mem::take(&mut row.suppressed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_has_one_line_a_second_and_others_have_theirs() {
        let mut log = FaultLog::default();
        let admitted = (0..1000).filter(|_| log.admit(PortId(3)).is_some()).count();
        assert_eq!(admitted, 1);
        assert_eq!(log.admit(PortId(4)), Some(0));
        log.set_now(INTERVAL_NS);
        assert_eq!(log.admit(PortId(3)), Some(999));
        assert_eq!(log.admit(PortId(3)), None);
    }
}
