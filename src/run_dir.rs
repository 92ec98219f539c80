//! The run directory: one daemon at a time, and the two sockets it answers on.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

/// Name of the socket that changes things. Mode 0600: whoever may connect may do everything.
pub const API_SOCKET: &str = "api.sock";
/// Name of the socket that only tells. Mode 0666: counters and names are no secret on a host.
pub const STATS_SOCKET: &str = "stats.sock";

/// Why the run directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Somebody holds the lock.
    #[error("another dreamwire is running on {path} (process {pid}): end it, or choose another --run-dir")]
    Taken {
        /// The directory.
        path: PathBuf,
        /// What the holder wrote into the lock file.
        pid: String,
    },
    /// The system refuses.
    #[error("{path}: {error}; the run directory must be writable (see --run-dir)")]
    Io {
        /// What was being made.
        path: PathBuf,
        /// What the system says.
        error: io::Error,
    },
    /// There is something else where a socket shall be.
    #[error("{0} exists and is no socket: remove it, or choose another --run-dir")]
    NotASocket(PathBuf),
}

/// A directory that is ours until this is dropped; then the sockets are unlinked.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    sockets: Vec<PathBuf>,
    // Held, never read: the kernel releases it with the process, however that ends.
    _lock: Flock<File>,
}

impl RunDir {
    /// Makes the directory if there is none, and takes its lock.
    pub fn claim(path: &Path) -> Result<Self, RunDirError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |error| RunDirError::Io { path, error }
        };
        DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(io(path))?;
        let lock_path = path.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open(&lock_path)
            .map_err(io(&lock_path))?;
        let mut pid = String::new();
        // Whatever stands there is for a message only.
        let _ = Read::by_ref(&mut file).take(32).read_to_string(&mut pid);
        let mut lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            nix::errno::Errno::EAGAIN => RunDirError::Taken { path: path.to_owned(), pid: pid.trim().to_owned() },
            error => RunDirError::Io { path: lock_path.clone(), error: error.into() },
        })?;
        let written = lock.set_len(0).and_then(|()| {
            io::Seek::rewind(&mut *lock)?;
            writeln!(lock, "{}", std::process::id())
        });
        written.map_err(io(&lock_path))?;
        Ok(Self { path: path.to_owned(), sockets: Vec::new(), _lock: lock })
    }

    /// Listens on a socket in the directory. One that a dead daemon has left is replaced: the lock is ours.
    /// Call it while the process has one thread: the umask is the process's.
    pub fn listen(&mut self, name: &str, mode: u32) -> Result<UnixListener, RunDirError> {
        let path = self.path.join(name);
        if let Ok(metadata) = std::fs::symlink_metadata(&path) {
            if !metadata.file_type().is_socket() {
                return Err(RunDirError::NotASocket(path));
            }
            std::fs::remove_file(&path).map_err(|error| RunDirError::Io { path: path.clone(), error })?;
        }
        // Born closed: between bind and chmod nobody else can connect.
        let umask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(&path);
        nix::sys::stat::umask(umask);
        let listener = listener
            .and_then(|listener| {
                std::fs::set_permissions(&path, Permissions::from_mode(mode))?;
                listener.set_nonblocking(true)?;
                Ok(listener)
            })
            .map_err(|error| RunDirError::Io { path: path.clone(), error })?;
        self.sockets.push(path);
        Ok(listener)
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        for socket in &self.sockets {
            // Gone already is as good; the lock file stays, so that two that start at once lock the same inode.
            let _ = std::fs::remove_file(socket);
        }
    }
}
