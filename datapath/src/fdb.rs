//! The forwarding database: where stations were last seen. Owned by one worker, so nothing here is shared.
//!
//! A set-associative table: a key's hash names one bucket of 8 keys (one cache line), and the key is in that bucket or
//! nowhere. So every operation is bounded, nothing ever grows, and a full bucket means that an address is not learned
//! and its frames are flooded, as with any switch. The hash is seeded: a guest cannot aim at a bucket. Quotas keep one
//! port, and one network's tunnel, from filling the table for others.
//!
//! With several workers each has a whole table of its own, and tells the others of what it learns ([`Seen`]). Where two saw
//! the same station in different places, the later sighting holds, at all of them: what a worker sees itself is later than
//! everything that it has heard of.

use std::hash::BuildHasher;
use std::net::IpAddr;

use foldhash::quality::RandomState;

use crate::mac::Mac;
use crate::snapshot::{NETWORKS_MAX, NetworkId, PORTS_MAX, PortId, WorkerId};

/// Addresses in one bucket: 8 keys of 8 bytes are a cache line.
const WAYS: usize = 8;

/// Buckets: room for 65,536 addresses.
const BUCKETS: usize = 8192;

/// Addresses learned at one port at most: a guest with that many nested machines bridges a rack.
pub const LEARNED_PER_PORT_MAX: u16 = 1024;

/// Addresses learned from one network's tunnel at most.
pub const LEARNED_PER_TUNNEL_MAX: u32 = 16384;

/// An entry is written to again only after this long, so that a steady flow leaves its cache line clean.
const REFRESH_NS: u64 = 1_000_000_000;

/// How often [`Fdb::learn`] has to hear of a station that sends, in ns, for an entry of `age_ns` never to be forgotten: it
/// may go unwritten for that long twice.
#[inline]
pub fn refresh_ns(age_ns: u64) -> u64 {
    REFRESH_NS.min(age_ns / 4)
}

/// Sightings kept for the others until the end of a turn. A burst has 32 frames, a turn as many bursts as there are ports
/// with something to say; what is too much is said at the next refresh.
const NEWS_MAX: usize = 1024;

/// Of these, one network's at most: two stations that take each other's address with every frame leave others room.
const NEWS_PER_NETWORK_MAX: u16 = 64;

/// A worker's epochs are below that power of two more than where they begin: a million a second for half a year.
const EPOCH_BITS: u32 = 44;

/// Buckets looked at by one [`Fdb::sweep`].
const SWEEP_BUCKETS: usize = 256;

/// Where a station was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Location {
    /// A local port, whichever worker's.
    Port(PortId),
    /// Another host's VTEP.
    Vtep(IpAddr),
}

/// What a worker tells the others when it has learned an address, or has noted anew that it is still there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// Segment.
    pub network: NetworkId,
    /// Station.
    pub mac: Mac,
    /// Where.
    pub location: Location,
    /// When, in ns; workers have one clock.
    pub seen_ns: u64,
}

/// What became of an address that was seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Learned {
    /// It was known there.
    Known,
    /// It is new, or has moved.
    New,
    /// The bucket or the quota is full.
    Refused,
}

/// A learned address, for `show fdb`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdbRow {
    /// Segment.
    pub network: NetworkId,
    /// Station.
    pub mac: Mac,
    /// Where it was last seen.
    pub location: Location,
    /// Time since it was last seen, in ns, give or take two seconds.
    pub idle_ns: u64,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    location: Location,
    seen_ns: u64,
    /// When the entry is forgotten; the network's age as of the last refresh.
    expires_ns: u64,
}

/// The table. See the module's text.
#[derive(Debug)]
pub struct Fdb {
    hasher: RandomState,
    keys: Box<[[u64; WAYS]]>,
    entries: Box<[[Entry; WAYS]]>,
    by_port: Box<[u16]>,
    by_tunnel: Box<[u32]>,
    sweep_at: usize,
    /// By network.
    epochs: Box<[u64]>,
    /// For the other workers. Of no capacity if there are none.
    news: Vec<Seen>,
    /// By network: how much of it is its.
    news_by_network: Box<[u16]>,
    news_lost: u64,
}

/// Network and address in one word. Never zero, which marks a free place: a station's address is not zero.
#[inline]
fn key(network: NetworkId, mac: Mac) -> u64 {
    u64::from(network.0) << 48 | mac.to_u64()
}

#[inline]
fn key_network(key: u64) -> NetworkId {
    NetworkId((key >> 48) as u16)
}

impl Default for Fdb {
    fn default() -> Self {
        let free = Entry { location: Location::Port(PortId(0)), seen_ns: 0, expires_ns: 0 };
        Self {
            hasher: RandomState::default(),
            keys: vec![[0; WAYS]; BUCKETS].into_boxed_slice(),
            entries: vec![[free; WAYS]; BUCKETS].into_boxed_slice(),
            by_port: vec![0; PORTS_MAX].into_boxed_slice(),
            by_tunnel: vec![0; NETWORKS_MAX].into_boxed_slice(),
            sweep_at: 0,
            epochs: vec![1; NETWORKS_MAX].into_boxed_slice(),
            news: Vec::new(),
            news_by_network: vec![0; NETWORKS_MAX].into_boxed_slice(),
            news_lost: 0,
        }
    }
}

impl Fdb {
    #[inline]
    fn bucket(&self, key: u64) -> usize {
        self.hasher.hash_one(key) as usize % BUCKETS
    }

    /// Rises with every address that comes, moves or goes in `network`: what was looked up there at the same epoch still
    /// holds, until it grows old. Never zero. One for each network: whoever has addresses move costs his own network.
    #[inline]
    pub fn epoch(&self, network: NetworkId) -> u64 {
        self.epochs[usize::from(network.0)]
    }

    /// Makes everything that was looked up before be looked up again.
    pub fn renew(&mut self) {
        // Above every earlier one of any network: a port may come to another.
        let next = self.epochs.iter().max().map_or(1, |epoch| epoch + 1);
        self.epochs.fill(next);
    }

    /// Has epochs begin so far from other workers' that they are never the same: a port takes along what was noted at one.
    pub(crate) fn begin_at(&mut self, worker: WorkerId) {
        self.epochs.fill(1 + (u64::from(worker.0) << EPOCH_BITS));
    }

    /// Where `mac` was last seen in `network` and when that is forgotten (ns), unless it was too long ago.
    #[inline]
    pub fn lookup(&self, network: NetworkId, mac: Mac, now_ns: u64) -> Option<(Location, u64)> {
        let key = key(network, mac);
        let bucket = self.bucket(key);
        let way = self.keys[bucket].iter().position(|&other| other == key)?;
        let entry = &self.entries[bucket][way];
        (entry.expires_ns > now_ns).then_some((entry.location, entry.expires_ns))
    }

    /// Notes that station `mac` of `network` was seen at `location`.
    #[inline]
    pub fn learn(&mut self, network: NetworkId, mac: Mac, location: Location, now_ns: u64, age_ns: u64) -> Learned {
        debug_assert!(mac.is_station());
        let key = key(network, mac);
        let bucket = self.bucket(key);
        let mut seen_ns = now_ns;
        if let Some(way) = self.keys[bucket].iter().position(|&other| other == key) {
            let entry = &self.entries[bucket][way];
            if entry.location == location {
                if now_ns.saturating_sub(entry.seen_ns) >= refresh_ns(age_ns) || entry.expires_ns <= now_ns {
                    self.entries[bucket][way] = Entry { location, seen_ns: now_ns, expires_ns: now_ns + age_ns };
                    self.note(Seen { network, mac, location, seen_ns });
                }
                return Learned::Known;
            }
            // Another worker's turn may have begun after ours.
            seen_ns = seen_ns.max(entry.seen_ns + 1);
            self.forget(bucket, way);
        }
        let learned = self.insert(bucket, key, Entry { location, seen_ns, expires_ns: seen_ns + age_ns }, now_ns);
        if learned == Learned::New {
            self.note(Seen { network, mac, location, seen_ns });
        }
        learned
    }

    /// Notes what another worker has seen, unless something later is known.
    pub fn hear(&mut self, seen: Seen, now_ns: u64, age_ns: u64) -> Learned {
        let Seen { network, mac, location, seen_ns } = seen;
        let key = key(network, mac);
        let bucket = self.bucket(key);
        let heard = Entry { location, seen_ns, expires_ns: seen_ns + age_ns };
        if let Some(way) = self.keys[bucket].iter().position(|&other| other == key) {
            let entry = &mut self.entries[bucket][way];
            // At the same moment: any order, as long as it is everybody's.
            if (entry.seen_ns, entry.location) >= (seen_ns, location) {
                return Learned::Known;
            }
            if entry.location == location {
                *entry = heard;
                return Learned::Known;
            }
            self.forget(bucket, way);
        }
        self.insert(bucket, key, heard, now_ns)
    }

    /// Keeps what is learned for other workers from now on.
    pub(crate) fn keep_news(&mut self) {
        self.news.reserve_exact(NEWS_MAX);
    }

    /// What was learned since the last call, and how much more there was no room for.
    pub(crate) fn take_news(&mut self) -> (impl Iterator<Item = Seen>, u64) {
        self.news.iter().for_each(|seen| self.news_by_network[usize::from(seen.network.0)] = 0);
        (self.news.drain(..), std::mem::take(&mut self.news_lost))
    }

    fn note(&mut self, seen: Seen) {
        if self.news.capacity() == 0 {
            return;
        }
        let of_network = &mut self.news_by_network[usize::from(seen.network.0)];
        if self.news.len() == NEWS_MAX || *of_network == NEWS_PER_NETWORK_MAX {
            self.news_lost += 1;
            return;
        }
        *of_network += 1;
        self.news.push(seen);
    }

    fn insert(&mut self, bucket: usize, key: u64, entry: Entry, now_ns: u64) -> Learned {
        let within_quota = match entry.location {
            Location::Port(port) => self.by_port[usize::from(port.0)] < LEARNED_PER_PORT_MAX,
            Location::Vtep(_) => self.by_tunnel[usize::from(key_network(key).0)] < LEARNED_PER_TUNNEL_MAX,
        };
        let free = (0..WAYS).find(|&way| self.keys[bucket][way] == 0 || self.entries[bucket][way].expires_ns <= now_ns);
        let Some(way) = free.filter(|_| within_quota) else { return Learned::Refused };
        self.forget(bucket, way);
        self.epochs[usize::from(key_network(key).0)] += 1;
        self.keys[bucket][way] = key;
        self.entries[bucket][way] = entry;
        self.count(key, entry.location, 1);
        Learned::New
    }

    /// Frees a place, if it is taken.
    fn forget(&mut self, bucket: usize, way: usize) {
        let key = std::mem::take(&mut self.keys[bucket][way]);
        if key != 0 {
            self.epochs[usize::from(key_network(key).0)] += 1;
            self.count(key, self.entries[bucket][way].location, -1);
        }
    }

    fn count(&mut self, key: u64, location: Location, by: i16) {
        match location {
            Location::Port(port) => {
                let count = &mut self.by_port[usize::from(port.0)];
                *count = count.strict_add_signed(by);
            }
            Location::Vtep(_) => {
                let count = &mut self.by_tunnel[usize::from(key_network(key).0)];
                *count = count.strict_add_signed(i32::from(by));
            }
        }
    }

    /// Forgets what is too old in the next few buckets, so that quotas free up. Call it about once a second or more
    /// often; 32 calls look at the whole table.
    pub fn sweep(&mut self, now_ns: u64) {
        for _ in 0..SWEEP_BUCKETS {
            let bucket = self.sweep_at;
            self.sweep_at = (bucket + 1) % BUCKETS;
            for way in 0..WAYS {
                if self.keys[bucket][way] != 0 && self.entries[bucket][way].expires_ns <= now_ns {
                    self.forget(bucket, way);
                }
            }
        }
    }

    /// Forgets every entry for which `keep` is false. Looks at the whole table (about 100 µs): for changes of the
    /// configuration only.
    pub fn retain(&mut self, keep: impl Fn(NetworkId, Mac, Location) -> bool) {
        for bucket in 0..BUCKETS {
            for way in 0..WAYS {
                let key = self.keys[bucket][way];
                if key != 0 && !keep(key_network(key), Mac::from_u64(key), self.entries[bucket][way].location) {
                    self.forget(bucket, way);
                }
            }
        }
    }

    /// What is known of one station, if that is not too old.
    pub fn row(&self, network: NetworkId, mac: Mac, now_ns: u64) -> Option<FdbRow> {
        let key = key(network, mac);
        let bucket = self.bucket(key);
        let way = self.keys[bucket].iter().position(|&other| other == key)?;
        let entry = &self.entries[bucket][way];
        let idle_ns = now_ns.saturating_sub(entry.seen_ns);
        (entry.expires_ns > now_ns).then_some(FdbRow { network, mac, location: entry.location, idle_ns })
    }

    /// Everything that is known and not too old.
    pub fn rows(&self, now_ns: u64) -> Vec<FdbRow> {
        let places = self.keys.as_flattened().iter().zip(self.entries.as_flattened());
        places
            .filter(|(key, entry)| **key != 0 && entry.expires_ns > now_ns)
            .map(|(&key, entry)| FdbRow {
                network: key_network(key),
                mac: Mac::from_u64(key),
                location: entry.location,
                idle_ns: now_ns.saturating_sub(entry.seen_ns),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NET: NetworkId = NetworkId(3);
    const AGE: u64 = 300 * 1_000_000_000;

    fn mac(number: u32) -> Mac {
        let [a, b, c, d] = number.to_be_bytes();
        Mac([2, 0, a, b, c, d])
    }

    fn port(number: u16) -> Location {
        Location::Port(PortId(number))
    }

    #[test]
    fn a_station_is_found_where_it_was_last_seen() {
        let mut fdb = Fdb::default();
        assert_eq!(fdb.learn(NET, mac(1), port(1), 0, AGE), Learned::New);
        assert_eq!(fdb.learn(NET, mac(1), port(1), 5, AGE), Learned::Known);
        assert_eq!(fdb.lookup(NET, mac(1), 5), Some((port(1), AGE)));
        let vtep = Location::Vtep("192.0.2.2".parse().unwrap());
        assert_eq!(fdb.learn(NET, mac(1), vtep, 6, AGE), Learned::New);
        assert_eq!(fdb.lookup(NET, mac(1), 6), Some((vtep, 6 + AGE)));
        assert_eq!(fdb.by_port[1], 0);
        assert_eq!(fdb.lookup(NetworkId(4), mac(1), 6), None, "networks do not see each other's stations");
    }

    #[test]
    fn an_old_station_is_forgotten_and_a_seen_one_is_not() {
        let mut fdb = Fdb::default();
        fdb.learn(NET, mac(1), port(1), 0, AGE);
        fdb.learn(NET, mac(2), port(1), 0, AGE);
        fdb.learn(NET, mac(2), port(1), AGE / 2, AGE);
        assert_eq!(fdb.lookup(NET, mac(1), AGE), None);
        assert_eq!(fdb.lookup(NET, mac(2), AGE), Some((port(1), AGE / 2 + AGE)));
        for _ in 0..BUCKETS / SWEEP_BUCKETS {
            fdb.sweep(AGE);
        }
        assert_eq!(fdb.by_port[1], 1);
        assert_eq!(fdb.rows(AGE).len(), 1);
    }

    #[test]
    fn an_age_below_the_refresh_interval_is_kept() {
        let mut fdb = Fdb::default();
        let age = REFRESH_NS / 4;
        fdb.learn(NET, mac(1), port(1), 0, age);
        fdb.learn(NET, mac(1), port(1), 2 * age, age);
        assert_eq!(fdb.lookup(NET, mac(1), 2 * age), Some((port(1), 3 * age)));
    }

    #[test]
    fn the_epoch_rises_when_an_address_comes_moves_or_goes_and_only_then() {
        let mut fdb = Fdb::default();
        let mut last = fdb.epoch(NET);
        let mut rose = |fdb: &Fdb| std::mem::replace(&mut last, fdb.epoch(NET)) < fdb.epoch(NET);
        fdb.learn(NET, mac(1), port(1), 0, AGE);
        assert!(rose(&fdb));
        fdb.learn(NET, mac(1), port(1), REFRESH_NS, AGE);
        assert!(!rose(&fdb), "a refresh changes no answer");
        fdb.learn(NET, mac(1), port(2), REFRESH_NS, AGE);
        assert!(rose(&fdb));
        fdb.retain(|_, _, _| false);
        assert!(rose(&fdb));
        fdb.learn(NetworkId(4), mac(1), port(1), 0, AGE);
        assert!(!rose(&fdb), "another network's");
    }

    #[test]
    fn tables_that_tell_each_other_agree_on_the_latest_place_in_any_order() {
        let told = |fdb: &mut Fdb| fdb.take_news().0.collect::<Vec<_>>();
        let mut tables = [Fdb::default(), Fdb::default()];
        tables.iter_mut().for_each(Fdb::keep_news);
        // Both see the station before either has heard of the other; the clock says so of one, or of neither.
        for (station, times) in [(1, [10, 20]), (2, [20, 10]), (3, [15, 15])] {
            for (at, fdb) in tables.iter_mut().enumerate() {
                assert_eq!(fdb.learn(NET, mac(station), port(at as u16), times[at], AGE), Learned::New);
            }
            let news = tables.each_mut().map(told);
            assert_eq!(news.each_ref().map(Vec::len), [1, 1]);
            tables[0].hear(news[1][0], 30, AGE);
            tables[1].hear(news[0][0], 30, AGE);
            let [zero, one] = tables.each_ref().map(|fdb| fdb.lookup(NET, mac(station), 30).unwrap().0);
            assert_eq!(zero, one);
            assert_eq!(zero, port(if times[0] > times[1] { 0 } else { 1 }));
        }
        // Seen here after the others were heard of: later, whatever the clock says.
        assert_eq!(tables[0].learn(NET, mac(1), port(0), 5, AGE), Learned::New);
        let news = told(&mut tables[0]);
        assert_eq!(tables[1].hear(news[0], 30, AGE), Learned::New);
        assert_eq!(tables[1].lookup(NET, mac(1), 30).unwrap().0, port(0));
        assert_eq!((tables[1].by_port[0], tables[1].by_port[1]), (2, 1), "{:?}", tables[1].rows(30));
        // A refresh is told too, so that nobody forgets.
        tables[0].learn(NET, mac(1), port(0), REFRESH_NS + 30, AGE);
        let news = told(&mut tables[0]);
        assert_eq!(tables[1].hear(news[0], REFRESH_NS + 31, AGE), Learned::Known);
        assert_eq!(tables[1].lookup(NET, mac(1), AGE + 30), Some((port(0), REFRESH_NS + 30 + AGE)));
    }

    #[test]
    fn one_port_cannot_fill_the_table() {
        let mut fdb = Fdb::default();
        let refused = (0..3000).filter(|&n| fdb.learn(NET, mac(n), port(1), 0, AGE) == Learned::Refused).count();
        assert_eq!(refused, 3000 - usize::from(LEARNED_PER_PORT_MAX));
        assert_eq!(fdb.learn(NET, mac(5000), port(2), 0, AGE), Learned::New);
        fdb.retain(|_, _, location| location != port(1));
        assert_eq!(fdb.rows(0).len(), 1);
        assert_eq!(fdb.learn(NET, mac(1), port(1), 0, AGE), Learned::New);
    }

    #[test]
    fn one_networks_news_leave_others_room() {
        let mut fdb = Fdb::default();
        fdb.keep_news();
        let station = Mac([2, 0, 0, 0, 0, 1]);
        for frame in 0..5000 {
            fdb.learn(NetworkId(0), station, Location::Port(PortId(frame % 2)), u64::from(frame), AGE);
        }
        fdb.learn(NetworkId(1), station, Location::Port(PortId(2)), 5000, AGE);
        let (news, lost) = fdb.take_news();
        let networks: Vec<_> = news.map(|seen| seen.network.0).collect();
        let of = |network| networks.iter().filter(|&&other| other == network).count();
        assert_eq!((of(0), of(1), lost), (64, 1, 5000 - 64));
        // And the next turn begins with all of it.
        fdb.learn(NetworkId(0), station, Location::Port(PortId(3)), 6000, AGE);
        assert_eq!(fdb.take_news().0.count(), 1);
    }
}
