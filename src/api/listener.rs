//! Accepts connections on a UNIX socket and serves HTTP/1.1 on each, within limits.

use std::io;
use std::os::unix::net::UnixListener as StdListener;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

/// Connections on one socket at most; others wait in the kernel's backlog. Anybody on the host may connect to the
/// statistics socket: descriptors must remain for virtual machines.
const CONNECTIONS_MAX: usize = 64;
/// A connection that has not sent a whole request head by then is closed, between requests as well.
const HEAD_SECONDS_MAX: u64 = 10;
/// After a failed accept (out of descriptors) the next try waits, or the loop would spin.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves `router` on `listener` until the future is dropped.
pub async fn serve(listener: StdListener, router: Router) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    let free = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = Arc::clone(&free).acquire_owned().await.expect("the semaphore is never closed");
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("accepting a connection failed: {error}");
                tokio::time::sleep(ACCEPT_RETRY).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(Duration::from_secs(HEAD_SECONDS_MAX))
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!("API connection: {error}");
            }
            drop(place);
        });
    }
}
