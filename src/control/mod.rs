//! The control thread: owner of desired state, of the objects' numbers and counters, and of the snapshots.
//!
//! # Theory of operation
//!
//! One thread owns a [`Control`]; everybody else sends it jobs and awaits their results ([`ControlHandle::call`]).
//! So changes happen one after the other, and what blocks (an endpoint that is stopped joins its thread, which waits
//! for the worker to let go of its rings) blocks neither sockets nor statistics: those read the [`Inventory`], which
//! the control thread replaces as a whole after each change.
//!
//! A change is a whole new [`Document`](crate::config::Document). It is applied in three steps:
//!
//! 1. *Bring up* (`transition`): bind new underlays, give out numbers, start new endpoints. What needs nothing of
//!    the old state goes first; then what must replace it (an endpoint on the same socket) stops the old one. Each
//!    step leaves a note of how to undo it; the first failure undoes them all, in reverse, and nothing was changed.
//! 2. *Publish*: build a snapshot for each worker, hand it over, raise the generation. From here on nothing fails. Ports
//!    that another worker is to serve move now.
//! 3. *Retire*: stop what the new document does not have. Numbers and counters of removed objects are kept until all
//!    workers have adopted a snapshot without them; then the counters go into a total and the numbers are free again.
//!    Old snapshots are dropped here, never by a worker.
//!
//! An object keeps its number and counters while its name lives and what they describe stays the same: a port gets a
//! new number when it moves to another network or has another count of queues, a network when its place on the wire
//! changes. Nothing learned under the old number can then lead a frame to the new place.

mod build;
mod core;
pub mod inventory;
mod kernel_tables;
pub mod news;
mod next_hops;
mod numbers;
mod perimeters;
pub mod rulebook;
pub mod session;
mod slots;
pub mod totals;
mod transition;

use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

pub use self::core::{Applied, ApplyError, Control};
use inventory::Inventory;

/// How often the control thread looks for what workers have to tell: frames that were dropped, and that they have let go of what
/// was removed.
const TICK: Duration = Duration::from_millis(200);

type Job = Box<dyn FnOnce(&mut Control) + Send>;

/// The control thread has ended.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the daemon is ending")]
pub struct ControlGone;

/// Reaches the control thread from anywhere.
#[derive(Debug, Clone)]
pub struct ControlHandle {
    jobs: mpsc::Sender<Job>,
    inventory: watch::Receiver<Arc<Inventory>>,
}

impl ControlHandle {
    /// Runs `job` on the control thread and returns its result. The job runs even if nobody awaits it any more.
    pub async fn call<R: Send + 'static>(
        &self,
        job: impl FnOnce(&mut Control) -> R + Send + 'static,
    ) -> Result<R, ControlGone> {
        let (reply, result) = oneshot::channel();
        let job: Job = Box::new(move |control| {
            // The caller may have hung up; the change is made all the same.
            let _ = reply.send(job(control));
        });
        self.jobs.send(job).map_err(|_| ControlGone)?;
        result.await.map_err(|_| ControlGone)
    }

    /// Tells the control thread to end, after the jobs it has; does not wait for it.
    pub fn shut_down(&self) {
        // Ended already is as good.
        let _ = self.jobs.send(Box::new(Control::shut_down));
    }

    /// Returns when the control thread has ended.
    pub async fn ended(&self) {
        let mut inventory = self.inventory.clone();
        while inventory.changed().await.is_ok() {}
    }

    /// What exists right now.
    pub fn inventory(&self) -> Arc<Inventory> {
        Arc::clone(&self.inventory.borrow())
    }
}

/// Starts the thread that owns `control`. It ends after [`Control::shut_down`], or with the last handle.
pub fn spawn(mut control: Control) -> std::io::Result<(ControlHandle, JoinHandle<()>)> {
    let (jobs, queue) = mpsc::channel::<Job>();
    let inventory = control.watch();
    let thread = thread::Builder::new().name("control".to_owned()).spawn(move || {
        while !control.is_shut_down() {
            let job = queue.recv_timeout(TICK);
            // Before the job: it may take away the names of what there is to tell.
            control.hear();
            match job {
                Ok(job) => job(&mut control),
                Err(mpsc::RecvTimeoutError::Timeout) if control.has_retiring() => control.sweep(),
                Err(mpsc::RecvTimeoutError::Timeout) => control.look_after_pages(),
                Err(mpsc::RecvTimeoutError::Disconnected) => control.shut_down(),
            }
        }
    })?;
    Ok((ControlHandle { jobs, inventory }, thread))
}
