//! One vhost-user stream: cuts bytes into messages, keeps hold of every descriptor, never blocks for good.
//!
//! Reads take what is there and remember a message that has only half arrived; waiting is the caller's, together with
//! whatever else it waits for. Writes wait, but for [`STALL_MAX`] at most, and not once a stop is asked for.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::message::{DESCRIPTORS_MAX, HEADER_BYTES, Header, Message, PAYLOAD_BYTES_MAX};
use crate::eventfd::EventFd;

/// How long a message may take from its first byte to its last, in either direction. Front-ends write a message with
/// one sendmsg, so a second is a long time; ten leave room for a host under load.
const STALL_MAX: Duration = Duration::from_secs(10);

/// Why a stream is of no more use.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectionError {
    #[error("the other side closed the connection")]
    Closed,
    #[error("the other side closed the connection in the middle of a message")]
    ClosedMidMessage,
    #[error("a message stood half done for {} seconds", STALL_MAX.as_secs())]
    Stalled,
    #[error("a message came with more than {DESCRIPTORS_MAX} descriptors, or more than this process may open")]
    Descriptors,
    #[error("not a vhost-user message: header {request:#x} {flags:#x} {payload_bytes:#x}")]
    Rubbish { request: u32, flags: u32, payload_bytes: u32 },
    #[error("the port is being stopped")]
    Stopped,
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl From<Errno> for ConnectionError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A stream with the message that is arriving on it.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    header: [u8; HEADER_BYTES],
    payload: Vec<u8>,
    /// Bytes of header and payload that are there.
    filled: usize,
    descriptors: Vec<OwnedFd>,
    since: Option<Instant>,
}

impl Connection {
    pub(super) fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        let payload = Vec::with_capacity(PAYLOAD_BYTES_MAX);
        Ok(Self { stream, header: [0; HEADER_BYTES], payload, filled: 0, descriptors: Vec::new(), since: None })
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The other side has closed, though not all that it sent may have been read.
    pub(super) fn peer_is_gone(&self) -> bool {
        let mut polled = [PollFd::new(self.stream.as_fd(), PollFlags::empty())];
        poll(&mut polled, PollTimeout::ZERO).is_ok_and(|ready| ready > 0)
    }

    /// When the message that is arriving has taken too long.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.since.map(|since| since + STALL_MAX)
    }

    /// Takes what has arrived; a whole message if that completes one.
    pub(super) fn receive(&mut self, replies: bool) -> Result<Option<Message>, ConnectionError> {
        if self.deadline().is_some_and(|deadline| Instant::now() > deadline) {
            return Err(ConnectionError::Stalled);
        }
        while self.filled < HEADER_BYTES {
            let mut header = self.header;
            let Some(bytes) = self.read(&mut header[self.filled..])? else { return Ok(None) };
            self.header = header;
            self.filled += bytes;
        }
        let header = Header::decode(&self.header);
        let payload_bytes = header.payload_bytes as usize;
        if !header.version_is_known() || header.is_reply() != replies || payload_bytes > PAYLOAD_BYTES_MAX {
            let Header { request, payload_bytes, .. } = header;
            return Err(ConnectionError::Rubbish { request, flags: header.flags(), payload_bytes });
        }
        while self.filled < HEADER_BYTES + payload_bytes {
            let mut payload = std::mem::take(&mut self.payload);
            payload.resize(payload_bytes, 0);
            let read = self.read(&mut payload[self.filled - HEADER_BYTES..]);
            self.payload = payload;
            let Some(bytes) = read? else { return Ok(None) };
            self.filled += bytes;
        }
        self.filled = 0;
        self.since = None;
        let payload = self.payload[..payload_bytes].to_vec();
        Ok(Some(Message { header, payload, descriptors: std::mem::take(&mut self.descriptors) }))
    }

    /// `None` if nothing is there. Every descriptor that arrives is owned, whatever becomes of the message.
    fn read(&mut self, into: &mut [u8]) -> Result<Option<usize>, ConnectionError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.stream, &mut [IoSliceMut::new(into)], &mut control, flags) {
            Ok(received) => received,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
            Err(rustix::io::Errno::CONNRESET) => return Err(ConnectionError::Closed),
            Err(error) => return Err(ConnectionError::Io(error.into())),
        };
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                self.descriptors.extend(descriptors);
            }
        }
        // MSG_CTRUNC: the kernel has kept back what did not fit (218daf1664 in DPDK: the rest leaked).
        if received.flags.contains(ReturnFlags::CTRUNC) || self.descriptors.len() > DESCRIPTORS_MAX {
            return Err(ConnectionError::Descriptors);
        }
        match received.bytes {
            0 if self.filled == 0 => Err(ConnectionError::Closed),
            0 => Err(ConnectionError::ClosedMidMessage),
            bytes => {
                self.since.get_or_insert_with(Instant::now);
                Ok(Some(bytes))
            }
        }
    }

    /// Sends one message whole; gives up when `wake` is signalled.
    pub(super) fn send(
        &self,
        header: Header,
        payload: &[u8],
        descriptors: &[Arc<OwnedFd>],
        wake: &EventFd,
    ) -> Result<(), ConnectionError> {
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(payload);
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(|descriptor| descriptor.as_fd()).collect();
        let deadline = Instant::now() + STALL_MAX;
        let mut sent = 0;
        while sent < bytes.len() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            // Descriptors travel with the first byte.
            if sent == 0 && !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
                return Err(ConnectionError::Descriptors);
            }
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match sendmsg(&self.stream, &[IoSlice::new(&bytes[sent..])], &mut control, flags) {
                Ok(count) => sent += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => {
                    let waits = [(self.stream.as_fd(), PollFlags::POLLOUT)];
                    wait(wake, &waits, Some(deadline))?;
                    if Instant::now() > deadline {
                        return Err(ConnectionError::Stalled);
                    }
                }
                Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => return Err(ConnectionError::Closed),
                Err(error) => return Err(ConnectionError::Io(error.into())),
            }
        }
        Ok(())
    }
}

/// Waits until one of `waits` is ready, `deadline` has passed, or `wake` is signalled, which is an error. Says which
/// of `waits` are ready (hang-ups and errors are).
pub(super) fn wait<const N: usize>(
    wake: &EventFd,
    waits: &[(BorrowedFd<'_>, PollFlags); N],
    deadline: Option<Instant>,
) -> Result<[bool; N], ConnectionError> {
    let mut polled = vec![PollFd::new(wake.as_fd(), PollFlags::POLLIN)];
    polled.extend(waits.iter().map(|(descriptor, events)| PollFd::new(*descriptor, *events)));
    let timeout = deadline.map_or(PollTimeout::NONE, |deadline| {
        // Rounded up, so that the deadline has passed when poll returns.
        let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
    });
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready = |polled: &PollFd<'_>| polled.any().unwrap_or(true);
    if ready(&polled[0]) {
        return Err(ConnectionError::Stopped);
    }
    Ok(std::array::from_fn(|index| ready(&polled[index + 1])))
}

#[cfg(test)]
mod tests {
    use super::super::message::request;
    use super::*;
    use std::io::Write;

    fn pair() -> (Connection, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (Connection::new(ours).unwrap(), theirs)
    }

    #[test]
    fn a_message_that_arrives_byte_by_byte_is_put_together() {
        let (mut connection, mut peer) = pair();
        let bytes = [Header::request(request::SET_FEATURES, 8).encode().as_slice(), &7u64.to_ne_bytes()].concat();
        for (sent, byte) in bytes.iter().enumerate() {
            assert!(connection.receive(false).unwrap().is_none());
            assert_eq!(connection.deadline().is_some(), sent > 0);
            peer.write_all(&[*byte]).unwrap();
        }
        let message = connection.receive(false).unwrap().unwrap();
        assert_eq!((message.header.request, message.payload), (request::SET_FEATURES, 7u64.to_ne_bytes().to_vec()));
        assert!(connection.deadline().is_none());
        drop(peer);
        assert!(matches!(connection.receive(false), Err(ConnectionError::Closed)));
    }

    #[test]
    fn descriptors_stay_with_their_message() {
        let (mut connection, peer) = pair();
        let peer = Connection::new(peer).unwrap();
        let wake = EventFd::new().unwrap();
        let event = || Arc::new(EventFd::new().unwrap().as_fd().try_clone_to_owned().unwrap());
        for count in [0, 1, 3, 32] {
            let descriptors: Vec<_> = std::iter::repeat_with(event).take(count).collect();
            peer.send(Header::request(1, 0), &[], &descriptors, &wake).unwrap();
        }
        for count in [0, 1, 3, 32] {
            assert_eq!(connection.receive(false).unwrap().unwrap().descriptors.len(), count);
        }
    }

    #[test]
    fn a_size_beyond_the_limit_a_reply_and_another_version_are_rubbish() {
        for words in [[1u32, 1, 4097], [1, 1, u32::MAX], [1, 5, 0], [1, 0, 0], [1, 2, 0]] {
            let (mut connection, mut peer) = pair();
            words.iter().for_each(|word| peer.write_all(&word.to_ne_bytes()).unwrap());
            assert!(matches!(connection.receive(false), Err(ConnectionError::Rubbish { .. })), "{words:x?}");
        }
    }

    #[test]
    fn a_reader_that_never_reads_does_not_outlast_a_stop() {
        let (connection, _peer) = pair();
        let wake = EventFd::new().unwrap();
        wake.signal().unwrap();
        let header = Header::reply(request::GET_FEATURES, 4096);
        let outcome = (0..10_000).find_map(|_| connection.send(header, &[0; 4096], &[], &wake).err());
        assert!(matches!(outcome, Some(ConnectionError::Stopped)), "{outcome:?}");
    }
}
