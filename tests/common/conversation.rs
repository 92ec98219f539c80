//! A TCP connection between two guests, in which each says a line when it is told to.

use dreamwire_bench::topology::{BOOT_LIMIT, Guest, wait_until};

/// In either guest: what its end is to say, and what it has heard.
const SAY: &str = "/tmp/say";
const HEARD: &str = "/tmp/heard";

/// Both ends are socat, whose input is a pipe that stays open.
pub(crate) struct Conversation<'a> {
    client: &'a Guest,
    server: &'a Guest,
    lines: u32,
}

impl<'a> Conversation<'a> {
    /// The server listens at `port`, the client connects from `source_port`. Whether they can is seen when they speak.
    pub(crate) fn begin(client: &'a Guest, server: &'a Guest, address: &str, source_port: u16, port: u16) -> Self {
        start(server, &format!("socat TCP-LISTEN:{port},reuseaddr -"));
        wait_until(BOOT_LIMIT, "the server", || server.sh(&format!("netstat -tln | grep :{port}")).is_ok()).unwrap();
        start(client, &format!("socat - TCP:{address}:{port},sourceport={source_port}"));
        Self { client, server, lines: 0 }
    }

    /// A line each way, which both receive.
    #[track_caller]
    pub(crate) fn both_hear_each_other(&mut self) {
        self.lines += 1;
        let line = format!("line {}.", self.lines);
        self.client_says(&line);
        self.server_hears(&line);
        self.server_says(&line);
        self.client_hears(&line);
    }

    /// Sends; returns before it has arrived.
    pub(crate) fn client_says(&self, line: &str) {
        say(self.client, line);
    }

    /// As [`Self::client_says`].
    pub(crate) fn server_says(&self, line: &str) {
        say(self.server, line);
    }

    /// Waits until the client's line has arrived.
    #[track_caller]
    pub(crate) fn server_hears(&self, line: &str) {
        wait_heard(self.server, line);
    }

    /// Waits until the server's line has arrived.
    #[track_caller]
    pub(crate) fn client_hears(&self, line: &str) {
        wait_heard(self.client, line);
    }

    /// Whether the client's line has arrived.
    pub(crate) fn server_heard(&self, line: &str) -> bool {
        heard(self.server, line)
    }

    /// Whether the server's line has arrived.
    pub(crate) fn client_heard(&self, line: &str) -> bool {
        heard(self.client, line)
    }
}

fn start(guest: &Guest, command: &str) {
    guest.sh(&format!("rm -f {SAY}; mkfifo {SAY}; (sleep 1000 >{SAY} &); ({command} <{SAY} >{HEARD} 2>&1 &)")).unwrap();
}

fn say(guest: &Guest, line: &str) {
    guest.sh(&format!("echo '{line}' >{SAY}")).unwrap();
}

fn heard(guest: &Guest, line: &str) -> bool {
    guest.sh(&format!("grep -qxF '{line}' {HEARD}")).is_ok()
}

/// A segment that was lost comes again within a second at first, then within two, four, eight.
#[track_caller]
fn wait_heard(guest: &Guest, line: &str) {
    let waited = wait_until(BOOT_LIMIT, line, || heard(guest, line));
    assert!(waited.is_ok(), "{} did not hear {line:?}: {:?}", guest.name(), guest.sh(&format!("cat {HEARD}")));
}
