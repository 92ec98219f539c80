//! Whether a worker sleeps, so that whoever leaves something for it makes a system call only then.
//!
//! The two sides each write one thing and read the other's: the sender leaves something and then asks whether the worker
//! sleeps; the worker says that it sleeps and then looks whether something was left. A fence between the two on both sides
//! makes at least one of them see the other (store buffering; C++20 [atomics.fences]). `datapath/tests/doorbell_loom.rs`
//! tries all orders.

use super::sync::{AtomicBool, Ordering, fence};

/// See the module's text. One per worker; every other worker may ring it.
#[derive(Debug)]
pub(super) struct Doorbell {
    asleep: AtomicBool,
}

impl Doorbell {
    /// Of a worker that is awake.
    pub(super) fn new() -> Self {
        Self { asleep: AtomicBool::new(false) }
    }

    /// The worker is about to sleep. It has to look for what was left before after this, and may sleep if nothing was.
    pub(super) fn lie_down(&self) {
        self.asleep.store(true, Ordering::Relaxed);
        // Pairs with the fence in `must_wake`.
        fence(Ordering::SeqCst);
    }

    /// The worker looks for itself again.
    pub(super) fn get_up(&self) {
        // Relaxed: a sender that sees it late wakes a worker that is awake.
        self.asleep.store(false, Ordering::Relaxed);
    }

    /// For a sender that has left something: whether it has to wake the worker. True for one of several.
    #[must_use]
    pub(super) fn must_wake(&self) -> bool {
        // Pairs with the fence in `lie_down`: either the worker finds what was left before this, or we see that it sleeps.
        fence(Ordering::SeqCst);
        self.asleep.load(Ordering::Relaxed) && self.asleep.swap(false, Ordering::Relaxed)
    }
}
