//! What the worker says about its rings and learned addresses, asked off the runtime's thread.
//!
//! The worker answers in its loop. Rings are on the statistics socket, which anybody may read: their answer is kept
//! for a moment, so that readers cannot keep a worker awake.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use dreamwire_datapath::fdb::FdbRow;
use dreamwire_datapath::worker::{RingRow, WorkerHandle};
use tokio::sync::Mutex;

use super::reply::Refusal;

/// How long an answer is good for.
const FRESH: Duration = Duration::from_millis(100);

/// The last answer about rings.
#[derive(Debug, Clone, Default)]
pub(super) struct Rings(Arc<Mutex<Option<Answer>>>);

/// When it was asked for, and what it was.
type Answer = (Instant, Arc<Vec<RingRow>>);

impl Rings {
    /// The rings that are attached, or were a moment ago.
    pub(super) async fn get(&self, worker: &Arc<WorkerHandle>) -> Result<Arc<Vec<RingRow>>, Refusal> {
        // Held over the question on purpose: whoever asks meanwhile gets the same answer.
        let mut last = self.0.lock().await;
        if let Some((asked, rows)) = last.as_ref()
            && asked.elapsed() < FRESH
        {
            return Ok(Arc::clone(rows));
        }
        let worker = Arc::clone(worker);
        let rows = Arc::new(off_thread(move || worker.rings()).await?);
        *last = Some((Instant::now(), Arc::clone(&rows)));
        Ok(rows)
    }
}

/// The addresses that were learned.
pub(super) async fn fdb(worker: &Arc<WorkerHandle>) -> Result<Vec<FdbRow>, Refusal> {
    let worker = Arc::clone(worker);
    off_thread(move || worker.fdb()).await
}

async fn off_thread<R: Send + 'static>(question: impl FnOnce() -> R + Send + 'static) -> Result<R, Refusal> {
    tokio::task::spawn_blocking(question).await.map_err(|error| {
        tracing::error!("asking the worker failed: {error}");
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "worker", "the worker did not answer; see the log")
    })
}
