//! Talks to the daemon: one request, one connection.

use std::path::{Path, PathBuf};

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Bytes;
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use crate::api::CUT_HEADER;
use crate::config::{Mistake, RUN_DIR_DEFAULT};
use crate::run::listing;
use crate::run_dir::{API_SOCKET, STATS_SOCKET};

/// Bytes of an answer at most: statistics of 1024 ports with 32 rings each.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Where the daemon is.
#[derive(Debug)]
pub(super) struct Client {
    run_dir: PathBuf,
}

/// What is sent along.
pub(super) enum Body {
    Nothing,
    Json(Value),
    /// A file's text, and whether it is JSON.
    Text {
        text: String,
        json: bool,
    },
}

impl Client {
    pub(super) fn new(run_dir: Option<PathBuf>) -> Self {
        Self { run_dir: run_dir.unwrap_or_else(|| RUN_DIR_DEFAULT.into()) }
    }

    /// A request to the API socket; the answer as JSON. `file` is what mistakes are reported in.
    pub(super) fn api(&self, method: Method, path: &str, body: Body, file: Option<&Path>) -> Result<Value, String> {
        json(&self.request(API_SOCKET, method, path, body, file)?)
    }

    /// A request to the API socket whose answer is text.
    pub(super) fn api_text(&self, path: &str) -> Result<String, String> {
        let answer = self.request(API_SOCKET, Method::GET, path, Body::Nothing, None)?;
        String::from_utf8(answer).map_err(|error| format!("the daemon's answer is no text: {error}"))
    }

    /// A request to the statistics socket.
    pub(super) fn stats(&self) -> Result<Value, String> {
        json(&self.request(STATS_SOCKET, Method::GET, "/stats", Body::Nothing, None)?)
    }

    fn request(
        &self,
        socket: &str,
        method: Method,
        path: &str,
        body: Body,
        file: Option<&Path>,
    ) -> Result<Vec<u8>, String> {
        let socket = self.run_dir.join(socket);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| format!("cannot start: {error}"))?;
        let (status, answer) = runtime.block_on(exchange(&socket, method, path, body))?;
        if status.is_success() { Ok(answer) } else { Err(refusal(status, &answer, file)) }
    }
}

async fn exchange(socket: &Path, method: Method, path: &str, body: Body) -> Result<(StatusCode, Vec<u8>), String> {
    let stream = UnixStream::connect(socket).await.map_err(|error| unreachable_daemon(socket, &error))?;
    let talk = |error: hyper::Error| format!("talking to the daemon on {} failed: {error}", socket.display());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(talk)?;
    tokio::spawn(connection);
    let (media, bytes) = match body {
        Body::Nothing => ("application/json", Bytes::new()),
        Body::Json(value) => ("application/json", Bytes::from(value.to_string())),
        Body::Text { text, json: true } => ("application/json", Bytes::from(text)),
        Body::Text { text, json: false } => ("application/toml", Bytes::from(text)),
    };
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "dreamwire")
        .header(header::CONTENT_TYPE, media)
        .body(Full::new(bytes))
        .map_err(|error| format!("{path}: {error}"))?;
    let response = sender.send_request(request).await.map_err(talk)?;
    let status = response.status();
    if let Some(count) = response.headers().get(CUT_HEADER).and_then(|value| value.to_str().ok()) {
        eprintln!("warning: there are more than these {count}");
    }
    let answer = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
    let answer = answer.map_err(|error| format!("the daemon's answer broke off: {error}"))?;
    Ok((status, answer.to_bytes().to_vec()))
}

fn unreachable_daemon(socket: &Path, error: &std::io::Error) -> String {
    let socket = socket.display();
    match error.kind() {
        std::io::ErrorKind::PermissionDenied => format!("no permission to use {socket}: run this as the daemon's user"),
        std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => format!(
            "no daemon is running on {socket} ({error}): start one with `dreamwire run`, or name its directory with \
             --run-dir or DREAMWIRE_RUN_DIR"
        ),
        _ => format!("{socket}: {error}"),
    }
}

fn refusal(status: StatusCode, answer: &[u8], file: Option<&Path>) -> String {
    let errors = serde_json::from_slice::<Value>(answer).ok();
    let errors = errors.as_ref().and_then(|value| value["errors"].as_array());
    let Some(errors) = errors else {
        return format!("the daemon refused: {status}: {}", String::from_utf8_lossy(answer));
    };
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let mistakes: Vec<_> = errors
        .iter()
        .map(|error| Mistake {
            path: text(&error["path"]),
            line: error["line"].as_u64().and_then(|line| u32::try_from(line).ok()),
            message: text(&error["message"]),
        })
        .collect();
    match file {
        Some(file) => listing(file, &mistakes),
        None => mistakes.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"),
    }
}

fn json(answer: &[u8]) -> Result<Value, String> {
    serde_json::from_slice(answer).map_err(|error| format!("the daemon's answer is no JSON: {error}"))
}

/// A name as a part of a path (RFC 3986 §2.3: unreserved characters stay).
pub(super) fn segment(name: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    name.bytes().map(|byte| if plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") }).collect()
}
