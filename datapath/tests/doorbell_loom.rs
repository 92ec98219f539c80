//! Every order of a sender that leaves something and a worker that goes to sleep: it never sleeps over it.

mod sync {
    pub(super) use loom::sync::atomic::{AtomicBool, Ordering, fence};
}
#[path = "../src/worker/doorbell.rs"]
mod doorbell;

use loom::sync::Arc;
use loom::sync::atomic::AtomicUsize;
use sync::{AtomicBool, Ordering};

#[test]
fn nothing_is_left_at_a_sleeping_workers_door() {
    loom::model(|| {
        let left = Arc::new(AtomicUsize::new(0));
        let rung = Arc::new(AtomicBool::new(false));
        let bell = Arc::new(doorbell::Doorbell::new());
        let sender = loom::thread::spawn({
            let (left, rung, bell) = (Arc::clone(&left), Arc::clone(&rung), Arc::clone(&bell));
            move || {
                // The weakest store that a queue can end its push with.
                left.store(1, Ordering::Release);
                if bell.must_wake() {
                    rung.store(true, Ordering::Relaxed);
                }
            }
        });
        bell.lie_down();
        let sleeps = left.load(Ordering::Acquire) == 0;
        if !sleeps {
            bell.get_up();
        }
        sender.join().expect("the sender ends");
        assert!(!sleeps || rung.load(Ordering::Relaxed), "it sleeps and nobody has rung");
    });
}
