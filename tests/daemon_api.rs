//! The daemon as a program: its API over real sockets, its command line, its signals. No guests.
#![allow(clippy::unwrap_used, missing_docs, reason = "tests")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

const DEADLINE: Duration = Duration::from_secs(20);

/// Polls until `condition` gives something.
fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(start.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

struct Daemon {
    child: Child,
    log: Arc<Mutex<String>>,
    dir: tempfile::TempDir,
}

impl Daemon {
    fn command(run_dir: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dreamwire"));
        command.env("DREAMWIRE_RUN_DIR", run_dir).env_remove("DREAMWIRE_LOG").stdin(Stdio::null());
        command
    }

    /// Starts a daemon; with `config` as its file.
    fn start(config: Option<&str>) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), config)
    }

    fn start_in(dir: tempfile::TempDir, config: Option<&str>) -> Self {
        let mut command = Self::command(&dir.path().join("run"));
        command.arg("run");
        if let Some(text) = config {
            std::fs::write(dir.path().join("dreamwire.toml"), text).unwrap();
            command.arg("--config").arg(dir.path().join("dreamwire.toml"));
        }
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let (stderr, written) = (BufReader::new(child.stderr.take().unwrap()), Arc::clone(&log));
        std::thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                written.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        let daemon = Self { child, log, dir };
        daemon.wait_for_log("dreamwire is running");
        daemon
    }

    fn wait_for_log(&self, words: &str) {
        let log = || self.log.lock().unwrap().clone();
        let start = Instant::now();
        while !log().contains(words) {
            assert!(start.elapsed() < DEADLINE, "{words:?} is not in the log:\n{}", log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join("run").join(name)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).unwrap()), signal).unwrap();
    }

    fn ended(&mut self) -> ExitStatus {
        let child = &mut self.child;
        wait_for("the daemon's end", || child.try_wait().unwrap())
    }

    /// A command of ours against this daemon.
    fn cli(&self, arguments: &[&str]) -> Output {
        Self::command(&self.dir.path().join("run")).args(arguments).output().unwrap()
    }

    /// As [`Daemon::cli`]; must succeed.
    fn ok(&self, arguments: &[&str]) -> String {
        let output = self.cli(arguments);
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// As [`Daemon::cli`]; must fail with status 1.
    fn refused(&self, arguments: &[&str]) -> String {
        let output = self.cli(arguments);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {}", String::from_utf8_lossy(&output.stdout));
        String::from_utf8(output.stderr).unwrap()
    }

    fn file(&self, name: &str, text: &str) -> String {
        let path = self.dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    }

    fn state(&self) -> Value {
        serde_json::from_str(&self.ok(&["show", "state"])).unwrap()
    }

    /// One HTTP exchange: status, head, body.
    fn http(&self, socket: &str, request: &str, media: &str, body: &str) -> (u16, String, String) {
        let mut stream = UnixStream::connect(self.path(socket)).unwrap();
        let length = body.len();
        // A daemon that refuses a body answers and hangs up before it was sent whole.
        let _ = write!(
            stream,
            "{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {media}\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        let mut answer = String::new();
        // The answer is whole when the rest of the connection was reset.
        let _ = stream.read_to_string(&mut answer);
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, head.to_ascii_lowercase(), body.to_owned())
    }

    fn api(&self, request: &str, body: &Value) -> (u16, Value) {
        let (status, _, answer) = self.http("api.sock", request, "application/json", &body.to_string());
        (status, serde_json::from_str(&answer).unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn ports_come_and_go_by_command() {
    let daemon = Daemon::start(None);
    assert_eq!(daemon.ok(&["port", "add", "vm1", "--mac", "52:54:00:00:00:01"]), "+ port vm1\napplied; generation 2\n");
    assert!(daemon.path("vm1.sock").exists());
    let shown: Value = serde_json::from_str(&daemon.ok(&["show", "port", "vm1", "--json"])).unwrap();
    assert_eq!(shown["mac"], "52:54:00:00:00:01");
    assert_eq!(shown["session"]["connected"], false);
    assert_eq!(shown["rings"].as_array().unwrap().len(), 2);
    assert!(daemon.ok(&["show"]).contains("vm1   default"));
    assert!(daemon.ok(&["qemu-args", "vm1"]).contains(daemon.path("vm1.sock").to_str().unwrap()));

    assert!(daemon.refused(&["port", "add", "vm1"]).contains("there is a port \"vm1\" already"));
    let said = daemon.refused(&["port", "add", "vm2", "--mac", "52:54:00:00:00:01"]);
    assert!(said.starts_with("port.vm2.mac: 52:54:00:00:00:01 is another port's in network \"default\""), "{said}");
    assert!(daemon.refused(&["port", "set", "vm1", "colour=red"]).contains("unknown key \"colour\""));
    assert!(daemon.refused(&["port", "del", "vm9"]).contains("there is no port \"vm9\""));
    assert!(daemon.refused(&["network", "del", "default"]).contains("no network is called \"default\""));

    let said = daemon.ok(&["port", "set", "vm1", "mac=", "queues=2"]);
    assert!(
        said.contains("~ port vm1 mac: 52:54:00:00:00:01 → none\n~") || said.contains("~ port vm1 queues: 1 → 2"),
        "{said}"
    );
    assert_eq!(daemon.state()["port"][0]["queues"], 2);
    assert!(daemon.path("vm1.sock").exists(), "the endpoint was started anew on the same path");
    daemon.ok(&["port", "del", "vm1"]);
    assert!(!daemon.path("vm1.sock").exists());
    assert_eq!(daemon.state()["port"], json!([]));
}

#[test]
fn networks_and_remotes_by_command() {
    let config = "[[underlay]]\nname='fabric'\naddress='127.0.0.1'\nport=14789\nmtu=9000\n";
    let daemon = Daemon::start(Some(config));
    daemon.ok(&["network", "add", "blue", "--vni", "7", "--underlay", "fabric", "--remote", "127.0.0.2"]);
    daemon.ok(&["remote", "add", "blue", "127.0.0.3"]);
    daemon.ok(&["remote", "add", "blue", "127.0.0.3"]);
    assert_eq!(daemon.state()["network"][0]["remotes"], json!(["127.0.0.2", "127.0.0.3"]));
    assert!(daemon.refused(&["remote", "add", "blue", "127.0.0.1"]).contains("this host's own address"));
    daemon.ok(&["remote", "del", "blue", "127.0.0.2"]);
    daemon.ok(&["network", "set", "blue", "vni=8", "learning=false"]);
    let network = &daemon.state()["network"][0];
    assert_eq!((&network["vni"], &network["learning"]), (&json!(8), &json!(false)));
    let said = daemon.cli(&["network", "set", "blue", "mtu=9000"]);
    assert!(said.status.success());
    assert!(String::from_utf8_lossy(&said.stderr).contains("warning: network.blue.mtu: mtu 9000 and 50 bytes"));
    daemon.ok(&["network", "del", "blue"]);
    assert_eq!(daemon.state()["network"], json!([]));
}

#[test]
fn a_failure_on_the_host_leaves_everything_as_it_was() {
    let daemon = Daemon::start(None);
    daemon.ok(&["port", "add", "vm1"]);
    let before = daemon.state();
    let generation = daemon.ok(&["stats", "--json"]);
    let foreign = daemon.dir.path().join("foreign.sock");
    let _listener = UnixListener::bind(&foreign).unwrap();
    // vm1 would have to make way for its new self; vm2 and vm4 could start; vm3 cannot.
    let text = format!(
        "[[network]]\nname='default'\n[[network]]\nname='second'\n[[port]]\nname='vm1'\nqueues=2\n[[port]]\nname='vm2'\n\
         [[port]]\nname='vm3'\nsocket='{}'\n[[port]]\nname='vm4'\n",
        foreign.display()
    );
    let said = daemon.refused(&["apply", &daemon.file("f.toml", &text)]);
    assert!(said.contains("port.vm3.socket") && said.contains("in use"), "{said}");
    assert_eq!(daemon.state(), before);
    assert!(daemon.path("vm1.sock").exists());
    assert!(UnixStream::connect(daemon.path("vm1.sock")).is_ok(), "vm1 still listens");
    assert!(!daemon.path("vm2.sock").exists() && !daemon.path("vm4.sock").exists());
    assert!(UnixStream::connect(&foreign).is_ok(), "what is not ours was not touched");

    // Now vm1 has been stopped already when its new self cannot start: it has to come back.
    let said = daemon.refused(&["port", "set", "vm1", &format!("socket={}", foreign.display()), "queues=4"]);
    assert!(said.contains("port.vm1.socket") && said.contains("in use"), "{said}");
    assert_eq!(daemon.state(), before);
    assert!(UnixStream::connect(daemon.path("vm1.sock")).is_ok(), "vm1 listens again");
    let number = |text: &str| serde_json::from_str::<Value>(text).unwrap()["generation"].clone();
    assert_eq!(number(&daemon.ok(&["stats", "--json"])), number(&generation));
}

#[test]
fn a_mistake_leaves_everything_as_it_was_and_names_its_line() {
    let daemon = Daemon::start(None);
    let before = daemon.state();
    let file =
        daemon.file("f.toml", "[[network]]\nname='default'\n[[port]]\nname='vm1'\n[[port]]\nname='vm2'\nqueues=99\n");
    let said = daemon.refused(&["apply", &file]);
    assert_eq!(said, format!("{file}:7: port.vm2.queues: 99 is out of range: 1 to 16 (queue pairs)\n"));
    assert_eq!(daemon.cli(&["diff", &file]).status.code(), Some(2));
    assert_eq!(daemon.state(), before);
    assert!(!daemon.path("vm1.sock").exists());
}

#[test]
fn a_socket_path_passes_from_a_removed_port_to_a_new_one() {
    let daemon = Daemon::start(None);
    let socket = daemon.path("shared.sock");
    let text =
        |name: &str| format!("[[network]]\nname='default'\n[[port]]\nname='{name}'\nsocket='{}'\n", socket.display());
    daemon.ok(&["apply", &daemon.file("a.toml", &text("old"))]);
    let new = daemon.file("b.toml", &text("new"));
    let diff = daemon.cli(&["diff", &new]);
    assert_eq!(
        (diff.status.code(), String::from_utf8(diff.stdout).unwrap().as_str()),
        (Some(1), "- port old\n+ port new\n")
    );
    assert_eq!(daemon.state()["port"][0]["name"], "old", "a diff changes nothing");
    daemon.ok(&["apply", &new]);
    assert!(UnixStream::connect(&socket).is_ok());
    assert_eq!(daemon.ok(&["apply", &new]), "nothing to change; generation 3\n");
    assert_eq!(daemon.cli(&["diff", &new]).status.code(), Some(0));
}

#[test]
fn sighup_reads_the_file_again() {
    let daemon = Daemon::start(Some("[[network]]\nname='default'\n"));
    daemon.file("dreamwire.toml", "[[network]]\nname='default'\n[[port]]\nname='vm1'\n");
    daemon.signal(Signal::SIGHUP);
    wait_for("vm1", || daemon.path("vm1.sock").exists().then_some(()));
    daemon.wait_for_log("read again and applied");
    let before = daemon.state();
    daemon.file("dreamwire.toml", "[[network]]\nname='default'\ncolour='red'\n");
    daemon.signal(Signal::SIGHUP);
    daemon.wait_for_log("line 3: network.default.colour: unknown key");
    daemon.wait_for_log("nothing was changed");
    assert_eq!(daemon.state(), before);
}

#[test]
fn sigterm_ends_it_cleanly() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let mut daemon = Daemon::start(None);
        daemon.ok(&["port", "add", "vm1"]);
        daemon.signal(signal);
        assert_eq!(daemon.ended().code(), Some(0));
        let left: Vec<_> =
            std::fs::read_dir(daemon.dir.path().join("run")).unwrap().map(|e| e.unwrap().path()).collect();
        assert!(left.iter().all(|path| path.extension().is_none_or(|end| end != "sock")), "{left:?}");
        assert!(daemon.refused(&["show"]).contains("no daemon is running on"));
    }
}

#[test]
fn one_daemon_for_one_run_directory() {
    let mut daemon = Daemon::start(None);
    let second = daemon.refused(&["run"]);
    let pid = daemon.child.id();
    assert!(
        second.contains("another dreamwire is running on") && second.contains(&format!("process {pid}")),
        "{second}"
    );
    daemon.ok(&["show"]);

    // What a killed daemon leaves behind is in nobody's way.
    daemon.ok(&["port", "add", "vm1"]);
    daemon.signal(Signal::SIGKILL);
    daemon.ended();
    assert!(daemon.path("api.sock").exists());
    let dir = std::mem::replace(&mut daemon.dir, tempfile::tempdir().unwrap());
    let next = Daemon::start_in(dir, None);
    next.ok(&["port", "add", "vm1"]);
}

#[test]
fn a_file_with_mistakes_starts_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f.toml");
    std::fs::write(&file, "[[network]]\nname='n'\nvni=16777216\nunderlay='u'\n[[rules]]\n").unwrap();
    let run = |file: &Path| {
        let output = Daemon::command(&dir.path().join("run")).args(["run", "--config"]).arg(file).output().unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    let said = run(&file);
    let lines: Vec<_> = said.lines().collect();
    assert_eq!(lines.len(), 3, "{said}");
    assert!(lines[0].contains("f.toml:3: network.n.vni: 16777216 is out of range"), "{said}");
    assert!(lines[1].contains("f.toml:4: network.n.underlay: no underlay is called \"u\""), "{said}");
    assert!(lines[2].contains("f.toml:5: rules: unknown key"), "{said}");
    assert!(!dir.path().join("run").exists());
    assert!(run(&dir.path().join("nowhere.toml")).contains("cannot be read"));
}

#[test]
fn http_statuses_say_what_is_wrong() {
    let daemon = Daemon::start(None);
    let (status, body) = daemon.api("GET /v1/ports/none", &Value::Null);
    assert_eq!((status, &body["errors"][0]["path"]), (404, &json!("port.none")));
    assert_eq!(daemon.api("GET /v1/nonsense", &Value::Null).0, 404);
    assert_eq!(daemon.api("GET /", &Value::Null).0, 404);
    assert_eq!(daemon.api("DELETE /v1/state", &Value::Null).0, 405);
    let (status, body) = daemon.api("PUT /v1/ports/vm1", &json!({"name": "vm2"}));
    assert_eq!(status, 422, "{body}");
    let (status, body) = daemon.api("PUT /v1/ports/vm1", &json!({"queues": "two"}));
    assert_eq!((status, &body["errors"][0]["message"]), (422, &json!("expected an integer, found a string")));
    let (status, body) = daemon.api("PUT /v1/ports/vm1?dry_run=true", &json!({}));
    assert_eq!((status, &body["changes"][0]["change"], &body["generation"]), (200, &json!("added"), &json!(1)));
    assert_eq!(daemon.api("PUT /v1/ports/vm1", &json!({})).0, 200);
    assert_eq!(daemon.api("POST /v1/ports", &json!({"name": "vm1"})).0, 409);
    let state = "PUT /v1/state";
    let (status, _, body) = daemon.http("api.sock", state, "application/toml", "[[port]]\nname='a'\nmtu=1\n");
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &body["errors"][1]["line"]), (422, &json!(3)), "{body}");
    assert_eq!(daemon.http("api.sock", state, "application/json", "{").0, 400);
    assert_eq!(daemon.http("api.sock", state, "text/yaml", "a: b").0, 415);
    let big = " ".repeat((32 << 20) + 1);
    assert_eq!(daemon.http("api.sock", state, "application/json", &big).0, 413);
}

#[test]
fn the_statistics_socket_tells_and_changes_nothing() {
    let daemon = Daemon::start(None);
    daemon.ok(&["port", "add", "vm1"]);
    let mode = |name: &str| std::fs::metadata(daemon.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("api.sock"), mode("stats.sock")), (0o600, 0o666));
    assert_eq!(daemon.http("stats.sock", "DELETE /v1/ports/vm1", "application/json", "").0, 404);

    let (status, head, text) = daemon.http("stats.sock", "GET /metrics", "text/plain", "");
    assert_eq!(status, 200);
    assert!(head.contains("content-type: application/openmetrics-text; version=1.0.0"), "{head}");
    assert!(text.ends_with("# EOF\n"), "{text}");
    let mut types = std::collections::HashMap::new();
    for line in text.lines().filter(|line| *line != "# EOF") {
        if let Some(declared) = line.strip_prefix("# TYPE ") {
            let (name, kind) = declared.split_once(' ').unwrap();
            assert!(types.insert(name, kind).is_none(), "{name} is declared twice");
        } else if !line.starts_with("# HELP ") {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            let name = sample.split('{').next().unwrap();
            let family = name.strip_suffix("_total").unwrap_or(name);
            assert!(types.contains_key(family), "{line} has no TYPE");
            assert_eq!(name.ends_with("_total"), types[family] == "counter", "{line}");
            value.parse::<f64>().unwrap();
        }
    }
    assert!(
        text.contains("dreamwire_port_frames_total{port=\"vm1\",network=\"default\",direction=\"rx\"} 0\n"),
        "{text}"
    );

    let (status, _, body) = daemon.http("stats.sock", "GET /stats", "text/plain", "");
    let stats: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &stats["conservation"]["balanced"]), (200, &json!(true)), "{stats}");
    assert_eq!(stats["ports"][0]["name"], "vm1");
    assert!(
        daemon.ok(&["stats"]).ends_with("received 0 + originated 0 + copied 0 = sent 0 + dropped 0 (difference 0)\n")
    );
}

#[test]
fn many_idle_connections_do_not_shut_others_out_of_the_api() {
    let daemon = Daemon::start(None);
    let _idle: Vec<_> = (0..80).map(|_| UnixStream::connect(daemon.path("stats.sock")).unwrap()).collect();
    daemon.ok(&["show"]);
}
