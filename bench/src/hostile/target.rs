//! What is attacked: a dreamwire daemon, or DPDK's testpmd over its vhost driver. Four ports: two innocent, `bad`, and
//! `friend` on bad's other side. dreamwire has a fifth beside `bad`: `pairs`, which has two queue pairs.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Failure;
use super::tally::Counted;
use crate::topology::{Daemon, DaemonSpec, http_get};
use crate::traffic::Testpmd;
use crate::traffic::testpmd::TestpmdOptions;

/// Two networks that have nothing to do with each other.
const CONFIG: &str = r#"
[daemon]
run_dir = "{run_dir}"
[[network]]
name = "good"
[[network]]
name = "bad"
[[port]]
name = "good1"
network = "good"
[[port]]
name = "good2"
network = "good"
[[port]]
name = "bad"
network = "bad"
[[port]]
name = "friend"
network = "bad"
[[port]]
name = "pairs"
network = "bad"
queues = 2
"#;

/// A running target; it ends when dropped.
#[derive(Debug)]
pub enum Target {
    /// The daemon.
    Dreamwire(Box<Daemon>),
    /// testpmd in io mode, with two pairs of ports.
    Testpmd(Box<Testpmd>),
}

/// What dreamwire says about the attacked port.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// A front-end is connected.
    pub connected: bool,
    /// Connections so far.
    pub connections: u64,
    /// Why the last one ended.
    pub last_end: String,
    /// Of the last connection.
    pub warnings: Vec<String>,
    /// Why rings are quarantined, those that are.
    pub quarantined: Vec<String>,
}

impl Target {
    /// Starts the `dreamwire` program at `binary`.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn dreamwire(binary: &Path) -> Result<Self, Failure> {
        let spec = DaemonSpec { name: "dreamwire", binary, netns: None, config: CONFIG };
        Ok(Self::Dreamwire(Box::new(Daemon::start(&spec).map_err(|error| Failure::Wrong(error.to_string()))?)))
    }

    /// Starts testpmd.
    ///
    /// # Errors
    /// When it is missing, or does not come up.
    pub fn testpmd() -> Result<Self, Failure> {
        let options = TestpmdOptions { bystanders: true, ..TestpmdOptions::default() };
        let started = Testpmd::start(&std::env::temp_dir(), &options);
        Ok(Self::Testpmd(Box::new(started.map_err(|error| Failure::Wrong(error.to_string()))?)))
    }

    /// Whether what it says about its ports can be asked for.
    pub fn is_dreamwire(&self) -> bool {
        matches!(self, Self::Dreamwire(_))
    }

    /// Whether it has that port.
    pub fn has(&self, port: &str) -> bool {
        self.is_dreamwire() || port != "pairs"
    }

    /// The socket of `good1`, `good2`, `bad`, `friend` or `pairs`.
    pub fn socket(&self, port: &str) -> PathBuf {
        match self {
            Self::Dreamwire(daemon) => daemon.path(&format!("{port}.sock")),
            Self::Testpmd(testpmd) => testpmd.socket(match port {
                "bad" => "a.sock",
                "friend" => "b.sock",
                "good1" => "c.sock",
                _ => "d.sock",
            }),
        }
    }

    /// How it ended, if it did.
    pub fn ended(&mut self) -> Option<String> {
        match self {
            Self::Dreamwire(daemon) => daemon.check_running().err().map(|error| error.to_string()),
            Self::Testpmd(testpmd) => testpmd.ended().map(|status| status.to_string()),
        }
    }

    fn pid(&self) -> u32 {
        match self {
            Self::Dreamwire(daemon) => daemon.pid(),
            Self::Testpmd(testpmd) => testpmd.pid(),
        }
    }

    /// Open descriptors.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pid())).map_or(0, Iterator::count)
    }

    /// Resident memory of its own, KiB: what guests share with it is theirs.
    pub fn private_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap_or_default();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
        line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse().ok()).unwrap_or(0)
    }

    /// What dreamwire says about the attacked port, on the API and on the statistics socket, which must agree about
    /// quarantine.
    ///
    /// # Errors
    /// When it does not answer, or the sockets differ.
    pub fn view(&self, name: &str) -> Result<View, Failure> {
        let Self::Dreamwire(daemon) = self else { return Ok(View::default()) };
        let path = format!("/v1/ports/{name}");
        let port = get(&daemon.path("api.sock"), &path)?;
        let stats = get(&daemon.path("stats.sock"), "/stats")?;
        let listed = stats["ports"].as_array().into_iter().flatten().find(|port| port["name"] == name);
        let listed = listed.ok_or_else(|| Failure::Wrong(format!("the statistics have no port {name}")))?;
        let quarantined = reasons(&port);
        if !reasons(listed).iter().all(|reason| quarantined.contains(reason))
            && reasons(&get(&daemon.path("api.sock"), &path)?) != reasons(listed)
        {
            return Err(Failure::Wrong(format!("the sockets differ: {quarantined:?} and {:?}", reasons(listed))));
        }
        let session = &port["session"];
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        Ok(View {
            connected: session["connected"] == true,
            connections: session["connections"].as_u64().unwrap_or(0),
            last_end: text(&session["last_end"]),
            warnings: session["warnings"].as_array().into_iter().flatten().map(text).collect(),
            quarantined: reasons(listed),
        })
    }

    /// What dreamwire has counted at a port so far.
    ///
    /// # Errors
    /// When it does not answer.
    pub(super) fn counted(&self, name: &str) -> Result<Counted, Failure> {
        let Self::Dreamwire(daemon) = self else { return Ok(Counted::default()) };
        let port = get(&daemon.path("api.sock"), &format!("/v1/ports/{name}"))?;
        let number = |value: &Value| value.as_u64().unwrap_or(0);
        let drops = port["drops"].as_object().into_iter().flatten();
        Ok(Counted {
            received: number(&port["rx"]["frames"]),
            sent: number(&port["tx"]["frames"]),
            drops: drops.map(|(reason, count)| (reason.clone(), number(count))).collect(),
        })
    }

    /// Frames that dreamwire has dropped at the innocent ports, by reason.
    ///
    /// # Errors
    /// When it does not answer.
    pub fn innocent_drops(&self) -> Result<Vec<String>, Failure> {
        let Self::Dreamwire(daemon) = self else { return Ok(vec![]) };
        let stats = get(&daemon.path("stats.sock"), "/stats")?;
        let innocent = |port: &&Value| port["name"] == "good1" || port["name"] == "good2";
        let ports = stats["ports"].as_array().into_iter().flatten().filter(innocent);
        Ok(ports.map(|port| port["drops"].to_string()).filter(|drops| drops != "{}").collect())
    }
}

fn reasons(port: &Value) -> Vec<String> {
    let rings = port["rings"].as_array().into_iter().flatten();
    rings.filter_map(|ring| Some(ring["quarantined"].as_str()?.to_owned())).collect()
}

fn get(socket: &Path, path: &str) -> Result<Value, Failure> {
    let answer = http_get(socket, path)?;
    serde_json::from_str(&answer.body).map_err(|error| Failure::Wrong(format!("GET {path}: {error}: {}", answer.body)))
}
