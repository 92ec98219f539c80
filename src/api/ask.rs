//! What workers are asked, off the runtime's thread: rings, learned addresses, connections.
//!
//! A worker answers in its loop. Rings are on the statistics socket, which anybody may read: their answer is kept
//! for a moment, so that readers cannot keep a worker awake.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use dreamwire_datapath::fdb::FdbRow;
use dreamwire_datapath::worker::{RingRow, WorkerHandle};
use tokio::sync::Mutex;

use super::reply::Refusal;
use crate::control::inventory::Workers;

/// How long an answer is good for.
const FRESH: Duration = Duration::from_millis(100);

/// The last answer about rings.
#[derive(Debug, Clone, Default)]
pub(super) struct Rings(Arc<Mutex<Option<Answer>>>);

/// When it was asked for, and what it was.
type Answer = (Instant, Arc<Vec<RingRow>>);

impl Rings {
    /// The rings that are attached, or were a moment ago.
    pub(super) async fn get(&self, workers: &Workers) -> Result<Arc<Vec<RingRow>>, Refusal> {
        // Held over the question on purpose: whoever asks meanwhile gets the same answer.
        let mut last = self.0.lock().await;
        if let Some((asked, rows)) = last.as_ref()
            && asked.elapsed() < FRESH
        {
            return Ok(Arc::clone(rows));
        }
        let workers = Arc::clone(workers);
        let rows = Arc::new(off_thread(move || workers.iter().flat_map(WorkerHandle::rings).collect()).await?);
        *last = Some((Instant::now(), Arc::clone(&rows)));
        Ok(rows)
    }
}

/// The addresses that were learned. Workers tell each other: of two that know a station, the one that saw it last counts.
pub(super) async fn fdb(workers: &Workers) -> Result<Vec<FdbRow>, Refusal> {
    let workers = Arc::clone(workers);
    off_thread(move || {
        let mut rows = workers.iter().flat_map(WorkerHandle::fdb).collect::<Vec<_>>();
        rows.sort_by_key(|row| std::cmp::Reverse(row.idle_ns));
        let latest: BTreeMap<_, _> = rows.into_iter().map(|row| ((row.network, row.mac), row)).collect();
        latest.into_values().collect()
    })
    .await
}

pub(super) async fn off_thread<R: Send + 'static>(question: impl FnOnce() -> R + Send + 'static) -> Result<R, Refusal> {
    tokio::task::spawn_blocking(question).await.map_err(|error| {
        tracing::error!("asking the workers failed: {error}");
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "worker", "the workers did not answer; see the log")
    })
}
