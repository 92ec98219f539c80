//! Where front-ends come from: a listening socket of ours, or one of theirs that we connect to.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen, socket, sockopt,
};
use nix::sys::stat::{Mode, fchmod};

use super::EndpointError;

/// Owner and group of the daemon may connect: connecting is being the VM. QEMU's user belongs into the daemon's
/// group (libvirt: libvirt-qemu; systemd: `Group=`).
const SOCKET_MODE: u32 = 0o660;
/// Front-ends that may wait while we turn others away.
const BACKLOG: i32 = 16;

/// Our own listening socket; its file is removed with it.
#[derive(Debug)]
pub(super) struct Listening {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file, so that we remove no other's.
    file: (u64, u64),
}

impl Listening {
    /// Binds `path`. Removes a socket file that nobody listens on any more, and nothing else.
    pub(super) fn start(path: &Path) -> Result<Self, EndpointError> {
        remove_stale(path)?;
        let failed = |source: io::Error| EndpointError::Bind { path: path.to_owned(), source };
        let (descriptor, address) = unix_socket(path).map_err(failed)?;
        // Set before the file exists (the kernel gives it the socket's mode, less the umask), and again without umask.
        fchmod(&descriptor, Mode::from_bits_retain(SOCKET_MODE)).map_err(|error| failed(error.into()))?;
        bind(descriptor.as_raw_fd(), &address).map_err(|error| failed(error.into()))?;
        let opened = fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE))
            .and_then(|()| fs::symlink_metadata(path))
            .and_then(|status| Ok((status, listen(&descriptor, Backlog::new(BACKLOG)?)?)));
        match opened {
            Ok((status, ())) => {
                let file = (status.dev(), status.ino());
                Ok(Self { listener: descriptor.into(), path: path.to_owned(), file })
            }
            Err(source) => {
                // Bound a moment ago by us; what counts is the first error.
                let _ = fs::remove_file(path);
                Err(failed(source))
            }
        }
    }

    /// A front-end that waits, if one does.
    pub(super) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            // It was gone before we came to it.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let ours = fs::symlink_metadata(&self.path).is_ok_and(|status| (status.dev(), status.ino()) == self.file);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "the port's socket file stays behind");
        }
    }
}

/// One attempt to connect to a front-end's socket; never waits (connect(2) does when the backlog is full).
pub(super) fn connect_once(path: &Path) -> io::Result<UnixStream> {
    let (descriptor, address) = unix_socket(path)?;
    connect(descriptor.as_raw_fd(), &address)?;
    Ok(descriptor.into())
}

/// The process at the other end, as it was when it connected (or began to listen).
pub(super) fn peer_pid(stream: &UnixStream) -> Option<i32> {
    getsockopt(stream, sockopt::PeerCredentials).ok().map(|peer| peer.pid())
}

/// Makes sure that `directory` exists and that nobody else can enter it.
pub(super) fn private_directory(directory: &Path) -> Result<(), EndpointError> {
    let failed = |source| EndpointError::PrivateDir { path: directory.to_owned(), source };
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Ok(()) => return Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(error)),
    }
    let status = fs::symlink_metadata(directory).map_err(failed)?;
    let ours = status.is_dir() && status.uid() == nix::unistd::geteuid().as_raw() && status.mode() & 0o077 == 0;
    if ours { Ok(()) } else { Err(EndpointError::NotPrivate { path: directory.to_owned() }) }
}

fn unix_socket(path: &Path) -> io::Result<(OwnedFd, UnixAddr)> {
    let address = UnixAddr::new(path)?;
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    Ok((socket(AddressFamily::Unix, SockType::Stream, flags, None)?, address))
}

fn remove_stale(path: &Path) -> Result<(), EndpointError> {
    let Ok(status) = fs::symlink_metadata(path) else { return Ok(()) };
    if !status.file_type().is_socket() {
        return Err(EndpointError::NotASocket { path: path.to_owned() });
    }
    match connect_once(path) {
        Err(error) if error.raw_os_error() == Some(Errno::ECONNREFUSED as i32) => {
            tracing::info!(path = %path.display(), "removing a socket file that nobody listens on");
            fs::remove_file(path).map_err(|source| EndpointError::Bind { path: path.to_owned(), source })
        }
        // Gone since we looked.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        // Connected, or EAGAIN: somebody listens. Anything else is not ours to remove.
        _ => Err(EndpointError::InUse { path: path.to_owned() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_listener_is_respected_and_a_stale_file_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1.sock");
        let live = UnixListener::bind(&path).unwrap();
        let error = Listening::start(&path).unwrap_err().to_string();
        assert!(error.contains("vm1.sock") && error.contains("in use"), "{error}");
        drop(live);
        let ours = Listening::start(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, SOCKET_MODE);
        assert!(ours.accept().unwrap().is_none());
        let front_end = connect_once(&path).unwrap();
        let accepted = ours.accept().unwrap().unwrap();
        assert_eq!(peer_pid(&accepted), Some(std::process::id() as i32));
        drop((ours, front_end));
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = Listening::start(file.path()).unwrap_err().to_string();
        assert!(error.contains("not a socket"), "{error}");
        assert!(file.path().exists());
    }

    #[test]
    fn a_socket_file_that_was_replaced_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm1.sock");
        let ours = Listening::start(&path).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(ours);
        assert!(path.exists());
    }

    #[test]
    fn a_directory_that_others_may_enter_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let private = directory.path().join("private");
        private_directory(&private).unwrap();
        private_directory(&private).unwrap();
        fs::set_permissions(&private, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(private_directory(&private).unwrap_err().to_string().contains("chmod 700"));
    }
}
