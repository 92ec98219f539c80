//! The next hops on a wire: which card has which address.
//!
//! A row is made only for an address that something is sent to, so strangers cannot fill the table. It is asked for when
//! it is used and not known, at most once a second; asked again, while it is still used, after [`REFRESH_NS`]; and not
//! believed any longer after [`EXPIRE_NS`] without an answer (compare RFC 4861 §10, RFC 1122 §2.3.2.1).

use std::net::IpAddr;

use crate::mac::Mac;

/// Next hops of one underlay at most.
pub const NEIGHBOURS_MAX: usize = 1024;

const SECOND_NS: u64 = 1_000_000_000;
const ASK_INTERVAL_NS: u64 = SECOND_NS;
/// RFC 4861 §10: REACHABLE_TIME is 30 s.
const REFRESH_NS: u64 = 30 * SECOND_NS;
const EXPIRE_NS: u64 = 60 * SECOND_NS;
/// After so long without use a row may make way for another.
const IDLE_NS: u64 = 60 * SECOND_NS;

/// A question to put on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ask {
    /// Whose card is wanted.
    pub(crate) address: IpAddr,
    /// Who had it last; `None`: ask everybody.
    pub(crate) last_known: Option<Mac>,
}

#[derive(Debug, Clone, Copy)]
struct Row {
    address: IpAddr,
    mac: Option<Mac>,
    /// Configured, or told by the kernel: never asked for, never aged.
    is_fixed: bool,
    confirmed_ns: u64,
    asked_ns: Option<u64>,
    used_ns: u64,
}

/// See the module's text. Never grows: [`NEIGHBOURS_MAX`] rows are allocated at the start.
#[derive(Debug)]
pub(crate) struct Neighbours {
    rows: Vec<Row>,
    /// Whether unknown addresses are asked for here, or by somebody else.
    asks: bool,
}

impl Neighbours {
    /// With neighbours that are known from the start. `asks`: whether others are asked for on the wire.
    pub(crate) fn new(fixed: &[(IpAddr, Mac)], asks: bool) -> Self {
        let mut rows = Vec::with_capacity(NEIGHBOURS_MAX);
        rows.extend(fixed.iter().take(NEIGHBOURS_MAX).map(|&(address, mac)| Row {
            address,
            mac: Some(mac),
            is_fixed: true,
            confirmed_ns: 0,
            asked_ns: None,
            used_ns: 0,
        }));
        Self { rows, asks }
    }

    /// Whether the address is a configured neighbour.
    pub(crate) fn is_fixed(&self, address: IpAddr) -> bool {
        self.rows.iter().any(|row| row.is_fixed && row.address == address)
    }

    /// The row of an address, made if need be. `None`: the table is full of others in use.
    pub(crate) fn row(&mut self, address: IpAddr, now_ns: u64) -> Option<u16> {
        if let Some(index) = self.rows.iter().position(|row| row.address == address) {
            return Some(index as u16);
        }
        let fresh = Row { address, mac: None, is_fixed: false, confirmed_ns: now_ns, asked_ns: None, used_ns: now_ns };
        if self.rows.len() < NEIGHBOURS_MAX {
            self.rows.push(fresh);
            return Some((self.rows.len() - 1) as u16);
        }
        let idle = |row: &Row| !row.is_fixed && now_ns.saturating_sub(row.used_ns) >= IDLE_NS;
        let index = self.rows.iter().position(idle)?;
        self.rows[index] = fresh;
        Some(index as u16)
    }

    /// The card in row `index`, if the row is `address`' and nothing has to be asked: nearly always.
    #[inline]
    pub(crate) fn fresh(&mut self, index: u16, address: &IpAddr, now_ns: u64) -> Option<Mac> {
        let row = self.rows.get_mut(usize::from(index)).filter(|row| row.address == *address)?;
        row.used_ns = now_ns;
        row.mac.filter(|_| row.is_fixed || now_ns.saturating_sub(row.confirmed_ns) < REFRESH_NS)
    }

    /// The card of `address`, which was in row `index`, for sending to it now; and a question, if it is time for one.
    /// `None` as the card: not known, or the row is another address's by now.
    #[inline]
    pub(crate) fn resolve(&mut self, index: u16, address: IpAddr, now_ns: u64) -> (Option<Mac>, Option<Ask>) {
        let Some(row) = self.rows.get_mut(usize::from(index)).filter(|row| row.address == address) else {
            return (None, None);
        };
        row.used_ns = now_ns;
        if row.is_fixed || (row.mac.is_some() && now_ns.saturating_sub(row.confirmed_ns) < REFRESH_NS) {
            return (row.mac, None);
        }
        if now_ns.saturating_sub(row.confirmed_ns) >= EXPIRE_NS {
            row.mac = None;
        }
        let is_due = row.asked_ns.is_none_or(|asked| now_ns.saturating_sub(asked) >= ASK_INTERVAL_NS);
        if !is_due || !self.asks {
            return (row.mac, None);
        }
        row.asked_ns = Some(now_ns);
        (row.mac, Some(Ask { address, last_known: row.mac }))
    }

    /// Somebody who knows says which cards there are, sorted by address: what is not among them is not known any more.
    pub(crate) fn replace(&mut self, told: &[(IpAddr, Mac)]) {
        for row in &mut self.rows {
            let found = told.binary_search_by_key(&row.address, |(address, _)| *address);
            row.mac = found.ok().map(|index| told[index].1);
            row.is_fixed = row.mac.is_some();
        }
        let now_ns = 0;
        for &(address, mac) in told {
            if let Some(index) = self.row(address, now_ns) {
                let row = &mut self.rows[usize::from(index)];
                (row.mac, row.is_fixed) = (Some(mac), true);
            }
        }
    }

    /// Somebody says where an address is. Believed if it is sent to, and not configured.
    pub(crate) fn hear(&mut self, address: IpAddr, mac: Mac, now_ns: u64) {
        if !mac.is_station() {
            return;
        }
        if let Some(row) = self.rows.iter_mut().find(|row| row.address == address && !row.is_fixed) {
            row.mac = Some(mac);
            row.confirmed_ns = now_ns;
            row.asked_ns = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(number: u32) -> IpAddr {
        std::net::Ipv4Addr::from(0x0a00_0000 + number).into()
    }

    const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);

    #[test]
    fn an_unknown_address_is_asked_for_once_a_second_until_it_answers() {
        let mut table = Neighbours::new(&[], true);
        let row = table.row(address(1), 0).unwrap();
        let everybody = Some(Ask { address: address(1), last_known: None });
        assert_eq!(table.resolve(row, address(1), 0), (None, everybody));
        assert_eq!(table.resolve(row, address(1), SECOND_NS - 1), (None, None));
        assert_eq!(table.resolve(row, address(1), SECOND_NS), (None, everybody));
        table.hear(address(1), MAC, SECOND_NS);
        assert_eq!(table.resolve(row, address(1), SECOND_NS), (Some(MAC), None));
    }

    #[test]
    fn a_neighbour_is_confirmed_while_in_use_and_forgotten_when_silent() {
        let mut table = Neighbours::new(&[], true);
        let row = table.row(address(1), 0).unwrap();
        table.hear(address(1), MAC, 0);
        assert_eq!(table.resolve(row, address(1), REFRESH_NS - 1), (Some(MAC), None));
        let it = Some(Ask { address: address(1), last_known: Some(MAC) });
        assert_eq!(table.resolve(row, address(1), REFRESH_NS), (Some(MAC), it));
        assert_eq!(table.resolve(row, address(1), REFRESH_NS + 1), (Some(MAC), None));
        let everybody = Some(Ask { address: address(1), last_known: None });
        assert_eq!(table.resolve(row, address(1), EXPIRE_NS), (None, everybody));
        let moved = Mac([2, 0, 0, 0, 0, 10]);
        table.hear(address(1), moved, EXPIRE_NS);
        assert_eq!(table.resolve(row, address(1), EXPIRE_NS), (Some(moved), None));
    }

    #[test]
    fn strangers_and_group_addresses_are_not_believed() {
        let mut table = Neighbours::new(&[(address(7), MAC)], true);
        table.hear(address(1), MAC, 0);
        assert_eq!(table.rows.len(), 1);
        let row = table.row(address(1), 0).unwrap();
        table.hear(address(1), Mac::BROADCAST, 0);
        assert_eq!(table.resolve(row, address(1), 0).0, None);
        table.hear(address(7), Mac([2, 0, 0, 0, 0, 66]), 0);
        assert_eq!(table.resolve(0, address(7), 100 * EXPIRE_NS), (Some(MAC), None), "configured");
    }

    #[test]
    fn what_the_kernel_tells_replaces_what_it_told_before() {
        let mut table = Neighbours::new(&[], false);
        let row = table.row(address(2), 0).unwrap();
        assert_eq!(table.resolve(row, address(2), 0), (None, None), "nobody is asked");
        table.replace(&[(address(1), MAC), (address(2), MAC)]);
        assert_eq!(table.resolve(row, address(2), 10 * EXPIRE_NS), (Some(MAC), None));
        let moved = Mac([2, 0, 0, 0, 0, 10]);
        table.replace(&[(address(1), moved)]);
        assert_eq!(table.resolve(row, address(2), 10 * EXPIRE_NS), (None, None));
        let row = table.row(address(1), 0).unwrap();
        assert_eq!(table.resolve(row, address(1), 0), (Some(moved), None));
        assert_eq!(table.rows.len(), 2);
    }

    #[test]
    fn a_full_table_refuses_until_rows_are_idle_and_never_allocates() {
        let mut table = Neighbours::new(&[], true);
        let capacity = table.rows.capacity();
        for number in 0..NEIGHBOURS_MAX as u32 {
            assert!(table.row(address(number), 0).is_some());
        }
        assert_eq!(table.row(address(5000), IDLE_NS - 1), None);
        let row = table.row(address(5000), IDLE_NS).unwrap();
        assert_eq!(table.resolve(row, address(0), IDLE_NS), (None, None), "the row is another's now");
        assert_eq!(table.rows.capacity(), capacity);
    }
}
