//! A GET over a UNIX socket, as little of HTTP as that takes.
//!
//! The request is HTTP/1.0 (RFC 1945): the answer then ends with the connection and is never chunked.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// How long the other side may be silent.
const SILENCE_MAX: Duration = Duration::from_secs(10);
/// Longest answer read.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Status code and body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HttpAnswer {
    /// Such as 200.
    pub status: u16,
    /// What follows the header.
    pub body: String,
}

/// Asks for `path`.
///
/// # Errors
/// When nothing listens, or what listens does not speak HTTP.
pub fn http_get(socket: &Path, path: &str) -> io::Result<HttpAnswer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").as_bytes())?;
    let mut answer = Vec::new();
    stream.take(ANSWER_BYTES_MAX).read_to_end(&mut answer)?;
    parse(&String::from_utf8_lossy(&answer))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an HTTP answer"))
}

fn parse(answer: &str) -> Option<HttpAnswer> {
    let (header, body) = answer.split_once("\r\n\r\n")?;
    let status = header.strip_prefix("HTTP/1.")?.split(' ').nth(1)?;
    Some(HttpAnswer { status: status.parse().ok()?, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_body_are_told_apart() {
        let answer = parse("HTTP/1.0 404 Not Found\r\nContent-Type: text/plain\r\n\r\nno\r\n\r\n").unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (404, "no\r\n\r\n"));
        assert_eq!(parse("SSH-2.0\r\n\r\n"), None);
    }
}
