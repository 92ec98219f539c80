//! What the machine itself takes to wake a thread: a thread that sleeps as a worker does, and answers as soon as it runs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::cpu;
use super::latency::{Latencies, gap};

/// Tells the thread to end.
const END: u64 = u64::MAX;

/// The thread. It ends when this is dropped.
#[derive(Debug)]
pub(super) struct BareSleeper {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

#[derive(Debug)]
struct Shared {
    kick: EventFd,
    asked: AtomicU64,
    answered: AtomicU64,
}

impl BareSleeper {
    /// Starts it on a CPU.
    pub(super) fn start(on: usize) -> io::Result<Self> {
        let kick = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let shared = Arc::new(Shared { kick, asked: AtomicU64::new(0), answered: AtomicU64::new(0) });
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.serve(on)
        });
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Wakes it `samples` times, after silences as [`super::latency::measure`] keeps them.
    pub(super) fn measure(&self, samples: usize, silence: Duration, latencies: &mut Latencies) -> io::Result<()> {
        let first = self.shared.asked.load(Ordering::Relaxed);
        for number in 1..=samples {
            let idle = Instant::now();
            while idle.elapsed() < gap(silence, number) {
                std::hint::spin_loop();
            }
            let started = Instant::now();
            self.shared.ask(first + number as u64)?;
            while self.shared.answered.load(Ordering::Acquire) != first + number as u64 {
                if self.thread.as_ref().is_none_or(JoinHandle::is_finished) {
                    return Err(io::Error::other("the thread that is to be woken has ended"));
                }
                std::hint::spin_loop();
            }
            latencies.record(started.elapsed());
        }
        Ok(())
    }
}

impl Shared {
    fn ask(&self, number: u64) -> io::Result<()> {
        self.asked.store(number, Ordering::Release);
        self.kick.write(1)?;
        Ok(())
    }

    fn serve(&self, on: usize) -> io::Result<()> {
        cpu::pin(on)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&self.kick, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0))?;
        loop {
            match epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                result => result?,
            };
            match self.asked.load(Ordering::Acquire) {
                END => return Ok(()),
                number => self.answered.store(number, Ordering::Release),
            }
        }
    }
}

impl Drop for BareSleeper {
    fn drop(&mut self) {
        // A thread that has ended already does not hear it.
        let _ = self.shared.ask(END);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}
