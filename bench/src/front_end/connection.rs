//! The socket to the back-end: vhost-user messages out, replies in.
//!
//! Raw messages rather than the vhost crate's `Frontend`: this side must also send QEMU's order, descriptors left
//! out on purpose, and messages that no front-end should send. Limits: replies of `REPLY_BYTES_MAX`; descriptors
//! that a back-end sends are dropped by the kernel (no message that we send is answered with one).

use std::io::{self, IoSlice, Read};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use vhost::vhost_user::message::FrontendReq;

use super::error::FrontEndError;

/// Longest reply taken, bytes: GET_CONFIG's 256 bytes of configuration and its head.
const REPLY_BYTES_MAX: usize = 4096;

/// Request, flags, size: three u32 (vhost-user, "Header").
const HEADER_BYTES: usize = 12;

/// Header flags: version 1.
const VERSION: u32 = 1;
/// Header flags: this is a reply.
const REPLY: u32 = 1 << 2;
/// Header flags: an acknowledgement is asked for (REPLY_ACK).
const NEED_REPLY: u32 = 1 << 3;

/// A connected vhost-user socket, the front-end's end.
#[derive(Debug)]
pub struct Connection {
    stream: UnixStream,
    acknowledge: bool,
}

impl Connection {
    /// Speaks over `stream`; no answer within `timeout` is an error.
    ///
    /// # Errors
    /// What setsockopt(2) says.
    pub fn new(stream: UnixStream, timeout: Duration) -> Result<Self, FrontEndError> {
        stream.set_read_timeout(Some(timeout)).map_err(FrontEndError::system("setting a read timeout"))?;
        stream.set_write_timeout(Some(timeout)).map_err(FrontEndError::system("setting a write timeout"))?;
        Ok(Self { stream, acknowledge: false })
    }

    /// From now on [`Self::set`] asks for acknowledgements (after REPLY_ACK was negotiated).
    pub fn acknowledge(&mut self, on: bool) {
        self.acknowledge = on;
    }

    /// The socket itself, for what is not a message.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends a request without reply; waits for the acknowledgement if those are on.
    ///
    /// # Errors
    /// A refusal, a lost connection, a timeout.
    pub fn set(&mut self, request: FrontendReq, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrontEndError> {
        if self.acknowledge {
            self.set_acknowledged(request, body, fds)
        } else {
            self.send(u32::from(request), VERSION, body, fds)
        }
    }

    /// Sends a request and waits for its acknowledgement.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub fn set_acknowledged(
        &mut self,
        request: FrontendReq,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), FrontEndError> {
        self.send(u32::from(request), VERSION | NEED_REPLY, body, fds)?;
        match self.reply_u64(request)? {
            0 => Ok(()),
            code => Err(FrontEndError::Refused { request: format!("{request:?}"), code }),
        }
    }

    /// Sends a request that is answered with one u64.
    ///
    /// # Errors
    /// As [`Self::set`], or an answer of another shape.
    pub fn get_u64(&mut self, request: FrontendReq) -> Result<u64, FrontEndError> {
        self.send(u32::from(request), VERSION, &[], &[])?;
        self.reply_u64(request)
    }

    /// Sends a request and returns the body of its reply.
    ///
    /// # Errors
    /// As [`Self::set`].
    pub fn get(&mut self, request: FrontendReq, body: &[u8]) -> Result<Vec<u8>, FrontEndError> {
        self.send(u32::from(request), VERSION, body, &[])?;
        self.reply(request)
    }

    /// Sends anything at all.
    ///
    /// # Errors
    /// What sendmsg(2) says.
    pub fn send(&mut self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), FrontEndError> {
        let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
        for word in [request, flags, body.len() as u32] {
            bytes.extend(word.to_le_bytes());
        }
        bytes.extend(body);
        let fds: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&fds)];
        let control = if fds.is_empty() { &[][..] } else { &rights[..] };

        let mut sent =
            sendmsg::<()>(self.stream.as_raw_fd(), &[IoSlice::new(&bytes)], control, MsgFlags::MSG_NOSIGNAL, None)
                .map_err(FrontEndError::system("sending a vhost-user message"))?;
        while sent < bytes.len() {
            sent += sendmsg::<()>(
                self.stream.as_raw_fd(),
                &[IoSlice::new(&bytes[sent..])],
                &[],
                MsgFlags::MSG_NOSIGNAL,
                None,
            )
            .map_err(FrontEndError::system("sending a vhost-user message"))?;
        }
        Ok(())
    }

    fn reply_u64(&mut self, request: FrontendReq) -> Result<u64, FrontEndError> {
        let body = self.reply(request)?;
        let bytes =
            body.as_slice().try_into().map_err(|_| answer(request, format!("{} bytes instead of 8", body.len())))?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn reply(&mut self, request: FrontendReq) -> Result<Vec<u8>, FrontEndError> {
        let mut header = [0; HEADER_BYTES];
        self.read(request, &mut header)?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (answered, flags, bytes) = (word(0), word(4), word(8) as usize);
        if answered != u32::from(request) || flags & REPLY == 0 || bytes > REPLY_BYTES_MAX {
            return Err(answer(request, format!("request {answered}, flags {flags:#x}, {bytes} bytes")));
        }
        let mut body = vec![0; bytes];
        self.read(request, &mut body)?;
        Ok(body)
    }

    fn read(&mut self, request: FrontendReq, into: &mut [u8]) -> Result<(), FrontEndError> {
        self.stream.read_exact(into).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                FrontEndError::Disconnected { waiting_for: format!("answering {request:?}") }
            }
            _ => FrontEndError::System { doing: "waiting for the back-end's reply", source },
        })
    }
}

fn answer(request: FrontendReq, problem: String) -> FrontEndError {
    FrontEndError::Answer { request: format!("{request:?}"), problem }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn connection() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Connection::new(ours, Duration::from_secs(2)).unwrap(), theirs)
    }

    #[test]
    fn request_and_reply_have_the_layout_of_the_specification() {
        let (mut connection, mut back_end) = connection();
        back_end.write_all(&[1, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0xef, 0xbe, 0, 0, 1, 0, 0, 0]).unwrap();
        assert_eq!(connection.get_u64(FrontendReq::GET_FEATURES).unwrap(), 0x1_0000_beef);
        let mut request = [0; 12];
        back_end.read_exact(&mut request).unwrap();
        assert_eq!(request, [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    }

    #[test]
    fn refusal_is_an_error_when_acknowledgements_are_on() {
        let (mut connection, mut back_end) = connection();
        connection.acknowledge(true);
        back_end.write_all(&[3, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).unwrap();
        assert!(matches!(
            connection.set(FrontendReq::SET_OWNER, &[], &[]),
            Err(FrontEndError::Refused { code: 1, .. })
        ));
    }

    #[test]
    fn closed_connection_is_told_from_a_bad_answer() {
        let (mut first, back_end) = connection();
        drop(back_end);
        assert!(first.get_u64(FrontendReq::GET_FEATURES).is_err());
        let (mut second, mut back_end) = connection();
        back_end.write_all(&[2, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0]).unwrap();
        assert!(matches!(second.get_u64(FrontendReq::GET_FEATURES), Err(FrontEndError::Answer { .. })));
    }
}
