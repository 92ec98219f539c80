//! QEMU's control socket (QMP): one command at a time, events put aside until they are asked for.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::TopologyError;
use super::error::during;

/// How long QEMU may take to answer. Under emulation on a loaded machine a reset takes a second.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);
/// Events kept for whoever asks; older ones are forgotten.
const EVENTS_MAX: usize = 1024;

/// A connection that has left capability negotiation behind.
#[derive(Debug)]
pub struct Qmp {
    lines: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Qmp {
    /// Connects and negotiates no capabilities.
    ///
    /// # Errors
    /// When nothing listens there, or it does not speak QMP.
    pub fn connect(socket: &Path) -> Result<Self, TopologyError> {
        let connecting = || format!("connect to QMP at {}", socket.display());
        let stream = UnixStream::connect(socket).map_err(during(connecting))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT)).map_err(during(connecting))?;
        let mut qmp = Self { lines: BufReader::new(stream), events: Vec::new() };
        qmp.next_line("greeting")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    /// QEMU's refusal, or its silence.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value, TopologyError> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        let stream = self.lines.get_mut();
        stream.write_all(line.as_bytes()).map_err(during(|| format!("send {command} to QMP")))?;
        loop {
            let mut answer = self.next_line(command)?;
            if let Some(error) = answer.get("error") {
                return Err(refused(command, error["desc"].as_str().unwrap_or("no reason given")));
            }
            if answer.get("return").is_some() {
                return Ok(answer["return"].take());
            }
            self.keep_event(answer);
        }
    }

    /// The events since the last call, oldest first; the last may be some behind unless a command was just run.
    pub fn take_events(&mut self) -> Vec<Value> {
        std::mem::take(&mut self.events)
    }

    fn keep_event(&mut self, event: Value) {
        if self.events.len() == EVENTS_MAX {
            self.events.remove(0);
        }
        self.events.push(event);
    }

    fn next_line(&mut self, command: &str) -> Result<Value, TopologyError> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => Err(refused(command, "QEMU closed the connection")),
            Ok(_) => serde_json::from_str(&line).map_err(|error| refused(command, &error.to_string())),
            Err(error) => Err(during(|| format!("read QMP's answer to {command}"))(error)),
        }
    }
}

fn refused(command: &str, reason: &str) -> TopologyError {
    TopologyError::Qmp { command: command.to_owned(), reason: reason.to_owned() }
}
